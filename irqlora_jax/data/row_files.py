"""Files whose rows are read one by one, at any place.

A .jsonl file has an index of 8 bytes a row: where each line starts. A .parquet file is read one row
group at a time. The files of a data set on the hub are downloaded first, and then read like others.
"""

import array
import codecs
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from irqlora_jax.data.hub import download_files
from irqlora_jax.data.order import POOL
from irqlora_jax.data.rows import Row, hub_names, line_row, local_files, open_parquet, table_rows
from irqlora_jax.text import decode_text

_STREAMED = (".jsonl", ".parquet")


class RowFile(Protocol):
    """A file whose rows are read one by one.

    Attributes:
        count: number of rows.
        digest: sha256 of the file.
    """

    count: int
    digest: str

    @property
    def blocks(self) -> tuple[int, ...] | None:
        """Numbers of rows that are read together; None if each is read alone."""
        ...

    def read(self, index: int) -> Row:
        """Reads a row. `index` counts from 0."""
        ...


class JsonlFile:
    """A .jsonl file with the place of every line. See `RowFile`."""

    blocks = None

    def __init__(self, path: Path) -> None:
        """Finds the lines, in one pass through the file."""
        self._path, starts, blank = path, array.array("q"), array.array("q")
        digest, place = hashlib.sha256(), 0
        with open(path, "rb") as file:
            self._state = _state(file)
            for line in file:
                digest.update(line)
                text = line.removeprefix(codecs.BOM_UTF8) if place == 0 else line
                if text.strip():
                    starts.append(place + len(line) - len(text))
                else:
                    blank.append(len(starts))
                place += len(line)
        self.count, self.digest = len(starts), digest.hexdigest()
        starts.append(place)
        self._starts = np.frombuffer(starts, np.int64)
        self._blank = np.array(blank, np.int64)

    def read(self, index: int) -> Row:
        """Reads a row.

        Raises:
            ValueError: not UTF-8 or not JSON, or the file was changed since the start.
        """
        start, end = self._starts[index : index + 2].tolist()
        with open(self._path, "rb") as file:
            if _state(file) != self._state:
                raise ValueError(f"{self._path}: changed during the run; expected the same file")
            file.seek(start)
            data = file.read(end - start).strip()
        number = index + 1 + int(np.searchsorted(self._blank, index, side="right"))
        return line_row(self._path, number, decode_text(data, f"{self._path}, row {index + 1}"))


def _state(file: BinaryIO) -> tuple[int, int]:
    """The size and the modification time of a file, which change with its content."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


class ParquetFile:
    """A .parquet file that is read a row group at a time. See `RowFile`."""

    def __init__(self, path: Path) -> None:
        """Reads the sizes of the row groups, and hashes the file."""
        self._path = path
        with open_parquet(path) as file:
            found = file.metadata
            sizes = [found.row_group(group).num_rows for group in range(found.num_row_groups)]
        self.blocks = tuple(size for size in sizes if size)
        self._groups = [group for group, size in enumerate(sizes) if size]
        self._ends = np.cumsum(self.blocks, dtype=np.int64)
        self.count = sum(self.blocks)
        with open(path, "rb") as file:
            self.digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.tables: Callable[[Path, int], Any] = read_group

    def read(self, index: int) -> Row:
        """Reads a row.

        Raises:
            ValueError: the file is damaged, or a value has no counterpart in Python.
        """
        group = int(np.searchsorted(self._ends, index, side="right"))
        place = index - int(self._ends[group] - self.blocks[group])
        table = self.tables(self._path, self._groups[group])
        if place >= table.num_rows:
            raise ValueError(f"{self._path}: changed during the run; expected the same file")
        return table_rows(self._path, table.slice(place, 1), index + 1)[0]


def read_group(path: Path, group: int) -> Any:
    """Reads a row group of a .parquet file, as a table of pyarrow."""
    with open_parquet(path) as file:
        return file.read_row_group(group)


def open_files(source: str) -> list[RowFile]:
    """Opens the files of a source. Those of a data set on the hub are downloaded if needed.

    Raises:
        FileNotFoundError: no such file, or the hub does not provide the data set.
        ValueError: files of another kind.
    """
    paths = local_files(source)
    if paths is None:
        paths = download_files(source, *hub_names(source), _STREAMED)
    kinds = {path.suffix for path in paths}
    if len(kinds) > 1 or not kinds <= {*_STREAMED}:
        accepted = f"{' or '.join(_STREAMED)} files with data.streaming true"
        raise ValueError(f"{source}: {' and '.join(sorted(kinds))}; expected {accepted}")
    if kinds == {".jsonl"}:
        return list[RowFile](map(JsonlFile, paths))
    files = [ParquetFile(path) for path in paths]
    sizes = [size for file in files for size in file.blocks]
    # Two pools: a batch may hold the end of one and the start of the next.
    held = 2 * (-(-POOL * max(len(sizes), 1) // max(sum(sizes), 1)) + 1)
    tables = functools.lru_cache(held)(read_group)
    for file in files:
        file.tables = tables
    return [*files]


def first_blocks(files: Sequence[RowFile], count: int) -> tuple[int, ...] | None:
    """The blocks of the first `count` rows of the files."""
    if files[0].blocks is None:
        return None
    found: list[int] = []
    for block in (block for file in files for block in file.blocks or ()):
        if count > 0:
            found.append(min(block, count))
        count -= block
    return tuple(found)
