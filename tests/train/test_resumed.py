"""Runs that are resumed: finished, longer, from an earlier checkpoint, moved, or damaged."""

import html
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from irqlora_jax.runs.lock import locked
from irqlora_jax.train.finetune import run
from tests.models import WORLD
from tests.train.small_runs import (
    assert_same_run,
    config_for,
    evaluations_of,
    losses_of,
    steps_of,
)

pytestmark = pytest.mark.usefixtures("optimizer_promotion", "shared_steps")

CHANGES: dict[str, Any] = {
    "train__steps": 6,
    "train__eval_every": 2,
    "train__save_every": 2,
    "train__keep_checkpoints": 3,
    "data__max_examples": 16,
}


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory) -> Path:
    """A finished run with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with jax.numpy_dtype_promotion("standard"):
        run(config_for(base, folder, **CHANGES))
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.long
@pytest.mark.parametrize(("steps", "reason"), [(6, "finished, 6 of 6"), (3, "train.steps = 3")])
def test_a_finished_run_is_left_as_it_is(base, folder, said, steps: int, reason: str) -> None:
    before = contents(folder)
    result = run(config_for(base, folder, **CHANGES | {"train__steps": steps}))
    assert contents(folder) == before
    rows = json.loads((folder / "results.json").read_text())
    assert (result.steps, [row.loss for row in result.rows]) == (6, [row["loss"] for row in rows])
    assert reason in said[-1] and "nothing is changed" in said[-1]


def test_more_steps_are_recorded(base: Path, folder: Path) -> None:
    assert run(config_for(base, folder, **CHANGES | {"train__steps": 7})).steps == 7
    assert json.loads((folder / "config.json").read_text())["train"]["steps"] == 7
    assert '"steps": 7,' in html.unescape((folder / "report.html").read_text())


def test_an_earlier_checkpoint_goes_on(base: Path, finished: Path, folder: Path) -> None:
    newest = folder / "checkpoints" / "6" / "_CHECKPOINT_METADATA"
    newest.write_text("")
    config = config_for(base, folder, **CHANGES)
    before = contents(folder)
    with pytest.raises(ValueError, match=r"6/_CHECKPOINT_METADATA: not .*--resume_from 4 goes on"):
        run(config)
    with pytest.raises(FileNotFoundError, match=r"resume_from = 3: not in .*; there are 2, 4, 6"):
        run(config, resume_from=3)
    assert contents(folder) == before
    run(config, resume_from=2)
    assert steps_of(folder) == [2, 4, 6]
    assert [step for step, _ in losses_of(folder)] == [1, 2, 3, 4, 5, 6]
    assert_same_run(finished, folder)


def test_resume_from_needs_a_run(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"resume_from = 2: no run in .*; expected null"):
        run(config_for(base, tmp_path / "new"), resume_from=2)
    assert list(tmp_path.iterdir()) == []


DAMAGES: dict[str, Callable[[str], str]] = {
    "truncated": lambda text: text[: len(text) // 2],
    "other": lambda text: "[3]\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named(base: Path, folder: Path, damage: str) -> None:
    config = config_for(base, folder, **CHANGES)
    for name in (
        "config.json",
        "data.json",
        "metrics.jsonl",
        "results.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ):
        text = (folder / name).read_text()
        (folder / name).write_text(DAMAGES[damage](text))
        before = contents(folder)
        with pytest.raises(ValueError, match=name) as error:
            run(config)
        assert "\n" not in str(error.value), name
        assert contents(folder) == before
        (folder / name).write_text(text)


def test_a_second_process_is_refused_before_it_reads(base: Path, folder: Path) -> None:
    before = contents(folder)
    with locked(folder), pytest.raises(BlockingIOError, match="writes there"):
        run(config_for(base, folder, **CHANGES))
    assert contents(folder) == before


def test_the_same_files_under_another_path_go_on(base, folder, tmp_path, said) -> None:
    data = tmp_path / "moved.jsonl"
    shutil.copyfile(WORLD / "data" / "train.jsonl", data)
    moved = CHANGES | {"train__steps": 7, "data__train": str(data)}
    assert run(config_for(tmp_path / "elsewhere", folder, **moved)).steps == 7
    assert any("model = " in line and "elsewhere" in line for line in said)
    assert evaluations_of(folder)[-1][0] == 7
    data.write_text("".join(data.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=r"data.train = .*moved.jsonl': now 16 examples"):
        run(config_for(base, folder, **moved))
