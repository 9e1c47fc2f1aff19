"""A file of finished runs: the settings that they share, then one line of JSON for each run."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def resume(file: Path, settings: Any, kind: Any) -> dict[Any, dict[str, Any]]:
    """Starts the file, or reads its results.

    Removes half a line at the end, which is left if a run is killed while it writes.

    Args:
        file: the file of results.
        settings: a dataclass; runs with other settings are refused.
        kind: the named tuple that identifies a run.

    Raises:
        ValueError: the file has other settings; the message says which.
    """
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        _write(file, {"settings": dataclasses.asdict(settings)})
        return {}
    contents = file.read_bytes()
    whole = contents.rfind(b"\n") + 1
    if whole < len(contents):
        os.truncate(file, whole)
    if whole == 0:
        file.unlink()
        return resume(file, settings, kind)
    found, results = read(file, type(settings), kind)
    for field in dataclasses.fields(settings):
        old, new = (getattr(each, field.name) for each in (found, settings))
        if old != new:
            raise ValueError(
                f"{file} was begun with {field.name} = {old!r}, not {new!r}: expected the "
                "same, or another --output"
            )
    return results


def read(file: Path, settings: Any, kind: Any) -> tuple[Any, dict[Any, dict[str, Any]]]:
    """The settings of a file, and its finished runs.

    Args:
        file: the file of results.
        settings: class of the settings.
        kind: the named tuple that identifies a run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not one of ours; the message says which.
    """
    first, *lines = file.read_text().splitlines(keepends=True)
    try:
        fields = json.loads(first)["settings"]
        found = settings(**(fields | {"rates": tuple(fields["rates"])}))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: line 1 is not the settings: {error}") from error
    results: dict[Any, dict[str, Any]] = {}
    for number, text in enumerate(lines, 2):
        if not text.endswith("\n"):
            break  # killed while writing it
        try:
            row = json.loads(text)
            run = kind(*(row.pop(name) for name in kind._fields))
        except (ValueError, KeyError) as error:
            raise ValueError(f"{file}: line {number} is not a run: {error}") from error
        results[run] = row
    return found, results


def append(file: Path, run: Any, figures: Mapping[str, Any]) -> None:
    """Adds a finished run."""
    _write(file, run._asdict() | dict(figures))


def _write(file: Path, row: Mapping[str, Any]) -> None:
    with file.open("a") as out:
        out.write(json.dumps(row) + "\n")
        out.flush()
        os.fsync(out.fileno())
