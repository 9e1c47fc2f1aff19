"""Reads tensors part by part, and writes safetensors files; a whole file is never in memory."""

import dataclasses
import json
import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_WHOLE = {"U8": "uint8", "I32": "int32", "I64": "int64"}
_PART = 2**19  # elements that are read or written at a time


@dataclasses.dataclass(frozen=True)
class Header:
    """Shape and type of a tensor in a safetensors file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    def rows(self, name: str, first: int, stop: int, columns: slice | None = None) -> np.ndarray:
        """Reads rows `first` to `stop`, of a matrix perhaps only some columns. `name` is that of
        the tensor.

        The file is open only meanwhile: pages of a mapped file count as memory until it is closed.
        """
        try:
            with safe_open(self.file, framework="numpy") as tensors:
                part = tensors.get_slice(name)
                return part[first:stop] if columns is None else part[first:stop, columns]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.file}: {name} cannot be read: {error}") from error


def read_headers(file: Path) -> dict[str, Header]:
    """Reads the headers of all tensors of a file."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {
                name: Header(file, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole safetensors file: {error}") from error


def read_metadata(file: Path) -> dict[str, str]:
    """Reads the texts in the header of a file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(file, framework="numpy") as tensors:
            return dict(tensors.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole safetensors file: {error}") from error


def check_float(header: Header, name: str) -> None:
    """Checks that a tensor has a floating-point type.

    Raises:
        ValueError: it has another type.
    """
    if header.dtype not in FLOATS:
        accepted = ", ".join(FLOATS.values())
        raise ValueError(f"{header.file}: {name} has type {header.dtype}: expected {accepted}")


def read_into(
    out: np.ndarray, header: Header, name: str, first: int = 0, columns: slice | None = None
) -> None:
    """Copies rows of a tensor part by part.

    Args:
        out: destination; its number of rows is the number of copied rows.
        header: of the tensor.
        name: of the tensor.
        first: index of the first copied row.
        columns: of a matrix, those that are copied; None: all.

    Raises:
        ValueError: the file cannot be read, or the tensor has NaN or infinite values.
    """
    for start, part in _read_parts(header, name, first, out.shape[0], columns):
        out[start : start + len(part)] = part


def equal_values(found: Mapping[str, Header], first: str, second: str) -> bool:
    """Whether two tensors of the same shape have the same values, also in different types.

    Raises:
        ValueError: as `read_into`.
    """
    rows = found[first].shape[0]
    parts = (_read_parts(found[name], name, 0, rows) for name in (first, second))
    return all(
        np.array_equal(one.astype(np.float32), other.astype(np.float32))
        for (_, one), (_, other) in zip(*parts, strict=True)
    )


def _read_parts(
    header: Header, name: str, first: int, count: int, columns: slice | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields `count` rows from `first` on, part by part, each with the index of its first row."""
    rows = max(1, _PART * header.shape[0] // max(1, math.prod(header.shape)))
    for start in range(0, count, rows):
        stop = min(start + rows, count)
        part = header.rows(name, first + start, first + stop, columns)
        if not np.isfinite(part).all():
            raise ValueError(f"{header.file}: {name} has NaN or infinite values")
        yield start, part


def read_ahead(
    found: Mapping[str, Header], names: Sequence[str], dtype: Any
) -> Generator[np.ndarray, None, None]:
    """Yields tensors by name as `dtype` (None: the type in the file).

    A tensor is valid only until the next one is requested, because all share one buffer. While
    the caller uses a tensor, a thread reads the first rows of the next one into a second buffer.
    That buffer has a quarter of the size of the largest tensor; the remaining rows are read on
    request. Two fixed buffers are used because the allocator may keep freed memory. An error of
    the thread is raised when its tensor is requested. Closing the iterator waits for the thread.
    """
    headers = [found[name] for name in names]
    types = [np.dtype(FLOATS[header.dtype] if dtype is None else dtype) for header in headers]
    nbytes = [math.prod(h.shape) * kind.itemsize for h, kind in zip(headers, types, strict=True)]
    whole = aligned((max(nbytes, default=0),), np.uint8)
    prefetched = aligned((whole.size // 4,), np.uint8)

    def read(i: int) -> np.ndarray:
        kind, (rows, *rest) = np.dtype(FLOATS[headers[i].dtype]), headers[i].shape
        row = math.prod(rest) * kind.itemsize
        rows = min(rows, prefetched.size // row)
        part = prefetched[: rows * row].view(kind).reshape(rows, *rest)
        read_into(part, headers[i], names[i])
        return part

    with ThreadPoolExecutor(1, thread_name_prefix="reader") as reader:
        next_part = reader.submit(read, 0) if names else None
        for i, header in enumerate(headers):
            assert next_part is not None
            weight = whole[: nbytes[i]].view(types[i]).reshape(header.shape)
            part = next_part.result()
            weight[: len(part)] = part
            next_part = reader.submit(read, i + 1) if i + 1 < len(names) else None
            read_into(weight[len(part) :], header, names[i], len(part))
            yield weight


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Allocates an array on a 64-byte boundary, which jax uses on a CPU without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def write_tensors(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    types: Mapping[str, str],
    parts: Iterable[tuple[str, np.ndarray]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file while its tensors are computed. The header needs only shapes.

    Args:
        file: path of the file.
        shapes: of the tensors, in the order of the file.
        types: of the tensors, by name; values are rounded to them.
        parts: name and values of each tensor, in the same order.
        metadata: further texts in the header.

    Raises:
        ValueError: a value is out of the range of its type.
    """
    codes = {name: code for code, name in (FLOATS | _WHOLE).items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * np.dtype(types[name]).itemsize
        header[name] = {
            "dtype": codes[types[name]],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # align the data to 8 bytes
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        expected = iter(shapes.items())
        # No zip, and delete the name: else an array stays alive while the next one is computed.
        for name, array in parts:
            assert (name, array.shape) == next(expected)
            _write_array(out, name, array, types[name])
            del array
        assert next(expected, None) is None


def _write_array(out: BinaryIO, name: str, array: np.ndarray, dtype: str) -> None:
    flat = array.reshape(-1)
    for start in range(0, flat.size, _PART):
        with np.errstate(over="ignore"):
            part = flat[start : start + _PART].astype(dtype, copy=False)
        if not np.isfinite(part).all():
            raise ValueError(f"dtype = '{dtype}': cannot hold all values of {name}")
        out.write(np.ascontiguousarray(part).view(np.uint8).data)
