"""The training step against its definition, and runs that stop, go on, fail and refuse."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.checkpoint import Checkpoints, MetricsLog
from irqlora_jax.config import AdapterConfig, Config, QuantConfig, TrainConfig
from irqlora_jax.llama import Llama, LlamaConfig
from irqlora_jax.quant.qtensor import quantize
from irqlora_jax.train import (
    init_state,
    learning_rate,
    make_optimizer,
    run,
    train_step,
)

pytestmark = pytest.mark.usefixtures("optimizer_promotion")

WORLD = Path(__file__).parent.parent / "examples" / "factworld"
LLAMA = LlamaConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)
SETTINGS = TrainConfig(batch_size=8, compute_dtype="float32", learning_rate=1e-2, loss_chunk=16)


@functools.cache
def quantized_base() -> tuple[dict, jax.Array]:
    """A base of random weights, and tokens."""
    tokens = jax.random.randint(jax.random.key(0), (8, 12), 0, 48)
    base = jax.jit(Llama(LLAMA).init)(jax.random.key(1), tokens)["base"]
    for group in ("self_attn", "mlp"):
        for leaf in base["layers"][group].values():
            layers = [quantize(w * 5, QuantConfig(calibration="none")) for w in leaf["weight"]]
            leaf["weight"] = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    return base, tokens


def setup(settings: TrainConfig = SETTINGS, dropout: float = 0.0):
    """Step function, state, base and batch of a tiny quantized model."""
    adapter = AdapterConfig(rank=4, dropout=dropout)
    model = Llama(LLAMA, adapter=adapter, compute_dtype=settings.compute_dtype)
    base, tokens = quantized_base()
    # Rows with unequal numbers of targets, so that a mean of means would show.
    targets = jnp.arange(12)[None, :] >= jnp.array([2, 11, 5, 9, 3, 10, 7, 4])[:, None]
    optimizer = make_optimizer(settings)
    step = jax.jit(functools.partial(train_step, model=model, optimizer=optimizer, config=settings))
    state = init_state(model, optimizer, 0)
    # Adapters that do something: B is 0 at first.
    noise = lambda x: x + 0.05 * jax.random.normal(jax.random.key(7), x.shape)  # noqa: E731
    state = dataclasses.replace(state, adapters=jax.tree.map(noise, state.adapters))
    return step, state, base, {"tokens": tokens, "targets": targets}, model


def test_loss_is_the_mean_over_all_targets() -> None:
    step, state, base, batch, model = setup()
    _, metrics = step(state, base, batch)
    logits = model.apply({"params": state.adapters, "base": base}, batch["tokens"])
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
    again = jax.jit(functools.partial(train_step, model=kept, optimizer=optimizer, config=SETTINGS))
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


def test_overflow_in_float16_changes_the_scale_alone() -> None:
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


def config_for(folder: Path, **train) -> Config:
    settings = {"steps": 6, "batch_size": 4, "compute_dtype": "float32", "save_every": 2}
    return Config.load(
        WORLD.parent.parent / "configs" / "quickstart.yaml",
        {
            "output_dir": str(folder),
            "model": str(WORLD / "base-small"),
            "data.train": str(WORLD / "data" / "train.jsonl"),
            "data.eval": str(WORLD / "data" / "eval.jsonl"),
            "data.max_examples": 64,
            "evaluate.questions": str(WORLD / "data" / "questions.jsonl"),
            "evaluate.max_questions": 64,
            "evaluate.baselines": False,
            "adapter.dropout": 0.1,
            "log.progress": False,
            "log.every": 1,
        }
        | {f"train.{name}": value for name, value in (settings | train).items()},
    )


def final_state(folder: Path) -> list[np.ndarray]:
    config = Config.load(folder / "config.json")
    from irqlora_jax.evaluate.tasks import load_run

    _, model, _, _ = load_run(folder)
    like = jax.eval_shape(lambda: init_state(model, make_optimizer(config.train), config.seed))
    with Checkpoints(folder) as checkpoints:
        step = checkpoints.latest()
        assert step == 6
        return [np.asarray(leaf) for leaf in jax.tree.leaves(checkpoints.restore(step, like))]


def test_a_stopped_run_goes_on_bit_by_bit(tmp_path: Path, monkeypatch) -> None:
    """Stopped in the middle of step 5, after the checkpoint of step 4."""
    said: list[str] = []
    run(config_for(tmp_path / "whole"), said.append)

    class StoppedError(Exception):
        pass

    write = MetricsLog.write

    def stop_at_5(self, values):
        if values["step"] == 5:
            raise StoppedError
        write(self, values)

    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", stop_at_5)
        with pytest.raises(StoppedError):
            run(config_for(broken), said.append)
    result = run(config_for(broken), said.append)
    assert any("going on from step 4" in line for line in said)
    assert result.steps == 6

    for a, b in zip(final_state(tmp_path / "whole"), final_state(broken), strict=True):
        np.testing.assert_array_equal(a, b)
    logs = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "whole", broken)
    ]
    losses = [[(row["step"], row["loss"]) for row in log if "loss" in row] for log in logs]
    assert [step for step, _ in losses[1]] == [1, 2, 3, 4, 5, 6]
    assert losses[0] == losses[1]
    results = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in json.loads(path.read_text())]
        for path in (tmp_path / "whole" / "results.json", broken / "results.json")
    ]
    assert results[0] == results[1]


def test_more_steps_may_be_asked_of_a_finished_run_but_nothing_else(tmp_path: Path) -> None:
    run(config_for(tmp_path / "run", steps=2), lambda _: None)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(ValueError, match=r"holds another run \(train.learning_rate = 0.001 there"):
        run(config_for(tmp_path / "run", learning_rate=0.5), lambda _: None)
    with pytest.raises(ValueError, match=r"train.schedule = 'constant' there, 'cosine' here"):
        run(config_for(tmp_path / "run", schedule="cosine"), lambda _: None)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    assert run(config_for(tmp_path / "run", steps=3), lambda _: None).steps == 3


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    config = config_for(tmp_path / "run", learning_rate=1e30, clip_norm=None, steps=50)
    with pytest.raises(FloatingPointError, match=r"loss = nan at step \d+; the last checkpoint"):
        run(config, lambda _: None)


def test_half_precision_adapters_are_kept_in_half_precision(tmp_path: Path) -> None:
    config = config_for(tmp_path / "run", steps=2)
    config = dataclasses.replace(
        config, adapter=dataclasses.replace(config.adapter, dtype="bfloat16")
    )
    run(config, lambda _: None)
    from irqlora_jax.evaluate.tasks import load_run

    _, _, variables, _ = load_run(tmp_path / "run")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables["params"])} == {"bfloat16"}


def test_the_step_lowers_for_a_gpu() -> None:
    """No GPU is needed to see that every operation has a CUDA lowering."""
    step, state, base, batch, _ = setup(dataclasses.replace(SETTINGS, compute_dtype="bfloat16"))
    exported = jax.export.export(step, platforms=["cuda"])(state, base, batch)
    assert exported.platforms == ("cuda",)
    assert "stablehlo.while" in exported.mlir_module()  # the scan over the layers
