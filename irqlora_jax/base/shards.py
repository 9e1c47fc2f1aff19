"""Writes large bases as shards with an index (`stored.py`). All processes gather, the first writes.

Only a chunk of an array is gathered at a time.
"""

import functools
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from irqlora_jax.base.stored import CHUNK, TYPES, forget_base, index_of, shard_of
from irqlora_jax.files.checksums import seal
from irqlora_jax.files.small import write_text
from irqlora_jax.model.tree import LAYERS
from irqlora_jax.processes import fetch, first_only, is_first, together

Arrays = Mapping[str, Any]
"""Arrays of NumPy or jax by name, or their shapes."""
Layers = tuple[str, int, int]
"""Name of an array, its first layer in a shard, and the one behind its last; the whole array if it
is not of the layers."""


def plan_shards(arrays: Arrays, limit: int) -> list[list[Layers]]:
    """Splits a base into shards of whole layers.

    Args:
        arrays: of the base, by name.
        limit: bytes that a shard should not exceed. A layer, or an array outside of the layers, is
            not split, so a shard may exceed it with one of them.
    """
    stacks: dict[str, list[str]] = {}
    for name in arrays:
        first = name.partition(".")[0]
        stacks.setdefault(first if first.partition("_")[0] == LAYERS else name, []).append(name)
    units: list[tuple[int, list[Layers]]] = []
    for stack, names in stacks.items():
        if stack.partition("_")[0] != LAYERS:
            units.append((_nbytes(arrays[stack]), [whole(stack, arrays[stack])]))
            continue
        count = arrays[names[0]].shape[0]
        size = sum(_nbytes(arrays[name]) for name in names) // count
        units += [(size, [(name, i, i + 1) for name in names]) for i in range(count)]
    shards: list[list[Layers]] = []
    room = 0
    for size, unit in units:
        if not shards or size > room:
            shards.append([])
            room = limit
        room -= size
        _extend(shards[-1], unit)
    return shards


def whole(name: str, x: Any) -> Layers:
    """All of an array."""
    return name, 0, x.shape[0] if x.shape else 1


def _extend(shard: list[Layers], unit: Sequence[Layers]) -> None:
    """Adds layers to a shard; a layer behind others of its array becomes one tensor with them."""
    places = {name: place for place, (name, *_) in enumerate(shard)}
    for name, start, stop in unit:
        place = places.get(name)
        if place is None:
            shard.append((name, start, stop))
        else:
            shard[place] = (name, shard[place][1], stop)


def is_spread(arrays: Arrays) -> bool:
    """Whether an array is on devices of several processes."""
    return any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in arrays.values())


def chunks(x: Any, start: int, stop: int) -> Iterator[np.ndarray]:
    """Entries of the first axis of an array, chunk by chunk. All processes, if the array is on
    devices of several; the first one gets them."""
    if not isinstance(x, jax.Array) or _is_here(x):
        host = np.asarray(x)
        yield host[start:stop] if host.shape else host
        return
    axes = x.sharding.spec if isinstance(x.sharding, NamedSharding) else ()
    axis = next((i for i, names in enumerate(axes) if not names), len(axes))
    if 0 < axis < x.ndim:  # the rows are split over devices: take columns of all
        yield _assembled(x, axis)[start:stop]
    elif axis == 0:
        yield from _gathered(x, 0, start, stop)
    else:
        yield fetch(x)[start:stop] if x.shape else fetch(x)


def _assembled(x: jax.Array, axis: int) -> np.ndarray:
    """The whole array, gathered in parts along an axis. Of several processes, only the first one
    keeps it; it is empty in the others."""
    keeps = is_first() or x.is_fully_addressable
    found, end = np.empty(x.shape if keeps else (0,) * x.ndim, x.dtype), 0
    for part in _gathered(x, axis, 0, x.shape[axis]):
        start, end = end, end + part.shape[axis]
        if keeps:
            found[(slice(None),) * axis + (slice(start, end),)] = part
    return found


def _is_here(x: jax.Array) -> bool:
    """Whether the values are in the memory of this process, so that they need no copy."""
    devices = x.sharding.device_set
    return len(devices) == 1 and next(iter(devices)).platform == "cpu" and x.is_fully_addressable


def _gathered(x: jax.Array, axis: int, start: int, stop: int) -> Iterator[np.ndarray]:
    """Gathers parts along an axis that is not split, so that no more than a part is copied."""
    count = max(1, CHUNK * x.shape[axis] // _nbytes(x))
    for first in range(start, stop, count):
        size = min(count, stop - first)
        yield fetch(_slicer(x.sharding, axis, size)(x, np.int32(first)))


@functools.lru_cache(maxsize=128)
def _slicer(where: Any, axis: int, size: int) -> Callable[..., jax.Array]:
    def cut(x: jax.Array, first: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, first, size, axis)

    return jax.jit(cut, out_shardings=where)


def write_shards(path: Path, arrays: Arrays, metadata: Mapping[str, str], limit: int) -> None:
    """Writes all shards, and the index last. All processes, if `is_spread`.

    Args:
        path: of the base in its small form.
        arrays: of the base.
        metadata: texts for the index.
        limit: as for `plan_shards`.

    Raises:
        OSError: a file cannot be written.
    """
    shards, spread = plan_shards(arrays, limit), is_spread(arrays)
    forget = functools.partial(forget_base, path)
    first_only(forget) if spread else forget()
    writes = is_first() or not spread
    checksums: dict[str, str] = {}
    places: dict[str, str] = {}
    tensors: dict[str, Any] = {}
    for number, shard in enumerate(shards, 1):
        file = shard_of(path, number, len(shards))
        order = sorted(shard, key=lambda one: (-arrays[one[0]].dtype.itemsize, one))
        shapes = {_tensor_name(arrays, one): _shape(arrays, one) for one in order}
        types = {name: arrays[one[0]].dtype.name for name, one in zip(shapes, order, strict=True)}
        values = _values(arrays, order)
        write = functools.partial(_write_or_gather, writes, file, shapes, types, values)
        checksums |= together(write) if spread else write()
        places |= dict.fromkeys(shapes, file.name)
        tensors |= {name: [types[name], shape] for name, shape in shapes.items()}

    def end() -> None:
        about = seal(
            {**metadata, "tensors": json.dumps(tensors), "checksums": json.dumps(checksums)}
        )
        index = {"metadata": about, "weight_map": places}
        write_text(index_of(path), json.dumps(index, indent=1, sort_keys=True) + "\n")

    first_only(end) if spread else end()


def _values(arrays: Arrays, order: Sequence[Layers]) -> Iterator[tuple[str, np.ndarray]]:
    """The chunks of all tensors of a shard."""
    for one in order:
        name, start, stop = one
        for chunk in chunks(arrays[name], start, stop):
            yield _tensor_name(arrays, one), chunk


def _write_or_gather(
    writes: bool,
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    types: Mapping[str, str],
    values: Iterator[tuple[str, np.ndarray]],
) -> dict[str, str]:
    """As `_write`, or only takes part in the gathering; so also if the writing fails."""
    try:
        return _write(file, shapes, types, values) if writes else {}
    finally:
        for _ in values:
            pass


def _write(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    types: Mapping[str, str],
    values: Iterable[tuple[str, np.ndarray]],
) -> dict[str, str]:
    """Writes a shard, and returns the checksums of its tensors."""
    codes = {name: code for code, name in TYPES.items()}
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * np.dtype(types[name]).itemsize
        entry = {"dtype": codes[types[name]], "shape": shape, "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # align the data to 8 bytes
    totals = dict.fromkeys(shapes, 0)
    aside = file.with_name(f"{file.name}.part")
    with aside.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, value in values:
            data = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
            totals[name] = zlib.crc32(data, totals[name])
            out.write(data)
    os.replace(aside, file)
    return {name: f"{total:08x}" for name, total in totals.items()}


def _tensor_name(arrays: Arrays, one: Layers) -> str:
    name, start, stop = one
    return f"{name}[{start}:{stop}]" if name.partition(".")[0].partition("_")[0] == LAYERS else name


def _shape(arrays: Arrays, one: Layers) -> tuple[int, ...]:
    name, start, stop = one
    shape = arrays[name].shape
    return (stop - start, *shape[1:]) if shape else ()


def _nbytes(x: Any) -> int:
    return math.prod(x.shape) * x.dtype.itemsize
