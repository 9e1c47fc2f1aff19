"""The robust calibration, and the joint search with factors of squared errors, against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.quant.calibrations import joint, robust
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.quant.formats import get_format
from tests.quant.test_icq import make_blocks, make_partial
from tests.quant.test_joint import COUNT, FORMATS, errors, plain_errors, slow_errors


def factors(blocks, valid=None):
    """The formula of the docstring."""
    inside = np.arange(blocks.shape[1]) < (blocks.shape[1] if valid is None else valid[:, None])
    squares = np.where(inside, np.float64(blocks), 0) ** 2
    mean = squares.sum(1, keepdims=True) / inside.sum(-1, keepdims=True)
    relative = squares / np.where(mean > 0, mean, 1)
    return np.where(inside, 2 * relative + 1 / (relative + 0.02), 0)


def search(blocks, name, symmetric=False, valid=None, weigh=robust.weigh, inputs=None):
    """Scale and shift in float64; an integer's zero point becomes its shift."""
    valid = None if valid is None else jnp.asarray(valid)
    inputs = None if inputs is None else jnp.asarray(inputs, jnp.float32)
    found = joint.search(
        jnp.asarray(blocks), name, symmetric, np.inf, valid=valid, weigh=weigh, inputs=inputs
    )
    scale, shift = (np.asarray(x, np.float64) for x in found)
    return scale, -shift * scale if get_format(name).integer else shift


@pytest.mark.parametrize(
    ("name", "measured"), [*((name, False) for name in FORMATS), ("nf3", True), ("int4", True)]
)
def test_finds_what_a_slow_grid_of_525_candidates_finds(name, measured):
    rng = np.random.default_rng(0)
    blocks = rng.standard_t(8, (COUNT, 64)).astype(np.float32)
    if measured:
        inputs = rng.lognormal(0, 1, (3, 64))
        factor = inputs[np.arange(COUNT) % 3]
        found = search(blocks, name, weigh=None, inputs=inputs)
    else:
        factor, found = factors(blocks), search(blocks, name)
    ours, slow = errors(blocks, name, *found, factor=factor), slow_errors(blocks, name, factor)
    # Zero points of integers are rounded to 16th parts here, and free there. Factors that do not
    # follow the weights make the error a rougher function of scale and shift.
    assert ours.sum() <= slow.sum() * (1.06 if measured else 1.03)


@pytest.mark.parametrize(
    ("name", "partial", "symmetric"),
    [(name, False, False) for name in FORMATS]
    + [("nf4", True, False), ("int3", True, True), ("int4", False, True)]
    + [("nf4", True, True), ("fp4", False, True)],
)
def test_never_loses_more_than_the_plain_quantizer(name, partial, symmetric):
    blocks, valid = make_partial(make_blocks(64)) if partial else (make_blocks(64), None)
    found = search(blocks, name, symmetric, valid)
    assert np.isfinite(found).all()
    factor = factors(blocks, valid)
    factor /= factor.max(1, keepdims=True)
    ours = errors(blocks, name, *found, factor=factor)
    plain = plain_errors(blocks, name, symmetric, valid, factor)
    largest = np.abs(blocks).max(1).astype(np.float64)
    assert (ours <= plain * (1 + 1e-4) + 64 * (6e-7 * largest) ** 2).all()


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_scales_without_shifts_come_close_to_a_grid_in_the_measured_error(name):
    """A slow search over 400 scales of each block; the plain one is among them."""
    rng = np.random.default_rng(5)
    blocks = rng.standard_t(5, (COUNT, 64)).astype(np.float32)
    inputs = rng.lognormal(0, 1, (3, 64))
    factor = inputs[np.arange(COUNT) % 3]
    scale, shift = search(blocks, name, True, weigh=None, inputs=inputs)
    assert (shift == 0).all()
    largest, nothing = np.abs(blocks).max(1).astype(np.float64), np.zeros(COUNT)
    tried = [
        errors(blocks, name, f * largest, nothing, factor=factor)
        for f in (1, *np.linspace(0.3, 1.2, 400))
    ]
    ours = errors(blocks, name, scale, shift, factor=factor)
    assert (ours <= tried[0] * (1 + 1e-4)).all()
    assert ours.sum() <= np.min(tried, axis=0).sum() * 1.04


@pytest.mark.parametrize("name", ["nf3", "int3"])
def test_the_largest_and_the_smallest_weights_keep_more_than_with_the_least_error(name):
    blocks = np.random.default_rng(1).standard_t(5, (COUNT, 64)).astype(np.float32)
    order = np.abs(blocks).argsort(1)
    found = {weigh: search(blocks, name, weigh=weigh) for weigh in (None, robust.weigh)}
    for some in (order[:, -1:], order[:, :8]):
        only = np.zeros_like(blocks, np.float64)
        np.put_along_axis(only, some, 1, 1)
        least, ours = (errors(blocks, name, *one, factor=only).sum() for one in found.values())
        assert ours < 0.8 * least


def test_the_weights_of_a_large_input_keep_their_values():
    blocks = np.random.default_rng(2).standard_normal((COUNT, 64)).astype(np.float32)
    inputs = np.ones((2, 64))
    inputs[1, 5] = 1000
    found = [search(blocks, "nf3", weigh=None, inputs=x) for x in (None, inputs)]
    at = np.zeros(blocks.shape)
    at[1::2, 5] = 1
    before, after = (errors(blocks, "nf3", *one, factor=at).sum() for one in found)
    assert after < 0.05 * before
    for old, new in zip(*found, strict=True):  # blocks whose inputs are alike stay as they were
        np.testing.assert_allclose(new[::2], old[::2], rtol=1e-4, atol=1e-5)


def test_factors_follow_the_formula_and_ignore_the_unit_and_what_is_behind_the_end():
    blocks, valid = make_partial(np.random.default_rng(3).standard_normal((60, 32)))
    blocks = blocks.astype(np.float32)
    for unit in (1, 2.0**60, 2.0**-100):
        found = robust.weigh(jnp.asarray(blocks.T * np.float32(unit)), jnp.asarray(valid))
        inside = np.arange(32)[None] < valid[:, None]
        expected = factors(blocks, valid)
        np.testing.assert_allclose(np.asarray(found).T[inside], expected[inside], rtol=2e-5)


@pytest.mark.parametrize("name", ["nf4", "int2"])
def test_extremes_stay_finite(name):
    top = np.finfo(np.float32).max
    rows = [[top, -top], [-top, -top], [1e-45, 0], [0, 0], [5, 5], [top, 0], [1e-38, -1e-38]]
    blocks = np.array([[*row, *[row[0]] * 14] for row in rows], np.float32)
    for inputs in (np.zeros((1, 16)), np.full((1, 16), 1e30)):
        scale, shift = search(blocks, name, inputs=inputs)
        assert np.isfinite(scale).all() and np.isfinite(shift).all() and (scale >= 0).all()
        exact = errors(blocks[3:5], name, scale[3:5], shift[3:5])
        np.testing.assert_allclose(exact, 0, atol=1e-11)


@pytest.mark.parametrize("name", ["nf3", "int4"])
def test_a_quantized_matrix_uses_it(name):
    weight = np.random.default_rng(4).standard_normal((96, 200)).astype(np.float32)
    made = {
        how: quantize(jnp.asarray(weight), QuantConfig(format=name, calibration=how))
        for how in ("joint", "robust")
    }
    assert made["robust"].nbytes == made["joint"].nbytes
    padded, valid = np.pad(weight, ((0, 0), (0, 56))).reshape(-1, 64), np.tile([64, 64, 64, 8], 96)
    factor = factors(padded, valid).reshape(96, 256)[:, :200]
    lost = {
        how: float((factor * (np.asarray(q.dequantize()) - weight) ** 2).sum())
        for how, q in made.items()
    }
    assert lost["robust"] < 0.97 * lost["joint"]
