"""Runs that stop, go on, end early, diverge and refuse."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from irqlora_jax import hf
from irqlora_jax.config import Config
from irqlora_jax.data import load_examples, make_batches
from irqlora_jax.evaluate import score_questions, scores
from irqlora_jax.evaluate.perplexity import row_nll
from irqlora_jax.evaluate.scores import Row, Scorer
from irqlora_jax.files.hub import read_config
from irqlora_jax.generate.decode import generate
from irqlora_jax.runs.checkpoints import Checkpoints
from irqlora_jax.runs.load import load_run
from irqlora_jax.runs.state import make_model
from irqlora_jax.sharding import make_mesh
from irqlora_jax.train import loop
from irqlora_jax.train.finetune import run
from irqlora_jax.train.stop import Stop
from tests.models import (
    QUICKSTART,
    ROOT,
    TEMPLATE,
    WORLD,
    as_flags,
    assert_same,
    byte_tokenizer,
    gguf_tokens,
    tiny_llama,
    write_gguf,
)
from tests.train.small_runs import (
    StoppedError,
    assert_same_run,
    at_step,
    config_for,
    crash,
    evaluations_of,
    losses_of,
    no_training,
    rows_of,
    settings_for,
    steps_of,
)

pytestmark = pytest.mark.usefixtures("optimizer_promotion", "shared_steps")


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with jax.numpy_dtype_promotion("standard"):
        run(config_for(base, folder))
    return folder


def test_a_crashed_run_goes_on_bit_by_bit(base, whole, tmp_path, monkeypatch, said) -> None:
    """Crashed in the middle of step 5, after the checkpoint of step 4."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 5, crash)
        with pytest.raises(StoppedError):
            run(config_for(base, folder))
    result = run(config_for(base, folder))
    assert any("resuming from step 4" in line for line in said)
    assert result.steps == 6 and [step for step, _ in losses_of(folder)] == [1, 2, 3, 4, 5, 6]
    assert_same_run(whole, folder)
    results = [json.loads((f / "results.json").read_text()) for f in (whole, folder)]
    assert results[0][0].pop("seconds") != results[1][0].pop("seconds")
    assert results[0] == results[1]


def test_sigterm_saves_and_the_run_goes_on_bit_by_bit(
    base, whole, tmp_path, monkeypatch, said
) -> None:
    """The signal comes while step 4 is computed, so that is the last one; nothing is evaluated."""
    folder = tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as ended:
            run(config_for(base, folder, train__save_every=0))
    assert ended.value.code == 143 and steps_of(folder) == [4]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert "SIGTERM: ended after step 4 of 6" in said[-1] and "same command" in said[-1]
    assert not (folder / "results.json").exists()
    run(config_for(base, folder))
    assert_same_run(whole, folder)


def test_ctrl_c_on_the_command_line(base: Path, tmp_path: Path) -> None:
    """A process of its own, interrupted when its first steps are logged."""
    folder, other = tmp_path / "run", tmp_path / "other"
    changes = {"train__steps": 4000, "train__save_every": 0, "train__schedule": "constant"}
    flags = as_flags(settings_for(base, folder, **changes))
    command = [sys.executable, "train.py", f"--config={QUICKSTART}", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not (folder / "metrics.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130, err.decode()
    assert b"SIGINT: ended after step" in out and b"Traceback" not in err
    assert b"send the signal again" in err and b"PyTorch" not in err
    (step,) = steps_of(folder)
    run(config_for(base, folder, **changes | {"train__steps": step + 2}))
    run(config_for(base, other, **changes | {"train__steps": step + 2}))
    assert steps_of(folder) == [step, step + 2] and steps_of(other) == [step + 2]
    assert_same_run(folder, other)


@pytest.mark.parametrize("moment", range(1, 9))
def test_the_last_state_is_saved_whenever_the_signal_is_seen(
    base, tmp_path, monkeypatch, said, moment
) -> None:
    class Late(Stop):
        """Becomes known when it is asked for the so-manyth time."""

        asked = 0

        @property
        def signal(self):
            self.asked += 1
            return signal.SIGINT if self.asked >= moment else None

        @signal.setter
        def signal(self, value):
            pass

    monkeypatch.setattr(loop, "Stop", Late)
    folder = tmp_path / "run"
    with pytest.raises(SystemExit):
        run(config_for(base, folder, train__eval_every=1, train__save_every=0))
    last = losses_of(folder)[-1][0]
    assert f"ended after step {last} of 6" in said[-1] and steps_of(folder)[-1] == last


def test_the_second_signal_ends_at_once(base, tmp_path, monkeypatch) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    folder = tmp_path / "run"
    at_step(monkeypatch, 3, twice)
    with pytest.raises(KeyboardInterrupt):
        run(config_for(base, folder))
    assert steps_of(folder) == [2]


@pytest.mark.long
def test_several_devices_are_used_and_another_mesh_may_go_on(
    base, whole, tmp_path, monkeypatch, said
) -> None:
    """As many as divide the batch by default, then one, then two that split the weights."""
    folder = tmp_path / "run"
    for step, mesh in ((3, {"mesh__data": None}), (5, {})):
        with monkeypatch.context() as patch, pytest.raises(StoppedError):
            at_step(patch, step, crash)
            run(config_for(base, folder, **mesh))
    assert "4 of 8 devices (data 4, fsdp 1, tensor 1)" in said[0]
    run(config_for(base, folder, mesh__fsdp=2))
    assert [step for step, _ in losses_of(folder)] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(losses_of(folder), losses_of(whole), rtol=1e-5)
    np.testing.assert_allclose(evaluations_of(folder), evaluations_of(whole), rtol=1e-5)


@pytest.fixture(scope="module")
def worsening(base: Path, tmp_path_factory) -> Path:
    """A run that is evaluated at every step and soon gets worse."""
    folder = tmp_path_factory.mktemp("worsening") / "run"
    with jax.numpy_dtype_promotion("standard"):
        run(config_for(base, folder, **WORSENING))
    return folder


WORSENING = {
    "train__steps": 12,
    "train__learning_rate": 0.02,
    "train__save_every": 0,
    "train__eval_every": 1,
    "train__early_stopping": 3,
    "train__keep_checkpoints": 1,
    "evaluate__samples": ["question what is", "question"],
    "evaluate__sample_tokens": 4,
}


@pytest.mark.long
def test_early_stopping_and_the_best_checkpoint(
    base: Path, worsening: Path, said: list[str]
) -> None:
    losses = [loss for _, loss in evaluations_of(worsening)]
    best = losses.index(min(losses)) + 1
    assert 1 <= best < 9 and len(losses) == best + 3  # by definition of the patience
    # The best is kept beside the newest one, and evaluates to what was said of it.
    assert steps_of(worsening) == [best, best + 3]
    with Checkpoints(worsening) as checkpoints:
        assert checkpoints.best() == best and checkpoints.find("best") == best
        assert [checkpoints.loss(step) for step in steps_of(worsening)] == [min(losses), losses[-1]]
    assert load_run(worsening, checkpoint="best").step == best
    last, better = json.loads((worsening / "results.json").read_text())
    assert (last["model"], last["loss"]) == ("finetuned", losses[-1])
    assert (better["model"], better["loss"]) == (f"finetuned, best (step {best})", min(losses))
    # The same command finds nothing more to do.
    result = run(config_for(base, worsening, **WORSENING))
    assert (result.steps, result.best) == (best + 3, best)
    assert any(f"ended early, after step {best + 3} of 12: 3 evaluations" in s for s in said)
    assert [loss for _, loss in evaluations_of(worsening)] == losses


@pytest.mark.long
def test_patience_survives_a_crash(base, worsening, tmp_path, monkeypatch) -> None:
    """Crashed after two evaluations without a better loss: the third ends it, not three more."""
    last = evaluations_of(worsening)[-1][0]
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, last, crash)
        with pytest.raises(StoppedError):
            run(config_for(base, folder, **WORSENING | {"train__save_every": 1}))
    result = run(config_for(base, folder, **WORSENING))
    assert result.steps == last
    assert_same_run(worsening, folder)


@pytest.mark.long
def test_the_log_has_speed_memory_and_samples(worsening: Path) -> None:
    steps = [row for row in rows_of(worsening) if "loss" in row]
    assert all(row["learning_rate"] == pytest.approx(0.02) for row in steps)
    assert all(row["grad_norm"] > 0 and row["peak_memory"] > 2**20 for row in steps)
    assert "tokens_per_second" not in steps[0]  # that is when the program was compiled
    assert all(row["tokens_per_second"] > 0 for row in steps[1:])
    assert all(0 <= row["device_share"] <= 1 for row in steps[1:])
    model = load_run(worsening)
    prompt = model.tokenizer("question what is")["input_ids"]
    eos = model.model.config.eos_token_ids
    (new,) = generate(model.model, model.variables, [prompt], 4, eos_token_ids=eos)
    evaluated = [row for row in rows_of(worsening) if "eval_loss" in row]
    for row in evaluated:
        assert row["eval_tokens_per_second"] > 0
        assert [s["prompt"] for s in row["samples"]] == ["question what is", "question"]
    answer = evaluated[-1]["samples"][0]["answer"]
    assert answer.split() == model.tokenizer.decode(new, skip_special_tokens=True).split() != []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train__learning_rate": 0.5}, ["train.learning_rate = 0.001 there, 0.5 here"]),
        ({"train__schedule": "cosine"}, ["train.schedule = 'constant' there, 'cosine' here"]),
        ({"adapter__rank": 4}, ["adapter.rank = 8 there, 4 here"]),
        ({"data__max_examples": 32}, ["data.max_examples = 64 there, 32 here"]),
    ],
)
def test_another_run_in_the_folder_is_refused(base, whole, changes: dict, words: list[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    with pytest.raises(ValueError, match="holds another run") as error:
        run(config_for(base, whole, **changes))
    assert all(word in str(error.value) for word in words)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_other_contents_of_the_data_file_are_refused(base, tmp_path, monkeypatch) -> None:
    no_training(monkeypatch)
    data, folder = tmp_path / "data.jsonl", tmp_path / "run"
    lines = (WORLD / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:16]))
    changes = {"data__train": str(data), "data__eval": None, "train__steps": 1}
    run(config_for(base, folder, **changes))
    data.write_text("".join(lines[:15] + lines[16:17]))
    with pytest.raises(ValueError, match=r"data.train = .*data.jsonl': now 16 examples") as error:
        run(config_for(base, folder, **changes))
    assert str(error.value).count("sha256") == 2 and "output_dir" in str(error.value)
    # The same rows in another form are the same data.
    rows = [json.loads(line) for line in lines[:16]]
    data.write_text("\n\n".join(json.dumps(dict(reversed(row.items()))) for row in rows))
    assert run(config_for(base, folder, **changes)).steps == 1


def test_the_original_model_may_be_gone(base, tmp_path, monkeypatch) -> None:
    no_training(monkeypatch)
    copy, folder = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(base, copy)
    changes = {"data__eval": None}
    run(config_for(copy, folder, **changes, train__steps=1))
    shutil.rmtree(copy)
    assert run(config_for(copy, folder, **changes, train__steps=2)).steps == 2
    with pytest.raises(FileNotFoundError, match=r"evaluate.baselines = True: needs .* model = "):
        run(config_for(copy, folder, **changes, evaluate__baselines=True))


DIVERGING = {"train__clip_norm": None, "train__save_every": 1}


def test_a_nan_loss_names_step_examples_and_checkpoint(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = config_for(base, folder, train__learning_rate=1e30, **DIVERGING)
    with pytest.raises(FloatingPointError) as error:
        run(config)
    (failed,) = set(range(1, 7)) - {step for step, _ in losses_of(folder)} - {3, 4, 5, 6}
    assert f"loss = nan at step {failed}, in a batch" in str(error.value)
    examples = load_examples(config.data.train, config.data, load_run(folder).tokenizer)
    indices = sorted(make_batches(examples, config.data, 4, config.seed).indices(failed - 1))
    assert f"examples {', '.join(map(str, indices))} (counted from 0)" in str(error.value)
    assert f"the last checkpoint is of step {failed - 1}" in str(error.value)
    assert steps_of(folder) == [failed - 1]


@pytest.mark.long
def test_a_state_that_is_not_finite_is_never_saved(base: Path, tmp_path: Path) -> None:
    """The first loss and gradient are finite, but float32 cannot hold the update."""
    folder = tmp_path / "run"
    with pytest.raises(FloatingPointError, match="not finite after step 1; there is no checkpoint"):
        rates = {"train__learning_rate": 1e38, "train__weight_decay": 1e4}
        run(config_for(base, folder, **rates, **DIVERGING))
    assert steps_of(folder) == [] and np.isfinite(losses_of(folder)).all()


@pytest.mark.long
def test_packed_and_half_precision(base: Path, tmp_path: Path) -> None:
    """Packing and bfloat16 adapters through a whole run: the loss falls."""
    folder = tmp_path / "run"
    changes = {
        "data__packing": True,
        "data__packing_length": 64,
        "adapter__dtype": "bfloat16",
        "data__eval": None,
        "train__steps": 30,
        "train__learning_rate": 0.01,
    }
    run(config_for(base, folder, **changes))
    losses = [loss for _, loss in losses_of(folder)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3
    variables = load_run(folder).variables
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables["params"])} == {"bfloat16"}


class Named(Scorer):
    """Keeps the names of the rows and measures nothing."""

    def row(self, name, *rest):
        return Row(name, None, None, None, 0.0, None)


@pytest.mark.parametrize(
    ("calibration", "symmetric", "quantized"),
    [
        ("none", False, ["plain nf3"]),
        ("icq", False, ["plain nf3", "nf3 + ICQ"]),
        ("joint", False, ["plain nf3", "nf3 + ICQ", "nf3 + joint"]),
        ("joint", True, ["plain nf3", "nf3 + ICQ", "nf3 + joint, no shifts"]),
    ],
)
def test_baselines_show_the_papers_calibration_too(
    monkeypatch, calibration: str, symmetric: bool, quantized: list[str]
) -> None:
    monkeypatch.setattr(scores, "load_base", lambda source, quant, **_: ({}, quant))
    quant = {"quant__calibration": calibration, "quant__symmetric": symmetric}
    config = config_for(WORLD / "base-small", Path("run"), **quant)
    model = make_model(read_config(WORLD / "base-small"), config.adapter, config.train)
    mesh = make_mesh(config.mesh, config.train.batch_size)
    rows = scores.baselines(config, model, {}, mesh, Named([], [], 1, 64, 1), None)
    assert [row.model for row in rows] == ["full precision", *quantized]


@pytest.mark.long
def test_questions_and_baselines_make_the_table(tmp_path, monkeypatch) -> None:
    no_training(monkeypatch)
    questions = str(WORLD / "data" / "questions.jsonl")
    asked = {"evaluate__questions": questions, "evaluate__max_questions": 64}
    result = run(
        config_for(
            WORLD / "base-small",
            tmp_path / "run",
            train__steps=1,
            evaluate__baselines=True,
            **asked,
        )
    )
    names = [row.model for row in result.rows]
    assert names == ["full precision", "plain nf3", "plain nf3, finetuned"]
    exact, plain, tuned = (dataclasses.asdict(row) for row in result.rows)
    assert exact["entropy"] is None and exact["bits"] == 32
    assert plain["entropy"] == tuned["entropy"] and 2 < plain["entropy"] < 3 < plain["bits"] < 4
    assert exact["loss"] < plain["loss"] and exact["accuracy"] > plain["accuracy"] > 0.3


def test_evaluations_take_as_many_rows_as_a_forward_pass_of_the_training(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise they would need the memory that accumulation saves."""
    seen: list[tuple[int, int]] = []

    def record(model: Any, variables: Any, batch: Any, chunk: int) -> Any:
        seen.append(batch["tokens"].shape)
        return row_nll(model, variables, batch, chunk)

    def record_scores(model: Any, variables: Any, questions: Any, size: int) -> Any:
        seen.append((size, max(len(q.prompt) for q in questions)))
        return score_questions(model, variables, questions, size)

    no_training(monkeypatch)
    monkeypatch.setattr(sys.modules[row_nll.__module__], "row_nll", record)
    monkeypatch.setattr("irqlora_jax.evaluate.scores.score_questions", record_scores)
    changes = {"train__batch_size": 8, "train__accumulation": 4, "train__steps": 1}
    questions = {"evaluate__questions": str(WORLD / "data" / "questions.jsonl")}
    config = config_for(base, tmp_path / "run", **changes, **questions, evaluate__max_questions=8)
    run(config)
    longest = config.data.source_length + config.data.target_length
    assert len(seen) > 1 and seen[0][0] == 2
    assert all(rows * length <= 2 * longest for rows, length in seen)


@pytest.mark.long
def test_a_gguf_file_is_needed_only_until_the_base_is_written(tmp_path, monkeypatch) -> None:
    no_training(monkeypatch)
    # All linear layers have the same shape, which is compiled once.
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_key_value_heads": 4}
    llama = tiny_llama(vocab_size=258, max_position_embeddings=128, bos_token_id=0, **sizes)
    file, folder = tmp_path / "model.gguf", tmp_path / "run"
    write_gguf(file, llama, **gguf_tokens(byte_tokenizer(template=TEMPLATE)))
    settings = {"train__steps": 2, "train__save_every": 0, "train__schedule": "constant"}
    settings["data__eval"] = None
    run(config_for(file, folder, **settings))
    base, _ = hf.load_base(file, Config.load(folder / "config.json").quant)
    file.unlink()
    result = run(config_for(file, folder, **settings | {"train__steps": 3}))
    assert result.steps == 3
    found = load_run(folder)
    assert_same(found.variables["base"], base)
    assert found.source == str(file)
    assert found.tokenizer.chat_template == TEMPLATE
    out = hf.export_merged(folder, tmp_path / "merged")
    again = load_run(out)
    assert again.model.config == found.model.config
    text = "prey of Tunan 12"
    assert again.tokenizer(text)["input_ids"] == found.tokenizer(text)["input_ids"]
