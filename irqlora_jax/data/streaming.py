"""Training sets that are not held in memory: rows are read and tokenized when they are used.

The memory holds 8 bytes a row: where each row of a .jsonl file starts. A .parquet file is read one
row group at a time. Any row can be read at any time, so batches stay a pure function of the step
and a resumed run sees the same batches, as without streaming.

What this cannot do:
- Packing, grouping by length and plain text need the lengths of all examples in tokens.
- Rows without a token to learn are known only when they are read. They stay in the batches, where
  they count like padding.
- The order of .parquet rows is less random: see `order.block_order`.
- .json, .csv, .tsv and data sets of the hub: convert or download them first.
"""

import array
import codecs
import copy
import functools
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast, overload

import numpy as np
from jaxtyping import Int64

from irqlora_jax.data.chat import read_chat_template, to_conversation
from irqlora_jax.data.config import DataConfig
from irqlora_jax.data.encode import implies_space
from irqlora_jax.data.examples import Example, Item, Said, draft_examples, joins, to_example
from irqlora_jax.data.formats import PAIR_COLUMNS, TEXT_COLUMNS, Pair, Text, to_pair
from irqlora_jax.data.order import POOL
from irqlora_jax.data.rows import (
    Row,
    check_columns,
    line_row,
    local_files,
    open_parquet,
    table_rows,
)
from irqlora_jax.text import decode_text

logger = logging.getLogger(__name__)

_FIRST = 64  # rows that are checked at the start
_KEPT = 1024  # examples that stay in memory, for those who ask for them again


class RowFile(Protocol):
    """A file whose rows are read one by one.

    Attributes:
        count: number of rows.
        blocks: numbers of rows that are read together; None if each is read alone.
        digest: sha256 of the file.
    """

    count: int
    blocks: tuple[int, ...] | None
    digest: str

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
    """What changes with the content of a file: its size, and when it was last written."""
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


class Stream:
    """The examples of one source, read and tokenized when they are used.

    Attributes:
        count: number of examples.
        blocks: numbers of examples that are read together; None if each is read alone.
        digest: hash of the files and of what else the examples depend on.
    """

    def __init__(
        self, source: str, config: DataConfig, tokenizer: Any, max_length: int | None
    ) -> None:
        """Finds the rows of the files, and checks the first 64 of them.

        Args:
            source: .jsonl files or .parquet files: one, or a pattern.
            config: for this source alone (`DataConfig.of_source`).
            tokenizer: a transformers tokenizer.
            max_length: context length of the model in tokens.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a source of another kind, no rows, or a bad row among the first ones.
        """
        files = _open_files(source)
        self._source, self._config, self._files = source, config, files
        self._tokenizer, self._max_length = tokenizer, max_length
        self._template = (
            read_chat_template(config.chat_template) if config.format == "chat" else None
        )
        self._ends = np.cumsum([file.count for file in files])
        self._chosen: Int64[np.ndarray, " rows"] | None = None
        self._said: set[str] = set()
        limit, rows = config.max_examples, int(self._ends[-1])
        self.count = rows if limit is None else min(rows, limit)
        if not self.count:
            raise ValueError(f"{source} has no rows")
        self.blocks = _first_blocks(files, self.count)
        parts = [file.digest for file in files]
        parts += [config.format, str(self.count), self._template or ""]
        self.digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        items = [self._item(index) for index in range(min(self.count, _FIRST))]
        self._implied = None
        if joins(config):
            pairs = cast(list[Pair], items)
            prompts, answers = [pair.prompt for pair in pairs], [pair.answer for pair in pairs]
            self._implied = implies_space(tokenizer, prompts, answers)
        if not any(example.targets.any() for example in map(self._encode, items)):
            raise ValueError(
                f"{source}: none of its first {len(items)} rows has a token to learn (data.format "
                f"= '{config.format}')"
            )

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.count:
            raise IndexError(f"index = {index}: expected 0 to {self.count - 1}")
        return self._encode(self._item(index))

    def without(self, held: Int64[np.ndarray, " held"]) -> "Stream":
        """The stream without some of its examples, given by increasing index."""
        there = np.arange(self.count) if self._chosen is None else self._chosen
        found = copy.copy(self)
        found._chosen = np.delete(there, held)
        found.count = len(found._chosen)
        if self.blocks is not None:
            lost = np.searchsorted(np.cumsum(self.blocks), held, side="right")
            left = np.array(self.blocks) - np.bincount(lost, minlength=len(self.blocks))
            found.blocks = tuple(left[left > 0].tolist())
        return found

    def _item(self, index: int) -> Item:
        row = index if self._chosen is None else int(self._chosen[index])
        file = int(np.searchsorted(self._ends, row, side="right"))
        found = self._files[file].read(row - int(self._ends[file] - self._files[file].count))
        return to_item(found, self._config.format)

    def _encode(self, item: Item) -> Example:
        said: Said = Counter()
        own = self._config, self._tokenizer, self._max_length
        (draft,) = draft_examples([item], *own, self._template, said, self._implied)
        example = to_example(draft)
        said["have no token to learn"] += not example.targets.any()
        for what in [what for what, count in said.items() if count and what not in self._said]:
            self._said.add(what)
            logger.warning("%s and perhaps others %s", item.place, what)
        return example


def to_item(row: Row, format: str) -> Item:
    """Makes what a row of a format holds.

    Raises:
        ValueError: the row does not have this format.
    """
    if format == "chat":
        check_columns(row, ())
        return to_conversation(row)
    columns = PAIR_COLUMNS.get(format) or TEXT_COLUMNS[format]
    check_columns(row, columns)
    if format in PAIR_COLUMNS:
        return to_pair(row, format)
    if "message_id" in row.columns:
        raise ValueError(
            f"{row.place} is a message of a tree: expected whole conversations, or data.streaming "
            "false"
        )
    return Text(row.place, row.text(columns[0]))


def _open_files(source: str) -> list[RowFile]:
    accepted = ".jsonl or .parquet files with data.streaming true"
    paths = local_files(source)
    if paths is None:
        name = source.partition(":")[0]
        raise ValueError(
            f"{source}: a data set of the hub; expected {accepted}, e.g. downloaded with `hf "
            f"download --repo-type dataset {name}`"
        )
    kinds = {path.suffix for path in paths}
    if len(kinds) > 1 or not kinds <= {".jsonl", ".parquet"}:
        raise ValueError(f"{source}: {' and '.join(sorted(kinds))}; expected {accepted}")
    if kinds == {".jsonl"}:
        return [JsonlFile(path) for path in paths]
    files = [ParquetFile(path) for path in paths]
    sizes = [size for file in files for size in file.blocks]
    # Two pools: a batch may hold the end of one and the start of the next.
    held = 2 * (-(-POOL * max(len(sizes), 1) // max(sum(sizes), 1)) + 1)
    tables = functools.lru_cache(held)(read_group)
    for file in files:
        file.tables = tables
    return list[RowFile](files)


def _first_blocks(files: Sequence[RowFile], count: int) -> tuple[int, ...] | None:
    """The blocks of the first `count` rows of the files."""
    if files[0].blocks is None:
        return None
    found: list[int] = []
    for block in (block for file in files for block in file.blocks or ()):
        if count > 0:
            found.append(min(block, count))
        count -= block
    return tuple(found)


class StreamedExamples(Sequence[Example]):
    """The examples of several streams, one stream after the other.

    Attributes:
        streams: the sources.
    """

    def __init__(self, streams: Sequence[Stream]) -> None:
        """Puts streams together."""
        self.streams = tuple(streams)
        self._ends = np.cumsum([stream.count for stream in streams])
        self._read = functools.lru_cache(_KEPT)(self._example)

    @property
    def digest(self) -> str:
        """Hash of all files and of what else the examples depend on."""
        return hashlib.sha256("\n".join(s.digest for s in self.streams).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"index = {index}: expected 0 to {len(self) - 1}")
        return self._read(index)

    def _example(self, index: int) -> Example:
        stream = int(np.searchsorted(self._ends, index, side="right"))
        found = self.streams[stream]
        return found[index - int(self._ends[stream] - found.count)]

    def without(self, held: Int64[np.ndarray, " held"]) -> "StreamedExamples":
        """The examples without some of them, given by increasing index."""
        parts = np.split(held, np.searchsorted(held, self._ends[:-1]))
        starts = self._ends - [stream.count for stream in self.streams]
        left = zip(self.streams, parts, starts, strict=True)
        return StreamedExamples([stream.without(part - start) for stream, part, start in left])
