"""The joint search of scale and shift against a slow float64 grid, and its own invariances."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.quant import stats
from irqlora_jax.quant.calibrations import joint
from irqlora_jax.quant.calibrations.icq_integer import plain_range
from irqlora_jax.quant.calibrations.joint import JointOptions
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.quant.entropy import block_entropy
from irqlora_jax.quant.formats import get_format
from tests.quant.test_icq import make_blocks, make_partial

COUNT = len(make_blocks(64))  # one shape, so that few programs are compiled
FORMATS = ("nf4", "nf3", "nf2", "fp4", "int4", "int3", "int2")


def search(blocks, name, error_weight=np.inf, refine_steps=4, symmetric=False, valid=None):
    """Scale and shift of every block in float64; an integer's zero point becomes its shift."""
    valid = None if valid is None else jnp.asarray(valid)
    found = joint.search(jnp.asarray(blocks), name, symmetric, error_weight, refine_steps, valid)
    scale, shift = (np.asarray(x, np.float64) for x in found)
    return scale, -shift * scale if get_format(name).integer else shift


def codes(blocks, name, scale, shift):
    """Ranks of the nearest levels."""
    points = get_format(name).midpoints.astype(np.float64)
    safe = np.where(scale == 0, 1, scale)[..., None]
    return np.searchsorted(points, (np.float64(blocks) - shift[..., None]) / safe, side="left")


def errors(blocks, name, scale, shift, valid=None, factor: Any = 1):
    """Squared error of every block."""
    levels = np.sort(get_format(name).table).astype(np.float64)
    back = levels[codes(blocks, name, scale, shift)] * scale[..., None] + shift[..., None]
    inside = np.arange(blocks.shape[-1]) < np.broadcast_to(
        blocks.shape[-1] if valid is None else valid[:, None], (*blocks.shape[:-1], 1)
    )
    return (factor * np.where(inside, back - np.float64(blocks), 0) ** 2).sum(-1)


def plain_errors(blocks, name, symmetric=False, valid=None, factor: Any = 1):
    if get_format(name).integer:
        bits, count = get_format(name).bits, None if valid is None else jnp.asarray(valid)
        found = plain_range(jnp.asarray(blocks), bits, symmetric, count)
        scale, zero = (np.asarray(x, np.float64) for x in found)
        return errors(blocks, name, scale, -zero * scale, valid, factor)
    inside = np.arange(blocks.shape[1]) < (blocks.shape[1] if valid is None else valid[:, None])
    scale = np.abs(np.where(inside, blocks, 0)).max(1).astype(np.float64)
    return errors(blocks, name, scale, np.zeros_like(scale), valid, factor)


def slow_errors(blocks, name, factor: Any = 1):
    """The prototype's way: 21 x 25 candidates as they stand, then 4 least-squares steps.

    `factor` multiplies the squared errors, [n, block].
    """
    levels = np.sort(get_format(name).table).astype(np.float64)
    middle, half = (levels[0] + levels[-1]) / 2, (levels[-1] - levels[0]) / 2
    blocks = blocks.astype(np.float64)
    median = np.sort(blocks, 1)[:, blocks.shape[1] // 2 - 1]
    spread = np.abs(blocks - median[:, None]).max(1)
    best = np.full(len(blocks), np.inf), np.zeros(len(blocks)), np.zeros(len(blocks))
    share = np.broadcast_to(factor, blocks.shape)
    share = share / share.sum(1, keepdims=True)

    def keep(scale, shift, best):
        new = errors(blocks, name, scale, shift, factor=factor), scale, shift
        return tuple(np.where(new[0] < best[0], a, b) for a, b in zip(new, best, strict=True))

    for move in np.linspace(-0.3, 0.3, 21) * 0.541087:
        center = median + move * spread
        for width in np.linspace(0.4, 1, 25):
            scale = width * np.abs(blocks - center[:, None]).max(1) / half
            best = keep(scale, center - middle * scale, best)
    for _ in range(4):
        level = levels[codes(blocks, name, *best[1:])]
        off = level - (share * level).sum(1, keepdims=True)
        out = blocks - (share * blocks).sum(1, keepdims=True)
        scale = (share * off * out).sum(1) / (share * off * off).sum(1)
        best = keep(scale, (share * (blocks - scale[:, None] * level)).sum(1), best)
    return best[0]


@pytest.mark.parametrize("name", FORMATS)
def test_finds_what_a_slow_grid_of_525_candidates_finds(name):
    blocks = np.random.default_rng(0).standard_t(8, (COUNT, 64)).astype(np.float32)
    ours = errors(blocks, name, *search(blocks, name))
    slow = slow_errors(blocks, name)
    # Zero points of integers are rounded to 16th parts here, and free there.
    assert ours.sum() <= slow.sum() * 1.015
    assert (ours <= slow * 1.5).all()


@pytest.mark.parametrize(
    ("name", "partial", "symmetric"),
    [(name, False, False) for name in FORMATS]
    + [("nf4", True, False), ("int3", True, True), ("int4", False, True)]
    + [("nf4", False, True), ("nf2", True, True), ("fp4", False, True)],
)
def test_never_loses_more_than_the_plain_quantizer(name, partial, symmetric):
    blocks, valid = make_partial(make_blocks(64)) if partial else (make_blocks(64), None)
    found = search(blocks, name, symmetric=symmetric, valid=valid)
    assert np.isfinite(found).all()
    plain = plain_errors(blocks, name, symmetric, valid)
    ours = errors(blocks, name, *found, valid)
    largest = np.abs(blocks).max(1).astype(np.float64)
    assert (ours <= plain * (1 + 1e-4) + 64 * (6e-7 * largest) ** 2).all()


@pytest.mark.parametrize("name", ["nf4", "nf3", "fp4"])
def test_scales_without_shifts_come_close_to_a_grid(name):
    """A slow search over 400 scales of each block, without least squares."""
    blocks = make_blocks(64)
    scale, shift = search(blocks, name, symmetric=True)
    assert (shift == 0).all()
    largest, nothing = np.abs(blocks).max(1).astype(np.float64), np.zeros(len(blocks))
    tried = (errors(blocks, name, f * largest, nothing) for f in np.linspace(0.3, 1.2, 400))
    slow, ours = np.min(list(tried), axis=0), errors(blocks, name, scale, nothing)
    some = slow > 0
    assert ours.sum() <= slow.sum() * 1.02 and np.median(ours[some] / slow[some]) <= 1.01


@pytest.mark.parametrize("calibration", ["joint", "robust"])
def test_a_base_without_shifts_is_as_large_as_a_plain_one(calibration):
    weight = jnp.asarray(np.random.default_rng(0).standard_t(4, (16, 256)), jnp.float32)
    quant = QuantConfig(format="nf4", calibration=calibration, symmetric=True)
    found, plain = quantize(weight, quant), quantize(weight, quant.plain)
    assert jax.tree.structure(found) == jax.tree.structure(plain)
    assert found.shift_codes is None and quant.plain.calibration == "none"
    apart = [jnp.sum((one.dequantize() - weight) ** 2) for one in (found, plain)]
    assert calibration == "robust" or apart[0] < apart[1]
    assert quant.label == f"nf4 + {calibration}, no shifts" and quant.plain.label == "plain nf4"
    assert dataclasses.replace(quant, format="int4").label == f"int4 + {calibration}"
    with pytest.raises(ValueError, match=r"nf4 and quant\.calibration icq"):
        QuantConfig(format="nf4", calibration="icq", symmetric=True)


@pytest.mark.parametrize("name", ["nf4", "int3"])
def test_steps_of_least_squares_lower_the_error_and_nothing_else(name):
    blocks = np.random.default_rng(1).standard_normal((COUNT, 64)).astype(np.float32)
    before, after = (errors(blocks, name, *search(blocks, name, refine_steps=k)) for k in (0, 4))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < before.sum()


def test_a_larger_weight_of_the_error_trades_entropy_for_error():
    name = "nf4"
    blocks = np.random.default_rng(2).standard_normal((COUNT, 64)).astype(np.float32)
    error, entropy = [], []
    for weight in (0.0, 100.0, np.inf):
        found = search(blocks, name, weight, refine_steps=0)
        ranks = jnp.asarray(codes(blocks, name, *found))
        error.append(errors(blocks, name, *found).sum())
        entropy.append(float(block_entropy(ranks, 2 ** get_format(name).bits).mean()))
    assert sorted(error, reverse=True) == error and error[0] > 1.02 * error[-1]
    assert sorted(entropy, reverse=True) == entropy and entropy[0] > entropy[-1] + 0.01


@pytest.mark.parametrize("name", ["nf3", "int4"])
def test_follows_powers_of_two_and_ignores_what_is_behind_the_end(name):
    blocks, valid = make_partial(make_blocks(32)[:60])
    scale, shift = search(blocks, name, 100.0, valid=valid)
    twice = search(blocks * np.float32(2.0**20), name, 100.0, valid=valid)
    np.testing.assert_array_equal(twice[0], scale * 2.0**20)
    np.testing.assert_array_equal(twice[1], shift * 2.0**20)
    rubbish = np.arange(32)[None] >= valid[:, None]
    other = search(np.where(rubbish, np.float32(-3), blocks), name, 100.0, valid=valid)
    np.testing.assert_array_equal(other, (scale, shift))


@pytest.mark.parametrize("name", ["nf4", "int2"])
def test_extremes_stay_finite(name):
    top = np.finfo(np.float32).max
    rows = [[top, -top], [-top, -top], [1e-45, 0], [0, 0], [5, 5], [top, 0], [1e-38, -1e-38]]
    blocks = np.array([[*row, *[row[0]] * 14] for row in rows], np.float32)
    scale, shift = search(blocks, name, 100.0)
    assert np.isfinite(scale).all() and np.isfinite(shift).all() and (scale >= 0).all()
    exact = errors(blocks[3:5], name, scale[3:5], shift[3:5])
    np.testing.assert_allclose(exact, 0, atol=1e-11)


@pytest.mark.parametrize("name", ["nf4", "int3"])
def test_both_forms_find_the_same(name):
    """The form for a CPU, and the one for other devices."""
    blocks = jnp.asarray(make_blocks(64)[:96]).T
    both = []
    for staged in (False, True):
        form = functools.partial(
            *(joint._search, blocks, None, get_format(name), False, 100.0, 4, staged)
        )
        both.append(jax.jit(form)())
    # They round alike but for sums; where two candidates all but tie, either may win.
    differ = np.abs(np.asarray(both[0][0]) / np.asarray(both[1][0]) - 1) > 1e-4
    assert differ.mean() < 0.05


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (4, True), (2, False)])
def test_zero_points_can_be_stored(bits, symmetric):
    blocks = make_blocks(64)
    _, zero = joint.search(jnp.asarray(blocks), f"int{bits}", symmetric, np.inf)
    stored = stats.decode_zero(stats.encode_zero(zero, bits), bits)
    np.testing.assert_array_equal(stored, zero)
    assert not symmetric or (np.asarray(zero) == 2 ** (bits - 1)).all()


@pytest.mark.parametrize("name", ["nf3", "int4"])
def test_a_quantized_matrix_is_closer_and_no_larger(name):
    weight = jnp.asarray(np.random.default_rng(3).standard_normal((96, 200)), jnp.float32)

    def made(calibration: str, **more) -> tuple[float, int]:
        q = quantize(weight, QuantConfig(format=name, calibration=calibration, **more))  # type: ignore
        return float(((q.dequantize() - weight) ** 2).sum()), q.nbytes

    (plain, _), (icq, size) = made("none"), made("icq")
    error, nbytes = made("joint")
    assert nbytes == size
    assert error < 0.93 * min(plain, icq)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"error_weight": -1.0}, "quant.joint.error_weight = -1.0"),
        ({"error_weight": np.nan}, "quant.joint.error_weight = nan"),
        ({"refine_steps": -1}, "quant.joint.refine_steps = -1"),
    ],
)
def test_bad_arguments_are_named(change, named):
    with pytest.raises(ValueError, match=named):
        JointOptions(**change)
