"""ICQ: the shift or the range of a block that maximizes the entropy of its codes.

IR-QLoRA's information calibration quantization (section 3.2). The mutual information between a
block and its codes is the entropy of the codes (eq. 5 to 7), so per block every candidate is tried
and the one of highest entropy wins:

- `search_shift`, NormalFloat and FP4: moves the shift around the median (eq. 8, 9).
- `search_range`, integers: shrinks and grows the range, as the released code does.
- `search_zero_point`, integers: moves the zero point at a fixed scale, as the paper's text says.

Three rules hold for all of them. Entropies are compared as sums of integers, so that equal
histograms tie exactly (sums of floats, as in the released code, let rounding noise decide). The
first of the best candidates wins. And a candidate is judged by the very float operations with
which the quantizer computes codes: XLA may fuse a product and a sum into one rounding, or turn a
division into a product with the reciprocal, which moves weights across a decision point; the
helpers `_product` and `quotient` forbid that.

Blocks are worked on in small chunks, one after the other, with the block axis last (it is the axis
of the vector instructions). Partial blocks are padded at their end: `valid` counts the elements of
each block that are real, the others have no influence.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Integer, Shaped

from irqlora_jax.quant.formats import Format, get_format

# Standard deviation in units of the scale, from the table of NF4: 1 / Q(0.9677083).
_SIGMA = 1 / 1.8481308
_CHUNK = 32768  # weights worked on at a time: about 4 MB of working memory
_FLOAT_MAX = float(np.finfo(np.float32).max)
_FLOAT_TINY = float(np.finfo(np.float32).tiny)


@functools.partial(jax.jit, static_argnames="n_levels")
def block_entropy(codes: Integer[Array, "*lead block"], n_levels: int) -> Float32[Array, "*lead"]:
    """Entropy of the codes of each block in bits (eq. 7), between 0 and log2(n_levels)."""
    size = codes.shape[-1]
    weight = jnp.zeros(codes.shape[:-1], jnp.int32)
    for level in range(n_levels):
        weight += _look_up((codes == level).sum(-1, dtype=jnp.int32), size)
    return _bits(weight, jnp.full(weight.shape, size, jnp.int32), size)


@functools.partial(jax.jit, static_argnames=("format", "search_range", "steps"))
def search_shift(
    blocks: Float[Array, "n block"],
    format: Format | str,
    search_range: float = 0.1,
    steps: int = 100,
    valid: Int[Array, " n"] | None = None,
) -> tuple[Float32[Array, " n"], Float32[Array, " n"]]:
    """Shift (the paper's tau) of every block, and the entropy of the codes that it gives.

    The 2 * steps + 1 candidates are tau0 + f * max|w - tau0|, with tau0 the (lower) median and f
    evenly spaced in +-search_range * sigma, where sigma is the standard deviation that NormalFloat
    takes for granted. The scale of a candidate is its own max|w - tau|.

    Args:
        blocks: weights.
        format: code book, not an integer one.
        search_range: lambda of the paper, below 1.
        steps: n of the paper.
        valid: number of real elements in each block (at least 1); None: all.
    """
    format = get_format(format) if isinstance(format, str) else format
    if format.integer:
        raise ValueError(f"format = {format.name!r}: accepted is a NormalFloat or FP4 format")
    _require_range(search_range)
    factors = _spaced(-search_range * _SIGMA, search_range * _SIGMA, 2 * steps + 1)
    search = functools.partial(_best_shift, factors=factors, format=format)
    return _in_chunks(search, 2, blocks, valid)


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
        return _scale_and_zero(*_limits(_masked(w, n, 0), symmetric), bits, symmetric)

    return _in_chunks(plain, 2, blocks, valid)


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
    _require_range(search_range)
    up, down = (_spaced(1.0, 1 + away, steps + 1) for away in (search_range, -search_range))
    factors = jnp.asarray(np.concatenate([up, down[1:]]))

    def search(w: Array, n: Array | None) -> tuple[Array, Array, Array]:
        low, high = _limits(_masked(w, n, 0), symmetric)

        def candidate(i: Array) -> tuple[Array, Array]:
            factor = factors[i]
            limits = _product(factor, low), _product(factor, high)
            return _scale_and_zero(*limits, bits, symmetric)

        return _best_integer(w, n, bits, factors.shape[0], candidate)

    return _in_chunks(search, 3, blocks, valid)


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
    _require_range(search_range)
    unit = 2 ** (8 - bits)
    reach = search_range * (2**bits - 1) * unit
    away = np.unique(np.floor(reach * np.arange(1, steps + 1) / steps + 1e-9))
    away = away[away > 0]
    moves = jnp.asarray(np.concatenate([[0.0], away, -away]) / unit, jnp.float32)

    def search(w: Array, n: Array | None) -> tuple[Array, Array, Array]:
        low, high = _limits(_masked(w, n, 0), symmetric=False)
        scale, zero = _scale_and_zero(low, high, bits, symmetric=False)

        def candidate(i: Array) -> tuple[Array, Array]:
            return scale, jnp.clip(zero + moves[i], 0, 255 / unit)

        return _best_integer(w, n, bits, moves.shape[0], candidate)

    return _in_chunks(search, 3, blocks, valid)


def quotient(x: Float32[Array, "..."], divisor: Float32[Array, "..."] | float) -> Array:
    """x / divisor (> 0), correctly rounded.

    XLA turns a division by a constant or by a broadcast array into a product with its reciprocal,
    and w / (a / b) into w * b / a. The bound, which never binds, keeps it from that. It matters:
    the least weight of a symmetric range divided by its scale lies exactly between two codes.
    """
    return x / jnp.maximum(divisor, -jnp.abs(x))


# --- chunks, exact arithmetic, entropy ------------------------------------------------------------


def _require_range(search_range: float) -> None:
    if not 0 < search_range < 1:
        raise ValueError(f"search_range = {search_range!r}: accepted is a number between 0 and 1")


def _spaced(start: float, stop: float, n: int) -> Float32[np.ndarray, " n"]:
    """n numbers from start to stop, rounded as torch.linspace does, for the released candidates."""
    first, final = np.float32(start), np.float32(stop)
    step = (final - first) / np.float32(n - 1)
    i = np.arange(n, dtype=np.float32)
    return np.where(i < n // 2, first + step * i, final - step * (n - 1 - i)).astype(np.float32)


def _in_chunks(
    work: Callable[[Array, Array | None], tuple[Array, ...]],
    n_results: int,
    blocks: Float[Array, "n block"],
    valid: Int[Array, " n"] | None,
) -> tuple[Float32[Array, " n"], ...]:
    """Applies work([block, b], [b] | None) -> [b] arrays chunk by chunk, without copying `blocks`.

    A ragged last chunk reaches back into the one before it and repeats some of its blocks.
    """
    n, block = blocks.shape
    size = min(n, max(64, _CHUNK // block))

    def step(i: Array, results: tuple[Array, ...]) -> tuple[Array, ...]:
        start = jnp.minimum(i * size, n - size)
        chunk = lax.dynamic_slice_in_dim(blocks, start, size).astype(jnp.float32).T
        count = None
        if valid is not None:
            count = lax.dynamic_slice_in_dim(valid, start, size).astype(jnp.int32)
        parts = work(chunk, count)
        return tuple(
            lax.dynamic_update_slice_in_dim(all_, part, start, 0)
            for all_, part in zip(results, parts, strict=True)
        )

    results = tuple(jnp.zeros(n, jnp.float32) for _ in range(n_results))
    return lax.fori_loop(0, -(-n // size), step, results) if n else results


def _product(factor: Array, x: Array) -> Array:
    """factor * x for |factor| <= 2, rounded before anything is added to it.

    No compiler can know that the bounds never bind, so it cannot fuse the product with a sum.
    """
    bound = 2 * jnp.abs(x)
    return jnp.clip(factor * x, -bound, bound)


def _table(block: int) -> tuple[Int32[np.ndarray, " counts"], int]:
    """c * log2(c) for counts c = 0 .. block, as fixed point, and its fractional bits.

    The entropy of n codes with counts c_i is log2(n) - sum_i c_i log2(c_i) / n, so one table serves
    all n, and a smaller sum is a higher entropy. Sums stay below 2**30.
    """
    count = np.arange(block + 1, dtype=np.float64)
    exact = count * np.log2(np.maximum(count, 1))
    fraction = 30 - math.ceil(math.log2(max(exact[-1], 1)))
    return np.round(exact * 2.0**fraction).astype(np.int32), fraction


def _look_up(counts: Integer[Array, "..."], block: int) -> Int32[Array, "..."]:
    return jnp.take(jnp.asarray(_table(block)[0]), counts.astype(jnp.int32), mode="clip")


def _bits(
    weight: Int32[Array, "..."], count: Int32[Array, "..."], block: int
) -> Float32[Array, "..."]:
    """Entropy of `count` codes whose table entries sum to `weight`."""
    lacking = (_look_up(count, block) - weight).astype(jnp.float32)
    return quotient(lacking * 2.0 ** -_table(block)[1], count.astype(jnp.float32))


def _inside(x: Shaped[Array, "block b"], count: Int32[Array, " b"]) -> Bool[Array, "block b"]:
    return jnp.arange(x.shape[0])[:, None] < count[None, :]


def _masked(
    x: Shaped[Array, "block b"], count: Int32[Array, " b"] | None, fill: float | int
) -> Shaped[Array, "block b"]:
    return x if count is None else jnp.where(_inside(x, count), x, fill)


def _small(block: int) -> np.dtype:
    """The narrowest type that counts to `block`; narrow vectors are fast."""
    return np.dtype(np.int8 if block < 128 else np.int16 if block < 32768 else np.int32)


def _above(codes: Array, n_levels: int) -> Integer[Array, "points b"]:
    """How many codes of each block are larger than 0, 1, .. n_levels - 2."""
    small = _small(codes.shape[0])
    level = jnp.arange(n_levels - 1, dtype=codes.dtype)[:, None, None]
    return (codes[None] > level).sum(1, dtype=small)


def _weight(
    above: Integer[Array, "points b"], n: Int32[Array, " b"], block: int
) -> Int32[Array, " b"]:
    """Sum of the table over the histogram of n codes, given what `_above` counts."""
    larger = jnp.concatenate([above, jnp.zeros_like(above[:1])])
    smaller = jnp.concatenate([n.astype(above.dtype)[None], above])
    return _look_up(smaller - larger, block).sum(0, dtype=jnp.int32)


_Best = tuple[Int32[Array, " b"], Int32[Array, " b"]]  # index of a candidate, its table sum


def _worst(n: Int32[Array, " b"]) -> _Best:
    return jnp.zeros_like(n), jnp.full_like(n, np.iinfo(np.int32).max)


def _better(best: _Best, i: Array, weight: Int32[Array, " b"]) -> _Best:
    wins = weight < best[1]
    return jnp.where(wins, i, best[0]), jnp.where(wins, weight, best[1])


def _try_all(
    codes_at: Callable[[Array], Integer[Array, "block b"]],
    n_candidates: int,
    n_levels: int,
    n: Int32[Array, " b"],
) -> _Best:
    """The best candidate, each one evaluated on its own; codes_at gives its codes, 0 as padding."""

    def step(i: Array, carry: tuple[Array, _Best]) -> tuple[Array, _Best]:
        codes, best = carry
        best = _better(best, i, _weight(_above(codes, n_levels), n, codes.shape[0]))
        # Codes reach their use as a carry, so that XLA does not compute them anew for every level.
        return codes_at(jnp.minimum(i + 1, n_candidates - 1)), best

    return lax.fori_loop(0, n_candidates, step, (codes_at(jnp.int32(0)), _worst(n)))[1]


# --- shifts ---------------------------------------------------------------------------------------


def _median(w: Float32[Array, "block b"], count: Int32[Array, " b"]) -> Float32[Array, " b"]:
    """Lower median of the first `count` elements (padding is +inf), by bisection on the bits."""

    def order(bits: Array) -> Array:  # its own inverse; integers that compare as the floats do
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)

    keys = order(lax.bitcast_convert_type(w, jnp.int32))
    rank = (count + 1) // 2

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)
        enough = (keys <= middle[None]).sum(0, dtype=jnp.int32) >= rank
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    ends = keys.min(0), keys.max(0)
    key, _ = lax.fori_loop(0, 32, halve, ends)
    return lax.bitcast_convert_type(order(key), jnp.float32)


def _crossings(midpoints: Float32[np.ndarray, " points"], reach: float) -> int:
    """How many decision points one weight can cross while f runs from -reach to reach.

    x = (w - tau) / m, m = max|w - tau|, moves by at most (1 + |x|) / m a unit of tau, and
    m >= (1 - |f|) * max|w - tau0|. So sign(x) * log(1 + |x|) moves by at most -2 log(1 - reach).
    """
    place = np.sign(midpoints) * np.log1p(np.abs(midpoints.astype(np.float64)))
    width = -2 * math.log1p(-reach) * 1.001 + 1e-6
    distance = place[None] - place[:, None]
    return int(((distance >= 0) & (distance <= width)).sum(axis=1).max())


def _best_shift(
    w: Float32[Array, "block b"],
    count: Int32[Array, " b"] | None,
    *,
    factors: np.ndarray,
    format: Format,
) -> tuple[Float32[Array, " b"], Float32[Array, " b"]]:
    block, b = w.shape
    n = jnp.full(b, block, jnp.int32) if count is None else count
    w = _masked(w, count, np.inf)
    median = _median(w, n)[None]
    low, high = w.min(0, keepdims=True), _masked(w, count, -np.inf).max(0, keepdims=True)
    spread = jnp.minimum(jnp.maximum(high - median, median - low), _FLOAT_MAX)
    table = jnp.asarray(factors, jnp.float32)

    def shift_at(i: Array) -> Array:
        return _product(jnp.take(table, i, mode="clip"), spread) + median

    def unit_at(i: Array) -> Array:
        """The weights as the quantizer compares them with the midpoints."""
        shift = shift_at(i)
        scale = jnp.maximum(jnp.abs(high - shift), jnp.abs(low - shift))
        return (w - shift) * (1 / jnp.where(scale == 0, 1, scale))

    def codes_at(i: Array) -> Integer[Array, "block b"]:
        x = unit_at(i)
        codes = jnp.zeros(w.shape, jnp.int8)
        for point in format.midpoints:
            codes += (x > point).astype(jnp.int8)
        return _masked(codes, count, 0)

    scan = functools.partial(_try_all, codes_at, len(factors), 2**format.bits, n)
    # The sweep needs candidates that differ by far more than a rounding error.
    step = float(factors[-1] - factors[0]) / (len(factors) - 1)
    if step < 1e-5:
        index, weight = scan()
    else:
        unit = (w - median) * (1 / jnp.where(spread == 0, 1, spread))
        sweep = functools.partial(_sweep, unit, n, codes_at, unit_at, format.midpoints, factors)
        coarse = (spread > 0) & (jnp.abs(median) * 2.0**-22 > step * spread)
        index, weight = lax.cond(coarse.any(), scan, sweep)
    shift = jnp.clip(shift_at(index[None])[0], -_FLOAT_MAX, _FLOAT_MAX)
    return shift, _bits(weight, n, block)


def _sweep(
    unit: Float32[Array, "block b"],
    n: Int32[Array, " b"],
    codes_at: Callable[[Array], Integer[Array, "block b"]],
    unit_at: Callable[[Array], Array],
    midpoints: Float32[np.ndarray, " points"],
    factors: np.ndarray,
) -> tuple[Int32[Array, " b"], Int32[Array, " b"]]:
    """What `_try_all` computes, from the events at which a code changes.

    As the shift grows, (w - shift) / scale never grows, and a weight crosses a decision point at
    most once. Where it does follows from a linear equation; rounding cannot displace that by half a
    candidate, so evaluating the nearest candidate decides between it and the next.
    """
    block, b = unit.shape
    last = len(factors) - 1
    step = float(factors[-1] - factors[0]) / last
    codes = codes_at(jnp.int32(0))
    above = _above(codes, len(midpoints) + 1)
    bottom = unit.min(0, keepdims=True)
    top = jnp.where(_inside(unit, n), unit, -np.inf).max(0, keepdims=True)
    center = (bottom + top) / 2
    points = jnp.asarray(midpoints)
    n_points = len(midpoints)
    n_places = (last + 1) * n_points * b

    def place_of(crossed: Array) -> Int32[Array, "block b"]:
        """Flat [candidate, point, b] index of each weight's next event, n_places if none."""
        point_index = codes.astype(jnp.int32) - 1 - crossed
        point = jnp.take(points, point_index, mode="clip")
        # x = point where the scale is top - shift, or else where it is shift - bottom.
        shift = (unit - point * top) / (1 - point)
        shift = jnp.where(shift <= center, shift, (unit + point * bottom) / (1 + point))
        nearest = jnp.round((shift - float(factors[0])) * (1 / step))
        nearest = jnp.clip(nearest, 0, last).astype(jnp.int32)
        index = nearest + (unit_at(nearest) > point).astype(jnp.int32)
        happens = (point_index >= 0) & (index <= last)
        place = (index * n_points + point_index) * b + jnp.arange(b)[None]
        return jnp.where(happens, place, n_places)

    # The loop of lax.map keeps XLA from fusing this arithmetic into the (serial) scatter.
    places = lax.map(place_of, jnp.arange(_crossings(midpoints, float(factors[-1]))))
    events = jnp.zeros(n_places, above.dtype).at[places.reshape(-1)].add(-1, mode="drop")
    events = events.reshape(last + 1, n_points, b)

    def step_to(i: Array, carry: tuple[Array, _Best]) -> tuple[Array, _Best]:
        above, best = carry
        above += events[i]
        return above, _better(best, i, _weight(above, n, block))

    return lax.fori_loop(0, last + 1, step_to, (above, _worst(n)))[1]


# --- integers -------------------------------------------------------------------------------------


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
    scale = jnp.maximum(quotient(high - low, 2.0**bits - 1), _FLOAT_TINY)
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
        return _masked(jnp.clip(codes, 0, 2**bits - 1).astype(jnp.int8), count, 0)

    index, weight = _try_all(codes_at, n_candidates, 2**bits, n)
    return *candidate(index), _bits(weight, n, block)
