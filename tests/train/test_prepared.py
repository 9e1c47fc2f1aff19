"""Adapters that a training step prepares: gates and noise, growing steepness, and penalties."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.adapters import bayesian, binary
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.export.folder import export_adapter
from irqlora_jax.export.peft import load_adapter, save_adapter
from irqlora_jax.model.llama import Llama
from irqlora_jax.report.page import page
from irqlora_jax.report.run_data import read_run_data
from irqlora_jax.runs.load import load_run
from irqlora_jax.runs.state import init_state, make_optimizer
from irqlora_jax.train import loop
from irqlora_jax.train.finetune import run
from irqlora_jax.train.step import penalty, prepare, prepared_model, train_step
from tests.models import long
from tests.train.small_runs import StoppedError, assert_same_run, at_step, config_for, crash
from tests.train.test_step import SETTINGS, setup

pytestmark = pytest.mark.usefixtures("optimizer_promotion", "shared_steps")


TARGETS = ("q_proj", "down_proj")  # compiles faster


@pytest.mark.long
@pytest.mark.parametrize("method", ["bayesian", "binary"])
def test_training_learns(method: str) -> None:
    step, state, base, batch, _ = setup(method=method, targets=TARGETS)
    losses = []
    for _ in range(15):
        state, metrics = step(state, base, batch)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


@pytest.mark.long
@pytest.mark.parametrize("method", ["bayesian", "binary"])
def test_parts_of_a_batch_share_what_a_step_prepares(method: str) -> None:
    """Another step has other gates or steeper factors, and so another loss."""
    whole, state, base, batch, _ = setup(method=method, targets=TARGETS)
    parts, *_ = setup(dataclasses.replace(SETTINGS, accumulation=4), method=method, targets=TARGETS)
    # Gates that are as often open as closed, and updates that matter.
    large = lambda path, x: 0 * x if "gates" in path[-1].key else 10 * x  # noqa: E731
    adapters = jax.tree_util.tree_map_with_path(large, state.adapters)
    state = dataclasses.replace(state, adapters=adapters)
    later = dataclasses.replace(state, step=jnp.int32(SETTINGS.steps - 1))
    losses, norms = [], []
    for step, at in ((whole, state), (parts, state), (whole, later)):
        _, metrics = step(at, base, batch)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert abs(losses[2] - losses[0]) > 1e-2


def test_the_penalty_of_a_step_is_the_sum_over_all_layers() -> None:
    adapter = AdapterConfig(method="bayesian", rank=4, targets=TARGETS)
    *_, model = setup(method="bayesian", targets=TARGETS)
    adapters = model.init_adapters(jax.random.key(0))
    lora = prepared_model(model)
    tree = prepare(model, adapters, jax.random.key(1), jnp.float32(0))
    assert lora.adapter == AdapterConfig(method="lora", rank=4, targets=TARGETS)
    expected, seen = 0.0, set()
    for group, linears in adapters["layers"].items():
        for name, leaves in linears.items():
            for layer in range(leaves["lora_A"].shape[0]):
                own = {leaf: stack[layer] for leaf, stack in leaves.items()}
                expected += float(bayesian.penalty(own, adapter.bayesian))
            drawn = tree["layers"][group][name]
            assert sorted(drawn) == ["lora_A", "lora_B"]
            seen |= {np.asarray(stack).tobytes() for stack in drawn["lora_A"]}
    assert float(penalty(model, adapters)) == pytest.approx(expected, rel=1e-5)
    assert len(seen) == 2 * model.config.num_hidden_layers


def test_a_strong_penalty_closes_gates_from_the_last_rank_on() -> None:
    """Without a task, the penalty alone moves all gates below the threshold."""
    options = bayesian.BayesianOptions(penalty=1.0, speed=1.0)
    params = bayesian.init(jax.random.key(0), 16, 8, 4, options)
    start = bayesian.learned(params)
    assert {name: int(value) for name, value in start.items()} == {
        "bits of A": 32, "bits of B": 32, "bits of E": 32, "rank": 4
    }  # fmt: skip
    slope = jax.grad(lambda p: bayesian.penalty(p, options))(params)
    for name, leaf in slope.items():
        gates = leaf[1:] if name == "gates_rank" else leaf
        assert bool((gates > 0).all() if "gates" in name else (leaf == 0).all()), name
    closed = params | {name: -jnp.ones_like(params[name]) for name in params if "gates" in name}
    assert {name: int(value) for name, value in bayesian.learned(closed).items()} == {
        "bits of A": 2, "bits of B": 2, "bits of E": 2, "rank": 1
    }  # fmt: skip


@pytest.mark.long
def test_a_penalty_in_training_leaves_fewer_bits_and_ranks(tmp_path: Path) -> None:
    """What the report says was learned, and the pair that is exported, which is smaller."""
    *_, base, batch, model = setup(method="bayesian", targets=TARGETS)
    options = bayesian.BayesianOptions(penalty=1.0)
    adapter = AdapterConfig(method="bayesian", rank=4, targets=TARGETS, bayesian=options)
    model = model.clone(adapter=adapter)
    optimizer = make_optimizer(SETTINGS, adapter.chosen)
    state = jax.jit(lambda: init_state(model, optimizer, 0))()
    step = functools.partial(train_step, model=model, optimizer=optimizer, config=SETTINGS)
    step = jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})
    learned, losses = [loop.learned(adapter, state.adapters)], []
    for _ in range(12):
        state, metrics = step(state, base, batch)
        losses.append(float(metrics["loss"]))
    learned.append(loop.learned(adapter, state.adapters))
    layers = range(model.config.num_hidden_layers)
    for numbers, bits, rank in zip(learned, (32, 2), (4, 1), strict=True):
        expected = {f"bits of {x}": bits for x in "ABE"} | {"rank": rank}
        assert numbers == {
            f"learned/{quantity}/{name}/{layer}": number
            for quantity, number in expected.items()
            for name in TARGETS
            for layer in layers
        }
    assert losses[-1] < losses[0]
    save_adapter(tmp_path, model, state.adapters)
    plain = AdapterConfig(method="lora", rank=1, alpha=adapter.alpha / 4, targets=TARGETS)
    pair = load_adapter(tmp_path, Llama(model.config, adapter=plain))
    own = jax.tree.map(lambda stack: stack[0], state.adapters["layers"]["mlp"]["down_proj"])
    whole, stored = bayesian.fold(own), pair["layers"]["mlp"]["down_proj"]
    np.testing.assert_allclose(stored["lora_A"][0], whole["lora_A"][:1], rtol=1e-6)
    np.testing.assert_allclose(stored["lora_B"][0], whole["lora_B"][:, :1], rtol=1e-6)
    assert not whole["lora_B"][:, 1:].any()


@pytest.mark.parametrize("open_gates", range(5))
def test_a_folded_factor_has_codes_of_its_bits(open_gates: int) -> None:
    """Bits b give at most 2^b - 1 values, on a grid around 0."""
    bits = (2, 4, 8, 16, 32)[open_gates]
    params = bayesian.init(jax.random.key(0), 64, 48, 4, bayesian.BayesianOptions())
    gates = jnp.where(jnp.arange(4) < open_gates, 1.0, -1.0)
    a = bayesian.fold(params | {"gates_A": gates})["lora_A"]
    end = float(jnp.abs(params["lora_A"]).max())
    if bits > 8:
        np.testing.assert_allclose(a, params["lora_A"], atol=end / 2 ** (bits - 1) + 1e-7 * end)
        return
    codes = np.asarray(a, np.float64) / (2 * end / (2**bits - 1))
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-3)
    assert np.abs(codes).max() < 2 ** (bits - 1) - 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": -1.0}, r"adapter.bayesian.penalty = -1.0: expected a finite number"),
        ({"speed": 0.0}, r"adapter.bayesian.speed = 0.0: expected a positive finite number"),
        ({"rank_gate": -2.0}, r"adapter.bayesian.rank_gate = -2.0: .* gates start open"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bayesian.BayesianOptions(**options)


def test_the_steepness_grows_with_the_steps() -> None:
    adapter = AdapterConfig(method="binary", rank=4)
    params = binary.init(jax.random.key(0), 16, 8, 4)
    key = jax.random.key(0)
    errors = []
    for progress in (0.0, 0.5, 1.0):
        pair = binary.prepare(params, key, jnp.float32(progress), adapter.binary)
        errors.append(float(jnp.abs(pair["lora_A"] - binary.fold(params)["lora_A"]).mean()))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("method", ["bayesian", *long("binary")])
def test_the_whole_product(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """A run that crashes goes on bit by bit, and its adapter and its report can be written."""
    changes: dict[str, Any] = {"adapter__method": method, "adapter__rank": 4, "train__steps": 4}
    changes |= {"adapter__targets": TARGETS, "train__eval_every": 4, "adapter__dropout": 0.0}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(config_for(base, whole, **changes))
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        at_step(patch, 3, crash)
        run(config_for(base, broken, **changes))
    run(config_for(base, broken, **changes))
    assert_same_run(whole, broken)
    export_adapter(whole, tmp_path / "adapter", fold=True)
    export_adapter(whole, tmp_path / "own", fold=False)
    trained = load_run(whole)
    plain = AdapterConfig(method="lora", rank=4, targets=TARGETS)
    lora = Llama(trained.model.config, adapter=plain)
    tokens = jnp.arange(12, dtype=jnp.int32)[None, :]
    apply = jax.jit(Llama.apply, static_argnums=0)
    logits = [
        np.asarray(apply(model, {"params": params, "base": trained.variables["base"]}, tokens))
        for model, params in (
            (trained.model, trained.variables["params"]),
            (lora, load_adapter(tmp_path / "adapter", lora)),
            (trained.model, load_adapter(tmp_path / "own", trained.model)),
            (trained.model, trained.model.init_adapters(jax.random.key(0))),
        )
    ]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-4)
    np.testing.assert_allclose(logits[2], logits[0], atol=1e-4)
    assert np.abs(logits[3] - logits[0]).max() > 1e-3
    report = page(read_run_data(whole))
    assert ("What the adapter learned" in report) == (method == "bayesian")
    if method == "bayesian":
        assert "down_proj: bits of A" in report
