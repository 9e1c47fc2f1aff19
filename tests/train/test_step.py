"""The training step against its definition."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.config import TrainConfig
from irqlora_jax.evaluate.perplexity import row_nll
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.runs.state import init_state, learning_rate, make_optimizer
from irqlora_jax.sharding import LINEAR_NAMES
from irqlora_jax.train.step import train_step
from tests import hlo
from tests.models import random_base, tiny_llama
from tests.train.small_step import LAYERS, SHAPES, step_and_shapes

pytestmark = pytest.mark.usefixtures("optimizer_promotion")

LLAMA = tiny_llama(vocab_size=48)
SETTINGS = TrainConfig(batch_size=8, compute_dtype="float32", learning_rate=1e-2, loss_chunk=16)


@functools.cache
def quantized_base() -> tuple[dict, jax.Array]:
    """A base of random weights, and tokens."""
    tokens = jax.random.randint(jax.random.key(0), (8, 12), 0, LLAMA.vocab_size)
    return random_base(LLAMA, QuantConfig(calibration="none")), tokens


@functools.cache
def setup(
    settings: TrainConfig = SETTINGS,
    dropout: float = 0.0,
    method: Any = "iec",
    targets: Any = LINEAR_NAMES,
):
    """Step function, state, base and batch of a tiny quantized model."""
    adapter = AdapterConfig(method=method, rank=4, dropout=dropout, targets=targets)
    model = Llama(LLAMA, adapter=adapter, compute_dtype=settings.compute_dtype)
    base, tokens = quantized_base()
    # Rows with unequal numbers of targets, so that a mean of means would show.
    targets = jnp.arange(12)[None, :] >= jnp.array([2, 11, 5, 9, 3, 10, 7, 4])[:, None]
    optimizer = make_optimizer(settings)
    step = functools.partial(train_step, model=model, optimizer=optimizer, config=settings)
    step = jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})  # compiles faster
    state = jax.jit(lambda: init_state(model, optimizer, 0))()
    # Adapters that do something: B is 0 at first.
    noise = lambda x: x + 0.05 * jax.random.normal(jax.random.key(7), x.shape)  # noqa: E731
    state = dataclasses.replace(state, adapters=jax.tree.map(noise, state.adapters))
    return step, state, base, {"tokens": tokens, "targets": targets}, model


def test_loss_is_the_mean_over_all_targets() -> None:
    step, state, base, batch, model = setup()
    _, metrics = step(state, base, batch)
    logits = jax.jit(model.apply)({"params": state.adapters, "base": base}, batch["tokens"])
    chances = np.asarray(jax.nn.log_softmax(logits[:, :-1]))
    labels, counts = np.asarray(batch["tokens"])[:, 1:], np.asarray(batch["targets"])[:, 1:]
    nll = -np.take_along_axis(chances, labels[:, :, None], 2)[:, :, 0]
    assert float(metrics["loss"]) == pytest.approx(nll[counts].mean(), rel=1e-5)
    assert int(metrics["targets"]) == counts.sum()


def test_accumulation_changes_nothing() -> None:
    whole, state, base, batch, _ = setup()
    parts, *_ = setup(dataclasses.replace(SETTINGS, accumulation=4))
    one, metrics_one = whole(state, base, batch)
    other, metrics_other = parts(state, base, batch)
    assert float(metrics_one["loss"]) == pytest.approx(float(metrics_other["loss"]), rel=1e-6)
    assert float(metrics_one["grad_norm"]) == pytest.approx(
        float(metrics_other["grad_norm"]), rel=1e-5
    )
    for a, b in zip(jax.tree.leaves(one.adapters), jax.tree.leaves(other.adapters), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_remat_changes_no_gradient() -> None:
    step, state, base, batch, model = setup()
    kept = model.clone(remat=True)
    optimizer = make_optimizer(SETTINGS)
    again = functools.partial(train_step, model=kept, optimizer=optimizer, config=SETTINGS)
    again = jax.jit(again, compiler_options={"xla_backend_optimization_level": 0})
    norm = float(step(state, base, batch)[1]["grad_norm"])
    assert float(again(state, base, batch)[1]["grad_norm"]) == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close_to_single(dtype: str) -> None:
    step, state, base, batch, _ = setup()
    half, *_ = setup(dataclasses.replace(SETTINGS, compute_dtype=dtype))
    _, metrics = step(state, base, batch)
    _, close = half(state, base, batch)
    assert float(close["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-2)
    assert float(close["grad_norm"]) == pytest.approx(float(metrics["grad_norm"]), rel=3e-2)


def test_overflow_in_float16_changes_only_the_loss_scale() -> None:
    step, state, base, batch, _ = setup(dataclasses.replace(SETTINGS, compute_dtype="float16"))
    state = dataclasses.replace(state, loss_scale=jnp.float32(2.0**24))
    new, metrics = step(state, base, batch)
    assert not np.isfinite(metrics["grad_norm"])
    assert float(new.loss_scale) == 2.0**23 and int(new.step) == 1
    same = jax.tree.map(
        lambda a, b: bool((a == b).all()),
        (new.adapters, new.opt_state),
        (state.adapters, state.opt_state),
    )
    assert all(jax.tree.leaves(same))
    state = dataclasses.replace(state, loss_scale=jnp.float32(128), good_steps=jnp.int32(999))
    new, metrics = step(state, base, batch)
    assert np.isfinite(metrics["grad_norm"])
    assert float(new.loss_scale) == 256 and int(new.good_steps) == 0


@pytest.mark.long
def test_the_schedule_counts_steps_that_overflow() -> None:
    """The first update of AdamW is the learning rate, which has to be the logged one."""
    settings = dataclasses.replace(SETTINGS, compute_dtype="float16", schedule="linear", steps=4)
    step, state, base, batch, _ = setup(settings)
    state = dataclasses.replace(state, loss_scale=jnp.float32(2.0**24))
    skipped, _ = step(state, base, batch)
    before = dataclasses.replace(skipped, loss_scale=jnp.float32(128))
    after, metrics = step(before, base, batch)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), after.adapters, before.adapters)
    assert float(metrics["learning_rate"]) == pytest.approx(0.75 * 1e-2)
    assert float(max(jax.tree.leaves(moved))) == pytest.approx(0.75 * 1e-2, rel=1e-2)


def test_dropout_differs_from_step_to_step_and_repeats_with_the_key() -> None:
    step, state, base, batch, _ = setup(dropout=0.5)
    first = float(step(state, base, batch)[1]["loss"])
    assert float(step(state, base, batch)[1]["loss"]) == first
    later = dataclasses.replace(state, step=state.step + 1)
    assert float(step(later, base, batch)[1]["loss"]) != first


def test_schedules() -> None:
    config = TrainConfig(steps=100, learning_rate=1.0, warmup_steps=10)
    for name, middle, end in (("constant", 1, 1), ("linear", 0.5, 0), ("cosine", 0.5, 0)):
        schedule = learning_rate(dataclasses.replace(config, schedule=name))
        values = [float(schedule(s)) for s in (0, 5, 10, 55, 100)]
        np.testing.assert_allclose(values, [0, 0.5, 1, middle, end], atol=1e-6)


def test_the_step_lowers_for_a_gpu() -> None:
    """No GPU is needed to see that every operation has a CUDA lowering."""
    step, state, base, batch, _ = setup(dataclasses.replace(SETTINGS, compute_dtype="bfloat16"))
    exported = jax.export.export(step, platforms=["cuda"])(state, base, batch)
    assert exported.platforms == ("cuda",)
    assert "stablehlo.while" in exported.mlir_module()  # the scan over the layers


def test_the_backward_scan_dequantizes_each_weight_once() -> None:
    """The rematerialized forward pass and the gradient of the input share it, and no weight
    outlives its layer."""
    step, *shapes = step_and_shapes("float32")
    program = hlo.parse(jax.jit(step).lower(*shapes).compile().as_text())
    assert sorted(hlo.dequantized(program, LAYERS).values()) == [7, 7]
    assert not hlo.stacked_floats(program, LAYERS, SHAPES)


def test_a_large_vocabulary_costs_no_full_logits() -> None:
    """LLaMA3's 128,256 words: logits exist for a chunk of the tokens, the output matrix once."""
    vocab, hidden, chunk = 128_256, 16, 32
    llama = tiny_llama(vocab_size=vocab, hidden_size=hidden, intermediate_size=24)
    step, *shapes = step_and_shapes("float32", llama, rows=2, length=128, chunk=chunk)
    program = hlo.parse(jax.jit(step).lower(*shapes).compile().as_text())
    sizes = {n for one in hlo.stored(program) for _, n in one.types}
    assert max(sizes) == chunk * vocab
    assert hidden * vocab not in sizes


@pytest.mark.long
def test_an_evaluation_needs_less_memory_than_a_step_with_as_many_rows() -> None:
    """So `--plan`, which compiles the step, covers the evaluations of a run."""
    step, state, base, batch = step_and_shapes("float32", rows=4, length=128, chunk=64)
    evaluate = functools.partial(row_nll, step.keywords["model"], chunk=64)  # type: ignore[attr-defined]
    memory = [
        jax.jit(one).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
        for one, shapes in (
            (step, (state, base, batch)),
            (evaluate, ({"params": state.adapters, "base": base}, batch)),
        )
    ]
    assert memory[1] < memory[0]
