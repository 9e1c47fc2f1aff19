"""Adapters that a training step prepares: gates and noise, growing steepness, and penalties."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.adapters import bayesian, binary
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.train.step import penalty, prepare
from tests.train.test_step import SETTINGS, setup

pytestmark = pytest.mark.usefixtures("optimizer_promotion")


@pytest.mark.parametrize("method", ["bayesian", "binary"])
def test_parts_of_a_batch_share_a_draw_and_training_learns(method: str) -> None:
    whole, state, base, batch, _ = setup(method=method)
    parts, *_ = setup(dataclasses.replace(SETTINGS, accumulation=4), method=method)
    _, metrics = whole(state, base, batch)
    _, metrics_other = parts(state, base, batch)
    assert float(metrics["loss"]) == pytest.approx(float(metrics_other["loss"]), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(metrics_other["grad_norm"]), rel=1e-4)
    losses = []
    for _ in range(30):
        state, metrics = whole(state, base, batch)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1


def test_the_penalty_of_a_step_is_the_sum_over_all_layers() -> None:
    adapter = AdapterConfig(method="bayesian", rank=4)
    *_, model = setup(method="bayesian")
    adapters = model.init_adapters(jax.random.key(0))
    lora, tree = prepare(model, adapters, jax.random.key(1), jnp.float32(0))
    assert lora.adapter == AdapterConfig(method="lora", rank=4)
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
    assert len(seen) == 7 * leaves["lora_A"].shape[0]


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
