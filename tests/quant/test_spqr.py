"""SpQR and OAC against the released engine, and the leave-one-out gain against plain loops."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.quant.calibrations.icq_integer import plain_range
from irqlora_jax.quant.feedback import feedback_factor, round_with_feedback
from irqlora_jax.quant.spqr import leave_one_out_gain, spqr
from tests.arrays import read_arrays
from tests.quant.test_feedback import integer_rounding

SETTINGS = json.loads((Path(__file__).parents[1] / "golden" / "spqr.json").read_text())["configs"]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("moments", ["inputs", "oac"])
def test_codes_outliers_and_weights_of_the_released_engine(golden, moments, name) -> None:
    released, own = read_arrays(golden / "spqr.npz"), SETTINGS[name]
    golden_of = {
        key.removeprefix(f"{moments}_{name}_"): value
        for key, value in released.items()
        if key.startswith(f"{moments}_{name}_")
    }
    act_order = own["permutation_order"] == "act_order"
    found = spqr(
        jnp.asarray(released["w"]),
        jnp.asarray(released[f"H_{moments}"]),
        own["bits"],
        own["groupsize"],
        own.get("outlier_relative_threshold", float("inf")),
        damping=own["percdamp"],
        order=jnp.asarray(golden_of["perm"]) if act_order else None,
        symmetric=own.get("sym", False),
        statistic_bits=own.get("qq_scale_bits"),
        leave_one_out=not own.get("simplified_outliers", False),
    )
    mask = np.unpackbits(golden_of["outliers"]).reshape(64, 128)
    np.testing.assert_array_equal(found.codes, golden_of["codes"])
    np.testing.assert_array_equal(found.outliers, mask)
    np.testing.assert_allclose(found.weight, golden_of["weight"], atol=5e-7)
    np.testing.assert_allclose(found.scale, golden_of["scale"], atol=2e-7)
    np.testing.assert_allclose(found.zero, golden_of["zero"], atol=2e-6)


@pytest.mark.parametrize(("bits", "group", "damping"), [(2, 32, 0.1), (3, 64, 0.01)])
@pytest.mark.parametrize("order", ["plain", "act"])
def test_released_gptq_with_the_moments_of_gradients(golden, bits, group, damping, order) -> None:
    """OAC of integers: the loop of GPTQ with another Gram matrix."""
    released = read_arrays(golden / "spqr.npz")
    weight, gram = released["w"], released["H_oac"]
    places = np.arange(128) if order == "plain" else np.argsort(-np.diag(gram), kind="stable")
    weight, gram = weight[:, places], gram[places][:, places]
    scale, zero = plain_range(jnp.asarray(weight.reshape(-1, group)), bits, False)
    scale, zero = (np.asarray(x).reshape(64, -1) for x in (scale, zero))
    rounding = integer_rounding(scale, zero, group, bits)
    factor = feedback_factor(jnp.asarray(gram), damping)
    codes = np.asarray(round_with_feedback(jnp.asarray(weight), factor, rounding), np.float32)
    found = np.empty_like(weight)
    found[:, places] = scale.repeat(group, 1) * (codes - zero.repeat(group, 1))
    np.testing.assert_allclose(found, released[f"gptq_int{bits}_g{group}_damp{damping}_{order}"],
        atol=3e-7)  # fmt: skip


def test_gain_of_leaving_one_out() -> None:
    rng = np.random.default_rng(0)
    weight, diagonal = rng.standard_t(3, (5, 12)), rng.uniform(0.5, 2, 12)

    def error(row, own):
        low, high = row.min(), row.max()
        scale = (high - low) / 7
        zero = -low / scale
        off = row - scale * (np.clip(np.round(row / scale + zero), 0, 7) - zero)
        return (off**2 / own**2).sum()

    expected = [
        [error(row, diagonal) - error(np.delete(row, i), np.delete(diagonal, i)) for i in range(12)]
        for row in weight
    ]
    found = leave_one_out_gain(
        jnp.asarray(weight, jnp.float32), jnp.asarray(diagonal, jnp.float32), 3
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_outliers_keep_the_loss_low() -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_t(3, (32, 64)).astype(np.float32)
    inputs = rng.standard_normal((200, 64)) @ rng.standard_normal((64, 64))
    gram = (inputs.T @ inputs).astype(np.float32)

    def loss(**options) -> tuple[float, int]:
        found = spqr(jnp.asarray(weight), jnp.asarray(gram), 3, 16, damping=0.01, **options)
        error = np.asarray(found.weight, np.float64) - weight
        return float(np.einsum("oi,ij,oj", error, gram, error)), int(found.outliers.sum())

    without, none = loss()
    simple, _ = loss(threshold=0.1, leave_one_out=False)
    with_outliers, some = loss(threshold=0.1)
    assert none == 0 < some < 0.1 * weight.size
    assert with_outliers < 0.5 * without and with_outliers < simple


def test_refusals() -> None:
    weight, gram = jnp.ones((8, 64)), jnp.eye(64)
    with pytest.raises(ValueError, match="group = 24: expected a divisor of the 64 columns"):
        spqr(weight, gram, 3, 24)
    with pytest.raises(ValueError, match="rows = 8: expected a multiple of 16"):
        spqr(weight, gram, 3, 16, statistic_bits=3)
    with pytest.raises(ValueError, match="gram = "):
        spqr(weight, -gram, 3, 16)
