"""Damaged files of a run are named by whatever opens it."""

import shutil
from pathlib import Path

import pytest

from irqlora_jax.runs.load import load_run, scores
from tests.models import write_run


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("written") / "run")


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("content", ["", "\0\0\0", "{", "[]", "3"])
def test_damaged_files_are_named(folder: Path, content: str) -> None:
    for name in ("config.json", "tokenizer/tokenizer.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match=name) as error:
            load_run(folder)
        assert "\n" not in str(error.value)
        (folder / name).write_text(text)
    assert load_run(folder).step == 3


@pytest.mark.parametrize("name", ["config.json", "tokenizer/tokenizer_config.json"])
def test_a_run_without_a_file_is_no_other_model(folder: Path, name: str) -> None:
    """Without these, the base alone or another tokenizer would be used in silence."""
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}: no such file"):
        load_run(folder)


@pytest.mark.parametrize("content", ["", "\0\0\0", "{", "{}", "3", '[{"loss": 3}]', "[3]"])
def test_damaged_scores_are_named(folder: Path, content: str) -> None:
    assert scores(folder) == {}
    (folder / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results.json: "):
        scores(folder)
    (folder / "results.json").unlink()
    (folder / "eval-mmlu.json").write_text("[")
    with pytest.raises(ValueError, match=r"eval-mmlu.json: not valid JSON"):
        scores(folder)
