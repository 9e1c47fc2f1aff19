"""Two processes never train in one folder at the same time."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from irqlora_jax.runs.lock import LOCK_FILE, locked

HOLDER = """
import os, sys
from pathlib import Path
from irqlora_jax.runs.lock import locked

with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
    os._exit(1)  # as a crash: nothing is cleaned up
"""


def test_the_second_is_refused_until_the_first_ends_however_it_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
        refused = pytest.raises(BlockingIOError, match=f"process {holder.pid} on .* writes there")
        with refused, locked(tmp_path):
            pass
        holder.communicate()
    assert (tmp_path / LOCK_FILE).is_file()  # the file alone is no lock
    with locked(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / LOCK_FILE).read_text()
        with pytest.raises(BlockingIOError), locked(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_stays_empty_is_not_left_behind(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    with pytest.raises(ValueError, match="refused"), locked(folder):
        raise ValueError("refused")
    assert list(tmp_path.iterdir()) == []
    with locked(folder):
        (folder / "config.json").write_text("{}")
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, said: list[str]) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        pass
    assert len(said) == 1 and "cannot be locked" in said[0] and "No locks available" in said[0]
