"""Error feedback against the released GPTQ code, a slow reference, and what it is for."""

import dataclasses
import inspect
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.quant import slabs
from irqlora_jax.quant.calibrations.icq_integer import plain_range
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.quant.feedback import feedback_factor, round_with_feedback
from irqlora_jax.quant.formats import FORMATS, get_format
from tests.arrays import read_arrays

FEEDBACK = QuantConfig(rounding="feedback")


def integer_rounding(scale: np.ndarray, zero: np.ndarray, size: int, bits: int, place=None):
    """Rounds column i with the scales [out, groups] of the group of `place[i]` (None: of i)."""
    place = np.arange(scale.shape[1] * size) if place is None else place
    scales, zeros = (jnp.asarray(np.repeat(x, size, 1)[:, place]) for x in (scale, zero))

    def round_column(column, index):
        own, middle = scales[:, index], zeros[:, index]
        code = jnp.clip(jnp.round(column / own) + middle, 0, 2**bits - 1)
        return code.astype(jnp.uint8), own * (code - middle)

    return round_column


def slow(weight: np.ndarray, gram: np.ndarray, damping: float, value_of) -> np.ndarray:
    """The values after each column's error went to all later ones, in float64, by the formula
    of the paper: with the inverse of what is left of H after every column."""
    work, left = weight.astype(np.float64), gram.astype(np.float64)
    left = left + damping * np.diag(left).mean() * np.eye(len(left))
    values = np.zeros_like(work)
    for i in range(work.shape[1]):
        inverse = np.linalg.inv(left[i:, i:])
        values[:, i] = value_of(work[:, i], i)
        error = (work[:, i] - values[:, i]) / inverse[0, 0]
        work[:, i:] -= np.outer(error, inverse[0])
    return values


SETTINGS = json.loads((Path(__file__).parents[1] / "golden" / "gptq.json").read_text())


def codes_of(golden, name: str, settings: dict, weight: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Our codes with the released scales and zero points."""
    scale, zero = golden[f"{name}_scale"], golden[f"{name}_zero"]
    order = golden["perm"] if settings["act"] else None
    place = None
    if settings["act"] and not settings["static"]:
        place = np.argsort(order)  # groups are counted in the order of rounding
    rounding = integer_rounding(scale, zero, settings["group"], settings["bits"], place)
    if order is not None:
        gram = gram[order][:, order]
    factor = feedback_factor(jnp.asarray(gram), settings.get("percdamp", 0.01))
    order = None if order is None else jnp.asarray(order)
    return np.asarray(round_with_feedback(jnp.asarray(weight), factor, rounding, order))


@pytest.mark.parametrize(
    ("ranges", "name"), [(part, name) for part in ("gptq", "gptq_icq") for name in SETTINGS[part]]
)
def test_codes_of_the_released_code(golden, ranges: str, name: str) -> None:
    """With its own ranges, and with those of integer ICQ."""
    settings, released = SETTINGS[ranges][name], read_arrays(golden / f"{ranges}.npz")
    gram = released["x"].T @ released["x"]
    found = codes_of(released, name, settings, released["w"], gram)
    np.testing.assert_array_equal(found, released[f"{name}_codes"])


@pytest.mark.parametrize("name", SETTINGS["gptq_dead"])
def test_codes_with_inputs_that_are_always_zero(golden, name: str) -> None:
    """The released code sets their columns to 0; here they keep their weights."""
    settings, released = SETTINGS["gptq_dead"][name], read_arrays(golden / "gptq_dead_columns.npz")
    dead = np.diag(released["H"]) == 0
    assert dead.any()
    weight = np.where(dead, 0, released["w"])
    # The scale of H matters, because the diagonal of a dead input becomes 1.
    found = codes_of(released, name, settings, weight, released["H"])
    np.testing.assert_array_equal(found, released[f"{name}_codes"])


FROM_WEIGHTS = [
    name
    for name, own in SETTINGS["gptq"].items()
    if "block" not in own and "mse" not in own and (own["static"] or not own["act"])
]


@pytest.mark.parametrize("name", FROM_WEIGHTS)
def test_ranges_of_the_released_code(golden, name: str) -> None:
    """Those of the plain integer quantizer, except where they are taken from updated weights."""
    settings, released = SETTINGS["gptq"][name], read_arrays(golden / "gptq.npz")
    blocks = jnp.asarray(released["w"].reshape(-1, settings["group"]))
    scale, zero = plain_range(blocks, settings["bits"], settings["sym"])
    np.testing.assert_allclose(scale, released[f"{name}_scale"].ravel(), rtol=1e-6)
    np.testing.assert_array_equal(zero, released[f"{name}_zero"].ravel())


# ------------------------------------------------------------------------------- in the quantizer


def layer(rows: int, columns: int, tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and the second moments of correlated inputs of unequal size."""
    draw = np.random.default_rng(seed)
    weight = draw.normal(size=(rows, columns)).astype(np.float32)
    inputs = draw.normal(size=(tokens, columns)) @ draw.normal(size=(columns, columns))
    inputs *= np.exp(draw.normal(size=columns))
    return weight, (inputs.T @ inputs / tokens).astype(np.float32)


def output_error(weight: np.ndarray, q, gram: np.ndarray) -> float:
    error = np.asarray(q.dequantize(), np.float64) - weight
    return float(np.einsum("oi,ij,oj", error, gram, error))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("columns", [200, 128])
def test_the_quantizer_rounds_as_the_slow_reference(format: str, columns: int) -> None:
    """Also where the last block and the last 128 columns are not full."""
    weight, gram = layer(6, columns, 400)
    config = QuantConfig(format=format, calibration="gptq")  # type: ignore[arg-type]
    found = quantize(jnp.asarray(weight), config, gram=jnp.asarray(gram))
    plain = quantize(jnp.asarray(weight), config.plain)
    for name in ("scale_codes", "scale_max", "scale_offset", "shift_codes"):
        one, other = getattr(found, name), getattr(plain, name)
        assert (one is None and other is None) or (one == other).all()
    order = np.argsort(-np.diag(gram), kind="stable")
    of_column = np.repeat(np.arange(found.scale().shape[1]), 64)[:columns]
    levels = np.asarray(get_format(format).table, np.float64)
    scale = np.asarray(found.scale(), np.float64)
    shift = 0 * scale if found.shift() is None else np.asarray(found.shift(), np.float64)

    def nearest(column: np.ndarray, place: int) -> np.ndarray:
        block = of_column[order[place]]
        values = levels * scale[:, block, None] + shift[:, block, None]
        return np.take_along_axis(values, np.abs(column[:, None] - values).argmin(1)[:, None], 1)[
            :, 0
        ]

    expected = np.zeros_like(weight)
    expected[:, order] = slow(weight[:, order], gram[order][:, order], 0.01, nearest)
    np.testing.assert_allclose(found.dequantize(), expected, rtol=1e-5, atol=1e-5)
    assert output_error(weight, found, gram) < 0.7 * output_error(weight, plain, gram)


@pytest.mark.long
@pytest.mark.parametrize("calibration", ["none", "icq", "joint", "robust", "importance"])
def test_every_calibration_gains(calibration: str) -> None:
    weight, gram = layer(64, 256, 1000)
    config = QuantConfig(format="nf3", calibration=calibration, rounding="feedback")  # type: ignore[arg-type]
    found = quantize(jnp.asarray(weight), config, gram=jnp.asarray(gram))
    nearest = dataclasses.replace(config, rounding="nearest")
    plain = quantize(
        jnp.asarray(weight), nearest, gram=jnp.asarray(gram) if nearest.needs_inputs else None
    )
    assert output_error(weight, found, gram) < 0.7 * output_error(weight, plain, gram)


def test_uncorrelated_inputs_and_slabs_change_nothing(monkeypatch) -> None:
    weight, gram = layer(40, 192, 500)
    config = QuantConfig(format="nf3", calibration="gptq")
    alone = jnp.diag(jnp.diagonal(jnp.asarray(gram)))
    found = quantize(jnp.asarray(weight), config, gram=alone)
    assert (found.packed == quantize(jnp.asarray(weight), config.plain).packed).all()
    whole = quantize(jnp.asarray(weight), config, gram=jnp.asarray(gram))
    monkeypatch.setattr(slabs, "_CACHED", 7 * 192)
    jax.clear_caches()
    parts = quantize(jnp.asarray(weight), config, gram=jnp.asarray(gram))
    assert (parts.packed == whole.packed).all()


def test_a_traced_call_gives_the_same_codes() -> None:
    weight, gram = map(jnp.asarray, layer(8, 96, 300))
    config = QuantConfig(format="nf3", calibration="gptq")
    traced = jax.jit(lambda weight, gram: quantize(weight, config, gram=gram))(weight, gram)
    assert (traced.packed == quantize(weight, config, gram=gram).packed).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda gram: gram.at[3, 4].set(jnp.nan), "gram = .*NaN"),
        (lambda gram: -gram, "gram = .*negative"),
        (lambda gram: gram.at[0, 1].set(9e9).at[1, 0].set(9e9), "damping = 0.01: expected"),
    ],
)
def test_moments_that_cannot_be_are_refused(change, message: str) -> None:
    weight, gram = layer(4, 64, 100)
    with pytest.raises(ValueError, match=message):
        quantize(jnp.asarray(weight), FEEDBACK, gram=change(jnp.asarray(gram)))


def test_moments_of_another_layer_are_refused() -> None:
    """Without the type checks of these tests, which users do not have."""
    weight, gram = layer(4, 64, 100)
    with pytest.raises(ValueError, match=r"gram = \(63, 63\): expected shape \(64, 64\)"):
        inspect.unwrap(quantize)(jnp.asarray(weight), FEEDBACK, gram=jnp.asarray(gram[1:, 1:]))


def test_fewer_tokens_than_inputs_need_the_damping() -> None:
    weight, gram = layer(4, 64, 10)
    quantize(jnp.asarray(weight), FEEDBACK, gram=jnp.asarray(gram))
    with pytest.raises(ValueError, match=r"damping = 0\.0: expected more damping"):
        quantize(jnp.asarray(weight), FEEDBACK, gram=jnp.asarray(gram), damping=0.0)


@pytest.mark.parametrize("calibration", ["gptq", "importance"])
def test_moments_are_given_exactly_where_they_are_needed(calibration: str) -> None:
    weight, gram = map(jnp.asarray, layer(4, 64, 100))
    with pytest.raises(ValueError, match=r"gram = 'None': expected X\^T X .* with nf4"):
        quantize(weight, QuantConfig(calibration=calibration))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"gram = 'a matrix': expected None with nf4 \+ ICQ"):
        quantize(weight, QuantConfig(), gram=gram)
