"""Makes an output folder appear only when it is complete."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from irqlora_jax.runs.lock import LOCK_FILE, locked


@contextlib.contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `folder` at the end or deleted on failure."""
    # Put it in the nearest parent that exists, so that a failure leaves no empty parents.
    parent = next(path for path in folder.parents if path.exists())
    aside = parent / f"{folder.name}.part"
    with contextlib.ExitStack() as stack:
        try:
            # A killed export leaves its lock file, which tells its folder from others.
            if aside.exists() and not (aside.is_dir() and _is_left_over(aside)):
                raise FileExistsError(
                    f"output_dir = '{folder}': {aside} exists and is of no export; delete it, or "
                    "choose another name"
                )
            stack.enter_context(locked(aside))
        except (FileExistsError, BlockingIOError):
            raise
        except OSError as error:
            reason = f"cannot be written ({error.strerror})"
            raise OSError(f"output_dir = '{folder}': {reason}") from error
        with _renamed(aside, folder):
            yield aside


def _is_left_over(aside: Path) -> bool:
    names = {path.name for path in aside.iterdir()}
    return not names or LOCK_FILE in names


@contextlib.contextmanager
def _renamed(aside: Path, folder: Path) -> Iterator[None]:
    """Empties a locked folder, and renames it to `folder` at the end or deletes it on failure."""
    try:
        for path in aside.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK_FILE:
                path.unlink()
        yield
        (aside / LOCK_FILE).unlink(missing_ok=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.replace(aside, folder)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError) and error.errno and not error.filename:  # from a write
            reason = f"cannot be written ({error.strerror})"
            raise OSError(f"output_dir = '{folder}': {reason}") from error
        raise
