"""How the benchmarks measure time, and what they say of the machine.

Every call is warmed up (which compiles it), every time is taken after the device has finished, and
what is compared is run in turns, so that whatever else the machine does meets all alike.
"""

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "google-tunix", "qwix", "torch", "transformers")
PACKAGES += ("peft", "bitsandbytes")


@dataclasses.dataclass(frozen=True)
class Timing:
    """Wall times of the repeats of one call, in seconds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def milliseconds(self) -> str:
        """The median and the spread, for a table."""
        low, high = min(self.seconds), max(self.seconds)
        return f"{self.median * 1e3:.4g} ({low * 1e3:.4g}-{high * 1e3:.4g})"

    def rate(self, count: float) -> str:
        """`count` a second, by the median and the spread, for a table."""
        rates = [count / s for s in (self.median, max(self.seconds), min(self.seconds))]
        return "{} ({}-{})".format(*(f"{r:,.0f}" if r >= 100 else f"{r:.3g}" for r in rates))

    def speedup(self, other: "Timing") -> float:
        """How many times as fast as the other: the median of the ratios of each turn."""
        return statistics.median(self._ratios(other))

    def speedups(self, other: "Timing", scale: float = 1.0) -> str:
        """`speedup` with its spread, for a table; times `scale`, where ours had more to do."""
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
        calls: by name. What they return is waited for if it holds JAX arrays; any other call must
            wait for its device itself.
        repeats: turns; every second one goes backwards, so that nobody always follows the same.
        warmup: calls of each beforehand that do not count. The first compiles.
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
    """Median wall time of a call that returns JAX arrays, after one that compiles."""
    return compare({"": call}, repeats)[""].median


def versions(packages: tuple[str, ...] = PACKAGES) -> str:
    """Python and those of the packages that are installed."""
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
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return ", ".join([*parts, f"{memory / 2**30:.0f} GiB", versions()])


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


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
