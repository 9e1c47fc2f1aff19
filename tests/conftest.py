"""Strict arithmetic and several devices for every test."""

import os
from pathlib import Path

# Before jax reads it: nothing is written into the user's home, by this process or its children.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def golden() -> Path:
    """Results of the released code (tests/golden/README.md)."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def optimizer_promotion():
    """optax itself mixes floats with integers, so tests that run an optimizer allow that."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True, scope="module")
def release_programs():
    """Thousands of compiled programs would fill gigabytes."""
    yield
    jax.clear_caches()
