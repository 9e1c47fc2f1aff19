"""What the processes of a run give each other while they make a base together.

Results travel as bytes, so that no value can change on the way.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from jaxtyping import UInt8

from irqlora_jax.sharding import AXES

_PART = 2**25  # bytes of a process that travel at a time


def tree_bytes(like: Any) -> int:
    """Counts the bytes of a tree of arrays or shapes."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(like))


def to_bytes(tree: Any, size: int) -> UInt8[np.ndarray, " size"]:
    """The bytes of the arrays of a tree, one after the other, and zeros behind them."""
    data, end = np.zeros(size, np.uint8), 0
    for leaf in jax.tree.leaves(tree):
        flat = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
        data[end : end + flat.size] = flat
        end += flat.size
    return data


def from_bytes(data: UInt8[np.ndarray, " size"], like: Any) -> Any:
    """The reverse of `to_bytes`: a tree of NumPy arrays; `like` has its shapes."""
    leaves, structure = jax.tree.flatten(like)
    found, end = [], 0
    for leaf in leaves:
        start, end = end, end + tree_bytes(leaf)
        found.append(data[start:end].copy().view(leaf.dtype).reshape(leaf.shape))
    return jax.tree.unflatten(structure, found)


def gather_bytes(data: UInt8[np.ndarray, " size"]) -> UInt8[np.ndarray, "processes size"]:
    """The data of every process, of the same size in each. All processes."""
    if jax.process_count() == 1:
        return data[None]
    from jax.experimental import multihost_utils

    found = np.empty((jax.process_count(), data.size), np.uint8)
    for start in range(0, data.size, _PART):
        part = data[start : start + _PART]
        found[:, start : start + _PART] = multihost_utils.process_allgather(part)
    return found


def tree_from_first(tree: Any, like: Any) -> Any:
    """The arrays of the first process, as NumPy arrays. All processes.

    Args:
        tree: of this process; those of the others are not read.
        like: its shapes.
    """
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    size = tree_bytes(like)
    own = to_bytes(tree if jax.process_index() == 0 else (), size)
    for start in range(0, size, _PART):
        part = multihost_utils.broadcast_one_to_all(own[start : start + _PART])
        own[start : start + _PART] = part
    return from_bytes(own, like)


@contextlib.contextmanager
def on_own_device(mesh: Mesh | None) -> Iterator[None]:
    """Context of what is computed on one device, the same for every mesh. It is the first device
    of this process."""
    if jax.process_count() == 1 and (mesh is None or mesh.size == 1):
        yield
        return
    device = own_devices(mesh)[0]
    with jax.default_device(device), jax.set_mesh(single(device)):
        yield


def own_devices(mesh: Mesh | None) -> list[Any]:
    """The devices of a mesh that this process has; None: its first device."""
    if mesh is None:
        return jax.local_devices()[:1]
    return [one for one in mesh.devices.flat if one.process_index == jax.process_index()]


def single(device: Any) -> Mesh:
    """A mesh of one device, for code that asks for a mesh."""
    return Mesh(np.array([device]).reshape(1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)
