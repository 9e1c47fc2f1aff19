"""Training sets that are not held in memory: rows are read and tokenized when they are used.

The memory holds 8 bytes a row: where each row of a .jsonl file starts. A .parquet file is read one
row group at a time. Any row can be read at any time, so batches stay a pure function of the step
and a resumed run sees the same batches, as without streaming.

What needs the lengths of all examples in tokens (plain text, packing, grouping by length) tokenizes
every row once at the start, and keeps only the lengths.

Limits:
- Rows without a token to learn are known only when they are read. They stay in the batches, where
  they count like padding.
- A bad row after the first 64 is found when it is used.
- The order of .parquet rows is less random (`order.block_order`), and they cannot be packed or
  grouped, which would need row groups from everywhere.
- .json, .csv, .tsv and .txt files must be converted first, also those of a data set on the hub.
"""

import array
import copy
import functools
import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Self, cast, overload

import numpy as np
from jaxtyping import Int32, Int64

from irqlora_jax.data.chat import read_chat_template, to_conversation
from irqlora_jax.data.config import DataConfig
from irqlora_jax.data.encode import encode_source, implies_space
from irqlora_jax.data.examples import (
    Draft,
    Example,
    Item,
    Said,
    draft_examples,
    eos_tokens,
    joins,
    to_example,
    window_length,
)
from irqlora_jax.data.formats import PAIR_COLUMNS, TEXT_COLUMNS, Pair, Text, to_pair
from irqlora_jax.data.row_files import RowFile, first_blocks, open_files
from irqlora_jax.data.rows import Row, check_columns

logger = logging.getLogger(__name__)

_FIRST = 64  # rows that are checked at the start
_KEPT = 1024  # examples in the cache
_CHUNK = 256  # rows that are tokenized together


class Rows:
    """The rows of the files of a source.

    Attributes:
        count: number of rows.
        files: the files.
        digest: hash of the files.
    """

    def __init__(self, source: str) -> None:
        """Finds the rows.

        Raises:
            FileNotFoundError, ValueError: as `open_files`, or there are no rows.
        """
        self.files: list[RowFile] = open_files(source)
        self._ends = np.cumsum([file.count for file in self.files])
        self.count = int(self._ends[-1])
        self.digest = hashlib.sha256("".join(f.digest for f in self.files).encode()).hexdigest()
        if not self.count:
            raise ValueError(f"{source} has no rows")

    def __getitem__(self, index: int) -> Row:
        file = int(np.searchsorted(self._ends, index, side="right"))
        return self.files[file].read(index - int(self._ends[file] - self.files[file].count))


class Stream:
    """The examples of one source. `RowStream` and `TextStream` say how they are made.

    Attributes:
        count: number of examples.
        blocks: numbers of examples that are read together; None if each is read alone.
        digest: hash of the files and of what else the examples depend on.
    """

    count: int
    blocks: tuple[int, ...] | None
    digest: str
    _chosen: Int64[np.ndarray, " examples"] | None = None  # None: all

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.count:
            raise IndexError(f"index = {index}: expected 0 to {self.count - 1}")
        return self._example(index if self._chosen is None else int(self._chosen[index]))

    def _example(self, index: int) -> Example:
        raise NotImplementedError

    def lengths(self) -> Int64[np.ndarray, " examples"]:
        """The length of every example in tokens."""
        there = np.arange(self.count) if self._chosen is None else self._chosen
        parts = (there[first : first + _CHUNK] for first in range(0, self.count, _CHUNK))
        return np.concatenate([self._lengths(part) for part in parts])

    def _lengths(self, indices: Int64[np.ndarray, " some"]) -> Int64[np.ndarray, " some"]:
        raise NotImplementedError

    def without(self, held: Int64[np.ndarray, " held"]) -> Self:
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


class RowStream(Stream):
    """A stream with an example in each row: every format but plain text."""

    def __init__(
        self, source: str, config: DataConfig, tokenizer: Any, max_length: int | None
    ) -> None:
        """Finds the rows of the files, and checks the first 64 of them.

        Args:
            source: .jsonl files or .parquet files: one, a pattern, or a data set of such files on
                the hub.
            config: for this source alone (`DataConfig.of_source`).
            tokenizer: a transformers tokenizer.
            max_length: context length of the model in tokens.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a source of another kind, no rows, or a bad row among the first ones.
        """
        self._rows, self._config = Rows(source), config
        self._tokenizer, self._max_length = tokenizer, max_length
        is_chat = config.format == "chat"
        self._template = read_chat_template(config.chat_template) if is_chat else None
        self._said: set[str] = set()
        self.count = min(self._rows.count, config.max_examples or self._rows.count)
        self.blocks = first_blocks(self._rows.files, self.count)
        parts = [self._rows.digest, config.format, str(self.count), self._template or ""]
        self.digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        items = [to_item(self._rows[i], config.format) for i in range(min(self.count, _FIRST))]
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

    def _example(self, index: int) -> Example:
        return self._encode(to_item(self._rows[index], self._config.format))

    def _lengths(self, indices: Int64[np.ndarray, " some"]) -> Int64[np.ndarray, " some"]:
        items = [to_item(self._rows[index], self._config.format) for index in indices.tolist()]
        return np.array([len(tokens) for tokens, _ in self._drafts(items, Counter())])

    def _drafts(self, items: Sequence[Item], said: Said) -> list[Draft]:
        own = self._config, self._tokenizer, self._max_length
        return draft_examples(items, *own, self._template, said, self._implied)

    def _encode(self, item: Item) -> Example:
        said: Said = Counter()
        (draft,) = self._drafts([item], said)
        example = to_example(draft)
        said["have no token to learn"] += not example.targets.any()
        for what in [what for what, count in said.items() if count and what not in self._said]:
            self._said.add(what)
            logger.warning("%s and perhaps others %s", item.place, what)
        return example


class TextStream(Stream):
    """A stream of windows of plain text. A window tokenizes its documents again."""

    def __init__(
        self, source: str, config: DataConfig, tokenizer: Any, max_length: int | None
    ) -> None:
        """Tokenizes all rows once, and keeps their numbers of tokens.

        Arguments and errors: as for `RowStream`.
        """
        self._rows, self._tokenizer = Rows(source), tokenizer
        self._length = window_length(source, config, max_length)
        counts = array.array("q")
        for first in range(0, self._rows.count, _CHUNK):
            last = min(first + _CHUNK, self._rows.count)
            counts.extend(map(len, self._tokens(range(first, last))))
        self._ends: Int64[np.ndarray, " rows"] = np.cumsum(np.frombuffer(counts, np.int64))
        total = int(self._ends[-1])
        windows = -(-(total - 1) // self._length)  # a last window has at least 2 tokens
        if windows < 1:
            raise ValueError(f"{source} has fewer than 2 tokens")
        self.count = min(windows, config.max_examples or windows)
        rows = first_blocks(self._rows.files, self._rows.count)
        self.blocks = None
        if rows is not None:
            row = np.searchsorted(self._ends, np.arange(self.count) * self._length, side="right")
            block = np.searchsorted(np.cumsum(rows), row, side="right")
            self.blocks = tuple(size for size in np.bincount(block).tolist() if size)
        parts = [self._rows.digest, str(self.count), str(total)]
        self.digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _lengths(self, indices: Int64[np.ndarray, " some"]) -> Int64[np.ndarray, " some"]:
        starts = indices * self._length
        return np.minimum(starts + self._length, self._ends[-1]) - starts

    def _tokens(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """The tokens of some rows; none for a row of white space."""
        texts = []
        for row in map(self._rows.__getitem__, rows):
            check_columns(row, ("text",))
            texts.append(row.text("text").strip("\n"))
        encoded = iter(encode_source(self._tokenizer, [text for text in texts if text.strip()]))
        end = eos_tokens(self._tokenizer)
        return (next(encoded) + end if text.strip() else [] for text in texts)

    def _example(self, index: int) -> Example:
        start = index * self._length
        stop = min(start + self._length, int(self._ends[-1]))
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop, side="left"))
        parts = [np.array(ids, np.int32) for ids in self._tokens(range(first, last + 1))]
        there: Int32[np.ndarray, " tokens"] = np.concatenate(parts)
        skipped = start - int(self._ends[first - 1] if first else 0)
        tokens = there[skipped : skipped + stop - start]
        return Example(tokens, np.arange(len(tokens)) > 0)


def open_stream(source: str, config: DataConfig, tokenizer: Any, max_length: int | None) -> Stream:
    """Opens the stream of a source. Arguments and errors: as for `RowStream`."""
    kind = TextStream if config.format == "text" else RowStream
    found = kind(source, config, tokenizer, max_length)
    if found.blocks is not None and (config.packing or config.group_by_length):
        name = "packing" if config.packing else "group_by_length"
        raise ValueError(
            f"data.{name} = True: expected false for streamed .parquet files ({source}), or .jsonl"
        )
    return found


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

    def lengths(self) -> Int64[np.ndarray, " examples"]:
        """The length of every example in tokens. Tokenizes all of them."""
        return np.concatenate([stream.lengths() for stream in self.streams])

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
