"""NEFTune: noise on the embeddings, in the training alone."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.config import TrainConfig
from irqlora_jax.model.llama import Llama
from irqlora_jax.runs.state import init_state, make_optimizer
from irqlora_jax.sharding import MeshConfig, make_mesh, put_batch
from irqlora_jax.train import step as steps
from irqlora_jax.train.noise import embedding_noise, example_lengths
from irqlora_jax.train.step import loss_sum, train_step
from tests.models import assert_same, random_base, tiny_llama

pytestmark = pytest.mark.usefixtures("optimizer_promotion")

LLAMA = tiny_llama(vocab_size=48, num_hidden_layers=1)
MODEL = Llama(LLAMA, adapter=AdapterConfig(method="lora", rank=4, targets=("q_proj",)))
TRAIN = TrainConfig(batch_size=4, compute_dtype="float32", loss_chunk=16)


def test_lengths_are_those_of_the_examples() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 12, 5)
    place = np.arange(12)
    targets = (place >= lengths[:, None] - 1) & (place < lengths[:, None])
    found = example_lengths(jnp.asarray(targets), None)
    np.testing.assert_array_equal(found, np.repeat(lengths[:, None], 12, 1))
    segments = np.sort(rng.integers(1, 4, (5, 12)), axis=1)
    segments[:, 10:] = 0
    wanted = (segments[:, :, None] == segments[:, None, :]).sum(2)
    found = example_lengths(jnp.asarray(targets), jnp.asarray(segments))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("packed", [False, True])
def test_the_size_of_the_noise(packed: bool) -> None:
    """The largest is alpha / sqrt(L d), the mean square a third of its square, as in transformers
    without padding (`tests/parity/test_neftune.py`)."""
    lengths, features = np.array([12, 3, 0]), 500
    targets = np.arange(12) < lengths[:, None]
    segments = np.repeat([[1, 2, 0]], [4, 7, 1], axis=1).repeat(3, 0)
    given = jnp.asarray(targets), jnp.asarray(segments) if packed else None, features
    noise = np.asarray(embedding_noise(jax.random.key(0), 5.0, *given))
    sizes = 5 / np.sqrt(np.maximum(lengths, 1)[:, None].repeat(12, 1) * features)
    if packed:
        sizes = 5 / np.sqrt(np.repeat([4, 7, 1], [4, 7, 1])[None].repeat(3, 0) * features)
    assert (np.abs(noise) <= sizes[..., None] * (1 + 1e-6)).all()
    np.testing.assert_allclose(np.abs(noise).max(2), sizes, rtol=0.03)
    np.testing.assert_allclose((noise**2).mean((0, 2)), (sizes**2).mean(0) / 3, rtol=0.1)
    np.testing.assert_allclose(noise.mean() / sizes.max(), 0, atol=0.02)
    assert not (noise[0] == noise[1]).any()


@functools.cache
def everything() -> tuple[Any, Any, Any]:
    tokens = jax.random.randint(jax.random.key(0), (4, 12), 0, LLAMA.vocab_size)
    batch = {
        "tokens": tokens,
        "targets": jnp.arange(12)[None, :] >= jnp.array([2, 11, 5, 9])[:, None],
    }
    base = random_base(LLAMA)
    state = jax.jit(lambda: init_state(MODEL, make_optimizer(TRAIN), 0))()
    return state, base, batch


def program(alpha: float) -> Any:
    settings = dataclasses.replace(TRAIN, neftune_alpha=alpha)
    step = functools.partial(
        train_step, model=MODEL, optimizer=make_optimizer(settings), config=settings
    )
    return step


def test_without_noise_the_step_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    state, base, batch = everything()

    def refuse(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(steps, "embedding_noise", refuse)
    jax.eval_shape(program(0.0), state, base, batch)
    with pytest.raises(AssertionError):
        jax.eval_shape(program(5.0), state, base, batch)


def test_noise_is_a_function_of_the_step() -> None:
    """The loss is that of embeddings with the noise; the same state gives the same step."""
    state, base, batch = everything()

    @jax.jit
    def losses(adapters: Any, base: Any, key: Any) -> Any:
        one = functools.partial(loss_sum, model=MODEL, chunk=16)
        noisy = one(adapters, base, batch, key, neftune_alpha=30.0)[0]
        return one(adapters, base, batch, key)[0], noisy

    plain, noisy = losses(state.adapters, base, jax.random.key(1))
    assert plain != noisy
    # Put the noise into the table of the embeddings: every token with an id of its own.
    tokens = jnp.arange(48).reshape(4, 12)
    key = jax.random.fold_in(jax.random.key(1), steps._NOISE)
    noise = embedding_noise(key, 30.0, batch["targets"], None, LLAMA.hidden_size)
    own = {**batch, "tokens": tokens}
    head = base.get("lm_head", base["embed_tokens"])
    moved = base["embed_tokens"]["weight"] + noise.reshape(48, -1)
    changed = base | {"lm_head": head, "embed_tokens": {"weight": moved}}
    options: Any = {"model": MODEL, "chunk": 16}
    loss = functools.partial(jax.jit(functools.partial(loss_sum, **options)), state.adapters)
    wanted = loss(changed, own, jax.random.key(1))[0]
    noised = jax.jit(functools.partial(loss_sum, **options, neftune_alpha=30.0))
    found = noised(state.adapters, base, own, jax.random.key(1))[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_step_with_noise_is_repeated_bit_by_bit() -> None:
    state, base, batch = everything()
    step = jax.jit(program(5.0), compiler_options={"xla_backend_optimization_level": 0})
    one, first = step(state, base, batch)
    again, same = step(state, base, batch)
    assert_same((one, first), (again, same))
    _, later = step(dataclasses.replace(state, step=state.step + 1), base, batch)
    assert float(later["loss"]) != float(first["loss"])


def test_a_mesh_has_the_same_noise_in_packed_rows() -> None:
    _, _, batch = everything()
    segments = jnp.asarray(np.repeat([[1, 2, 0]], [5, 6, 1], axis=1).repeat(4, 0))
    noise = jax.jit(lambda targets, ids: embedding_noise(jax.random.key(0), 5.0, targets, ids, 24))
    alone = noise(batch["targets"], segments)
    mesh = make_mesh(MeshConfig(data=2), 4)
    with jax.set_mesh(mesh):
        split = put_batch(mesh, {"targets": batch["targets"], "ids": segments})
        found = noise(split["targets"], split["ids"])
    assert found.sharding.spec[0] is not None
    np.testing.assert_allclose(found, alone, rtol=1e-6)
