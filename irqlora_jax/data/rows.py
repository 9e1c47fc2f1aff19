"""Reads rows from files and from data sets of the hub."""

import contextlib
import csv
import errno
import glob
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from irqlora_jax.data.hub import read_hub
from irqlora_jax.text import read_text, shorten

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
DOCUMENT_END = "<|endoftext|>"
CONVERSATIONS = ("messages", "conversations")
"""Columns with a list of messages. The second one is ShareGPT's."""
PAIR_COLUMNS: dict[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "output"),
    "input_output": ("input", "output"),
    "self_instruct": ("prompt", "completion"),
    "flan_v2": ("inputs", "targets"),
    "chip2": ("text",),
}
"""Columns of the formats with a prompt and an answer in each row. The last column is the answer."""
TEXT_COLUMNS: dict[str, tuple[str, ...]] = {"hh_rlhf": ("chosen",), "oasst1": ("text",)}
"""Columns of the formats with a conversation in each row. The loss covers every turn."""
PREFERENCE_COLUMNS = ("chosen", "rejected")
"""Columns of preference pairs, besides the optional prompt."""
# ID, ID:CONFIGURATION, ID:CONFIGURATION:SPLIT or ID::SPLIT.
_HUB = re.compile(r"(?P<id>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<config>[\w.-]*)(:(?P<split>[\w.-]+))?)?")


class Row(NamedTuple):
    """One row of a file, and its place for error messages ("FILE, line 3")."""

    place: str
    columns: dict[str, Any]

    def text(self, name: str, default: str | None = None) -> str:
        """The text of a column, or the default (if given) if the column is absent or null.

        Raises:
            ValueError: not text.
        """
        value = self.columns.get(name)
        if value is None and default is not None:
            return default
        return check_text(value, self.place, name)


def check_text(value: Any, place: str, name: str) -> str:
    """Returns the value if it is text that a tokenizer accepts.

    Raises:
        ValueError: not text; the message names the place.
    """
    if not isinstance(value, str):
        raise ValueError(f"{place}: {name} = {shorten(value)}: expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        surrogate = value[error.start].encode("unicode_escape").decode()
        raise ValueError(f"{place}: {name} contains an unpaired surrogate, {surrogate}") from None
    return value


def read_rows(source: str, columns: Sequence[str]) -> list[Row]:
    """Reads the rows of a file or of a data set on the hub.

    Args:
        source: a .json file (a list of objects, or an object that has such a list as "data"), a
            .jsonl file (an object on each line), a .csv or .tsv file (its first line names the
            columns), or a .parquet file; or a shell pattern of such files (*, ?, [ab], ** for
            folders), which are read in the order of their names. If there is no such file: the id
            of a data set on the hub, as ID, ID:CONFIGURATION, ID:CONFIGURATION:SPLIT or ID::SPLIT.
            The default split is "train".
        columns: names that every row must have.

    Raises:
        FileNotFoundError: no such file, and no such data set on the hub.
        ValueError: not readable, no rows, a name that stands twice in a row, or a row without one
            of the columns.
    """
    paths = local_files(source)
    if paths is None:
        found = read_hub(source, *hub_names(source))
        rows = [Row(f"{source}, row {n}", columns) for n, columns in enumerate(found, 1)]
    else:
        rows = [row for path in paths for row in _file_rows(path)]
    if not rows:
        raise ValueError(f"{source} has no rows")
    for row in rows:
        check_columns(row, columns)
    return rows


def _file_rows(path: Path) -> list[Row]:
    if path.suffix == ".json":
        return _json_rows(path)
    if path.suffix == ".jsonl":
        return _jsonl_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.suffix in (".csv", ".tsv"):
        return _csv_rows(path)
    accepted = f"{', '.join(SUFFIXES[:-2])} or {SUFFIXES[-2]}"
    raise ValueError(f"{path}: a file of rows is {accepted}; .txt is plain text")


def check_columns(row: Row, columns: Sequence[str]) -> None:
    """Checks that a row is an object with these columns.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(row.columns, dict):
        kind = type(row.columns).__name__
        raise ValueError(f"{row.place} is of type {kind}: expected an object")
    for name in columns:
        if name not in row.columns:
            there = ", ".join(map(str, row.columns)) or "none"
            wanted = ", ".join(columns)
            hint = format_hint(row)
            raise ValueError(
                f"{row.place} has no column {shorten(name)}: its columns are {there}; "
                f"expected are {wanted}{hint}"
            )


def format_hint(row: Row) -> str:
    """Says which values of `data.format` the columns of a row fit; "" if none."""
    if any(isinstance(row.columns.get(name), list) for name in CONVERSATIONS):
        return "; it looks like data.format = 'chat'"
    known = PAIR_COLUMNS | TEXT_COLUMNS | {"text": ("text",), "preference": PREFERENCE_COLUMNS}
    fits = [repr(name) for name, columns in known.items() if row.columns.keys() >= {*columns}]
    return f"; it looks like data.format = {' or '.join(fits)}" if fits else ""


def read_documents(source: str) -> list[str]:
    """Reads the documents of a .txt file, or the column "text" of rows.

    Raises:
        FileNotFoundError, ValueError: as `read_rows`.
    """
    paths = local_files(source)
    if paths is None or any(path.suffix != ".txt" for path in paths):
        documents = [row.text("text") for row in read_rows(source, ("text",))]
    else:
        end = rf"(?m)^{re.escape(DOCUMENT_END)}[ \t]*$"
        documents = [text for path in paths for text in re.split(end, read_text(path))]
    documents = [text.strip("\n") for text in documents if text.strip()]
    if not documents:
        raise ValueError(f"{source} has no text")
    return documents


def local_files(source: str) -> list[Path] | None:
    """Returns the file, or the files that fit a pattern, in the order of their names.

    None if `source` can only be the id of a data set on the hub.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file.
    """
    accepted = f"a file ({', '.join(SUFFIXES)}) or the id of a data set on the hub"
    if not source.strip():
        raise ValueError(f"the data set {source!r} has no name: expected {accepted}")
    try:
        os.stat(source)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            name = f"the data set {shorten(source)}"
            reason = f"has a name that no file can have: expected {accepted}"
            raise ValueError(f"{name} {reason}") from None
    except ValueError:  # a null character
        pass
    path = Path(source)
    if not path.exists() and glob.has_magic(source):
        paths = [Path(name) for name in sorted(glob.glob(source, recursive=True))]
        paths = [path for path in paths if path.is_file()]
        if not paths:
            raise FileNotFoundError(f"{source}: no file fits this pattern")
    else:
        paths = [path]
    for path in paths:
        if path.is_file() and path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: expected {accepted}")
    if paths[0].is_file():
        return paths
    if path.is_dir():
        raise ValueError(
            f"{source} is a folder: expected {accepted}; a pattern such as {source}/*.jsonl names "
            "the files in it"
        )
    if path.suffix in SUFFIXES or not _HUB.fullmatch(source):
        raise FileNotFoundError(f"{source}: there is no such file")
    return None


def hub_names(source: str) -> tuple[list[str], str]:
    """The id with the configuration (if given), and the split of a data set on the hub.

    `local_files` has checked the source.
    """
    parts = _HUB.fullmatch(source)
    assert parts is not None
    return [name for name in (parts["id"], parts["config"]) if name], parts["split"] or "train"


def _json_rows(path: Path) -> list[Row]:
    data = _parse(read_text(path), path)
    if isinstance(data, _Refused):
        raise ValueError(f"{path} {data.reason}")
    if isinstance(data, dict) and "data" in data:
        data = data["data"]
    if not isinstance(data, list):
        raise ValueError(f'{path}: expected a list of objects, or an object with it as "data"')
    return [_json_row(f"{path}, row {number}", columns) for number, columns in enumerate(data, 1)]


def _jsonl_rows(path: Path) -> list[Row]:
    lines = enumerate(read_text(path).split("\n"), 1)
    return [line_row(path, number, line) for number, line in lines if line.strip()]


def line_row(path: Path, number: int, line: str) -> Row:
    """Parses a line of a .jsonl file. `number` counts from 1.

    Raises:
        ValueError: not JSON, or a key stands twice.
    """
    return _json_row(f"{path}, line {number}", _parse(line, path, number))


class _Refused(NamedTuple):
    """Stands in parsed JSON for a value that is refused."""

    reason: str


def _parse(text: str, path: Path, first_line: int = 1) -> Any:
    """Parses JSON. `_json_row` raises an error for what is `_Refused` in a row."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except json.JSONDecodeError as error:
        where = f"line {first_line + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"{path} is not JSON: {error.msg} at {where}") from None
    except RecursionError:
        raise ValueError(f"{path} is not JSON of rows: nested too deep") from None


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any] | _Refused:
    twice = _find_twice([name for name, _ in pairs])
    return dict(pairs) if twice is None else _Refused(f"names the key {shorten(twice)} twice")


def _integer(digits: str) -> int | _Refused:
    try:
        return int(digits)
    except ValueError:
        most = sys.get_int_max_str_digits()
        return _Refused(f"= {digits[:20]}...: expected a number of at most {most} digits")


def _find_twice(names: Sequence[str]) -> str | None:
    """Returns the first name that stands twice, or None."""
    if len(set(names)) == len(names):
        return None
    return next(name for name in names if names.count(name) > 1)


def _json_row(place: str, columns: Any) -> Row:
    try:
        _check_parsed(columns, place)
    except RecursionError:
        raise ValueError(f"{place} is nested too deep") from None
    return Row(place, columns)


def _check_parsed(value: Any, place: str, field: str = "") -> None:
    if isinstance(value, _Refused):
        raise ValueError(f"{place}{field} {value.reason}")
    if isinstance(value, dict):
        for name, part in value.items():
            _check_parsed(part, place, f": {name}")
    elif isinstance(value, list):
        for part in value:
            _check_parsed(part, place, field)


def _csv_rows(path: Path) -> list[Row]:
    text = io.StringIO(read_text(path), newline="")
    delimiter = "\t" if path.suffix == ".tsv" else ","
    # Strict: else an unclosed quote silently swallows the rest of the file.
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    rows: list[Row] = []
    header: list[str] | None = None
    start = 1
    limit = csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is too small for long documents
    try:
        for fields in reader:
            place, start = f"{path}, line {start}", reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = fields
                twice = _find_twice(header)
                if twice is not None:
                    raise ValueError(f"{place} names the column {shorten(twice)} twice")
            elif len(fields) != len(header):
                raise ValueError(
                    f"{place} has {len(fields)} fields: the first line names {len(header)} columns"
                )
            else:
                rows.append(Row(place, dict(zip(header, fields, strict=True))))
    except csv.Error as error:
        where = f"from line {start} to line {reader.line_num}"
        raise ValueError(f"{path} is not {path.suffix[1:]}: {error}, {where}") from None
    finally:
        csv.field_size_limit(limit)
    return rows


def _parquet_rows(path: Path) -> list[Row]:
    with open_parquet(path) as file:
        return table_rows(path, file.read())


@contextlib.contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """Opens a .parquet file, as a `pyarrow.parquet.ParquetFile`.

    Raises:
        ValueError: inside of the context, too, if the file is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # e.g. no permission: not the fault of the content
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a whole parquet file: {reason}") from None


def table_rows(path: Path, table: Any, first: int = 1) -> list[Row]:
    """Converts a table of pyarrow to rows.

    Args:
        path: its file.
        table: the table.
        first: number of its first row in the file.

    Raises:
        ValueError: a column stands twice, or a value has no counterpart in Python.
    """
    twice = _find_twice(table.column_names)
    if twice is not None:
        raise ValueError(f"{path} names the column {shorten(twice)} twice")
    names = table.column_names
    columns = [_column(path, *pair, first) for pair in zip(names, table.columns, strict=True)]
    return [
        Row(f"{path}, row {number}", dict(zip(names, cells, strict=True)))
        for number, cells in enumerate(zip(*columns, strict=True), first)
    ]


def _column(path: Path, name: str, cells: Iterable[Any], first: int) -> list[Any]:
    """Converts a column of a pyarrow table to values of Python."""
    values = []
    for number, cell in enumerate(cells, first):
        try:
            values.append(cell.as_py())
        except UnicodeDecodeError as error:
            reason = f"is not UTF-8 text (byte {error.start})"
            raise ValueError(f"{path}, row {number}: {name} {reason}") from None
        except (ValueError, OverflowError) as error:  # e.g. a date in the year 10000
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}, row {number}: {name} cannot be read: {reason}") from None
    return values
