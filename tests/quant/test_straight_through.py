"""Rounding with straight-through gradients, clip factors, and packing with given scales."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.quant.calibrations.icq_integer import plain_range
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import encode_with, quantize
from irqlora_jax.quant.formats import FORMATS, get_format
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.quant.straight_through import (
    clipped_integers,
    clipped_levels,
    round_to_integers,
    round_to_levels,
)
from irqlora_jax.quant.trained import ApiqOptions, BlockOptions, Numbers, round_matrix
from tests.arrays import read_arrays
from tests.models import assert_same

FEW_BITS = [name for name in FORMATS if FORMATS[name].bits < 8]
INTEGERS = [name for name in FEW_BITS if FORMATS[name].integer]
LEVELS = [name for name in FEW_BITS if not FORMATS[name].integer]

# ------------------------------------------------------------------------ ApiQ's released code


@pytest.mark.parametrize("start", ["init", "random"])
@pytest.mark.parametrize("kind", ["asym", "sym"])
@pytest.mark.parametrize("format", INTEGERS)
def test_quantizer_of_the_released_code(golden, format: str, kind: str, start: str) -> None:
    """Also for a block of positive weights, one of zeros, and weights at the ends of the range."""
    released, fmt = read_arrays(golden / "apiq_quantizer.npz"), get_format(format)
    weight, cotangent = (released[name].reshape(-1, 64) for name in ("w", "cotangent"))
    given = {name: np.full(len(weight), 4.0, np.float32) for name in ("up", "low")}
    if start == "random":
        given = {name: released[f"{name}_random"][:, 0] for name in given}

    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def work(up, low):
        ends = jnp.asarray(weight.min(1)), jnp.asarray(weight.max(1))
        scale, zero = clipped_integers(*ends, low, up, fmt, kind == "sym")
        values = round_to_integers(jnp.asarray(weight), scale, zero, fmt)
        return (values * cotangent).sum(), (scale, zero, values)

    gradients, found = work(jnp.asarray(given["up"]), jnp.asarray(given["low"]))
    names = ("scale", "zero", "out", "grad_up", "grad_low")
    limits = (1e-8, 0, 3e-8, 3e-8, 3e-8)
    for name, ours, limit in zip(names, (*found, *gradients), limits, strict=True):
        expected = released[f"{format}_{kind}_{start}_{name}"]
        np.testing.assert_allclose(np.ravel(ours), expected.ravel(), rtol=0, atol=limit)


# -------------------------------------------------------------------- gradients of the rounding


def blocks_of(format: str, zeros=(0.0, 1.0, 1.5)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights inside, outside and at the ends of the code book, scales, shifts or zero points."""
    fmt, draw = get_format(format), np.random.default_rng(0)
    scale = np.array([0.5, 1.0, 2.0], np.float32)
    place = np.array(zeros if fmt.integer else (-0.25, 0.0, 0.5), np.float32)
    low, high = fmt.table.min(), fmt.table.max()
    units = draw.uniform(low - 1, high + 1, (3, 40)).astype(np.float32)
    units[:, :2] = low, high
    shift = -place * scale if fmt.integer else place
    return units * scale[:, None] + shift[:, None], scale, place


def slow(format: str, weight, scale, place) -> tuple[np.ndarray, ...]:
    """Values and their derivatives by weight, scale and place, weight by weight, in float64."""
    fmt, results = get_format(format), np.zeros((4, *weight.shape))
    levels = np.asarray(sorted(fmt.levels))
    for i, j in np.ndindex(*weight.shape):
        w, s, p = (float(x) for x in (weight[i, j], scale[i], place[i]))
        if fmt.integer:
            code = np.round(w / s + p - np.floor(p)) + np.floor(p)
            level = min(max(code, 0), levels[-1])
            inside, value = code == level, s * (level - p)
            by_scale = level - p - (w / s if inside else 0)
            by_place = 0 if inside else -s
        else:
            u = (w - p) / s
            level = levels[np.abs(levels - u).argmin()]
            inside, value = levels[0] <= u <= levels[-1], level * s + p
            by_scale = level - (u if inside else 0)
            by_place = 0 if inside else 1
        results[:, i, j] = value, inside, by_scale, by_place
    return tuple(results)


@pytest.mark.parametrize("format", FEW_BITS)
def test_gradients_of_the_rounding(format: str) -> None:
    given, fmt = blocks_of(format), get_format(format)
    rounding = round_to_integers if fmt.integer else round_to_levels
    values, transpose = jax.vjp(lambda *x: rounding(*x, fmt), *map(jnp.asarray, given))
    cotangent = np.random.default_rng(1).normal(size=values.shape).astype(np.float32)
    expected, inside, by_scale, by_place = slow(format, *given)
    assert inside[:, :2].all() and 0.1 < inside.mean() < 0.95
    np.testing.assert_allclose(values, expected, atol=1e-6)
    weight, scale, place = transpose(jnp.asarray(cotangent))
    np.testing.assert_array_equal(weight, cotangent * inside)
    np.testing.assert_allclose(scale, (cotangent * by_scale).sum(1), atol=1e-4)
    np.testing.assert_allclose(place, (cotangent * by_place).sum(1), atol=1e-5)


@pytest.mark.parametrize("format", LEVELS)
def test_levels_without_a_shift(format: str) -> None:
    weight, scale, _ = map(jnp.asarray, blocks_of(format))
    fmt = get_format(format)
    values, gradients = jax.value_and_grad(
        lambda shift: round_to_levels(weight, scale, shift, fmt).sum()
    )(jnp.zeros(3))
    assert values == round_to_levels(weight, scale, None, fmt).sum()
    assert (gradients != 0).all()  # weights outside of the range pull the shift


@pytest.mark.parametrize("shifted", [True, False])
def test_gradients_of_clipped_levels(shifted: bool) -> None:
    """Against the formulas, in float64."""
    draw, fmt = np.random.default_rng(0), get_format("nf3")
    low, high = -np.abs(draw.normal(size=5)), np.abs(draw.normal(size=5))
    down, up = draw.normal(size=(2, 5))

    def work(down, up):
        scale, shift = clipped_levels(*map(to_jax, (low, high)), down, up, fmt, shifted)
        return 2 * scale.sum() + (0.0 if shift is None else 3 * shift.sum())

    def to_jax(x):
        return jnp.asarray(x.astype(np.float32))

    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    steep = lambda x: sigmoid(x) * (1 - sigmoid(x))  # noqa: E731
    found = jax.grad(work, (0, 1))(to_jax(down), to_jax(up))
    if shifted:  # the ends are -1 and 1: scale = (top - bottom) / 2, shift = (top + bottom) / 2
        expected = (0.5 * low * steep(down), 2.5 * high * steep(up))
    else:
        top = sigmoid(up) * high > -sigmoid(down) * low
        expected = (
            np.where(top, 0, -2 * low * steep(down)),
            np.where(top, 2 * high * steep(up), 0),
        )
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------ as the storage rounds


def random_weight(seed: int = 0) -> jax.Array:
    """The last block of each row is not full."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=(24, 200)).astype(np.float32))


def config_of(format: str) -> QuantConfig:
    return QuantConfig(format=format, calibration="none")


def stored(format: str, weight: jax.Array, shifted: bool = True) -> QTensor:
    """Random scales, shifts, and zero points that are no whole numbers. Some weights are beyond the
    last level."""
    fmt, draw = get_format(format), np.random.default_rng(1)
    width = 4 / 2**fmt.bits if fmt.integer else 2.0
    scale = draw.uniform(0.7, 1, (24, 4)) * width
    place = draw.uniform(-0.2, 0.2, (24, 4))
    if fmt.integer:
        place = (2**fmt.bits - 1) * (0.5 + place)
    given = [jnp.asarray(x.astype(np.float32)) for x in (scale, place)]
    return encode_with(weight, config_of(format), given[0], given[1] if shifted else None)


def numbers_of(weight: jax.Array, q: QTensor) -> Numbers:
    leaves = BlockOptions().start(weight, q)
    return Numbers(weight, leaves["scale"], leaves.get("zero", leaves.get("shift")))


@pytest.mark.parametrize(
    ("format", "shifted"), [*((one, True) for one in FEW_BITS), *((one, False) for one in LEVELS)]
)
def test_values_are_those_of_the_stored_matrix(format: str, shifted: bool) -> None:
    weight = random_weight()
    q = stored(format, weight, shifted)
    found = round_matrix(numbers_of(weight, q), q)
    # Not bit by bit: integers multiply code - zero, and the storage adds -zero * scale.
    np.testing.assert_allclose(found, q.dequantize(), rtol=0, atol=2e-6)
    assert 0.2 < jnp.abs(found - weight).max() < 3


@pytest.mark.parametrize("format", FEW_BITS)
def test_plain_scales_give_the_plain_quantizer(format: str) -> None:
    weight, fmt = random_weight()[:, :128], get_format(format)
    blocks = weight.reshape(-1, 64)
    scale, place = jnp.abs(blocks).max(1), None
    if fmt.integer:
        scale, place = plain_range(blocks, fmt.bits, False)
    scale, place = (None if x is None else x.reshape(24, 2) for x in (scale, place))
    assert_same(
        encode_with(weight, config_of(format), scale, place), quantize(weight, config_of(format))
    )


@pytest.mark.parametrize("format", ["nf3", "int3"])
def test_a_stored_matrix_nearly_keeps_its_scales(format: str) -> None:
    """They are second-level quantized once more: the offset changes a little."""
    weight = random_weight()
    first = stored(format, weight)
    _, scale, place = numbers_of(weight, first)
    again = encode_with(weight, config_of(format), scale, place)
    np.testing.assert_allclose(again.scale(), first.scale(), rtol=0.02)
    assert (again.codes() == first.codes()).mean() > 0.98


@pytest.mark.parametrize(
    ("format", "change", "message"),
    [
        ("nf2", {"scale": jnp.full((2, 1), jnp.nan)}, r"scale\[0, 0\] = nan: expected finite"),
        ("nf2", {"place": jnp.full((2, 1), jnp.inf)}, r"shift\[0, 0\] = inf: expected finite"),
        ("nf2", {"scale": jnp.ones((1, 2))}, r"scale = \(1, 2\): expected shape \(2, 1\)"),
        ("int2", {"place": jnp.ones((1, 1))}, r"zero point = \(1, 1\): expected shape \(2, 1\)"),
        ("int2", {"place": None}, "zero point = None: expected one per block of int2"),
        (
            "int2",
            {"place": jnp.full((2, 1), 4.0)},
            r"zero point .* = \(4.0, 4.0\): expected .* 0 to",
        ),
        ("int2", {"place": jnp.full((2, 1), -1.0)}, r"zero point .* = \(-1.0, -1.0\): expected"),
        ("int2", {"scale": jnp.zeros((2, 1))}, r"scale .* = \(0.0, 0.0\): expected .* from 1.1"),
        ("none", {}, "quant.format = 'none': expected"),
    ],
)
def test_numbers_that_cannot_be_stored_are_refused(format: str, change, message: str) -> None:
    given = {"scale": jnp.ones((2, 1)), "place": jnp.ones((2, 1))} | change
    with pytest.raises(ValueError, match=message):
        # Without the type checks of these tests, which users do not have.
        inspect.unwrap(encode_with)(
            jnp.ones((2, 64)), QuantConfig(format=format, calibration="none"), **given
        )


# ------------------------------------------------------------------------- what a method trains


@pytest.mark.parametrize("format", FEW_BITS)
def test_block_training_starts_with_the_stored_values(format: str) -> None:
    """Many codes are not those of the nearest levels, as after error feedback."""
    weight, options = random_weight(), BlockOptions()
    q = stored(format, weight + 0.1 * random_weight(2))
    assert (q.codes() != stored(format, weight).codes()).mean() > 0.02
    leaves = options.start(weight, q)
    found = round_matrix(options.numbers(leaves, q, False), q)
    np.testing.assert_allclose(found, q.dequantize(), rtol=0, atol=1e-5)
    assert (leaves["weight"] == weight).mean() > 0.5


def test_clip_factors_do_not_see_the_padding() -> None:
    """The last block of a row has 8 weights."""
    weight = random_weight()
    q = stored("nf3", weight, shifted=False)
    leaves = ApiqOptions(clip_start=100.0).start(weight, q)
    np.testing.assert_array_equal(leaves["low"][:, -1], weight[:, 192:].min(1))
    np.testing.assert_array_equal(leaves["high"][:, -1], weight[:, 192:].max(1))
    numbers = ApiqOptions().numbers(leaves, q, False)
    expected = jnp.abs(jnp.pad(weight, ((0, 0), (0, 56)))).reshape(24, 4, 64).max(2)
    np.testing.assert_array_equal(numbers.scale, expected)


@pytest.mark.parametrize("format", INTEGERS)
def test_a_zero_point_is_trained_as_it_is_stored(format: str) -> None:
    weight, options = random_weight(), BlockOptions()
    q = stored(format, weight)
    leaves = options.start(weight, q)
    for zero in (-1.0, 0.3712, 1e3):
        moved = leaves | {"zero": jnp.full((24, 4), zero)}
        numbers = options.numbers(moved, q, False)
        packed = encode_with(numbers.weight, config_of(format), numbers.scale, numbers.place)
        np.testing.assert_array_equal(options.start(weight, packed)["zero"], numbers.place)
        by_zero = jax.grad(lambda leaves: options.numbers(leaves, q, False).place.sum())(moved)
        assert (by_zero["zero"] == 1).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ApiqOptions(epochs=0), "quant.apiq.epochs = 0: expected"),
        (lambda: BlockOptions(batch=0), "quant.block.batch = 0: expected"),
        (lambda: BlockOptions(weight_lr=-1.0), "quant.block.weight_lr = -1.0: expected"),
        (lambda: ApiqOptions(pair_decay=float("nan")), "quant.apiq.pair_decay = nan: expected"),
        (lambda: ApiqOptions(clip_start=float("inf")), "quant.apiq.clip_start = inf: expected"),
        (lambda: BlockOptions(last_factor=1.5), "quant.block.last_factor = 1.5: expected"),
        (lambda: BlockOptions(scale_lr=float("inf")), "quant.block.scale_lr = inf: expected"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_rates_fall_along_a_cosine() -> None:
    options = BlockOptions(last_factor=0.1)
    found = [options.factor(x) for x in (0.0, 0.5, 1.0)]
    np.testing.assert_allclose(found, [1.0, 0.55, 0.1])
