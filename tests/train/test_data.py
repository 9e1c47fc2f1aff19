"""Epochs, several sources, streams and named chat templates through whole runs."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from irqlora_jax import hf
from irqlora_jax.config import TrainConfig
from irqlora_jax.data.templates import CHAT_TEMPLATES
from irqlora_jax.generate.conversation import Style, find_style
from irqlora_jax.runs.folder import check_folder, fingerprint, save_config
from irqlora_jax.runs.load import load_run
from irqlora_jax.runs.state import learning_rate
from irqlora_jax.sharding import make_mesh
from irqlora_jax.train.finetune import run
from irqlora_jax.train.job import Job, read_job
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


def job_for(base: Path, folder: Path, **changes: Any) -> Job:
    config = config_for(base, folder, **changes)
    with jax.set_mesh(make_mesh(config.mesh, config.train.rows)):
        return read_job(config, base)


def test_epochs_count_packed_rows(base: Path, tmp_path: Path) -> None:
    settings = {"train__steps": None, "train__epochs": 2, "data__packing": True}
    settings |= {"data__packing_length": 40, "data__max_examples": 12, "data__eval": None}
    job = job_for(base, tmp_path / "run", **settings)
    assert job.batches.rows < 12
    assert job.config.train.total_steps == math.ceil(2 * job.batches.rows / 4) < 6
    assert job.config.train.epochs is None and job.stored_config.train.epochs == 2
    assert job.stored_config == config_for(base, tmp_path / "run", **settings)


def test_epochs_and_steps_may_change_with_a_constant_schedule(base: Path, tmp_path: Path) -> None:
    """Here only the configuration of a run is there."""
    settings: dict[str, Any] = {"train__steps": None, "train__epochs": 2}
    others = [{"train__epochs": 3}, {"train__steps": 9, "train__epochs": None}]
    for schedule in ("constant", "cosine"):
        folder = tmp_path / schedule
        folder.mkdir()
        settings["train__schedule"] = schedule
        save_config(folder, config_for(base, folder, **settings))
        for other in others:
            config = config_for(base, folder, **settings | other)
            if schedule == "constant":
                assert check_folder(folder, config) == config_for(base, folder, **settings)
            else:
                with pytest.raises(ValueError, match=r"train.epochs = 2.0 there"):
                    check_folder(folder, config)


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
    for entry, weight in zip(entries, (0.6, 0.3), strict=True):  # the same shares
        entry["weight"] = weight
    check_folder(whole, config_for(base, whole, **settings))
    entries[1]["weight"] = 1
    entries[0]["weight"] = 2
    split(tmp_path, 4, 8)  # the same rows, divided in another way
    with pytest.raises(ValueError, match=r"data.train = \[.*0.jsonl', .*\]: now 12 examples"):
        run(config_for(base, whole, **settings))


def test_a_streamed_job_has_the_batches_of_one_in_memory(base: Path, tmp_path: Path) -> None:
    split(tmp_path, 5, 9)
    settings = {"data__train": str(tmp_path / "*.jsonl"), "data__eval_fraction": 0.2}
    settings |= {"data__eval": None}
    kept = job_for(base, tmp_path / "run", **settings)
    streamed = job_for(base, tmp_path / "run", data__streaming=True, **settings)
    assert streamed.batches.rows == kept.batches.rows == 11
    for step in (4, 0):
        one, other = kept.batches[step], streamed.batches[step]
        width = one["tokens"].shape[1]  # the streamed one has more padding
        for name, values in other.items():
            np.testing.assert_array_equal(values[:, :width], one[name])
            assert not values[:, width:].any()
    found = [fingerprint(job.examples, job.eval_examples, job.parts) for job in (kept, streamed)]
    assert found[0]["eval"] == found[1]["eval"]
    assert found[1]["train"].keys() == {"examples", "sha256"}


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
    known = json.loads((folder / "data.json").read_text())
    for name in (None, "alpaca"):
        config = config_for(base, folder, **settings | {"data__chat_template": name})
        with jax.set_mesh(make_mesh(config.mesh, config.train.rows)):
            job = read_job(config, folder)
        assert (fingerprint(job.examples, []) == known) == (name is None)
