"""Moments of 8 bits in whole steps: checkpoints, meshes, the memory of the host."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.config import TrainConfig
from irqlora_jax.runs.checkpoints import Checkpoints
from irqlora_jax.runs.moments import Moment
from irqlora_jax.runs.state import init_state, make_model, make_optimizer
from irqlora_jax.sharding import MeshConfig, device_bytes, make_mesh, put_batch, tree_shardings
from irqlora_jax.train.step import make_step, sharded_state
from tests.models import assert_same, random_base, tiny_llama

pytestmark = pytest.mark.usefixtures("optimizer_promotion")

LLAMA = tiny_llama(vocab_size=48, hidden_size=64, head_dim=16)
ADAPTER = AdapterConfig(method="lora", rank=64, targets=("k_proj", "down_proj"))
TRAIN = TrainConfig(batch_size=4, learning_rate=1e-2, compute_dtype="float32", optimizer_bits=8)
FAST = {"xla_backend_optimization_level": 0}


@functools.cache
def base() -> Any:
    return random_base(LLAMA)


class Training:
    def __init__(self, settings: TrainConfig = TRAIN, mesh: MeshConfig | None = None) -> None:
        self.mesh, self.settings = make_mesh(mesh or MeshConfig(data=1), 4), settings
        model, optimizer = make_model(LLAMA, ADAPTER, settings), make_optimizer(settings)
        self.init = lambda: init_state(model, optimizer, 0)
        self.base = jax.device_put(base(), tree_shardings(self.mesh, base()))
        shapes = jax.eval_shape(self.init)
        self.step = make_step(self.mesh, shapes, model=model, optimizer=optimizer, config=settings)
        self.compiled: Any = None

    def state(self) -> Any:
        return sharded_state(self.mesh, self.init, self.settings.offload_optimizer)

    def go(self, state: Any, steps: range) -> tuple[Any, list[float]]:
        losses = []
        with jax.set_mesh(self.mesh):
            for step in steps:
                rng = np.random.default_rng(step)
                tokens = rng.integers(0, 48, (4, 12), dtype=np.int32)
                batch = {"tokens": tokens, "targets": rng.random((4, 12)) < 0.7}
                given = state, self.base, put_batch(self.mesh, batch)
                self.compiled = self.compiled or self.step.lower(*given).compile(FAST)
                state, metrics = self.compiled(*given)
                losses.append(float(metrics["loss"]))
        return state, losses


@functools.cache
def plain() -> Training:
    return Training()


@functools.cache
def four() -> tuple[Any, list[float]]:
    """Four steps in one go."""
    training = plain()
    state, losses = training.go(training.state(), range(4))
    return jax.tree.map(np.array, state), losses


def test_the_moments_of_large_leaves_have_8_bits() -> None:
    state, losses = four()
    shapes = jax.eval_shape(plain().init).adapters
    size = 0
    for leaf, mu in zip(*map(leaves, (shapes, state.opt_state[0].mu)), strict=True):
        count = leaf.size // leaf.shape[0]
        assert isinstance(mu, Moment) == (count >= 4096)
        size += leaf.shape[0] * (count + count // 256 * 4 if count >= 4096 else 4 * count)
    assert device_bytes(state.opt_state) == 2 * size + 8  # and the counts of two transformations
    assert len(set(losses)) == 4


def leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Moment))


def test_a_checkpoint_goes_on_bit_by_bit(tmp_path: Path) -> None:
    training, (wanted, losses) = plain(), four()
    half, begun = training.go(training.state(), range(2))
    with Checkpoints(tmp_path / "run", 1) as checkpoints:
        checkpoints.save(2, half)
        checkpoints.wait()
        restored = checkpoints.restore(2, training.state())
    ended, rest = training.go(restored, range(2, 4))
    assert begun + rest == losses
    assert_same(ended, wanted)


@pytest.mark.parametrize("where", ["mesh", "host"])
def test_other_places_give_the_same_losses(where: str) -> None:
    if where == "mesh":
        other = Training(mesh=MeshConfig(data=1, fsdp=2, tensor=2))
    else:
        other = Training(dataclasses.replace(TRAIN, offload_optimizer=True))
    state, losses = other.go(other.state(), range(4))
    np.testing.assert_allclose(losses, four()[1], rtol=1e-4)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state) if x.ndim > 1}
    assert kinds == ({"pinned_host"} if where == "host" else {"device"})
    if where == "host":
        assert len([x for x in jax.tree.leaves(state.opt_state) if x.dtype == np.uint8]) == 4
