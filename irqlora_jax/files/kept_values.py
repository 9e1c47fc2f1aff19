"""Keeps a value for each matrix in a file, so that an interruption loses none."""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from irqlora_jax.files.checksums import check_seal, seal
from irqlora_jax.files.small import write_text
from irqlora_jax.text import shorten

Values = dict[tuple[int, str], Any]
"""Plain values by layer and projection."""
logger = logging.getLogger(__name__)


def read_values(file: Path, settings: Mapping[str, Any], name: str, of: str) -> Values:
    """Reads the values in a file, and rewrites it without its damaged lines. Makes a new file.

    Args:
        file: a line with the settings, then a line for each matrix.
        settings: everything that the values depend on, as plain values.
        name: of a value, in the lines.
        of: what the values are, for messages.

    Raises:
        ValueError: the file belongs to other settings, or is another kind of file.
        OSError: the file cannot be read or written.
    """
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else []
    rows = [row for row in map(_parse, lines) if row is not None]
    if lines:
        stored = rows[0].get("settings") if rows else None
        if not isinstance(stored, dict):
            raise ValueError(f"{file}: not the {of}; expected a new folder")
        for key in sorted(stored.keys() | settings.keys()):
            if stored.get(key) != settings.get(key):
                there, here = shorten(stored.get(key)), shorten(settings.get(key))
                raise ValueError(
                    f"output_dir = '{file.parent}': holds the {of} with other settings ({key} = "
                    f"{there} there, {here} here); expected a new folder, or the same settings"
                )
    values: Values = {(row["layer"], row["projection"]): row[name] for row in rows if name in row}
    # An interruption may have left an incomplete last line.
    head = json.dumps(seal({"settings": settings}))
    kept = [head, *(_line(*place, name, value) for place, value in values.items())]
    write_text(file, "\n".join(kept) + "\n")
    return values


@contextlib.contextmanager
def kept_in(file: Path) -> Iterator[None]:
    """Context of the work that appends values. An interruption says where they are."""
    try:
        yield
    except KeyboardInterrupt:
        logger.info(f"finished work is kept in {file}; the same command resumes from there")
        raise


def append_value(file: Path, layer: int, projection: str, name: str, value: Any) -> None:
    """Appends the value of one matrix."""
    with file.open("a", encoding="utf-8") as opened:
        opened.write(_line(layer, projection, name, value) + "\n")


def _line(layer: int, projection: str, name: str, value: Any) -> str:
    return json.dumps(seal({"layer": layer, "projection": projection, name: value}))


def _parse(line: str) -> dict[str, Any] | None:
    """The values of a line; None if it is damaged."""
    try:
        return check_seal(json.loads(line), "projection")
    except (ValueError, AttributeError, RecursionError):
        return None
