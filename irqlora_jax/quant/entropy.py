"""Exact entropies of codes, and the search for the candidate of highest entropy.

`icq.py` and `icq_integer.py` use this code. Every search follows three rules. First, entropies are
compared as sums of integers, so equal histograms tie exactly. (The released code sums floats, so
rounding noise decides.) Second, the first of the best candidates wins. Third, a candidate is judged
by the same float operations with which the quantizer computes codes. XLA may fuse a product and a
sum into one rounding, or turn a division into a product with the reciprocal. Both can move weights
across a decision point, so `product` and `quotient` prevent them.

Every search has two forms that choose the same candidates. On a CPU, a chunk of blocks stays in the
cache, and `sweep` visits only the events at which a code changes. Elsewhere, `try_all` counts all
codes of every candidate. Its single reduction over all blocks keeps a parallel device busy and
needs no scatter. The axis of the blocks comes last, because vector instructions run along it.

Partial blocks are padded at the end. `valid` is the number of real elements of each block; padding
has no influence.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int, Int32, Integer, Shaped

_CACHED = 2**15  # weights in a chunk on a CPU: about 4 MB of working memory
_WIDE = 2**26  # weights in a chunk elsewhere: 256 MB, so that most tensors need a single chunk
Results = TypeVar("Results", bound=tuple[Array, ...])
Work = Callable[[Array, Any], Results]
FLOAT_MAX = float(np.finfo(np.float32).max)
FLOAT_TINY = float(np.finfo(np.float32).tiny)


@functools.partial(jax.jit, static_argnames="n_levels")
def block_entropy(
    codes: Integer[Array, "*lead block"],
    n_levels: int,
    valid: Int[Array, "*lead"] | None = None,
) -> Float32[Array, "*lead"]:
    """Entropy of the codes of each block in bits (eq. 7), between 0 and log2(n_levels).

    Args:
        codes: below n_levels.
        n_levels: size of the code book.
        valid: number of real codes in each block (at least 1); None: all.

    Examples:
        >>> block_entropy(jnp.array([[0, 1, 2, 3], [0, 0, 1, 1], [2, 2, 2, 2]]), 4).tolist()
        [2.0, 1.0, 0.0]
        >>> block_entropy(jnp.array([[0, 1, 3, 3]]), 4, valid=jnp.array([2])).tolist()
        [1.0]
    """
    block = codes.shape[-1]

    def work(codes: Array, count: Array | None) -> tuple[Array]:
        n = jnp.full(codes.shape[1], block, jnp.int32) if count is None else count
        above = above_levels(masked(codes, count, 0), n_levels)
        return (bits_of(histogram_weight(above, n, block), n, block),)

    flat = None if valid is None else valid.reshape(-1)
    (bits,) = in_chunks(work, work, 1, codes.reshape(-1, block), flat)
    return bits.reshape(codes.shape[:-1])


def quotient(x: Float32[Array, "..."], divisor: Float32[Array, "..."] | float) -> Array:
    """x / divisor (> 0) by a true division: correctly rounded on a CPU, within 2 units in the last
    place on a GPU (`div.full.f32`).

    XLA turns a division by a constant or by a broadcast array into a product with its reciprocal,
    and w / (a / b) into w * b / a. The bound here, which never takes effect, prevents that. It
    matters: in a symmetric range, the smallest weight / scale is exactly between two codes.
    """
    return x / jnp.maximum(divisor, -jnp.abs(x))


def require_range(search_range: float) -> None:
    if not 0 < search_range < 1:
        raise ValueError(f"search_range = {search_range!r}: expected a number between 0 and 1")


def spaced(start: float, stop: float, n: int) -> Float32[np.ndarray, " n"]:
    """n numbers from start to stop, rounded like torch.linspace in the released code."""
    first, final = np.float32(start), np.float32(stop)
    step = (final - first) / np.float32(n - 1)
    i = np.arange(n, dtype=np.float32)
    return np.where(i < n // 2, first + step * i, final - step * (n - 1 - i)).astype(np.float32)


def in_chunks(
    on_cpu: Work[Results],
    elsewhere: Work[Results],
    n_results: int,
    blocks: Shaped[Array, "n block"],
    valid: Int[Array, " n"] | None,
    repeated: Shaped[Array, "period block"] | None = None,
) -> Results:
    """Applies work([block, b], [b] | None) -> [b] arrays chunk by chunk, without copying `blocks`.

    The platform that the program is compiled for decides between `on_cpu` and `elsewhere`. If
    `repeated` is given, `work` gets a third argument [block, b]: row i % period for block i.
    """
    arrays = {"valid": valid, "repeated": repeated}

    def on(work: Work[Results], n_weights: int) -> Callable[..., Results]:
        return lambda blocks, given: _in_chunks(work, n_results, n_weights, blocks, **given)

    return lax.platform_dependent(
        blocks,
        {name: array for name, array in arrays.items() if array is not None},
        cpu=on(on_cpu, _CACHED),
        default=on(elsewhere, _WIDE),
    )


def _in_chunks(
    work: Work[Results],
    n_results: int,
    n_weights: int,
    blocks: Shaped[Array, "n block"],
    valid: Int[Array, " n"] | None = None,
    repeated: Shaped[Array, "period block"] | None = None,
) -> Results:
    """Converts weights to float32; codes keep their type.

    If the last chunk would be short, it starts earlier and repeats blocks of the previous one.
    """
    n, block = blocks.shape
    size = min(n, max(64, n_weights // block))

    def step(i: Array, results: tuple[Array, ...]) -> tuple[Array, ...]:
        start = jnp.minimum(i * size, n - size)
        chunk = lax.dynamic_slice_in_dim(blocks, start, size).T
        if jnp.issubdtype(chunk.dtype, jnp.floating):
            chunk = chunk.astype(jnp.float32)
        count = None
        if valid is not None:
            count = lax.dynamic_slice_in_dim(valid, start, size).astype(jnp.int32)
        more = ()
        if repeated is not None:
            more = (repeated[(start + jnp.arange(size)) % len(repeated)].T,)
        parts = work(chunk, count, *more)
        return tuple(
            lax.dynamic_update_slice_in_dim(all_, part, start, 0)
            for all_, part in zip(results, parts, strict=True)
        )

    results = tuple(jnp.zeros(n, jnp.float32) for _ in range(n_results))
    return cast(Results, lax.fori_loop(0, -(-n // size), step, results) if n else results)


def product(factor: Array, x: Array) -> Array:
    """factor * x for |factor| <= 2, rounded before anything is added to it.

    The compiler cannot know that the bounds never take effect, so it cannot fuse this with a sum.
    """
    bound = 2 * jnp.abs(x)
    return jnp.clip(factor * x, -bound, bound)


def _table(block: int) -> tuple[Int32[np.ndarray, " counts"], int]:
    """c * log2(c) for counts c = 0 .. block in fixed point, and the number of fractional bits.

    The entropy of n codes with counts c_i is log2(n) - sum_i c_i log2(c_i) / n, so one table serves
    all n, and a smaller sum is a higher entropy. Sums stay below 2**30.
    """
    count = np.arange(block + 1, dtype=np.float64)
    exact = count * np.log2(np.maximum(count, 1))
    fraction = 30 - math.ceil(math.log2(max(exact[-1], 1)))
    return np.round(exact * 2.0**fraction).astype(np.int32), fraction


def _look_up(counts: Integer[Array, "..."], block: int) -> Int32[Array, "..."]:
    return jnp.take(jnp.asarray(_table(block)[0]), counts.astype(jnp.int32), mode="clip")


def bits_of(
    weight: Int32[Array, "..."], count: Int32[Array, "..."], block: int
) -> Float32[Array, "..."]:
    """Entropy of `count` codes whose table entries sum to `weight`."""
    lacking = (_look_up(count, block) - weight).astype(jnp.float32)
    return quotient(lacking * 2.0 ** -_table(block)[1], count.astype(jnp.float32))


def inside(x: Shaped[Array, "block b"], count: Int32[Array, " b"]) -> Bool[Array, "block b"]:
    return jnp.arange(x.shape[0])[:, None] < count[None, :]


def masked(
    x: Shaped[Array, "block b"], count: Int32[Array, " b"] | None, fill: float | int
) -> Shaped[Array, "block b"]:
    return x if count is None else jnp.where(inside(x, count), x, fill)


def lower_median(w: Float32[Array, "block b"], count: Int32[Array, " b"]) -> Float32[Array, " b"]:
    """Lower median of the first `count` elements (padding is +inf), by bisection on the bits."""

    def order(bits: Array) -> Array:  # to integers in the order of the floats; its own inverse
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


def _small(block: int) -> np.dtype:
    """The narrowest type that can hold `block`; narrow vectors are fast."""
    return np.dtype(np.int8 if block < 128 else np.int16 if block < 32768 else np.int32)


def above_levels(codes: Array, n_levels: int) -> Integer[Array, "points b"]:
    """How many codes of each block are larger than 0, 1, .. n_levels - 2."""
    small = _small(codes.shape[0])
    level = jnp.arange(n_levels - 1, dtype=codes.dtype)[:, None, None]
    return (codes[None] > level).sum(1, dtype=small)


def histogram_weight(
    above: Integer[Array, "points b"], n: Int32[Array, " b"], block: int
) -> Int32[Array, " b"]:
    """Sum of the table over the histogram of n codes, from the result of `above_levels`."""
    larger = jnp.concatenate([above, jnp.zeros_like(above[:1])])
    smaller = jnp.concatenate([n.astype(above.dtype)[None], above])
    return _look_up(smaller - larger, block).sum(0, dtype=jnp.int32)


Best = tuple[Int32[Array, " b"], Int32[Array, " b"]]  # index of a candidate, its table sum


def worst(n: Int32[Array, " b"]) -> Best:
    return jnp.zeros_like(n), jnp.full_like(n, np.iinfo(np.int32).max)


def better(best: Best, i: Array, weight: Int32[Array, " b"]) -> Best:
    """The candidate with the smaller sum; if the sums are equal, with the smaller index."""
    wins = (weight < best[1]) | ((weight == best[1]) & (i < best[0]))
    return jnp.where(wins, i, best[0]), jnp.where(wins, weight, best[1])


def try_each(
    codes_at: Callable[[Array], Integer[Array, "block b"]],
    n_candidates: int,
    n_levels: int,
    n: Int32[Array, " b"],
) -> Best:
    """Evaluates each candidate by itself. `codes_at` returns its codes; padding has code 0."""

    def step(i: Array, carry: tuple[Array, Best]) -> tuple[Array, Best]:
        codes, best = carry
        best = better(best, i, histogram_weight(above_levels(codes, n_levels), n, codes.shape[0]))
        # With the codes as a carry, XLA does not compute them again for every level.
        return codes_at(jnp.minimum(i + 1, n_candidates - 1)), best

    return lax.fori_loop(0, n_candidates, step, (codes_at(jnp.int32(0)), worst(n)))[1]


def try_all(
    value_at: Callable[[Array], Float32[Array, "block b"]],
    points: Sequence[float],
    n_candidates: int,
    n: Int32[Array, " b"],
) -> Best:
    """`try_each` for parallel devices: one reduction per candidate, which reads the weights once.

    A code is the number of points that value_at(candidate) exceeds; padding is -inf. The counts
    are packed into 8-bit fields of integers (16-bit for blocks of 256 or more). So for 15 points
    the reduction carries only 4 integers.
    """
    block = jax.eval_shape(value_at, jnp.int32(0)).shape[0]
    width = 8 if block < 256 else 16
    fields = 32 // width
    words = [points[start : start + fields] for start in range(0, len(points), fields)]

    def step(i: Array, best: Best) -> Best:
        value = value_at(i)
        sums = []
        for word in words:
            exceeded = jnp.zeros(value.shape, jnp.uint32)
            for field, point in enumerate(word):
                exceeded += jnp.where(value > point, np.uint32(1 << width * field), np.uint32(0))
            sums.append(exceeded.sum(0, dtype=jnp.uint32))
        counts = [
            (total >> (width * field)) & (2**width - 1)
            for total, word in zip(sums, words, strict=True)
            for field in range(len(word))
        ]
        above = jnp.stack(counts).astype(jnp.int32)
        return better(best, i, histogram_weight(above, n, block))

    return lax.fori_loop(0, n_candidates, step, worst(n))


def sweep(
    above: Integer[Array, "points b"],
    event: Callable[[Array], tuple[Array, Array, Array | int]],
    n_events: int,
    n_candidates: int,
    weight_at: Callable[[Array, Array], tuple[Array, Int32[Array, " b"]]],
    n: Int32[Array, " b"],
) -> Best:
    """Computes the result of `try_each` from the events at which a weight passes a point.

    Args:
        above: how many weights exceed each point at candidate 0.
        event: maps an event number, 0 .. n_events - 1, to the candidate, the point and the change
            of `above` for each weight [block, b]. If it does not happen: candidate n_candidates.
        n_events: maximum number of events of one weight.
        n_candidates: number of candidates.
        weight_at: maps a candidate and its `above` to its index and its sum of the table.
        n: number of codes of each block.
    """
    n_points, b = above.shape
    size = n_candidates * n_points * b

    def place_of(j: Array) -> tuple[Array, Array]:
        candidate, point, change = event(j)
        place = (candidate * n_points + point) * b + jnp.arange(b)[None]
        place = jnp.where(candidate < n_candidates, place, size)
        return place, jnp.broadcast_to(jnp.asarray(change, above.dtype), place.shape)

    # The loop of lax.map keeps XLA from fusing this arithmetic into the (serial) scatter.
    places, changes = lax.map(place_of, jnp.arange(n_events))
    events = jnp.zeros(size, above.dtype)
    events = events.at[places.reshape(-1)].add(changes.reshape(-1), mode="drop")
    events = events.reshape(n_candidates, n_points, b)

    def step(i: Array, carry: tuple[Array, Best]) -> tuple[Array, Best]:
        above, best = carry
        above += events[i]
        return above, better(best, *weight_at(i, above))

    return lax.fori_loop(0, n_candidates, step, (above, worst(n)))[1]
