"""DPO on preference pairs: the step against its definition, and whole runs."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.config import Config, TrainConfig
from irqlora_jax.model.dpo import REWARDS, DpoOptions
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.runs.state import init_state, make_optimizer
from irqlora_jax.sharding import MeshConfig, make_mesh, put_batch, tree_shardings
from irqlora_jax.train.finetune import run
from irqlora_jax.train.step import make_step, state_shardings, train_step
from tests.models import QUICKSTART, WORLD, random_base, tiny_llama
from tests.train.small_runs import (
    StoppedError,
    assert_same_run,
    at_step,
    config_for,
    crash,
    losses_of,
    rows_of,
)

pytestmark = pytest.mark.usefixtures("optimizer_promotion", "shared_steps")

LLAMA = tiny_llama(vocab_size=48)
DPO = DpoOptions(beta=0.5, label_smoothing=0.1)
SETTINGS = TrainConfig(
    batch_size=4, compute_dtype="float32", learning_rate=1e-2, loss_chunk=16, dpo=DPO
)


@functools.cache
def setup(settings: TrainConfig = SETTINGS, dropout: float = 0.0) -> Any:
    """Step, state with adapters that do something, base, batch of 4 pairs, and model."""
    adapter = AdapterConfig(method="lora", rank=4, dropout=dropout)
    model = Llama(LLAMA, adapter=adapter, compute_dtype=settings.compute_dtype or "float32")
    optimizer = make_optimizer(settings)
    how: Any = {"model": model, "optimizer": optimizer, "config": settings, "preference": True}
    step = jax.jit(functools.partial(train_step, **how))
    state = jax.jit(lambda: init_state(model, optimizer, 0))()
    noise = lambda x: x + 0.05 * jax.random.normal(jax.random.key(7), x.shape)  # noqa: E731
    state = dataclasses.replace(state, adapters=jax.tree.map(noise, state.adapters))
    tokens = jax.random.randint(jax.random.key(0), (8, 12), 0, LLAMA.vocab_size)
    targets = jnp.arange(12)[None, :] >= jnp.array([2, 11, 5, 9, 3, 10, 7, 4])[:, None]
    base = random_base(LLAMA, QuantConfig(calibration="none"))
    return step, state, base, {"tokens": tokens, "targets": targets}, model


def logps(model: Llama, adapters: Any, base: Any, batch: Any) -> Any:
    """Log-probabilities of the answers from all logits."""
    logits: Any = model.apply({"params": adapters, "base": base}, batch["tokens"])
    chances = jax.nn.log_softmax(logits[:, :-1])
    own = jnp.take_along_axis(chances, batch["tokens"][:, 1:, None], 2)[:, :, 0]
    return jnp.where(batch["targets"][:, 1:], own, 0).sum(axis=1).reshape(4, 2)


def test_loss_rewards_and_gradient_are_those_of_the_definition() -> None:
    step, state, base, batch, model = setup()
    _, metrics = step(state, base, batch)

    def loss(adapters: Any) -> Any:
        frozen = logps(model.clone(adapter=None), {}, base, batch)
        rewards = DPO.beta * (logps(model, adapters, base, batch) - frozen)
        margin = rewards[:, 0] - rewards[:, 1]
        right, wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
        return -(0.9 * right + 0.1 * wrong).mean(), rewards

    (expected, rewards), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.adapters)
    assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-5)
    norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradient)))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)
    assert int(metrics["targets"]) == int(batch["targets"][:, 1:].sum())
    chosen, rejected = np.asarray(rewards).T
    values = chosen, rejected, chosen - rejected, chosen > rejected
    for name, value in zip(REWARDS, values, strict=True):
        assert float(metrics[name]) == pytest.approx(value.mean(), abs=1e-5), name
    assert 0 < float(metrics["rewards/accuracies"]) < 1


def test_the_reference_may_be_an_adapter() -> None:
    """With the trained adapter itself, all rewards are 0, and the loss is that of a coin."""
    step, state, base, batch, _ = setup()
    _, metrics = step(state, base, batch, state.adapters)
    assert float(metrics["loss"]) == pytest.approx(math.log(2), abs=1e-5)
    assert all(abs(float(metrics[name])) < 1e-4 for name in REWARDS[:3])
    assert float(metrics["grad_norm"]) > 1e-2


def test_accumulation_changes_nothing() -> None:
    whole, state, base, batch, _ = setup()
    parts, *_ = setup(dataclasses.replace(SETTINGS, accumulation=2))
    one, metrics = whole(state, base, batch)
    other, again = parts(state, base, batch)
    for name, value in metrics.items():
        assert float(again[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-6), name
    for a, b in zip(jax.tree.leaves(one.adapters), jax.tree.leaves(other.adapters), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_float16_is_close_and_an_overflow_changes_only_the_loss_scale() -> None:
    step, state, base, batch, _ = setup()
    half, *_ = setup(dataclasses.replace(SETTINGS, compute_dtype="float16"))
    _, metrics = step(state, base, batch)
    _, close = half(state, base, batch)
    assert float(close["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-2)
    assert float(close["grad_norm"]) == pytest.approx(float(metrics["grad_norm"]), rel=3e-2)
    new, metrics = half(dataclasses.replace(state, loss_scale=jnp.float32(2.0**30)), base, batch)
    assert not np.isfinite(metrics["grad_norm"]) and float(new.loss_scale) < 2.0**30
    for a, b in zip(jax.tree.leaves(new.adapters), jax.tree.leaves(state.adapters), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.long
def test_a_mesh_changes_nothing() -> None:
    step, state, base, batch, model = setup()
    _, expected = step(state, base, batch)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), SETTINGS.rows)
    with jax.set_mesh(mesh):
        own = jax.tree.map(jnp.copy, state)
        own = jax.device_put(own, state_shardings(mesh, own, False))
        spread = jax.device_put(base, tree_shardings(mesh, base))
        how: Any = {"model": model, "optimizer": make_optimizer(SETTINGS), "config": SETTINGS}
        split = make_step(mesh, own, **how, preference=True)
        _, metrics = split(own, spread, put_batch(mesh, batch))
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-5), name


# -------------------------------------------------------------------------------------- whole runs


def write_pairs(folder: Path) -> dict[str, Any]:
    """Files of factworld's questions with the right answer and the answer to another question."""
    settings = {"data__format": "preference"}
    for part in ("train", "eval"):
        lines = (WORLD / "data" / f"{part}.jsonl").read_text().splitlines()[:48]
        rows = [json.loads(line) for line in lines]
        pairs = []
        for row, other in zip(rows, rows[7:] + rows[:7], strict=True):
            if row["output"] != other["output"]:
                pairs.append({"prompt": row["input"], "chosen": row["output"]})
                pairs[-1]["rejected"] = other["output"]
        path = folder / f"{part}.jsonl"
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        settings[f"data__{part}"] = str(path)
    return settings


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of pairs that starts from LoftQ's adapters, which are then the reference."""
    changes = write_pairs(tmp_path_factory.mktemp("pairs"))
    changes |= {"train__steps": 12, "train__eval_every": 4, "train__save_every": 4}
    changes |= {"adapter__init": "loftq", "adapter__dropout": 0.0, "train__learning_rate": 2e-3}
    return changes


@pytest.fixture(scope="module")
def whole(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with jax.numpy_dtype_promotion("standard"):
        run(config_for(WORLD / "base-small", folder, **settings))
    return folder


def test_a_run_raises_the_margin_of_held_out_pairs(whole: Path) -> None:
    rows = rows_of(whole)
    evaluations = [row for row in rows if "eval_loss" in row]
    # Before the first step the adapter is its own reference.
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    margins = [row["eval_rewards/margins"] for row in evaluations]
    assert 0 < margins[0] < margins[-1]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"] < math.log(2)
    assert evaluations[-1]["eval_rewards/accuracies"] > 0.6
    last = [row for row in rows if "loss" in row][-1]
    assert last["rewards/margins"] == pytest.approx(
        last["rewards/chosen"] - last["rewards/rejected"], abs=1e-5
    )
    scores = json.loads((whole / "results.json").read_text())
    assert scores[-1]["loss"] == evaluations[-1]["eval_loss"]


def test_a_crashed_run_goes_on_bit_by_bit(
    settings: dict[str, Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crashed in step 6. The resumed run reads its reference from the checkpoint of step 0."""
    config = config_for(WORLD / "base-small", tmp_path / "run", **settings)
    with monkeypatch.context() as patch:
        at_step(patch, 6, crash)
        with pytest.raises(StoppedError):
            run(config)
    run(config)
    assert [step for step, _ in losses_of(tmp_path / "run")] == list(range(1, 13))
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.packing": True}, "data.packing = True: expected false with data.format preference"),
        ({"data.train_on_source": True}, "data.train_on_source = True: expected false with"),
        ({"data.format": "alpaca", "train.dpo.beta": 0.2}, "the default with data.format alpaca"),
        ({"train.dpo.beta": 0.0}, "train.dpo.beta = 0.0: expected a positive"),
        ({"train.dpo.label_smoothing": 0.5}, "0 <= label_smoothing < 0.5"),
        ({"train.dpo.loss": "ipo", "train.dpo.label_smoothing": 0.1}, "0 with train.dpo.loss ipo"),
        ({"train.dpo.loss": "hinge"}, "train.dpo.loss = 'hinge': expected sigmoid"),
        ({"calibrate.format": "preference"}, "calibrate.format = 'preference': expected a format"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as info:
        Config.load(QUICKSTART, {"data.format": "preference"} | changes)
    assert message in str(info.value)
