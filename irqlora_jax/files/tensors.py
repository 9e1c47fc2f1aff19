"""Safetensors files, read and written a tensor at a time: a whole file never stands in memory."""

import dataclasses
import json
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_PART = 2**19  # numbers that are read or written at a time


@dataclasses.dataclass(frozen=True)
class Header:
    """What a safetensors file says of a tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_headers(file: Path) -> dict[str, Header]:
    """The headers of all tensors of a file."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {
                name: Header(file, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole safetensors file: {error}") from error


def check_float(header: Header, name: str) -> None:
    """Refuses a tensor that is no float."""
    if header.dtype not in FLOATS:
        accepted = ", ".join(FLOATS.values())
        raise ValueError(f"{header.file}: {name} has type {header.dtype}: accepted is {accepted}")


def read_into(out: np.ndarray, header: Header, name: str, first: int = 0) -> None:
    """Copies rows of a tensor, part by part, and refuses NaN and infinity.

    Args:
        out: where to; as many rows as are copied.
        header: of the tensor.
        name: of the tensor.
        first: row of the tensor that comes first.
    """
    rows = max(1, _PART * header.shape[0] // max(1, math.prod(header.shape)))
    for start in range(0, out.shape[0], rows):
        stop = min(start + rows, out.shape[0])
        # Opened for each part: what was read of a mapped file counts as memory until it is closed.
        try:
            with safe_open(header.file, framework="numpy") as tensors:
                part = tensors.get_slice(name)[first + start : first + stop]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{header.file}: {name} cannot be read: {error}") from error
        if not np.isfinite(part).all():
            raise ValueError(f"{header.file}: {name} has NaN or infinite values")
        out[start:stop] = part


def read_ahead(
    found: Mapping[str, Header], names: Sequence[str], dtype: Any
) -> Generator[np.ndarray, None, None]:
    """The tensors of these names as `dtype` (None: as in the file), each lost when the next one is
    asked for.

    While the caller works on one, a thread reads as many rows of the next as fit into a quarter of
    the memory of the largest: the rest is read when it is asked for. So there are two buffers in
    all, since the allocator may keep what is freed. An error of the thread is raised where its
    tensor is asked for. Closing the iterator waits for the thread.
    """
    headers = [found[name] for name in names]
    types = [np.dtype(FLOATS[header.dtype] if dtype is None else dtype) for header in headers]
    nbytes = [math.prod(h.shape) * kind.itemsize for h, kind in zip(headers, types, strict=True)]
    whole = aligned((max(nbytes, default=0),), np.uint8)
    waiting = aligned((whole.size // 4,), np.uint8)

    def read(i: int) -> np.ndarray:
        kind, (rows, *rest) = np.dtype(FLOATS[headers[i].dtype]), headers[i].shape
        row = math.prod(rest) * kind.itemsize
        rows = min(rows, waiting.size // row)
        part = waiting[: rows * row].view(kind).reshape(rows, *rest)
        read_into(part, headers[i], names[i])
        return part

    with ThreadPoolExecutor(1, thread_name_prefix="reader") as reader:
        ahead = reader.submit(read, 0) if names else None
        for i, header in enumerate(headers):
            assert ahead is not None
            weight = whole[: nbytes[i]].view(types[i]).reshape(header.shape)
            part = ahead.result()
            weight[: len(part)] = part
            ahead = reader.submit(read, i + 1) if i + 1 < len(names) else None
            read_into(weight[len(part) :], header, names[i], len(part))
            yield weight


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array on a 64-byte boundary, which a CPU device takes over without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def write_tensors(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    parts: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Writes a safetensors file while its tensors are made: its header needs their shapes alone.

    Args:
        file: where to.
        shapes: of the tensors, in the order of the file.
        dtype: one of `FLOATS`, to which all numbers are rounded.
        parts: name and numbers of each tensor, in that order.

    Raises:
        ValueError: a number that `dtype` cannot hold.
    """
    code = next(code for code, name in FLOATS.items() if name == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin on a multiple of 8 bytes
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        expected = iter(shapes.items())
        # Neither zip nor a name may keep an array alive while the next one is made.
        for name, array in parts:
            assert (name, array.shape) == next(expected)
            _write_array(out, name, array, dtype)
            del array
        assert next(expected, None) is None


def _write_array(out: BinaryIO, name: str, array: np.ndarray, dtype: str) -> None:
    flat = array.reshape(-1)
    for start in range(0, flat.size, _PART):
        with np.errstate(over="ignore"):
            part = flat[start : start + _PART].astype(dtype, copy=False)
        if not np.isfinite(part).all():
            raise ValueError(f"dtype = '{dtype}': cannot hold all numbers of {name}")
        out.write(np.ascontiguousarray(part).view(np.uint8).data)
