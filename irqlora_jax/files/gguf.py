"""Reads the header of GGUF files, and their tensors row by row. `gguf_model` says what they mean.

The header is read here, because the reader of the library `gguf` makes an array for every token.
The library dequantizes.
Source: the GGUF specification (github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import dataclasses
import math
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from irqlora_jax.text import require, shorten

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0")
TYPES += ("Q4_K", "Q4_1", "Q4_0", "Q3_K", "Q2_K")
"""Types of tensors that are read."""
ARCHITECTURES = ("llama", "qwen2", "qwen3", "smollm3")
"""Architectures that are read. Mistrals are "llama"."""
_NUMBERS = dict(enumerate(("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?")))
_NUMBERS |= {10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor as it is stored.

    Attributes:
        type: one of `TYPES`.
        shape: rows first, as in numpy.
        offset: of the first byte in the file.
        row: size of a row in bytes; of an element, if there is only one dimension.
    """

    type: str
    shape: tuple[int, ...]
    offset: int
    row: int


@dataclasses.dataclass(frozen=True)
class Gguf:
    """The header of a file: metadata by key, and tensors by their name in the file."""

    file: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def architecture(self) -> str:
        """The architecture, with which the names of its metadata begin."""
        return self.fields.get("general.architecture", "")


def dequantize(file: Path, tensor: Tensor, places: slice | np.ndarray) -> np.ndarray:
    """Reads rows as float32. The file is mapped only meanwhile: mapped pages count as memory."""
    import gguf

    try:
        shape = (tensor.shape[0], tensor.row)
        data = np.array(np.memmap(file, np.uint8, "r", tensor.offset, shape)[places])
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error
    return gguf.dequantize(data, gguf.GGMLQuantizationType[tensor.type])


def is_gguf(source: str | Path) -> bool:
    """Whether a path names a GGUF file, which need not exist."""
    return Path(source).suffix.lower() == ".gguf" and not Path(source).expanduser().is_dir()


def read_gguf(source: str | Path) -> Gguf:
    """Reads the header of a GGUF file, and checks that the file is whole.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a GGUF file, damaged or truncated, a part of several files, another
            architecture, or a type of tensors that is not read.
    """
    file = Path(source).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"model = '{file}': no such file")
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            if size < 4 or opened.read(4) != b"GGUF":
                raise ValueError(f"{file}: not a GGUF file")
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                found = _parse(file, _Cursor(data, 4))
    except EOFError:
        raise ValueError(f"{file}: truncated in its header ({size:,} bytes)") from None
    for name, tensor in found.tensors.items():
        end = tensor.offset + tensor.row * tensor.shape[0]
        if end > size:
            raise ValueError(
                f"{file}: truncated: {name} ends at byte {end:,}, the file has {size:,}"
            )
    return found


class _Cursor:
    """Reads values one after the other."""

    def __init__(self, data: mmap.mmap, place: int) -> None:
        self.data, self.place = data, place

    def take(self, size: int) -> bytes:
        start, self.place = self.place, self.place + size
        if self.place > len(self.data):
            raise EOFError
        return self.data[start : self.place]

    def integer(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def string(self) -> str:
        return self.take(self.integer(8)).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.integer(4), self.integer(8)
            if inner == _STRING:
                return [self.string() for _ in range(count)]
            return self.numbers(inner, count).tolist()
        (number,) = self.numbers(kind, 1)
        # The shortest number with the same float32: 1e-05, not 9.999999747378752e-06.
        return float(str(number)) if number.dtype == np.float32 else number.item()

    def numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in _NUMBERS:
            raise ValueError(f"unknown type {kind} of a value")
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)


def _parse(file: Path, cursor: _Cursor) -> Gguf:
    version = cursor.integer(4)
    # Of a file for computers with another order of bytes, the version is at least 2**16.
    require(version in (2, 3), f"{file}: version of GGUF", version, "2 or 3, little-endian")
    tensor_count, field_count = cursor.integer(8), cursor.integer(8)
    try:
        fields = {cursor.string(): cursor.value(cursor.integer(4)) for _ in range(field_count)}
        described = [_describe(cursor) for _ in range(tensor_count)]
    except ValueError as error:
        raise ValueError(f"{file}: damaged: {error}") from None
    _check_kind(file, fields)
    alignment = fields.get("general.alignment", 32)
    ok = isinstance(alignment, int) and alignment > 0
    require(ok, f"{file}: general.alignment", alignment, "a whole number of at least 1")
    start = -(-cursor.place // alignment) * alignment
    tensors = {each[0]: _tensor(file, start, *each) for each in described}
    return Gguf(file, fields, tensors)


def _describe(cursor: _Cursor) -> tuple[str, list[int], int, int]:
    """Reads name, dimensions (columns first), number of the type, and offset of a tensor."""
    name, dimensions = cursor.string(), cursor.integer(4)
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise ValueError(f"{shorten(name, quoted=False)} has {dimensions} dimensions")
    sizes = [cursor.integer(8) for _ in range(dimensions)]
    return name, sizes, cursor.integer(4), cursor.integer(8)


def _tensor(
    file: Path, start: int, name: str, dimensions: Sequence[int], number: int, offset: int
) -> Tensor:
    import gguf

    known = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    type = known.get(number, f"number {number}")
    if type not in TYPES:
        raise ValueError(f"{file}: {name} has type {type}: expected one of {', '.join(TYPES)}")
    per_block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]
    columns, rest = (dimensions[0], dimensions[1:]) if len(dimensions) > 1 else (1, dimensions)
    if columns % per_block or min(dimensions) < 1:
        raise ValueError(
            f"{file}: {name} has dimensions {dimensions}: expected rows of whole blocks of "
            f"{per_block} ({type})"
        )
    row = columns // per_block * size
    return Tensor(type, tuple(reversed(dimensions)), start + offset, row * math.prod(rest[1:]))


def _check_kind(file: Path, fields: Mapping[str, Any]) -> None:
    parts = fields.get("split.count", 0)
    if parts not in (0, 1):
        number = fields.get("split.no", 0)
        raise ValueError(
            f"{file}: part {number + 1 if isinstance(number, int) else shorten(number)} of "
            f"{shorten(parts)}; expected one file, as llama-gguf-split --merge writes it"
        )
    kind = fields.get("general.architecture")
    accepted = " or ".join(map(repr, ARCHITECTURES))
    require(kind in ARCHITECTURES, f"{file}: general.architecture", kind, accepted)
    for name, wanted in (("general.type", "model"), (f"{kind}.expert_count", 0)):
        value = fields.get(name, wanted)
        require(value == wanted, f"{file}: {name}", value, repr(wanted))
