"""This machine: device, memory, network, packages and the cache of compiled programs."""

import contextlib
import functools
import importlib.metadata
import logging
import os
import re
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax

CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
FloatName = Literal["float32", "bfloat16", "float16"]
logger = logging.getLogger(__name__)


def installed_version(package: str) -> str:
    """The version of an installed package, or "not installed" (also when run from a clone)."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def compute_capability(device: Any) -> tuple[int, int] | None:
    """The CUDA compute capability of a jax device; None if it is not an NVIDIA GPU."""
    text = str(getattr(device, "compute_capability", None))
    found = re.fullmatch(r"(\d+)\.(\d+)", text)  # AMD's GPUs have "gfx90a"
    return (int(found[1]), int(found[2])) if found else None


def fastest_dtype(device: Any) -> FloatName:
    """The floating-point type in which a jax device computes fastest.

    GPUs before compute capability 8.0 emulate bfloat16 in float32, so they get float16. CPUs gain
    nothing from half precision (benchmarks/results).
    """
    if device.platform == "cpu":
        return "float32"
    return "float16" if (compute_capability(device) or (8, 0)) < (8, 0) else "bfloat16"


def peak_memory() -> int:
    """Peak memory so far in bytes, of the accelerator, or of this process on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


_CGROUPS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Limit and use of the memory of a container, versions 2 and 1, and the cache that it can drop."""


def total_memory(root: Path = Path("/")) -> int:
    """Memory of the host in bytes, or less in a container with a limit.

    Args:
        root: where `sys` is.
    """
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit, *_ in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # another version; no limit ("max")
            found.append(int((root / "sys/fs/cgroup" / limit).read_text(encoding="ascii")))
    return min(found)


def free_memory(root: Path = Path("/")) -> int:
    """Memory of the host in bytes that this process can still take; where unknown, half of all.

    Args:
        root: where `proc` and `sys` are.
    """
    everything = total_memory(root)
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return everything // 2
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    folder = root / "sys/fs/cgroup"
    for limit, used, droppable in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # another version; no limit ("max")
            stats = (folder / limit).with_name("memory.stat").read_text(encoding="ascii")
            cached = [int(line.split()[1]) for line in stats.splitlines() if droppable in line]
            most, now = (int((folder / name).read_text(encoding="ascii")) for name in (limit, used))
            free.append(max(most - now + max(cached, default=0), 0))
    return min([everything, *free])


def reaches_hub(seconds: float = 3.0) -> bool:
    """Whether the Hugging Face hub answers. False with HF_HUB_OFFLINE=1.

    The hub's own functions ask an unreachable hub for half a minute. A run asks for several files,
    so an answer holds for up to a minute.

    Args:
        seconds: time to wait for an answer.
    """
    from huggingface_hub import constants

    offline = constants.is_offline_mode()
    return not offline and _answers(constants.ENDPOINT, seconds, int(time.monotonic() // 60))


@functools.lru_cache(1)
def _answers(address: str, seconds: float, minute: int) -> bool:
    """Whether an address answers within some seconds. Another `minute` asks again."""
    from huggingface_hub import get_session

    answers: list[Any] = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # of any kind; the answer may be an error, too
            answers.append(get_session().head(address, timeout=seconds))

    # A name server that does not answer heeds no timeout, so a thread asks.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


def cache_programs(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Makes jax keep compiled programs in a folder, for this process and later ones.

    The folder is $JAX_COMPILATION_CACHE_DIR, else $XDG_CACHE_HOME/irqlora_jax, else
    ~/.cache/irqlora_jax. It may be deleted at any time. jax's own variable
    JAX_ENABLE_COMPILATION_CACHE=false turns the cache off.

    Args:
        environment: the environment variables.

    Returns:
        The folder, or None if nothing is kept.
    """
    if not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return None
    home = environment.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(environment.get(CACHE_VARIABLE) or f"{home}/irqlora_jax").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        reason = getattr(error, "strerror", None) or error
        logger.warning(f"compiled programs are not kept: {CACHE_VARIABLE} = '{folder}': {reason}")
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder
