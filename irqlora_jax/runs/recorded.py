"""Checksums of the small files of a run or a base, in its checksums.json.

The arrays have checksums of their own (base.safetensors, checkpoints). This file has them for the
configuration, the tokenizer, the scores and the other small files: a damaged one could still be
read, with other values. Folders of earlier versions have no checksums.json, and their files are not
checked. Nor are they after the file is deleted, e.g. to change a tokenizer on purpose.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from irqlora_jax.files.checksums import bytes_checksum, check_seal, seal
from irqlora_jax.files.small import read_json, refuse_folder, write_text

RECORD_FILE = "checksums.json"
_FILES = "files"


def write_recorded(folder: Path, name: str, text: str) -> None:
    """Writes a small file atomically, and its checksum.

    A crash on the way leaves a file that is accepted: until the new file is complete, the old and
    the new checksum are both recorded.

    Raises:
        OSError: the file cannot be written.
    """
    refuse_folder(folder / name)
    known, new = _read(folder), bytes_checksum(text.encode())
    _write(folder, known | {name: [*known.get(name, ()), new]})
    write_text(folder / name, text)
    _write(folder, known | {name: [new]})


def record(folder: Path, names: Iterable[str]) -> None:
    """Records the checksums of files that are there."""
    found = {name: [bytes_checksum((folder / name).read_bytes())] for name in names}
    _write(folder, _read(folder) | found)


def forget(folder: Path, name: str) -> None:
    """Drops the checksums of a file, or of all files below a folder ("/" at its end)."""
    known = _read(folder)
    kept = {each: values for each, values in known.items() if not _is_in(each, name)}
    if kept != known:
        _write(folder, kept)


def recorded(folder: Path, name: str) -> list[str]:
    """The recorded files below a folder ("/" at its end).

    Raises:
        ValueError: checksums.json is damaged.
    """
    return [each for each in _read(folder) if _is_in(each, name)]


def check_recorded(folder: Path, name: str) -> None:
    """Checks a file, or every recorded file below a folder, if there are checksums of it.

    Args:
        folder: of the run or base.
        name: path of the file in it, or of a folder with "/" at its end.

    Raises:
        FileNotFoundError: a recorded file is missing.
        ValueError: a file is not the recorded one, or checksums.json is damaged.
        OSError: a file cannot be read.
    """
    for each, accepted in _read(folder).items():
        if not _is_in(each, name):
            continue
        file = folder / each
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such file, but {RECORD_FILE} lists it")
        if file.is_dir():
            raise ValueError(f"{file}: a folder; expected a file")
        if bytes_checksum(file.read_bytes()) not in accepted:
            raise ValueError(
                f"{file}: damaged or changed, its checksum in {RECORD_FILE} does not match; "
                f"expected the file as it was (or no {RECORD_FILE}, to use it unchecked)"
            )


def _is_in(each: str, name: str) -> bool:
    return each == name or (name.endswith("/") and each.startswith(name))


def _read(folder: Path) -> dict[str, list[str]]:
    file = folder / RECORD_FILE
    if not file.is_symlink() and not file.exists():
        return {}
    try:
        files = check_seal(read_json(file), _FILES)[_FILES]
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"{file}: damaged; expected the file as it was (or none, to use the others unchecked)"
        ) from error
    return files


def _write(folder: Path, files: dict[str, list[str]]) -> None:
    write_text(folder / RECORD_FILE, json.dumps(seal({_FILES: files}), indent=1) + "\n")
