"""What can be read of the checkpoints of a run without orbax: their folders and metadata."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from irqlora_jax.files.checksums import check_seal
from irqlora_jax.files.small import parse_json, read_json
from irqlora_jax.runs.recorded import forget, record, recorded

METADATA = "_CHECKPOINT_METADATA"
_ALL = "checkpoints/"
_PATTERNS = "[]*?\\"  # orbax takes paths with these for patterns


def check_path(run: Path) -> None:
    """Checks that the checkpoints of a run will be found again.

    Raises:
        ValueError: orbax would take the path of the folder for a pattern.
    """
    path = run.absolute().as_posix()
    if set(path) & set(_PATTERNS):
        wrong = " ".join(_PATTERNS)
        raise ValueError(f"output_dir = '{path}': expected a path without the characters {wrong}")


def record_end(run: Path, step: int) -> None:
    """Records that a run ended with the checkpoint of a step, for `check_end`."""
    record(run, [f"{_ALL}{step}/{METADATA}"])


def forget_end(run: Path) -> None:
    """Forgets with which checkpoint a run ended, since it goes on."""
    forget(run, _ALL)


def check_end(run: Path) -> None:
    """Checks that the checkpoint with which a run ended is there: else an older one is the last,
    and perhaps the best.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: checksums.json is damaged.
    """
    for name in recorded(run, _ALL):
        folder = (run / name).parent
        if not folder.exists():
            raise FileNotFoundError(
                f"{folder}: no such folder, but the run ended with this checkpoint; expected it, "
                "or the step of another one (train --resume_from STEP, --checkpoint STEP)"
            )


def newest_log(run: Path) -> tuple[int, str] | None:
    """The step of the newest checkpoint of a run, and the checksum of the lines of metrics.jsonl
    up to it. None if there is no such checksum, or it cannot be read."""
    folders = [path for path in run.glob("checkpoints/*") if path.name.isdecimal()]
    newest = max(folders, key=lambda path: int(path.name), default=None)
    if newest is None:
        return None
    with contextlib.suppress(OSError, ValueError):
        log = read_metadata(newest).log
        return None if log is None else (int(newest.name), log)
    return None


def check_folders(checkpoints: Path) -> None:
    """Checks what orbax would stumble over while it lists the checkpoints."""
    steps = [path for path in checkpoints.glob("*") if path.name.isdecimal()]
    for path in (checkpoints, *steps):
        if (path.exists() or path.is_symlink()) and not path.is_dir():
            raise NotADirectoryError(f"{path}: not a folder; expected checkpoints there")
    for path in steps:
        metadata: Any = {}
        with contextlib.suppress(OSError, ValueError):  # reported for the checkpoint that is read
            metadata = parse_json(path / METADATA)
        if not isinstance(metadata, dict):
            raise ValueError(
                f"{path / METADATA}: damaged; expected a JSON object; "
                f"without the folder {path} the checkpoint before is used"
            )


class Metadata(NamedTuple):
    """What `Checkpoints.save` was told about a checkpoint.

    Attributes:
        loss: evaluation loss; None if it was not evaluated.
        arrays: checksum of every array by its path; empty in earlier versions.
        log: checksum of the lines of metrics.jsonl so far; None if unknown.
    """

    loss: float | None
    arrays: Mapping[str, str]
    log: str | None


def read_metadata(folder: Path) -> Metadata:
    """Reads what `Checkpoints.save` was told about a checkpoint.

    Raises:
        OSError, ValueError: there is no metadata, or it is damaged; the message names the file.
    """
    file = folder / METADATA
    stored = read_json(file).get("custom_metadata")
    try:
        if not isinstance(stored, dict):
            raise ValueError("no custom_metadata")
        values = check_seal(stored, "arrays")
        found = Metadata(values.get("eval_loss"), values.get("arrays", {}), values.get("log"))
        if not isinstance(found.loss, float | None) or not isinstance(found.arrays, dict):
            raise ValueError("values of other types")
    except ValueError as error:
        raise ValueError(f"{file}: damaged ({error})") from error
    return found
