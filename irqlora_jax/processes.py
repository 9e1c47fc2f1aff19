"""The processes of a run, on one machine or on several, and what they do together.

`jax.distributed` connects them. Every process runs the same program on the same mesh. The first one
writes the files and the messages. Functions marked "all processes" exchange data: all of them have
to call it, in the same order.
"""

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from irqlora_jax.text import require, shorten

Result = TypeVar("Result")


class OtherProcessError(RuntimeError):
    """Another process failed, so that this one cannot go on."""


_WHO = "the process itself"  # no name of a setting
_HEARTBEAT, _SHUTDOWN = 30, 15  # seconds until a process that is silent counts as dead
logger = logging.getLogger(__name__)


def connect(
    distributed: str = "off", process: int | None = None, processes: int | None = None
) -> None:
    """Connects this process with the others. Call it before jax computes anything.

    Args:
        distributed: "off": this process is alone; "auto": as SLURM, Open MPI or Kubernetes says
            (`jax.distributed.initialize`); else HOST:PORT, where the first process listens.
        process: number of this process, from 0; with an address.
        processes: number of all processes; with an address.

    Raises:
        ValueError: an argument is wrong, or "auto" finds no launcher.
        RuntimeError: the other processes cannot be reached.
    """
    named = {"process": process, "processes": processes}
    if distributed in ("off", "auto"):
        for name, value in named.items():
            require(value is None, name, value, f"null with distributed {distributed}")
        if distributed == "off":
            return
        given: dict[str, Any] = {}
    else:
        host, _, port = distributed.rpartition(":")
        ok = bool(host) and port.isdecimal() and 0 < int(port) < 2**16
        require(ok, "distributed", distributed, "off, auto or HOST:PORT of the first process")
        accepted = f"a whole number with distributed {distributed}"
        ok = processes is not None and processes >= 1
        require(ok, "processes", processes, f"{accepted}, at least 1")
        ok = process is not None and 0 <= process < (processes or 0)
        require(ok, "process", process, f"{accepted}, from 0 to processes - 1")
        given = {"coordinator_address": distributed, "num_processes": processes}
        given |= {"process_id": process}
    # For CPU devices, which have no streams: programs start in order, and each has threads for all
    # devices. Else two programs wait for each other's threads forever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    os.environ.setdefault("PJRT_NPROC", "128")
    # It would take SIGTERM away from `train.stop.Stop`.
    jax.config.update("jax_enable_preemption_service", False)
    limits: dict[str, Any] = {
        "heartbeat_timeout_seconds": _HEARTBEAT,
        "shutdown_timeout_seconds": _SHUTDOWN,
    }
    try:
        jax.distributed.initialize(**given, **limits)
    except ValueError as error:
        raise ValueError(
            f"distributed = {distributed}: {error}; expected a program started by SLURM, Open MPI "
            "or Kubernetes, off, or HOST:PORT of the first process"
        ) from error
    if not is_first():
        logging.getLogger("irqlora_jax").setLevel(logging.WARNING)


def is_first() -> bool:
    """Whether this process writes the files and the messages."""
    return jax.process_index() == 0


def put(tree: Any, where: NamedSharding) -> Any:
    """Puts arrays that every process has on the devices; each process puts its own parts.

    Args:
        tree: arrays of NumPy or jax, in the memory of this process.
        where: devices, perhaps of several processes.
    """
    if where.is_fully_addressable:
        return jax.device_put(tree, where)

    def parts(x: Any) -> jax.Array:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

    return jax.tree.map(parts, tree)


def fetch(x: Any) -> np.ndarray:
    """Reads an array into the memory of this process, whole. All processes."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def exchange(text: str) -> list[str]:
    """Returns the texts of all processes, in their order. All processes."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    data = np.frombuffer(text.encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(data.size))).reshape(-1)
    padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [
        bytes(row[:size]).decode(errors="replace") for row, size in zip(rows, lengths, strict=True)
    ]


def wait_for_all() -> None:
    """Waits until every process is here. All processes."""
    exchange("")


def together(work: Callable[[], Result]) -> Result:
    """Returns the result of `work`, which exchanges nothing; fails if it fails anywhere. All
    processes.

    Raises:
        Exception: that of `work`.
        OtherProcessError: `work` failed in another process, whose message this one repeats.
    """
    result: Any = None
    failed: Exception | None = None
    try:
        result = work()
    except Exception as error:
        if jax.process_count() == 1:
            raise
        failed = error
    reason = "" if failed is None else f"{_name()}: {type(failed).__name__}: {failed}"
    reasons = [other for other in exchange(reason) if other]
    if failed is not None:
        raise failed
    if reasons:
        raise OtherProcessError(f"another process failed: {'; '.join(sorted(set(reasons)))}")
    return result


def from_first(work: Callable[[], str]) -> str:
    """Returns the text that `work`, which exchanges nothing, gives in the first process; the others
    wait for it and fail with it. All processes."""
    return exchange(together(work if is_first() else lambda: ""))[0]


def first_only(work: Callable[[], Any]) -> None:
    """Does `work`, which exchanges nothing, in the first process; the others wait for it and fail
    with it. All processes."""
    together(work if is_first() else lambda: None)


def check_agreement(about: Mapping[str, Any]) -> None:
    """Checks that all processes were given the same. All processes.

    Args:
        about: values by name, e.g. versions and settings.

    Raises:
        ValueError: a process has another value than the first one; both are named.
    """
    own = {name: json.dumps(value, sort_keys=True, default=str) for name, value in about.items()}
    stated = [json.loads(text) for text in exchange(json.dumps({_WHO: _name(), **own}))]
    first = stated[0]
    for other in stated[1:]:
        for name in sorted(first.keys() | other.keys()):
            if name != _WHO and first.get(name) != other.get(name):
                here, there = (shorten(json.loads(one.get(name, "null"))) for one in (first, other))
                raise ValueError(
                    f"{name} = {there} in {other[_WHO]}, {here} in {first[_WHO]}; expected the "
                    "same in all processes"
                )


def describe_loss(error: RuntimeError) -> str | None:
    """The sentence for an error that ends this process because of another one; None: it does not.

    What jax raises when an exchange fails has no type of its own, so any of its errors may be one.
    """
    if isinstance(error, OtherProcessError):
        return str(error)
    if jax.process_count() == 1 or not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    reason = shorten(" ".join(str(error).split()), quoted=False)
    return (
        f"an exchange with the other processes failed ({reason}); one of them has probably died, "
        "and its own output says why; the same command in all of them goes on from the newest "
        "checkpoint"
    )


def check_folder_seen(file: Path, field: str) -> None:
    """Checks that a file that the first process has just written is here too. All processes.

    Args:
        file: of the first process.
        field: the setting with its folder.

    Raises:
        ValueError: it is not the same file.
        OtherProcessError: it is not the same file in another process.
    """
    written = from_first(lambda: file.read_bytes().decode(errors="replace"))

    def look() -> None:
        for _ in range(20):  # a network file system may show it later
            with contextlib.suppress(OSError):
                if file.read_bytes().decode(errors="replace") == written:
                    return
            time.sleep(0.25)
        raise ValueError(
            f"{field} = '{file.parent}': {_name()} does not see what the first process writes "
            "there; expected a folder that all hosts share"
        )

    together(look)


def highest(value: int, mesh: Mesh) -> jax.Array:
    """The largest of the values of all processes, computed while this process goes on. All
    processes. Read it with `int`.

    Args:
        value: of this process.
        mesh: of all processes.
    """
    own = np.full(mesh.size, value, np.int32)
    return _largest(put(own, NamedSharding(mesh, PartitionSpec(mesh.axis_names))))


@jax.jit
def _largest(values: jax.Array) -> jax.Array:
    return values.max()


def _name() -> str:
    """This process, for messages."""
    return f"process {jax.process_index()} ({socket.gethostname()}, pid {os.getpid()})"
