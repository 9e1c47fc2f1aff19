"""One process at a time that writes to a folder: a training, a quantization or an export."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

LOCK_FILE = "train.lock"
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context that makes the folder if needed, and in which no other process writes there.

    The lock is `flock` on a file of the folder. The system releases it when the process ends,
    however it ends. On some network file systems `flock` sees only the processes of the same
    machine. Where it does not work at all, a warning is shown and there is no lock.

    Raises:
        BlockingIOError: another process writes there.
    """
    made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _held(folder / LOCK_FILE):
            yield
    finally:
        with contextlib.suppress(OSError):  # a folder that is not empty stays
            for path in made:
                path.rmdir()


@contextlib.contextmanager
def _held(file: Path) -> Iterator[None]:
    descriptor = _lock(file)
    try:
        yield
    finally:
        if descriptor is not None:
            file.unlink(missing_ok=True)  # before another process can lock it
            os.close(descriptor)


def _lock(file: Path) -> int | None:
    """Returns the descriptor of the locked file, or None where locks do not work."""
    try:
        import fcntl
    except ImportError:  # Windows
        return _warn(file, "this system has no flock")
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise BlockingIOError(
                f"output_dir = '{file.parent}': {holder} writes there; expected another folder, or "
                "wait until it ends"
            ) from None
        except OSError as error:
            os.close(descriptor)
            return _warn(file, f"its file system has no locks: {error.strerror}")
        if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return descriptor
        os.close(descriptor)  # the process that held it has deleted it


def _warn(file: Path, reason: str) -> None:
    logger.warning(
        f"output_dir = '{file.parent}': cannot be locked ({reason}); start no second run there"
    )
