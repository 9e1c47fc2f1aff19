"""How the benchmarks measure time, and what they say of the machine."""

import os
import platform
import time
from collections.abc import Callable
from typing import Any

import jax


def median_seconds(call: Callable[[], Any], repeats: int = 7) -> float:
    """Median wall time of a call that returns JAX arrays, after one that compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


def machine() -> str:
    """Device, cores and versions, for the head of a table."""
    device = jax.devices()[0].device_kind
    versions = f"Python {platform.python_version()}, jax {jax.__version__}"
    return f"{device}, {os.cpu_count()} cores, {versions}"
