"""Short runs on factworld, and what they leave behind."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.config import Config
from irqlora_jax.runs.checkpoints import Checkpoints
from irqlora_jax.runs.load import load_run
from irqlora_jax.runs.state import TrainState, init_state, make_optimizer
from irqlora_jax.train import loop
from irqlora_jax.train.metrics import MetricsLog
from tests.models import QUICKSTART, run_settings


def settings_for(base: Path, folder: Path, /, **changes: Any) -> dict[str, Any]:
    settings = {"adapter__dropout": 0.1, "train__steps": 6, "train__eval_every": 0}
    settings |= {"train__save_every": 2, "log__every": 1}
    return run_settings(base, folder, **(settings | changes))


def config_for(base: Path, folder: Path, /, **changes: Any) -> Config:
    return Config.load(QUICKSTART, settings_for(base, folder, **changes))


def steps_of(folder: Path) -> list[int]:
    """Steps with a checkpoint."""
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdecimal())


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses_of(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows_of(folder) if "loss" in row]


def evaluations_of(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["eval_loss"]) for row in rows_of(folder) if "eval_loss" in row]


def state_of(folder: Path) -> list[np.ndarray]:
    """The last state of a run, as arrays."""
    config, model = Config.load(folder / "config.json"), load_run(folder).model
    like = jax.eval_shape(lambda: init_state(model, make_optimizer(config.train), config.seed))
    with Checkpoints(folder) as checkpoints:
        state = checkpoints.restore(checkpoints.find("last"), like)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def assert_same_run(one: Path, other: Path) -> None:
    """Bit by bit: the last state, and every loss on the way."""
    for a, b in zip(state_of(one), state_of(other), strict=True):
        np.testing.assert_array_equal(a, b)
    assert losses_of(one) == losses_of(other)
    assert evaluations_of(one) == evaluations_of(other)


class StoppedError(Exception):
    """Stands for a crash."""


def crash(*_: Any, **__: Any) -> None:
    raise StoppedError


def at_step(patch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Does something when the loss of a step is logged, before it is written."""
    write = MetricsLog.write

    def act(self: MetricsLog, done: int, values: dict[str, Any]) -> None:
        if done == step and "loss" in values:
            action()
        write(self, done, values)

    patch.setattr(MetricsLog, "write", act)


def no_training(patch: pytest.MonkeyPatch) -> None:
    """Steps that only count, for tests of everything around them: compiling one takes seconds."""

    def make_step(*_: Any, **__: Any) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        def advance(state: TrainState, base: Any, batch: Any, reference: Any) -> Any:
            metrics = dict.fromkeys(("loss", "grad_norm", "learning_rate"), jnp.float32(1))
            metrics["targets"] = batch["targets"].sum()
            return dataclasses.replace(state, step=state.step + 1), metrics

        return advance

    patch.setattr(loop, "make_step", make_step)
