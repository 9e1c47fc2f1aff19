"""Text of files; text for users: tables, sizes and error messages about values."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_LONGEST = 200
"""Longest value in a message, in characters."""


def require(ok: bool, field: str, value: Any, accepted: str) -> None:
    """Raises an error about the value of a field unless `ok`.

    Raises:
        ValueError: not `ok`. The message names the field, the value (shortened if it is long) and
            what is expected.

    Examples:
        >>> require(False, "train.steps", 0, "a whole number of at least 1")
        Traceback (most recent call last):
        ValueError: train.steps = 0: expected a whole number of at least 1
    """
    if not ok:
        raise refusal(field, value, accepted)


def refusal(field: str, value: Any, accepted: str) -> ValueError:
    """Makes the error of `require`."""
    return ValueError(f"{field} = {shorten(value)}: expected {accepted}")


def shorten(value: Any, *, quoted: bool = True) -> str:
    """Writes a value for a message, shortened to 200 characters if it is longer.

    Args:
        value: the value.
        quoted: as Python writes it, with text in quotes. Else as text.

    Examples:
        >>> shorten("red"), shorten("red", quoted=False), len(shorten("red" * 100))
        ("'red'", 'red', 200)
    """
    shown = repr(value) if quoted else str(value)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 3]}..."


def read_text(path: Path) -> str:
    r"""Reads the text of a file, with "\r\n" as "\n". `text.split("\n")` gives its lines.

    Use no `str.splitlines()` on text of a user or a model: it also splits at "\u2028", "\x0c" and
    other characters that may stand inside of a record.

    Raises:
        ValueError: as `decode_text`.
        OSError: the file cannot be read.
    """
    return decode_text(path.read_bytes(), path).replace("\r\n", "\n")


def decode_text(data: bytes, source: object) -> str:
    r"""Decodes UTF-8. A byte order mark at the start is not part of the text.

    Args:
        data: the bytes.
        source: their file, for the error message.

    Raises:
        ValueError: not UTF-8; the message names the line and the byte.

    Examples:
        >>> decode_text(b"\xef\xbb\xbfred", "a.txt")
        'red'
        >>> decode_text(b"red\n\xff", "a.txt")
        Traceback (most recent call last):
        ValueError: a.txt, line 2 is not UTF-8 text (byte 4)
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{source}, line {line} is not UTF-8 text (byte {error.start})") from None
    return text.removeprefix("\N{BYTE ORDER MARK}")


def with_current_names(
    fields: Mapping[str, Any], renamed: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    """Replaces other names of fields, such as those of earlier versions, in a section.

    Examples:
        >>> renamed = {"search_steps": ("icq", "steps")}
        >>> with_current_names({"format": "nf3", "search_steps": 50}, renamed)
        {'format': 'nf3', 'icq': {'steps': 50}}
    """
    current = {name: value for name, value in fields.items() if name not in renamed}
    for old, (name, *option) in renamed.items():
        if old in fields:
            value = fields[old]
            current[name] = {**current.get(name, {}), option[0]: value} if option else value
    return current


def readable_size(size: int) -> str:
    """Formats a number of bytes in GiB or MiB.

    Examples:
        >>> readable_size(3 * 2**30), readable_size(1536 * 2**10)
        ('3.00 GiB', '1.50 MiB')
    """
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Formats a table with aligned columns. The first row is the header; the first column, names.

    Examples:
        >>> print(aligned([("task", "score"), ("boolq", "0.7")]))
        task   score
        -----  -----
        boolq    0.7
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def first_few(names: Sequence[str]) -> str:
    """The first three names, and the number of the others.

    Examples:
        >>> first_few(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")
