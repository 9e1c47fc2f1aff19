"""Strict arithmetic and several devices for every test."""

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before jax reads it: what one test compiles the others need not, those of the other worker and the
# programs that tests start included; and nothing is written into the user's home. The first process
# makes the folder and deletes it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _programs = tempfile.TemporaryDirectory(prefix="irqlora-programs-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


LONGEST = ("train", "loftq", "offload", "plan", "qtensor", "icq", "llama", "sharding", "matmul")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A long file at the end would leave the other worker idle."""
    items.sort(key=lambda item: item.path.stem not in {f"test_{name}" for name in LONGEST})


@pytest.fixture
def golden() -> Path:
    """Results of the released code (tests/golden/README.md)."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def optimizer_promotion():
    """optax itself mixes floats with integers, so tests that run an optimizer allow that."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The messages of the package during a test; the list grows as they come."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("irqlora_jax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.setLevel(logging.NOTSET)
    logger.removeHandler(handler)


@pytest.fixture(autouse=True, scope="module")
def release_programs():
    """Thousands of compiled programs would fill gigabytes."""
    yield
    jax.clear_caches()
