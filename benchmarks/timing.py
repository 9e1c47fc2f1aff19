"""How the benchmarks measure time and describe the machine.

Every call is warmed up, which compiles it. Every time ends when the device has finished. Calls that
are compared run in turns, so that other load on the machine affects all of them alike.
"""

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from irqlora_jax.machine import total_memory

PACKAGES = ("jax", "jaxlib", "flax", "optax", "google-tunix", "qwix", "torch", "transformers")
PACKAGES += ("peft", "bitsandbytes")


@dataclasses.dataclass(frozen=True)
class Timing:
    """Wall times of one call's repeats, in seconds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def milliseconds(self) -> str:
        """The median and the spread, for a table."""
        low, high = min(self.seconds), max(self.seconds)
        return f"{self.median * 1e3:.4g} ({low * 1e3:.4g}-{high * 1e3:.4g})"

    def rate(self, count: float) -> str:
        """`count` / seconds, as median and spread, for a table."""
        rates = [count / s for s in (self.median, max(self.seconds), min(self.seconds))]
        return "{} ({}-{})".format(*(f"{r:,.0f}" if r >= 100 else f"{r:.3g}" for r in rates))

    def speedup(self, other: "Timing") -> float:
        """How many times as fast as `other`: the median of the turns' ratios."""
        return statistics.median(self._ratios(other))

    def speedups(self, other: "Timing", scale: float = 1.0) -> str:
        """`speedup` with its spread, for a table, times `scale` if ours had more work."""
        ratios = [scale * ratio for ratio in self._ratios(other)]
        digits = 0 if min(ratios) >= 10 else 3
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"

    def _ratios(self, other: "Timing") -> list[float]:
        return [b / a for a, b in zip(self.seconds, other.seconds, strict=True)]


def compare(
    calls: Mapping[str, Callable[[], Any]], repeats: int = 7, warmup: int = 1
) -> dict[str, Timing]:
    """Times calls in turns.

    Args:
        calls: calls by name. Time ends when the JAX arrays that a call returns are ready; a call
            that returns none must wait for its device itself.
        repeats: number of turns. Every second turn goes backwards, so that the order varies.
        warmup: calls of each before the first turn; they do not count. The first one compiles.
    """
    for call in calls.values():
        for _ in range(warmup):
            jax.block_until_ready(call())
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in reversed(names) if turn % 2 else names:
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


def median_seconds(call: Callable[[], Any], repeats: int = 7) -> float:
    """Median wall time of a call that returns JAX arrays, without compilation."""
    return compare({"": call}, repeats)[""].median


def versions(packages: tuple[str, ...] = PACKAGES) -> str:
    """The versions of Python and of the packages that are installed."""
    found = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def machine() -> str:
    """Device, driver, processor, cores, memory and versions, for the head of a table."""
    device = jax.devices()[0]
    parts = [] if device.platform == "cpu" else [device.device_kind, *_driver()]
    parts.append(f"{_processor()}, {os.cpu_count()} cores")
    return ", ".join([*parts, f"{total_memory() / 2**30:.0f} GiB", versions()])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _driver() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
    asked = subprocess.run(query, capture_output=True, text=True)
    return [f"driver {asked.stdout.splitlines()[0]}"] if asked.returncode == 0 else []


def table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]] = ()) -> str:
    """A table in Markdown; without rows only its head."""
    return "\n".join(map(line, (columns, ("---",) * len(columns), *rows)))


def line(cells: Iterable[str]) -> str:
    """One row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def verdict(met: bool) -> str:
    """How a benchmark reports that something holds, or does not."""
    return "met" if met else "MISSED"


def relative_error(x: jax.Array, expected: Any) -> float:
    """Norm of the error, relative to the norm of `expected`, in float64."""
    expected = np.asarray(expected, np.float64)
    difference = np.asarray(x, np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))
