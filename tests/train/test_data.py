"""Epochs, several sources, streams and named chat templates through whole runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from irqlora_jax import hf
from irqlora_jax.config import TrainConfig
from irqlora_jax.data.templates import CHAT_TEMPLATES
from irqlora_jax.generate.conversation import Style, find_style
from irqlora_jax.runs.load import load_run
from irqlora_jax.runs.state import learning_rate
from irqlora_jax.train.finetune import run
from tests.models import WORLD
from tests.train.small_runs import (
    StoppedError,
    assert_same_run,
    at_step,
    config_for,
    crash,
    losses_of,
    rows_of,
    steps_of,
)

pytestmark = pytest.mark.usefixtures("optimizer_promotion", "shared_steps")
TRAIN = WORLD / "data" / "train.jsonl"


def split(folder: Path, *counts: int) -> list[str]:
    """Writes files with these numbers of rows."""
    lines = TRAIN.read_text().splitlines(keepends=True)
    files, first = [], 0
    for number, count in enumerate(counts):
        files.append(folder / f"{number}.jsonl")
        files[-1].write_text("".join(lines[first : first + count]))
        first += count
    return list(map(str, files))


def test_steps_follow_from_epochs() -> None:
    settings = TrainConfig(epochs=3, batch_size=4)
    assert settings.with_steps(10).total_steps == 8  # the last batch is begun
    assert TrainConfig(epochs=0.1, batch_size=1).with_steps(30).total_steps == 3
    assert TrainConfig(epochs=0.001, batch_size=4).with_steps(10).total_steps == 1
    assert TrainConfig().with_steps(10).total_steps == 10_000
    with pytest.raises(ValueError, match=r"train.epochs = 3: the number of steps is not known"):
        assert settings.total_steps


def test_a_run_of_epochs_ends_and_resumes_at_the_same_step(base, tmp_path, monkeypatch, said):
    settings = {"train__steps": None, "train__epochs": 1.5, "data__max_examples": 10}
    settings |= {"train__schedule": "linear", "data__eval": None, "train__warmup_steps": 1}
    whole, crashed = tmp_path / "whole", tmp_path / "crashed"
    assert run(config_for(base, whole, **settings)).steps == 4
    assert any("4 steps of 4 (1.5 epochs of 10 rows)" in line for line in said)
    stored = json.loads((whole / "config.json").read_text())["train"]
    assert (stored["steps"], stored["epochs"]) == (None, 1.5)
    # The schedule ends with the last step.
    rates = [row["learning_rate"] for row in rows_of(whole) if "loss" in row]
    schedule = learning_rate(TrainConfig(steps=4, schedule="linear", warmup_steps=1))
    wanted = [np.asarray(schedule(step)).item() for step in range(4)]
    assert rates == pytest.approx([rate * rates[1] / wanted[1] for rate in wanted])
    report = (whole / "report.html").read_text()
    assert "cannot be used" not in report
    with monkeypatch.context() as patch:
        at_step(patch, 4, crash)
        with pytest.raises(StoppedError):
            run(config_for(base, crashed, **settings))
    assert run(config_for(base, crashed, **settings)).steps == 4
    assert losses_of(crashed) == losses_of(whole)
    # Finished: nothing to do. Another number of epochs would be another schedule.
    run(config_for(base, whole, **settings))
    assert "finished, 4 of 4 steps" in said[-1]
    with pytest.raises(ValueError, match=r"train.epochs = 1.5 there, 2.0 here"):
        run(config_for(base, whole, **settings | {"train__epochs": 2}))


def test_epochs_count_packed_rows_and_steps_go_on(base: Path, tmp_path: Path) -> None:
    settings = {"train__steps": None, "train__epochs": 2, "data__packing": True}
    settings |= {"data__packing_length": 40, "data__max_examples": 12, "data__eval": None}
    folder = tmp_path / "run"
    steps = run(config_for(base, folder, **settings)).steps
    assert steps < 6  # packed rows are fewer than examples
    settings |= {"train__steps": steps + 1, "train__epochs": None}
    assert run(config_for(base, folder, **settings)).steps == steps + 1


def test_a_warmup_longer_than_the_epochs_is_refused(base: Path, tmp_path: Path) -> None:
    settings = {"train__steps": None, "train__epochs": 1, "data__max_examples": 8}
    with pytest.raises(ValueError, match=r"train.warmup_steps = 9: expected at most train.steps ="):
        run(config_for(base, tmp_path / "run", train__warmup_steps=9, **settings))
    assert not (tmp_path / "run" / "config.json").exists()


def test_weighted_streams_resume_bit_by_bit(base, tmp_path, monkeypatch) -> None:
    files = split(tmp_path, 3, 9)
    entries = [{"path": file, "weight": w} for file, w in zip(files, (2, 1), strict=True)]
    settings = {"data__train": entries, "data__streaming": True, "data__max_examples": None}
    settings |= {"data__eval": None}
    whole, crashed = tmp_path / "whole", tmp_path / "crashed"
    run(config_for(base, whole, **settings))
    with monkeypatch.context() as patch:
        at_step(patch, 5, crash)
        with pytest.raises(StoppedError):
            run(config_for(base, crashed, **settings))
    assert steps_of(crashed) == [2, 4]
    run(config_for(base, crashed, **settings))
    assert_same_run(whole, crashed)
    entries[0]["weight"] = 3
    with pytest.raises(ValueError, match=r"weights of data.train = \[2.0, 1.0\] there, \[3.0, 1.0"):
        run(config_for(base, whole, **settings))
    entries[0]["weight"] = 2
    split(tmp_path, 4, 8)  # the same rows, divided in another way
    with pytest.raises(ValueError, match=r"data.train = \[.*0.jsonl', .*\]: now 12 examples"):
        run(config_for(base, whole, **settings))


def test_a_streamed_run_learns_what_a_run_in_memory_learns(base: Path, tmp_path: Path) -> None:
    split(tmp_path, 5, 9)
    settings = {"data__train": str(tmp_path / "*.jsonl"), "data__eval_fraction": 0.2}
    settings |= {"data__eval": None, "train__steps": 3, "adapter__dropout": 0.0}
    kept, streamed = tmp_path / "kept", tmp_path / "streamed"
    run(config_for(base, kept, **settings))
    run(config_for(base, streamed, data__streaming=True, **settings))
    # Only the padding of the batches differs, and rounding with it.
    for one, other in zip(losses_of(kept), losses_of(streamed), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert "tokens" not in json.loads((streamed / "data.json").read_text())["train"]
    with open(tmp_path / "0.jsonl", "a") as file:
        file.write('{"input":"a","output":"b"}\n')
    with pytest.raises(ValueError, match=r"now 12 examples \(sha256 .*with 11 examples \(sha256"):
        run(config_for(base, streamed, data__streaming=True, **settings))


def test_a_named_template_goes_with_the_run(base: Path, tmp_path: Path) -> None:
    rows, folder = tmp_path / "talks.jsonl", tmp_path / "run"
    pairs = [json.loads(line) for line in TRAIN.read_text().splitlines()[:8]]
    talks = [
        [{"from": "human", "value": pair["input"]}, {"from": "gpt", "value": pair["output"]}]
        for pair in pairs
    ]
    rows.write_text("".join(json.dumps({"conversations": talk}) + "\n" for talk in talks))
    settings = {"data__train": str(rows), "data__eval": None, "data__format": "chat"}
    settings |= {"data__chat_template": "zephyr", "train__steps": 1, "evaluate__samples": ["a"]}
    run(config_for(base, folder, **settings))
    assert json.loads((folder / "config.json").read_text())["data"]["chat_template"] == "zephyr"
    found = load_run(folder)
    assert found.tokenizer.chat_template == CHAT_TEMPLATES["zephyr"]
    assert found.config is not None
    assert find_style(found.config, found.tokenizer) == Style("chat")
    merged = hf.export_merged(folder, tmp_path / "merged")
    assert load_run(merged).tokenizer.chat_template == CHAT_TEMPLATES["zephyr"]
    # Without the name, a resumed run uses the template of its tokenizer.
    settings |= {"data__chat_template": None, "train__steps": 2}
    assert run(config_for(base, folder, **settings)).steps == 2
    settings |= {"data__chat_template": "alpaca", "train__steps": 3}
    with pytest.raises(ValueError, match=r"now 8 examples, .* but the run .* started with 8"):
        run(config_for(base, folder, **settings))
