"""Strict arithmetic and several devices for every test, and programs that compile fast."""

import gc
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Programs run for less time than they take to compile, so they are hardly optimized. The older
# emitters compile several times as fast.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"

# Before jax reads it, and once for all processes. The first one asks a process of its own whether
# this XLA knows the flags, for it would abort, and makes the folder of compiled programs: what one
# test compiles the others need not, programs that tests start included.
if "PYTEST_XDIST_WORKER" not in os.environ:
    tried = [sys.executable, "-c", "import jax.numpy; jax.numpy.zeros(1).block_until_ready()"]
    flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()}
    if subprocess.run(tried, env=os.environ | flags, capture_output=True).returncode == 0:
        os.environ |= flags
    _programs = tempfile.TemporaryDirectory(prefix="irqlora-programs-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax  # noqa: E402
import pytest  # noqa: E402

from irqlora_jax import messages  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
gc.set_threshold(100_000, 50, 100)  # tracing makes many objects: a tenth of all time otherwise
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


LONGEST = (
    "processes",
    "distributed_base",
    "notebooks",
    "mixed_base",
    "kills",
    "run",
    "trained_base",
    "relatives",
    "qtensor",
)
LONGEST += ("exported", "train_layer", "damage", "layerwise", "released", "outliers", "icq")
LONGEST += ("loftq_runs", "matmul", "llama", "budget", "harness", "command_line", "peft_methods")
LONGEST += ("step", "claim", "loftq", "export", "adapters", "pooled", "evaluate", "decode")
LONGEST += (
    "sensitivity",
    "cloq",
    "sharding",
    "meshes",
    "offload",
    "statistics",
    "rules",
    "commands",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first: one at the end would leave the other worker idle."""
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture
def golden() -> Path:
    """Results of the released code (tests/golden/README.md)."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def optimizer_promotion() -> Iterator[None]:
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


@pytest.fixture(scope="module")
def shared_steps() -> Iterator[None]:
    """Runs with the same model, settings and mesh share their compiled step.

    Tracing it takes longer than all the steps of a short run.
    """
    from irqlora_jax.train import loop
    from tests.models import made_once

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_step", made_once(loop.make_step))
        yield


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """A shell makes programs that it starts in the background ignore Ctrl-C, and so their children.
    Tests of signals must not depend on how pytest was started."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def patient() -> None:
    """On a busy machine any work may take long; that is not said among the messages of a test."""
    messages.QUIET = 1000.0


@pytest.fixture(autouse=True, scope="session")
def optimized_for_gpus() -> None:
    """Programs for GPUs are compiled as users compile them, whatever `FLAGS` say."""
    from irqlora_jax.plan.gpus import OPTIONS

    OPTIONS["xla_backend_optimization_level"] = 3


@pytest.fixture(autouse=True, scope="module")
def release_programs() -> Iterator[None]:
    """Thousands of compiled programs would fill gigabytes."""
    yield
    jax.clear_caches()
