"""Small files of a run: what is read is what was written, or the file is named."""

import json
from pathlib import Path

import pytest

from irqlora_jax.files.small import write_text
from irqlora_jax.runs import recorded
from irqlora_jax.runs.recorded import (
    RECORD_FILE,
    check_recorded,
    forget,
    record,
    write_recorded,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer").mkdir()
    for name in ("a.json", "b.jinja"):
        (tmp_path / "tokenizer" / name).write_text(name)
    record(tmp_path, ["tokenizer/a.json", "tokenizer/b.jinja"])
    write_recorded(tmp_path, "config.json", "{}")
    return tmp_path


def test_every_changed_byte_is_noticed_and_its_file_named(folder: Path) -> None:
    for name in ("config.json", "tokenizer/a.json", "tokenizer/b.jinja"):
        file = folder / name
        data = file.read_bytes()
        for place in range(len(data)):
            file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            with pytest.raises(ValueError, match=f"{name}: damaged or changed"):
                check_recorded(folder, name)
        file.unlink()
        with pytest.raises(FileNotFoundError, match=f"{name}: no such file, but"):
            check_recorded(folder, name)
        file.mkdir()
        with pytest.raises(ValueError, match=f"{name}: a folder; expected a file"):
            check_recorded(folder, name)
        file.rmdir()
        file.write_bytes(data)
        check_recorded(folder, name)


def test_a_folder_means_all_files_in_it_and_no_others(folder: Path) -> None:
    (folder / "config.json").write_text("changed")
    check_recorded(folder, "tokenizer/")
    check_recorded(folder, "results.json")  # never recorded
    (folder / "tokenizer" / "b.jinja").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.jinja"):
        check_recorded(folder, "tokenizer/")
    forget(folder, "tokenizer/")
    check_recorded(folder, "tokenizer/")


def test_nothing_is_written_where_a_folder_has_the_name(folder: Path) -> None:
    (folder / "a.json").mkdir()
    before = (folder / RECORD_FILE).read_bytes()
    with pytest.raises(IsADirectoryError, match=r"a folder; expected a file.*a\.json"):
        write_recorded(folder, "a.json", "{}")
    assert (folder / RECORD_FILE).read_bytes() == before
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("crash", [1, 2, 3])
def test_a_crash_while_writing_leaves_an_accepted_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, crash: int
) -> None:
    """Three files are written one after the other; the crash is before the first, second, third."""
    writes = 0

    def write(path: Path, text: str) -> None:
        nonlocal writes
        writes += 1
        if writes == crash:
            raise KeyboardInterrupt
        write_text(path, text)

    monkeypatch.setattr(recorded, "write_text", write)
    with pytest.raises(KeyboardInterrupt):
        write_recorded(folder, "config.json", '{"new": 1}')
    check_recorded(folder, "config.json")
    monkeypatch.undo()
    write_recorded(folder, "config.json", "{}")
    assert len(json.loads((folder / RECORD_FILE).read_text())["files"]["config.json"]) == 1


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"files": {"config.json": [null]}}', "\x00"])
def test_damaged_checksums_are_named(folder: Path, text: str) -> None:
    (folder / RECORD_FILE).write_text(text)
    with pytest.raises(ValueError, match=f"{RECORD_FILE}: damaged"):
        check_recorded(folder, "config.json")
    (folder / RECORD_FILE).unlink()
    (folder / "config.json").write_text("changed on purpose")
    check_recorded(folder, "config.json")
