"""ICQ for integers: the range or the zero point that maximizes the entropy of a group's codes.

- `search_range` shrinks and grows the range, as the released code does.
- `search_zero_point` moves the zero point at a fixed scale, as the paper's text says.

`entropy.py` says by which rules candidates are compared.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, Integer

from irqlora_jax.quant.entropy import (
    FLOAT_TINY,
    bits_of,
    in_chunks,
    masked,
    product,
    quotient,
    require_range,
    spaced,
    try_all,
)


@functools.partial(jax.jit, static_argnames=("bits", "symmetric"))
def plain_range(
    blocks: Float[Array, "n block"],
    bits: int,
    symmetric: bool,
    valid: Int[Array, " n"] | None = None,
) -> tuple[Float32[Array, " n"], Float32[Array, " n"]]:
    """Scale and zero point that spread the integer codes over the range of each block.

    code = clip(round(w / scale) + zero, 0, 2**bits - 1). The range always includes 0; a block of
    zeros gets [-1, 1]; a symmetric range is [-max|w|, max|w|] with the zero point in the middle.

    Args:
        blocks: weights.
        bits: width of a code.
        symmetric: fixes the zero point.
        valid: number of real elements in each block (at least 1); None: all.
    """

    def plain(w: Array, n: Array | None) -> tuple[Array, Array]:
        return _scale_and_zero(*_limits(masked(w, n, 0), symmetric), bits, symmetric)

    return in_chunks(plain, 2, blocks, valid)


@functools.partial(jax.jit, static_argnames=("bits", "symmetric", "search_range", "steps"))
def search_range(
    blocks: Float[Array, "n block"],
    bits: int,
    symmetric: bool,
    search_range: float = 0.1,
    steps: int = 50,
    valid: Int[Array, " n"] | None = None,
) -> tuple[Float32[Array, " n"], Float32[Array, " n"], Float32[Array, " n"]]:
    """Scale, whole zero point and entropy of every block: the search of the released code.

    The candidates are the range of `plain_range` times 1, then times 1 + search_range * i / steps
    for i = 1 .. steps, then times 1 - search_range * i / steps.

    Args:
        blocks: weights.
        bits: width of a code.
        symmetric: fixes the zero point.
        search_range: largest relative change of the range, below 1.
        steps: number of candidates above, and below, the plain range.
        valid: number of real elements in each block (at least 1); None: all.
    """
    require_range(search_range)
    up, down = (spaced(1.0, 1 + away, steps + 1) for away in (search_range, -search_range))
    factors = jnp.asarray(np.concatenate([up, down[1:]]))

    def search(w: Array, n: Array | None) -> tuple[Array, Array, Array]:
        low, high = _limits(masked(w, n, 0), symmetric)

        def candidate(i: Array) -> tuple[Array, Array]:
            factor = factors[i]
            limits = product(factor, low), product(factor, high)
            return _scale_and_zero(*limits, bits, symmetric)

        return _best_integer(w, n, bits, factors.shape[0], candidate)

    return in_chunks(search, 3, blocks, valid)


@functools.partial(jax.jit, static_argnames=("bits", "search_range", "steps"))
def search_zero_point(
    blocks: Float[Array, "n block"],
    bits: int,
    search_range: float = 0.1,
    steps: int = 50,
    valid: Int[Array, " n"] | None = None,
) -> tuple[Float32[Array, " n"], Float32[Array, " n"], Float32[Array, " n"]]:
    """Scale, zero point and entropy of every block: the search of the paper's text (appendix A.2).

    The scale is that of the plain asymmetric range, and a shift of up to search_range times the
    range is absorbed by the zero point. Zero points are stored as 8-bit fixed point with 8 - bits
    fractional bits; the candidates are numbers of that kind: the plain zero point, then those
    above it, then those below it. code = clip(round(w / scale + zero), 0, 2**bits - 1).

    Args:
        blocks: weights.
        bits: width of a code.
        search_range: largest change of the zero point, as a fraction of the range.
        steps: candidates in each direction; representable numbers that fall together count once.
        valid: number of real elements in each block (at least 1); None: all.
    """
    require_range(search_range)
    unit = 2 ** (8 - bits)
    reach = search_range * (2**bits - 1) * unit
    away = np.unique(np.floor(reach * np.arange(1, steps + 1) / steps + 1e-9))
    away = away[away > 0]
    moves = jnp.asarray(np.concatenate([[0.0], away, -away]) / unit, jnp.float32)

    def search(w: Array, n: Array | None) -> tuple[Array, Array, Array]:
        low, high = _limits(masked(w, n, 0), symmetric=False)
        scale, zero = _scale_and_zero(low, high, bits, symmetric=False)

        def candidate(i: Array) -> tuple[Array, Array]:
            return scale, jnp.clip(zero + moves[i], 0, 255 / unit)

        return _best_integer(w, n, bits, moves.shape[0], candidate)

    return in_chunks(search, 3, blocks, valid)


def _limits(w: Float32[Array, "block b"], symmetric: bool) -> tuple[Array, Array]:
    low, high = jnp.minimum(w.min(0), 0), jnp.maximum(w.max(0), 0)
    if symmetric:
        high = jnp.maximum(-low, high)
        low = jnp.where(low < 0, -high, low)
    empty = (low == 0) & (high == 0)
    return jnp.where(empty, -1, low), jnp.where(empty, 1, high)


def _scale_and_zero(
    low: Float32[Array, " b"], high: Float32[Array, " b"], bits: int, symmetric: bool
) -> tuple[Float32[Array, " b"], Float32[Array, " b"]]:
    scale = jnp.maximum(quotient(high - low, 2.0**bits - 1), FLOAT_TINY)
    if symmetric:
        return scale, jnp.full_like(scale, 2 ** (bits - 1))
    return scale, jnp.round(quotient(-low, scale))


def _best_integer(
    w: Float32[Array, "block b"],
    count: Int32[Array, " b"] | None,
    bits: int,
    n_candidates: int,
    candidate: Callable[[Array], tuple[Array, Array]],
) -> tuple[Float32[Array, " b"], Float32[Array, " b"], Float32[Array, " b"]]:
    block, b = w.shape
    n = jnp.full(b, block, jnp.int32) if count is None else count

    def codes_at(i: Array) -> Integer[Array, "block b"]:
        scale, zero = candidate(i)
        whole = jnp.floor(zero)
        # A whole zero point is added after rounding, as in the released code (ties!).
        codes = jnp.round(quotient(w, scale[None]) + (zero - whole)[None]) + whole[None]
        return masked(jnp.clip(codes, 0, 2**bits - 1).astype(jnp.int8), count, 0)

    index, weight = try_all(codes_at, n_candidates, 2**bits, n)
    return *candidate(index), bits_of(weight, n, block)
