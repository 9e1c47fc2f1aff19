"""LoRA and IEC: the paper's formulas, and exact folding for every shape."""

import dataclasses
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irqlora_jax.adapters import METHODS, iec, lora
from irqlora_jax.adapters.method import Method
from tests.models import ROOT

SHAPE = 24, 192
"""Outputs and inputs of a layer that every method takes with its default options."""


def spread_by_definition(x: np.ndarray, size: int) -> np.ndarray:
    """eq. 12: out[j] is the mean of the window that j's share falls into."""
    n = len(x)
    windows = math.gcd(n, size)
    return np.array(
        [x[(j * windows // size) * n // windows :][: n // windows].mean() for j in range(size)]
    )


@given(st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=10, deadline=None)
def test_spread_follows_eq_12(n: int, size: int) -> None:
    x = np.random.default_rng(n * 61 + size).normal(size=n).astype(np.float32)
    got = np.asarray(iec.spread(jnp.asarray(x), size))
    np.testing.assert_allclose(got, spread_by_definition(x, size), atol=1e-6)


def test_worked_example_of_the_merging_rule() -> None:
    """eq. 16 for 4 inputs, 4 outputs, rank 2: the connections interleave."""
    params = {
        "lora_A": jnp.zeros((2, 4)),
        "lora_B": jnp.zeros((4, 2)),
        "beta1": jnp.float32(1),
        "beta2": jnp.float32(1),
    }
    pair = iec.fold(params)
    assert pair["lora_A"].tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]
    assert pair["lora_B"].tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 24))
@settings(max_examples=10, deadline=None)
def test_fold_is_exact(in_features: int, out_features: int, rank: int) -> None:
    keys = jax.random.split(jax.random.key(in_features * 71 + out_features), 5)
    params = {
        "lora_A": jax.random.normal(keys[0], (rank, in_features)),
        "lora_B": jax.random.normal(keys[1], (out_features, rank)),
        "beta1": jax.random.normal(keys[2]),
        "beta2": jax.random.normal(keys[3]),
    }
    x = jax.random.normal(keys[4], (5, in_features))
    with jax.default_matmul_precision("highest"):
        u = x @ params["lora_A"].T + params["beta1"] * iec.spread(x, rank)  # eq. 12
        elastic = u @ params["lora_B"].T + params["beta2"] * iec.spread(u, out_features)  # eq. 13
        folded = lora.apply(iec.fold(params), x, x)
        whole = iec.apply(params, x, x)
        with_dropout = iec.apply(params, x, x + 0, 0.5) * 2  # another array: not folded into A
    for other in (folded, whole, with_dropout):
        assert float(jnp.abs(elastic - other).max()) <= 1e-5 * float(jnp.abs(elastic).max())


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_fresh_adapters_change_nothing(method: Method) -> None:
    params = method.init(jax.random.key(0), SHAPE, 4, method.options, jnp.float32)
    x = jax.random.normal(jax.random.key(1), (3, SHAPE[1]))
    weight = jax.random.normal(jax.random.key(2), SHAPE)
    if method.from_weight is not None:
        params = method.from_weight(params, weight, 1.0)
    assert not np.asarray(method.apply(params, x, x, 1.0, weight)).any()
    if method.gain is not None:
        np.testing.assert_allclose(method.gain(params, weight, 1.0), 1, rtol=1e-6)
    assert set(method.faster) <= params.keys()


@pytest.mark.parametrize("method", [METHODS["lora"], METHODS["iec"]], ids=["lora", "iec"])
def test_a_starts_as_in_peft(method: Method) -> None:
    a = method.init(jax.random.key(0), (8, 4096), 64, method.options, jnp.float32)["lora_A"]
    assert float(jnp.abs(a).max()) <= 1 / math.sqrt(4096)
    assert float(jnp.std(a)) == pytest.approx(1 / math.sqrt(3 * 4096), rel=0.02)


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_apply_fold_and_weight_update_are_one_update(method: Method) -> None:
    fresh = method.init(jax.random.key(0), SHAPE, 4, method.options, jnp.float32)
    keys = jax.random.split(jax.random.key(1), len(fresh) + 1)
    params = {
        name: jax.random.normal(key, leaf.shape)
        for (name, leaf), key in zip(fresh.items(), keys[1:], strict=True)
    }
    x = jax.random.normal(keys[0], (3, SHAPE[1]))
    y = method.apply(params, x, x, 0.5, jnp.zeros(SHAPE))
    update = method.weight_update(params, SHAPE)
    np.testing.assert_allclose(y, 0.5 * x @ update.T, atol=1e-4)
    assert fresh.keys() <= method.files.keys()
    if method.fold is not None:
        pair = method.fold(params, SHAPE)
        np.testing.assert_allclose(pair["lora_B"] @ pair["lora_A"], update, atol=1e-5)
        if method.rank is not None:
            kept = int(method.rank(params))
            np.testing.assert_allclose(
                pair["lora_B"][:, :kept] @ pair["lora_A"][:kept], update, atol=1e-5
            )


def test_a_method_without_a_pair_must_give_its_update() -> None:
    with pytest.raises(ValueError, match="adapter 'bare': needs fold, delta or reduced"):
        dataclasses.replace(METHODS["lora"], name="bare", fold=None)


def test_names_are_checked_in_python_too() -> None:
    """In a process of its own: here the type checks of the tests would come first."""
    code = """
from irqlora_jax import AdapterConfig, QuantConfig
for make, value in (
    (AdapterConfig, {"method": "loha"}),
    (AdapterConfig, {"init": "pissa"}),
    (QuantConfig, {"calibration": "iqc"}),
    (QuantConfig, {"format": "nf5"}),
):
    try:
        make(**value)
    except ValueError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        f"adapter.method = 'loha': expected {', '.join(METHODS)}",
        "adapter.init = 'pissa': expected default, loftq, cloq, lqlora, trained",
        "quant.calibration = 'iqc': expected none, icq, joint, robust, importance, gptq",
        "quant.format = 'nf5': expected nf4, nf3, nf2, fp4, int4, int3, int2, nf8, int8, none",
    ]


def test_first_gradient_reaches_beta2_but_not_beta1() -> None:
    """As in the released code: both scalars start at 0 and B at 0, which blocks beta1's path."""
    params = iec.init(jax.random.key(0), 16, 16, 4)
    x = jax.random.normal(jax.random.key(1), (3, 16))
    gradient = jax.grad(lambda p: (iec.apply(p, x, x) * x).sum())(params)
    assert float(gradient["beta2"]) != 0
    assert float(gradient["beta1"]) == 0


def test_connection_sees_what_dropout_took() -> None:
    params = iec.init(jax.random.key(0), 16, 16, 4) | {
        "beta1": jnp.float32(1),
        "beta2": jnp.float32(1),
    }
    x = jax.random.normal(jax.random.key(1), (3, 16))
    everything_dropped = iec.apply(params, x, jnp.zeros_like(x))
    expected = iec.spread(iec.spread(x, 4), 16)
    np.testing.assert_allclose(everything_dropped, expected, rtol=1e-6)
