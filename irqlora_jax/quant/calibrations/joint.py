"""Joint calibration ("ICQ+"): chooses the scale and the shift of a block together.

ICQ (`icq.py`) searches only the shift, and the largest weight determines the scale. Joint
calibration maximizes entropy - error_weight * error / variance over both, with the same storage and
dequantizer: the entropy of the codes in bits, the mean squared error of quantization, and the
variance of the block. A weight of 0 is ICQ with a free scale. An infinite weight minimizes the
error alone. On our testbed (examples/factworld/README.md), retained knowledge follows the error.

A candidate is an interval that the levels span. The first ones are the interval of the plain
quantizer, and 5 centers around the median with 7 half-widths each. Then come the neighbors of the
best one, twice. A candidate only supplies codes: their least-squares scale and shift, which cost
three sums over the block, decide its score. So 54 candidates come within 2.3 % of the error of a
grid of 21 x 25 unfitted ones (benchmarks/results/2026-11-27-cpu.md). Lloyd's steps refine the best
one: new codes, then least squares.

Squared errors can get factors, for each weight (`weigh`) and for each input of the matrix
(`inputs`). All sums over a block, its variance too, then have these factors.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Int32

from irqlora_jax.quant.calibrations.calibration import Calibrated, Calibration
from irqlora_jax.quant.entropy import (
    FLOAT_TINY,
    above_levels,
    bits_of,
    histogram_weight,
    in_chunks,
    lower_median,
    masked,
)
from irqlora_jax.quant.formats import Format, get_format
from irqlora_jax.text import require


def _grid(moves: np.ndarray, widths: np.ndarray) -> Float32[np.ndarray, "candidates 2"]:
    pairs = np.stack(np.meshgrid(moves, widths, indexing="ij"), axis=-1)
    return pairs.reshape(-1, 2).astype(np.float32)


_NEIGHBORS = np.array([-1.0, 0.0, 1.0])
# Offsets of the center in units of max|w - median| (0.541 is a standard deviation), and factors for
# the half-width. Stages: the plain quantizer, around the median, twice around the best candidate.
_STAGES = (
    _grid(np.zeros(1), np.ones(1)),
    _grid(np.linspace(-0.162, 0.162, 5), np.linspace(1.0, 0.4, 7)),
    _grid(0.04 * _NEIGHBORS, 1 + 0.05 * _NEIGHBORS),
    _grid(0.02 * _NEIGHBORS, 1 + 0.03 * _NEIGHBORS),
)
_CANDIDATES = np.concatenate(_STAGES)
_AROUND_BEST = len(_STAGES[0]) + len(_STAGES[1]), len(_CANDIDATES) - len(_STAGES[3])
Found = tuple[Array, Array, Array]  # the best score, its scale and its shift, [1, b]
# The level and its rank for each code, [block, b]; the scale and shift that gave them, [1, b].
Codes = tuple[Array, Array, Array, Array]
Start = tuple[Array, Array]  # the scale and shift around which candidates lie
# (weights [block, b], their number in each block or None) -> factors of the squared errors, >= 0
Weigh = Callable[[Array, Array | None], Array]


@functools.partial(
    jax.jit, static_argnames=("format", "symmetric", "error_weight", "refine_steps", "weigh")
)
def search(
    blocks: Float[Array, "n block"],
    format: Format | str,
    symmetric: bool = False,
    error_weight: float = 100.0,
    refine_steps: int = 4,
    valid: Int[Array, " n"] | None = None,
    weigh: Weigh | None = None,
    inputs: Float[Array, "period block"] | None = None,
) -> tuple[Float32[Array, " n"], Float32[Array, " n"]]:
    """Returns scale and shift of every block; for integer formats, scale and zero point.

    Zero points are limited to values that can be stored (`stats.encode_zero`), and the scale is
    optimal for them. With an infinite `error_weight`, the squared error of a block never exceeds
    the plain quantizer's error, except for rounding. Squared errors include the factors.

    Args:
        blocks: weights.
        format: code book.
        symmetric: fixes the zero point of integers in the middle of the codes, and the shift of
            the other formats at 0.
        error_weight: weight of the relative squared error, in bits of entropy; 0 to infinity.
        refine_steps: least-squares steps at the end; a block keeps those that lower its error.
        valid: number of real elements in each block (at least 1); None: all.
        weigh: factors of squared errors, as a function of the weights; None: all 1.
        inputs: further factors of squared errors, the same for all rows of the matrix: the second
            moments of its inputs, cut into blocks. Block i has row i % period. None: all 1.

    Raises:
        ValueError: a negative error weight or number of steps.

    Examples:
        >>> blocks = 2 * jnp.asarray(get_format("nf3").table)[None] + 5
        >>> scale, shift = search(blocks, "nf3")
        >>> f"{float(scale[0]):.3f}, {float(shift[0]):.3f}"
        '2.000, 5.000'
    """
    format = get_format(format) if isinstance(format, str) else format
    if not error_weight >= 0:
        raise ValueError(f"error_weight = {error_weight!r}: expected a number from 0 to .inf")
    if refine_steps < 0:
        raise ValueError(f"refine_steps = {refine_steps!r}: expected 0 or more")

    def work(
        w: Array, count: Array | None, inputs: Array | None = None, *, staged: bool
    ) -> tuple[Array, Array]:
        factors = [] if weigh is None else [weigh(w, count)]
        factors += [] if inputs is None else [inputs.astype(jnp.float32)]
        factor = _product_of(factors, count)
        return _search(w, count, format, symmetric, error_weight, refine_steps, staged, factor)

    on_cpu = functools.partial(work, staged=True)
    return in_chunks(on_cpu, functools.partial(work, staged=False), 2, blocks, valid, inputs)


def _product_of(
    factors: list[Float32[Array, "block b"]], count: Int32[Array, " b"] | None
) -> Float32[Array, "block b"] | None:
    """The product, with a maximum of 1 in each block; None without factors."""

    def relative(x: Array) -> Array:
        x = masked(x, count, 0)
        largest = x.max(0, keepdims=True)
        return masked(jnp.where(largest > 0, x / jnp.where(largest > 0, largest, 1), 1), count, 0)

    return relative(functools.reduce(jnp.multiply, map(relative, factors))) if factors else None


def _search(
    w: Float32[Array, "block b"],
    count: Int32[Array, " b"] | None,
    format: Format,
    symmetric: bool,
    error_weight: float,
    refine_steps: int,
    staged: bool,
    factor: Float32[Array, "block b"] | None = None,
) -> tuple[Float32[Array, " b"], Float32[Array, " b"]]:
    block, b = w.shape
    n = jnp.full(b, block, jnp.int32) if count is None else count
    unshifted = symmetric and not format.integer
    at_zero = format.integer or unshifted
    levels = np.sort(format.table)
    middle, half = (levels[0] + levels[-1]) / 2, (levels[-1] - levels[0]) / 2

    # Computes in units of max|w - median|; the halves prevent overflow. Integer formats are not
    # centered, because their zero point is the code of 0, and their range includes 0. Nor are
    # formats without a shift.
    center = lower_median(masked(w, count, np.inf), n)[None]
    low = masked(w, count, np.inf).min(0, keepdims=True)
    high = masked(w, count, -np.inf).max(0, keepdims=True)
    if format.integer:
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    largest = jnp.maximum(high, -low) / half
    if format.integer and not symmetric:
        largest = (high / 2 - low / 2) / half
    origin = jnp.zeros_like(center) if at_zero else center
    reach = jnp.maximum(high / 2 - center / 2, center / 2 - low / 2)
    unit = jnp.where(reach > FLOAT_TINY, reach, 1)

    def in_units(x: Array) -> Array:
        return (x / 2 - origin / 2) / unit

    def total_of(x: Float32[Array, "block b"]) -> Float32[Array, "1 b"]:
        return (x if factor is None else x * factor).sum(0, keepdims=True)

    # [1, b], as all numbers with one value per block
    size = n.astype(jnp.float32)[None] if factor is None else factor.sum(0, keepdims=True)
    u = masked(in_units(w), count, 0)
    low, high, center, nothing = map(in_units, (low, high, center, jnp.zeros_like(low)))
    mean, squares = total_of(u) / size, total_of(u * u)
    variance = squares - size * mean**2

    def codes_of(scale: Array, shift: Array) -> Codes:
        x = (u - shift) * (1 / jnp.where(scale == 0, 1, scale))
        level, rank = jnp.full(u.shape, levels[0], jnp.float32), jnp.zeros(u.shape, jnp.int8)
        for point, step in zip(format.midpoints, np.diff(levels), strict=True):
            level += jnp.where(x > point, step, 0)
            rank += (x > point).astype(jnp.int8)
        return masked(level, count, 0), masked(rank, count, 0), scale, shift

    def zero_point(scale: Array, shift: Array) -> Array:
        if unshifted:
            return jnp.zeros_like(scale)
        if symmetric:
            return jnp.full_like(scale, 2 ** (format.bits - 1))
        parts = 2 ** (8 - format.bits)
        exact = -shift / jnp.where(scale == 0, 1, scale)
        return jnp.clip(jnp.round(exact * parts) / parts, 0, 255 / parts)

    def fit(level: Array, start: Array) -> Found:
        """Negative error, scale and shift of the least-squares fit. Equal levels keep the scale."""
        total, square, cross = total_of(level), total_of(level * level), total_of(level * u)
        spread, covariance = square - total * total / size, cross - total * mean
        flat = spread <= 1e-6 * jnp.maximum(square, 1)
        scale = jnp.where(flat, start, covariance / jnp.where(flat, 1, spread))
        shift = mean - scale * total / size
        if not at_zero:
            return scale * (2 * covariance - scale * spread) - variance, scale, shift
        zero = zero_point(scale, shift)
        square += zero * (size * zero - 2 * total)
        cross -= zero * mean * size
        scale = jnp.where(square > 0, cross / jnp.where(square > 0, square, 1), start)
        return scale * (2 * cross - scale * square) - squares, scale, -zero * scale

    def score(error: Array, rank: Array) -> Array:
        relative = error / jnp.where(variance > 0, variance, 1)
        if math.isinf(error_weight):
            return -relative
        above = above_levels(rank, len(levels))
        entropy = bits_of(histogram_weight(above, n, block), n, block)[None]
        return entropy - error_weight * relative

    def judge(codes: Codes, best: Found) -> Found:
        level, rank, scale, shift = codes
        found = fit(level, scale)
        if format.integer:  # rounding the zero point may make the fit worse than the candidate
            error = total_of(masked(u - (level * scale + shift), count, 0) ** 2)
            found = _where_better(found, (-error, scale, shift))
        return _where_better((score(-found[0], rank), *found[1:]), best)

    plain: Start = jnp.maximum(high - nothing, nothing - low) / half, nothing
    around: Start = jnp.full((1, b), 1 / half), center - middle / half
    if format.integer:
        scale = plain[0] if symmetric else (high - low) / (2 * half)
        zero = jnp.round(-low / jnp.where(scale == 0, 1, scale))  # whole, as in `plain_range`
        plain = scale, -zero_point(scale, -zero * scale) * scale
    if symmetric:
        around = plain

    def codes_at(i: Array, start: Start) -> Codes:
        scale, shift = start
        move, width = jnp.asarray(_CANDIDATES)[i]
        shift = shift + move + middle * (1 - width) * scale
        scale = width * scale
        if at_zero:
            shift = -zero_point(scale, shift) * scale
        return codes_of(scale, shift)

    def start_of(i: Array, start: Start, best: Found) -> Start:
        restarts = (i == _AROUND_BEST[0]) | (i == _AROUND_BEST[1])
        scale, shift = (jnp.where(restarts, b, s) for b, s in zip(best[1:], start, strict=True))
        return jnp.where(i == 1, around[0], scale), jnp.where(i == 1, around[1], shift)

    def direct(i: Array, carry: tuple[Start, Found]) -> tuple[Start, Found]:
        start = start_of(i, *carry)
        return start, judge(codes_at(i, start), carry[1])

    def by_stages(i: Array, carry: tuple[Codes, Start, Found]) -> tuple[Codes, Start, Found]:
        best = judge(carry[0], carry[2])
        i = jnp.minimum(i + 1, len(_CANDIDATES) - 1)
        start = start_of(i, carry[1], best)
        return codes_at(i, start), start, best

    best = jnp.full((1, b), -jnp.inf), *plain
    if staged:  # with the codes as a carry, a CPU computes them once, not once for every sum
        carry = codes_of(*plain), plain, best
        scale, shift = lax.fori_loop(0, len(_CANDIDATES), by_stages, carry)[2][1:]
    else:
        scale, shift = lax.fori_loop(0, len(_CANDIDATES), direct, (plain, best))[1][1:]

    def errors(scale: Array, shift: Array) -> tuple[Array, Array]:
        level = codes_of(scale, shift)[0]
        return level, total_of(masked(u - (level * scale + shift), count, 0) ** 2)

    def refine(_: Array, now: tuple[Array, Found]) -> tuple[Array, Found]:
        level, found = now
        _, scale, shift = fit(level, found[1])
        level, error = errors(scale, shift)
        return level, _where_better((-error, scale, shift), found)

    level, error = errors(scale, shift)
    _, (_, scale, shift) = lax.fori_loop(0, refine_steps, refine, (level, (-error, scale, shift)))
    if format.integer:
        found = jnp.maximum(scale * unit * 2, FLOAT_TINY), zero_point(scale, shift)
        plain = largest, zero_point(*plain)
    else:
        found = scale * unit * 2, shift * unit * 2 + origin
        plain = largest, jnp.zeros_like(origin)
    # Weights near the largest float may get a scale or a shift beyond it: they stay plain.
    fits = jnp.isfinite(found[0]) & jnp.isfinite(found[1])
    scale, shift = (jnp.where(fits, new, old)[0] for new, old in zip(found, plain, strict=True))
    return scale, shift


def _where_better(new: Found, old: Found) -> Found:
    wins = new[0] > old[0]
    first, second, third = (jnp.where(wins, a, b) for a, b in zip(new, old, strict=True))
    return first, second, third


@dataclasses.dataclass(frozen=True)
class JointOptions:
    """Options of the joint calibration."""

    error_weight: float = 100.0
    """Weight of the relative squared error, in bits of entropy. 0: entropy alone. .inf: error
    alone."""
    refine_steps: int = 4
    """Least-squares steps at the end. A block keeps the steps that lower its error."""

    def __post_init__(self) -> None:
        weight, steps = self.error_weight, self.refine_steps
        require(weight >= 0, "quant.joint.error_weight", weight, "a number from 0 to .inf")
        require(steps >= 0, "quant.joint.refine_steps", steps, "a whole number of at least 0")


def _calibrate(
    blocks: Array,
    format: Format,
    symmetric: bool,
    options: JointOptions,
    valid: Array | None,
    inputs: Array | None,
) -> Calibrated:
    weight, steps = options.error_weight, options.refine_steps
    found = search(blocks, format, symmetric, weight, steps, valid)
    return calibrated(format, symmetric, *found)


def calibrated(format: Format, symmetric: bool, scale: Array, place: Array) -> Calibrated:
    """The result of `search` as a `Calibrated`."""
    if format.integer:
        return Calibrated(scale=scale, zero=place)
    return Calibrated(scale=scale, shift=None if symmetric else place)


JOINT = Calibration(
    "joint", "joint", "joint calibration", _calibrate, options=JointOptions(), most_bits=4
)
