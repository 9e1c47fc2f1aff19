"""ICQ for integers: the range or the zero point that maximizes the entropy of a block's codes.

- `search_range` varies the range, as in the released code.
- `search_zero_point` varies the zero point at a fixed scale, as in the paper's text.

`entropy.py` has the rules for comparing candidates.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Int32, Integer

from irqlora_jax.quant.choose import Implementation, choose, kernel, serves_all
from irqlora_jax.quant.entropy import (
    FLOAT_MAX,
    FLOAT_TINY,
    Best,
    above_levels,
    bits_of,
    histogram_weight,
    in_chunks,
    inside,
    masked,
    product,
    quotient,
    require_range,
    spaced,
    sweep,
    try_all,
    try_each,
)

SearchName = Literal["xla", "triton"] | None


@functools.partial(jax.jit, static_argnames=("bits", "symmetric"))
def plain_range(
    blocks: Float[Array, "n block"],
    bits: int,
    symmetric: bool,
    valid: Int[Array, " n"] | None = None,
) -> tuple[Float32[Array, " n"], Float32[Array, " n"]]:
    """Scale and zero point that spread the integer codes over the range of each block.

    code = clip(round(w / scale) + zero, 0, 2**bits - 1). The range always includes 0. A block of
    zeros gets [-1, 1]. A symmetric range is [-max|w|, max|w|] with the zero point in the middle.

    Args:
        blocks: weights.
        bits: width of a code.
        symmetric: fixes the zero point.
        valid: number of real elements in each block (at least 1); None: all.

    Examples:
        >>> scale, zero = plain_range(jnp.array([[-1.0, 0.0, 0.5, 2.0]]), 2, symmetric=False)
        >>> print(scale, zero)  # the codes 0 to 3 stand for -1, 0, 1 and 2
        [1.] [1.]
    """

    def plain(w: Array, n: Array | None) -> tuple[Array, Array]:
        return _scale_and_zero(*_limits(masked(w, n, 0), symmetric), bits, symmetric)

    return in_chunks(plain, plain, 2, blocks, valid)


@functools.partial(
    jax.jit, static_argnames=("bits", "symmetric", "search_range", "steps", "implementation")
)
def search_range(
    blocks: Float[Array, "n block"],
    bits: int,
    symmetric: bool,
    search_range: float = 0.1,
    steps: int = 50,
    valid: Int[Array, " n"] | None = None,
    implementation: SearchName = None,
) -> tuple[Float32[Array, " n"], Float32[Array, " n"], Float32[Array, " n"]]:
    """Searches the range of every block, as in the released code.

    Returns scale, whole zero point and entropy. The candidates are the range of `plain_range`
    times 1, then times 1 + search_range * i / steps for i = 1 .. steps, then times
    1 - search_range * i / steps.

    Args:
        blocks: weights.
        bits: width of a code.
        symmetric: fixes the zero point.
        search_range: largest relative change of the range, below 1.
        steps: number of candidates above the plain range, and number below it.
        valid: number of real elements in each block (at least 1); None: all.
        implementation: "triton": one GPU kernel (kernels/search_integer_triton.py). "xla". None:
            the kernel if it was measured to be faster, else XLA. Both find the same floats.

    Raises:
        ValueError: a search range outside of (0, 1), or an implementation that cannot serve; the
            message says why.

    Examples:
        >>> blocks = jnp.array([[-1.0, -0.6, -0.4, -0.3, 0.5, 0.8, 1.4, 2.0]])
        >>> scale, zero, entropy = search_range(blocks, 2, False)  # the plain scale is 1
        >>> f"{float(scale[0]):.3f}, {float(zero[0]):.0f}, {float(entropy[0]):.3f} bits"
        '0.932, 1, 2.000 bits'
    """
    candidates = range_candidates(bits, symmetric, search_range, steps)
    return _search("search", blocks, candidates, valid, implementation)


@functools.partial(jax.jit, static_argnames=("bits", "search_range", "steps", "implementation"))
def search_zero_point(
    blocks: Float[Array, "n block"],
    bits: int,
    search_range: float = 0.1,
    steps: int = 50,
    valid: Int[Array, " n"] | None = None,
    implementation: SearchName = None,
) -> tuple[Float32[Array, " n"], Float32[Array, " n"], Float32[Array, " n"]]:
    """Searches the zero point of every block, as in the paper's text (appendix A.2).

    Returns scale, zero point and entropy. The scale comes from the plain asymmetric range. The zero
    point absorbs a shift of up to search_range times the range. Zero points are stored as 8-bit
    fixed point with 8 - bits fractional bits, so only such numbers are candidates: the plain zero
    point, then larger, then smaller ones. code = clip(round(w / scale + zero), 0, 2**bits - 1).

    Args:
        blocks: weights.
        bits: width of a code.
        search_range: largest change of the zero point, as a fraction of the range.
        steps: candidates in each direction, before duplicates after rounding are removed.
        valid: number of real elements in each block (at least 1); None: all.
        implementation: as for `search_range`.

    Raises:
        ValueError: as for `search_range`.

    Examples:
        >>> blocks = jnp.array([[-1.0, -0.9, 0.3, 0.6, 0.8, 1.2, 1.8, 2.0]])
        >>> scale, zero, entropy = search_zero_point(blocks, 2)  # the plain zero point is 1
        >>> f"{float(scale[0]):.3f}, {float(zero[0]):.3f}, {float(entropy[0]):.3f} bits"
        '1.000, 0.891, 2.000 bits'
    """
    candidates = zero_point_candidates(bits, search_range, steps)
    return _search("search_zero_point", blocks, candidates, valid, implementation)


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Candidates of a search. `at(low, high, number)` returns the scale and zero point of one.

    Attributes:
        bits: width of a code.
        symmetric: whether the plain range, `low` to `high`, is symmetric.
        numbers: one per candidate: a factor for the range, or an offset of the zero point.
        at: see above; its optional fourth argument is a function that rounds to whole numbers.
        swept: whether XLA's search may use `sweep` on a CPU. Requires that candidates are ranges
            that differ by far more than a rounding error.
    """

    bits: int
    symmetric: bool
    numbers: Float32[np.ndarray, " candidates"]
    at: Callable[..., tuple[Float32[Array, " b"], Float32[Array, " b"]]]
    swept: bool


def range_candidates(bits: int, symmetric: bool, search_range: float, steps: int) -> Candidates:
    """The candidates of `search_range`."""
    require_range(search_range)
    up, down = (spaced(1.0, 1 + away, steps + 1) for away in (search_range, -search_range))

    def at(low: Array, high: Array, factor: Array, rounded: Callable = jnp.round) -> tuple:
        ends = product(factor, low), product(factor, high)
        return _scale_and_zero(*ends, bits, symmetric, rounded)

    swept = search_range / steps >= 1e-5
    return Candidates(bits, symmetric, np.concatenate([up, down[1:]]), at, swept)


def zero_point_candidates(bits: int, search_range: float, steps: int) -> Candidates:
    """The candidates of `search_zero_point`."""
    require_range(search_range)
    unit = 2 ** (8 - bits)
    reach = search_range * (2**bits - 1) * unit
    away = np.unique(np.floor(reach * np.arange(1, steps + 1) / steps + 1e-9))
    away = away[away > 0]
    moves = (np.concatenate([[0.0], away, -away]) / unit).astype(np.float32)

    def at(low: Array, high: Array, move: Array, rounded: Callable = jnp.round) -> tuple:
        scale, zero = _scale_and_zero(low, high, bits, False, rounded)
        return scale, jnp.clip(zero + move, 0, 255 / unit)

    return Candidates(bits, False, moves, at, swept=False)


def _search(
    operation: str,
    blocks: Float[Array, "n block"],
    candidates: Candidates,
    valid: Int[Array, " n"] | None,
    implementation: SearchName,
) -> tuple[Float32[Array, " n"], Float32[Array, " n"], Float32[Array, " n"]]:
    chosen = choose(implementation, _SEARCHES, blocks, candidates.bits, operation=operation)
    return chosen.forward(blocks, candidates, valid)


def _xla_search(
    blocks: Array, candidates: Candidates, valid: Array | None
) -> tuple[Array, Array, Array]:
    best = functools.partial(_best_integer, candidates=candidates)
    on_cpu = functools.partial(best, on_cpu=True)
    return in_chunks(on_cpu, functools.partial(best, on_cpu=False), 3, blocks, valid)


def _place(blocks: Array, bits: int) -> tuple[str, tuple[int, int]]:
    return f"int{bits}", (0, blocks.shape[1])


_SEARCHES = (
    kernel("triton", "search_integer_triton", "search", place=_place),
    Implementation("xla", serves_all, _xla_search),
)


def _limits(w: Float32[Array, "block b"], symmetric: bool) -> tuple[Array, Array]:
    return limits(jnp.minimum(w.min(0), 0), jnp.maximum(w.max(0), 0), symmetric)


def limits(
    low: Float32[Array, " b"], high: Float32[Array, " b"], symmetric: bool
) -> tuple[Float32[Array, " b"], Float32[Array, " b"]]:
    """The plain range of blocks, from min(smallest weight, 0) and max(largest weight, 0)."""
    if symmetric:
        high = jnp.maximum(-low, high)
        low = jnp.where(low < 0, -high, low)
    empty = (low == 0) & (high == 0)
    return jnp.where(empty, -1, low), jnp.where(empty, 1, high)


def _scale_and_zero(
    low: Float32[Array, " b"],
    high: Float32[Array, " b"],
    bits: int,
    symmetric: bool,
    rounded: Callable[[Array], Array] = jnp.round,
) -> tuple[Float32[Array, " b"], Float32[Array, " b"]]:
    scale = jnp.maximum(quotient(high - low, 2.0**bits - 1), FLOAT_TINY)
    if symmetric:
        return scale, jnp.full_like(scale, 2 ** (bits - 1))
    return scale, rounded(quotient(-low, scale))


def _best_integer(
    w: Float32[Array, "block b"],
    count: Int32[Array, " b"] | None,
    *,
    candidates: Candidates,
    on_cpu: bool,
) -> tuple[Float32[Array, " b"], Float32[Array, " b"], Float32[Array, " b"]]:
    block, b = w.shape
    bits, n_candidates = candidates.bits, len(candidates.numbers)
    n = jnp.full(b, block, jnp.int32) if count is None else count
    ends = _limits(masked(w, count, 0), candidates.symmetric)

    def candidate(i: Array) -> tuple[Array, Array]:
        return candidates.at(*ends, jnp.asarray(candidates.numbers)[i])

    def value_at(i: Array) -> Float32[Array, "block b"]:
        scale, zero = candidate(i)
        whole = jnp.floor(zero)
        # Adds a whole zero point after rounding, as in the released code, which affects ties.
        return jnp.round(quotient(w, scale[None]) + (zero - whole)[None]) + whole[None]

    def codes_at(i: Array) -> Integer[Array, "block b"]:
        return masked(jnp.clip(value_at(i), 0, 2**bits - 1).astype(jnp.int8), count, 0)

    def scan() -> Best:
        return try_each(codes_at, n_candidates, 2**bits, n)

    if not on_cpu:
        points = [level + 0.5 for level in range(2**bits - 1)]
        best = try_all(lambda i: masked(value_at(i), count, -np.inf), points, n_candidates, n)
    elif candidates.swept:
        best = _sweep_range(w, count, bits, candidates.numbers, candidate, scan)
    else:
        best = scan()
    index, weight = best
    return *candidate(index), bits_of(weight, n, block)


def _sweep_range(
    w: Float32[Array, "block b"],
    count: Int32[Array, " b"] | None,
    bits: int,
    factors: Float32[np.ndarray, " candidates"],
    candidate: Callable[[Array], tuple[Array, Array]],
    scan: Callable[[], Best],
) -> Best:
    """`sweep` over the ranges in ascending order of factors, or `scan` if `sweep` does not apply.

    As the range grows, |w / scale| never grows. A division gives the place where it passes a
    decision point of the rounding. Rounding displaces that place by less than half a candidate, so
    evaluating the nearest candidate decides between that one and the next. The zero point,
    -low / scale, is the same for all candidates except for its rounding, which may give either of
    two whole numbers. So the sweep tracks one more point than the codes need, and each candidate
    reads the points that belong to its own zero point.
    """
    block, b = w.shape
    n = jnp.full(b, block, jnp.int32) if count is None else count
    order = np.argsort(factors)
    last = len(factors) - 1
    step = float(factors.max() - factors.min()) / last
    scales, zeros = jax.vmap(candidate)(jnp.asarray(order))
    flat_scales, unit = scales.reshape(-1), scales[last // 2]
    lowest = zeros.min(0)
    upper = zeros > lowest[None]  # the zero point is the upper of its two values
    first = jnp.round(quotient(w, scales[:1])) + lowest[None] + 1
    codes = masked(jnp.clip(first, 0, 2**bits).astype(jnp.int8), count, 0)
    inside_ = True if count is None else inside(w, count)
    columns = jnp.arange(b)[None]

    def event(passed: Array) -> tuple[Array, Array, Array]:
        falls = w > 0
        code = codes.astype(jnp.int32)
        point = jnp.where(falls, code - 1 - passed, code + passed)
        level = point.astype(jnp.float32) - lowest[None] - 1  # round(w / scale) > level
        happens = jnp.where(falls, level >= 0, level < 0) & (w != 0) & inside_
        happens &= (point >= 0) & (point < 2**bits)
        factor = w / (unit[None] * (level + 0.5))
        nearest = jnp.round((factor - float(factors.min())) * (1 / step))
        nearest = jnp.clip(nearest, 0, last).astype(jnp.int32)
        scale = jnp.take(flat_scales, nearest * b + columns, mode="clip")
        before = (jnp.round(quotient(w, scale)) > level) == falls
        index = nearest + before.astype(jnp.int32)
        return jnp.where(happens, index, last + 1), point, jnp.where(falls, -1, 1)

    def weight_at(i: Array, above: Array) -> tuple[Array, Array]:
        above = jnp.where(upper[i][None], above[:-1], above[1:])
        return jnp.asarray(order, jnp.int32)[i], histogram_weight(above, n, block)

    def swept() -> Best:
        above = above_levels(codes, 2**bits + 1)
        n_events = _passed(bits, float(factors.max() / factors.min()))
        return sweep(above, event, n_events, last + 1, weight_at, n)

    usual = (zeros <= lowest[None] + 1) & (scales > 1e-30) & (scales < FLOAT_MAX)
    return lax.cond(usual.all(), swept, scan)


def _passed(bits: int, growth: float) -> int:
    """How many decision points, 0.5 .. 2**bits - 0.5, one weight can pass while a range grows."""
    points = np.arange(2**bits) + 0.5
    ratio = points[None] / points[:, None]
    return int(((ratio >= 1) & (ratio <= growth * 1.001)).sum(axis=1).max())
