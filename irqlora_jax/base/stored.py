"""The files of a base: one file, or when it is large shards with an index.

    base.safetensors                       the whole base, or else
    base-00001-of-00004.safetensors, ...   some layers of the stacks in each, and
    base.safetensors.index.json            the metadata, and which tensor is in which shard

A tensor of a shard is called NAME[FIRST:END] if it holds some of the layers of an array, else NAME.
The split follows the layers alone, so it does not depend on the devices that made the base.
"""

import dataclasses
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from irqlora_jax.files.checksums import check_seal
from irqlora_jax.files.small import read_json
from irqlora_jax.files.tensors import read_headers
from irqlora_jax.text import first_few

BASE_FILE = "base.safetensors"
"""Name of a small base in the folder of a run or of `irqlora quantize`."""
BASE_INDEX = f"{BASE_FILE}.index.json"
"""Name of the index of a large one."""
VERSION = "2"
TYPES = {"U8": "uint8", "U16": "uint16", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Types of tensors in safetensors files, and in NumPy."""
ADVICE = "copy the file again, or quantize the model again"
CHUNK = 2**24
"""Bytes of a tensor that are read or gathered at a time."""


def has_base(folder: str | Path) -> bool:
    """Whether there is a complete base in a folder, in either form."""
    # Unlike Path.is_file, false for names that no file can have.
    return os.path.isfile(find_file(Path(folder) / BASE_FILE))


def find_file(path: Path) -> Path:
    """The file that marks a base as complete: `path` itself, or its index if only that is there."""
    index = index_of(path)
    return index if not os.path.isfile(path) and os.path.isfile(index) else path


def index_of(path: Path) -> Path:
    """The index of a base."""
    return path if path.name.endswith(".index.json") else path.with_name(f"{path.name}.index.json")


def shard_of(path: Path, number: int, count: int) -> Path:
    """A shard, from 1."""
    return path.with_name(f"{path.stem}-{number:05}-of-{count:05}{path.suffix}")


def base_files(folder: Path) -> list[Path]:
    """The files of a base; the last one marks it as complete.

    Raises:
        FileNotFoundError, ValueError: as `open_base`.
    """
    stored = open_base(folder / BASE_FILE)
    shards = {piece.file for pieces in stored.arrays.values() for piece in pieces}
    return [*sorted(shards - {stored.file}), stored.file]


def base_size(folder: Path) -> int:
    """Bytes of the files of a base."""
    return sum(file.stat().st_size for file in base_files(folder))


def forget_base(path: Path, keep: bool = False) -> None:
    """Deletes a base, also an incomplete one.

    Args:
        path: of the base; FOLDER/base.safetensors.
        keep: only what belongs to shards; the file of a small base stays.
    """
    for file in (index_of(path), *([] if keep else [path])):
        file.unlink(missing_ok=True)
    for file in path.parent.glob(f"{path.stem}-*-of-*"):
        if is_shard(file.name, path):
            file.unlink()


def is_shard(name: str, path: Path = Path(BASE_FILE)) -> bool:
    """Whether a file is a shard of a base, complete or not, or its incomplete index."""
    stem, suffix = re.escape(path.stem), re.escape(path.suffix)
    shard = rf"{stem}-\d{{5,}}-of-\d{{5,}}{suffix}(\.part)?"
    return bool(re.fullmatch(shard, name)) or name == f"{index_of(path).name}.part"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor in a file: an array, or some of its layers.

    Attributes:
        file: where it is.
        name: of the tensor in the file.
        start: place of its first entry in the first axis of the array.
        shape: of the tensor.
        dtype: name of its type in NumPy.
        checksum: of its bytes; None for files of earlier versions.
    """

    file: Path
    name: str
    start: int
    shape: tuple[int, ...]
    dtype: str
    checksum: str | None

    def read(self, place: tuple[slice, ...] = ()) -> np.ndarray:
        """Reads the tensor, or a part of it. The file is open only meanwhile.

        Raises:
            ValueError: it cannot be read.
        """
        try:
            with safe_open(self.file, framework="numpy") as file:
                return file.get_slice(self.name)[place] if place else file.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.file}: {self.name} cannot be read ({error})") from error

    def check(self, found: str) -> None:
        """Compares a checksum with the stored one.

        Raises:
            ValueError: they differ.
        """
        if self.checksum not in (None, found):
            raise ValueError(
                f"{self.file}: {self.name} is damaged (checksum {found}, expected "
                f"{self.checksum}); {ADVICE}"
            )

    def verify(self) -> None:
        """Reads the tensor part by part and compares its checksum.

        Raises:
            ValueError: it is damaged.
        """
        count = self.shape[0] if self.shape else 1
        total, rows = 0, max(1, CHUNK * count // max(1, self.nbytes))
        for start in range(0, count, rows):
            place = (slice(start, min(start + rows, count)),)
            part = self.read(place if self.shape else ())
            total = zlib.crc32(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data, total)
        self.check(f"{total:08x}")

    @property
    def nbytes(self) -> int:
        """Size of the tensor."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Stored:
    """A base in its files.

    Attributes:
        file: that marks it as complete.
        metadata: texts by name.
        arrays: the tensors of each array, in the order of their layers.
    """

    file: Path
    metadata: Mapping[str, str]
    arrays: Mapping[str, list[Piece]]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array."""
        pieces = self.arrays[name]
        if len(pieces) == 1:
            return pieces[0].shape
        return (sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:])

    def parts(self, name: str, place: tuple[slice, ...]) -> Iterator[tuple[slice, np.ndarray]]:
        """Reads a part of an array, tensor by tensor: entries of the part, and their values."""
        rows, *others = place
        for piece in self.arrays[name]:
            first, stop = max(rows.start, piece.start), min(rows.stop, piece.start + piece.shape[0])
            if first < stop:
                own = slice(first - piece.start, stop - piece.start)
                yield slice(first - rows.start, stop - rows.start), piece.read((own, *others))


def read_metadata(path: Path) -> dict[str, str]:
    """Reads the metadata of a base.

    Raises:
        FileNotFoundError: there is no base.
        ValueError: it is damaged, or of another version.
    """
    file = find_file(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no such file; is this the folder of a finished run?")
    if file == index_of(path):
        metadata = _read_index(file)[0]
    else:
        try:
            with safe_open(file, framework="numpy") as opened:
                metadata = opened.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged safetensors file ({error})") from error
    if metadata.get("irqlora_jax") != VERSION:
        found = metadata.get("irqlora_jax")
        raise ValueError(f"{file}: base file version {found!r}: expected {VERSION!r}")
    try:
        return check_seal(metadata, "checksums")
    except ValueError as error:
        raise ValueError(f"{file}: the metadata is damaged ({error}); {ADVICE}") from error


def open_base(path: Path) -> Stored:
    """Reads the metadata and the headers of a base.

    Raises:
        FileNotFoundError: there is no base, or a shard is missing.
        ValueError: a file is damaged, or the base is of another version.
    """
    metadata, file = read_metadata(path), find_file(path)
    checksums = json.loads(metadata.get("checksums", "{}"))
    if file != index_of(path):
        headers = read_headers(file)
        wrong = [name for name, header in headers.items() if header.dtype not in TYPES]
        wrong += sorted(checksums.keys() ^ headers.keys()) if checksums else []
        if wrong:
            raise ValueError(f"{file}: the header of {first_few(wrong)} is damaged; {ADVICE}")
        arrays = {
            name: [Piece(file, name, 0, header.shape, TYPES[header.dtype], checksums.get(name))]
            for name, header in headers.items()
        }
        return Stored(file, metadata, arrays)
    described, places = json.loads(metadata["tensors"]), _read_index(file)[1]
    wrong = sorted(described.keys() ^ places.keys())
    if wrong:
        raise ValueError(f"{file}: weight_map is damaged at {first_few(wrong)}; {ADVICE}")
    found: dict[str, list[Piece]] = {}
    for name, (dtype, shape) in described.items():
        array, _, layers = name.partition("[")
        start = int(layers.partition(":")[0] or 0)
        shard = file.with_name(places[name])
        piece = Piece(shard, name, start, tuple(shape), dtype, checksums[name])
        found.setdefault(array, []).append(piece)
    for shard in sorted({piece.file for pieces in found.values() for piece in pieces}):
        if not shard.is_file():
            raise FileNotFoundError(f"{file}: lists {shard.name}, which does not exist")
    return Stored(file, metadata, {name: sorted(x, key=_start) for name, x in found.items()})


def check_headers(stored: Stored) -> None:
    """Compares the headers of shards with the index.

    Raises:
        ValueError: a shard is damaged, or of another base.
    """
    files: dict[Path, list[Piece]] = {}
    for pieces in stored.arrays.values():
        for piece in pieces:
            files.setdefault(piece.file, []).append(piece)
    for file, pieces in files.items():
        headers = read_headers(file)
        for piece in pieces:
            header = headers.get(piece.name)
            known = None if header is None else (header.shape, TYPES.get(header.dtype))
            if known != (piece.shape, piece.dtype):
                raise ValueError(f"{file}: the header of {piece.name} is damaged; {ADVICE}")


def _start(piece: Piece) -> int:
    return piece.start


def _read_index(file: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The metadata, and the file of each tensor."""
    values: Mapping[str, Any] = read_json(file)
    found = values.get("metadata"), values.get("weight_map")
    for texts in found:
        ok = isinstance(texts, dict) and all(isinstance(text, str) for text in texts.values())
        if not ok:
            raise ValueError(f"{file}: damaged; expected metadata and weight_map; {ADVICE}")
    metadata, places = found
    assert isinstance(metadata, dict) and isinstance(places, dict)
    for name in places.values():
        if Path(name).name != name:
            raise ValueError(f"{file}: lists {name!r}; expected a file in its folder")
    return metadata, places
