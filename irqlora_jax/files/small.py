"""Reads and writes small text files."""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from irqlora_jax.text import read_text


def write_text(path: Path, text: str) -> None:
    """Writes a small file atomically: completely or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    refuse_folder(path)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def refuse_folder(path: Path) -> None:
    """Refuses to write a file where a folder has its name, before anything else is written.

    Raises:
        IsADirectoryError: there is such a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder; expected a file", str(path))


def read_json(file: Path) -> Mapping[str, Any]:
    """Reads the object in a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, not valid JSON, or not an object.
    """
    values = parse_json(file)
    if not isinstance(values, dict):
        raise ValueError(f"{file}: a JSON {type(values).__name__}; expected an object")
    return values


def parse_json(file: Path) -> Any:
    """Reads the value in a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, or not valid JSON.
    """
    try:
        text = read_text(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file.parent}: no {file.name}") from None
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    except RecursionError:
        raise ValueError(f"{file}: not valid JSON: nested too deep") from None
