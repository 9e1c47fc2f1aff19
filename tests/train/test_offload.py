"""The optimizer's moments in the memory of the host: the same numbers from another place."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.config import TrainConfig
from irqlora_jax.runs.checkpoints import Checkpoints
from irqlora_jax.runs.state import init_state, learning_rate, make_model, make_optimizer
from irqlora_jax.sharding import MeshConfig, make_mesh, put_batch, tree_shardings
from irqlora_jax.train.loop import _all_finite
from irqlora_jax.train.step import make_step, sharded_state
from tests.models import IEC, LLAMA, PLAIN, assert_same, long, random_base

pytestmark = pytest.mark.usefixtures("optimizer_promotion")

TRAIN = TrainConfig(
    batch_size=4,
    learning_rate=1e-2,
    clip_norm=0.01,
    weight_decay=0.1,
    warmup_steps=1,
    compute_dtype="float32",
)
# As for users, not as quickly as in other tests (tests/conftest.py): roundings depend on it.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
EXACT = jax.__version_info__ < (0, 11)
"""Whether the compiler rounds the update of a layer as it rounds that of all of them."""
EVEN = dataclasses.replace(LLAMA, hidden_size=48, head_dim=16)


def kinds(tree: Any) -> set[str]:
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim > 1}


def make_batch(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, EVEN.vocab_size, (4, 12), dtype=np.int32)
    return {"tokens": tokens, "targets": rng.random((4, 12)) < 0.7}


@functools.cache
def small_base() -> Any:
    return random_base(EVEN, PLAIN)


class Training:
    """A few steps on a mesh, with the moments here or there."""

    def __init__(self, settings: TrainConfig, adapter: Any = IEC, mesh: MeshConfig | None = None):
        self.mesh = make_mesh(mesh or MeshConfig(data=1), 4 // settings.accumulation)
        self.settings = settings
        self.model = make_model(EVEN, adapter, settings)
        self.optimizer = make_optimizer(settings)
        base = small_base()
        self.base = jax.device_put(base, tree_shardings(self.mesh, base))

    def state(self) -> Any:
        start = lambda: init_state(self.model, self.optimizer, 0)  # noqa: E731
        return sharded_state(self.mesh, start, self.settings.offload_optimizer)

    @functools.cached_property
    def advance(self) -> Any:
        shapes = jax.eval_shape(lambda: init_state(self.model, self.optimizer, 0))
        settings = dict(model=self.model, optimizer=self.optimizer, config=self.settings)
        step, compiled = make_step(self.mesh, shapes, **settings), []

        def advance(*arguments: Any) -> Any:
            if not compiled:
                compiled.append(step.lower(*arguments).compile(OPTIMIZED))
            return compiled[0](*arguments)

        return advance

    def go(self, state: Any, steps: range) -> tuple[Any, list[float]]:
        losses = []
        with jax.set_mesh(self.mesh):
            for step in steps:
                batch = put_batch(self.mesh, make_batch(step))
                state, metrics = self.advance(state, self.base, batch)
                losses.append(float(metrics["loss"]))
        return state, losses


@functools.cache
def both(settings: TrainConfig, **more: Any) -> tuple[Training, Training]:
    away = dataclasses.replace(settings, offload_optimizer=True)
    return Training(settings, **more), Training(away, **more)


@pytest.mark.parametrize(
    "everything", [False, *long(True)], ids=["plain", "accumulated bfloat16 mesh"]
)
def test_offloading_changes_a_step_only_by_rounding(everything: bool) -> None:
    """From the same state each: with jax 0.10 the next one is the same bit by bit.

    b1 mu + (1 - b1) g has two products, either of which a compiler may fuse with the sum. Later
    ones choose for each program, and so differ in the last bit of a term. From there on Adam, which
    divides small gradients by their size, divides their roundings too.
    """
    settings, more = TRAIN, {}
    if everything:
        settings = dataclasses.replace(TRAIN, accumulation=2)
        adapter = dataclasses.replace(IEC, dtype="bfloat16")
        more = {"adapter": adapter, "mesh": MeshConfig(data=1, fsdp=2, tensor=2)}
    here, away = both(settings, **more)
    state, moved = here.state(), away.state()
    losses = []
    for step in range(4):
        old = jax.tree.map(np.array, state)  # the step takes its place
        moved = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), old, moved)
        state, there = here.go(state, range(step, step + 1))
        moved, same = away.go(moved, range(step, step + 1))
        assert same == there
        losses += same
        assert kinds(state.opt_state) == {"device"}
        assert kinds(moved.opt_state) == {"pinned_host"}
        assert kinds(moved.adapters) == {"device"}
        if EXACT:
            assert_same(moved, state)
        for one in zip(*map(moments, (old, state, moved)), strict=True):
            for rate, last, a, b in zip((TRAIN.beta1, TRAIN.beta2), *one, strict=True):
                kept = rate * wide(last)
                terms = np.abs(kept) + np.abs(wide(a) - kept)
                assert (np.abs(wide(a) - wide(b)) <= 2 * jnp.finfo(a.dtype).eps * terms).all()
        check_adapters(state, old.adapters, step)
        check_adapters(moved, old.adapters, step)
    assert losses[-1] != losses[0]


def moments(state: Any) -> Any:
    adam = state.opt_state[0]
    return zip(jax.tree.leaves(adam.mu), jax.tree.leaves(adam.nu), strict=True)


def wide(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def check_adapters(state: Any, before: Any, step: int) -> None:
    """Against float64, from those before the step and the moments after it."""
    rate = float(learning_rate(TRAIN)(step))
    old, new = jax.tree.leaves(before), jax.tree.leaves(state.adapters)
    for w, found, (mu, nu) in zip(map(wide, old), new, moments(state), strict=True):
        first = wide(mu) / (1 - TRAIN.beta1 ** (step + 1))
        second = wide(nu) / (1 - TRAIN.beta2 ** (step + 1))
        scaled, decay = first / (np.sqrt(second) + TRAIN.eps), TRAIN.weight_decay * w
        unit = jnp.finfo(found.dtype).eps
        # 1 - b2^t has lost the leading digits of 1.
        allowed = (4 * unit + 2e-4) * rate * (np.abs(scaled) + np.abs(decay)) + 2 * unit * np.abs(w)
        assert (np.abs(wide(found) - (w - rate * (scaled + decay))) <= allowed).all()


def test_a_checkpoint_goes_on_from_either_place(tmp_path: Path) -> None:
    here, away = both(TRAIN)
    expected, losses = here.go(here.state(), range(4))
    for first, second in ((here, away), (away, here)):
        half, begun = first.go(first.state(), range(2))
        saved = jax.tree.map(np.array, half)
        folder = tmp_path / f"{first is here}-{second is here}"
        with Checkpoints(folder, 1) as checkpoints:
            checkpoints.save(2, half)
            checkpoints.wait()
            restored = checkpoints.restore(2, second.state())
        assert kinds(restored.opt_state) == kinds(second.state().opt_state)
        assert_same(restored, saved)
        ended, rest = second.go(restored, range(2, 4))
        if EXACT:
            assert begun + rest == losses
            assert_same(ended, expected)
        else:
            np.testing.assert_allclose(begun + rest, losses, rtol=1e-6)


@pytest.mark.long
def test_a_float16_step_that_overflows_changes_nothing_but_the_scale() -> None:
    settings = dataclasses.replace(TRAIN, compute_dtype="float16", offload_optimizer=True)
    training = Training(settings)
    state, _ = training.go(training.state(), range(2))
    before = jax.tree.map(np.asarray, state)
    loud = jax.device_put(jnp.float32(2.0**24), state.loss_scale.sharding)
    state = dataclasses.replace(state, loss_scale=loud)
    after, _ = training.go(state, range(2, 3))
    assert_same(after.adapters, before.adapters)
    assert_same(after.opt_state, before.opt_state)
    assert float(after.loss_scale) == 2.0**23 and int(after.step) == 3


def test_nan_in_the_memory_of_the_host_is_found() -> None:
    training = Training(dataclasses.replace(TRAIN, offload_optimizer=True))
    state = training.state()
    assert _all_finite(state.opt_state)

    def spoil(x: Any) -> Any:
        return jax.device_put(np.full(x.shape, np.nan, x.dtype), x.sharding) if x.ndim > 1 else x

    assert not _all_finite(jax.tree.map(spoil, state.opt_state))
