"""The ICQ search for NormalFloat and FP4 as one GPU kernel (Pallas, Triton backend).

`search_shift` finds the very floats that `irqlora_jax.quant.icq.search_shift` finds. JAX deprecates
this backend of Pallas from 0.11 on; a kernel for Mosaic, its successor, would be a second file.

A thread owns a block. It sorts the weights into a column of a scratch buffer, which it alone reads
and which the first-level cache holds. At a candidate the weights that do not exceed a decision
point are the start of that column, so one pointer a point says how many they are: it shows the
first weight that does. All counts are differences of pointers, and the entropy a sum over a table
of integers. As the shift grows, a weight that does not exceed a point never comes to exceed it
again, so pointers only rise. A candidate is one pass or a few over the pointers: the weight shown
is judged by the operations of the quantizer, and where it does not exceed its point, the pointer
moves on to the next. In a block of 64 normal weights all of them move about 80 times at 201
candidates, where counting would compare 193,000 times.

Where rounding could break that order (shifts that differ by little more than their own rounding
error, magnitudes near the ends of float32) the kernel counts the weights of each candidate.

Cost, of the instructions compiled for an H200 (tests/cuda/test_search_cuda.py): 85 a candidate and
156 a pass, 2.5 passes a candidate, make 46 warp instructions for 32 weights. It has not run on a GPU.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32, Int

from irqlora_jax.devices import compute_capability
from irqlora_jax.quant.entropy import (
    FLOAT_MAX,
    bits_of,
    histogram_weight,
    product,
    require_range,
    spaced,
)
from irqlora_jax.quant.formats import Format, get_format

try:
    from jax.experimental.pallas import triton as plt
except ImportError:  # a later jax, without this backend: `refusal` says so
    plt = None

_SIGMA = 1 / 1.8481308  # as in irqlora_jax/quant/icq.py


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut. It changes no result.

    Attributes:
        blocks: of a program, a power of two: one a thread, 32 a warp.
        warps: of a program. One spares the barriers with which several agree on another pass.
        chunk: weights that a thread sorts in its registers at a time, a power of two; sorted chunks
            are merged in the scratch buffer.
    """

    blocks: int = 32
    warps: int = 1
    chunk: int = 8


def default_tiles(block: int) -> Tiles:
    """The tiles for blocks of that many weights."""
    return Tiles()


def refusal(
    blocks: Float[Array, "n block"], format: Format | str, device: Any = None
) -> str | None:
    """Why the kernel cannot serve, None if it can.

    Args:
        blocks: what is to be searched.
        format: code book.
        device: of jax; None: the first one.
    """
    device = jax.devices()[0] if device is None else device
    if plt is None:
        return f"it needs the Triton backend of Pallas, which jax {jax.__version__} does not have"
    if (compute_capability(device) or (0, 0)) < (8, 0):
        needs = "an NVIDIA GPU of compute capability 8.0 or more"
        return f"it needs {needs}, the device is {device.device_kind}"
    return _unserved(blocks, get_format(format) if isinstance(format, str) else format)


def _unserved(blocks: Array, format: Format) -> str | None:
    if format.integer:
        return f"it takes NormalFloat and FP4 formats, not {format.name}"
    if blocks.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"it takes float32, bfloat16 and float16, not {blocks.dtype}"
    n, block = blocks.shape
    if block not in (16, 32, 64, 128, 256):
        return f"it takes blocks of 16, 32, 64, 128 or 256 weights, not {block}"
    if (n + 1024) * (block + 1) >= 2**31:  # offsets are 32-bit integers
        return f"it takes fewer than 2**31 weights at a time, not {n * block}"
    return None


@functools.partial(
    jax.jit, static_argnames=("format", "search_range", "steps", "tiles", "interpret")
)
def search_shift(
    blocks: Float[Array, "n block"],
    format: Format | str,
    search_range: float = 0.1,
    steps: int = 100,
    valid: Int[Array, " n"] | None = None,
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[Float32[Array, " n"], Float32[Array, " n"]]:
    """Shift of every block, and the entropy of the codes that it gives (`icq.search_shift`).

    Args:
        blocks: finite weights, 16, 32, 64, 128 or 256 in a block.
        format: code book, not an integer one.
        search_range: lambda of the paper, below 1.
        steps: n of the paper.
        valid: number of real elements in each block (at least 1); None: all.
        tiles: how the work is cut; None: `default_tiles`.
        interpret: run as ordinary operations of XLA, on any device.

    Raises:
        ValueError: what `refusal` says of blocks and format; a search range outside of (0, 1).
    """
    format = get_format(format) if isinstance(format, str) else format
    if (reason := _unserved(blocks, format)) is not None:
        raise ValueError(f"search_triton: {reason}")
    require_range(search_range)
    factors = spaced(-search_range * _SIGMA, search_range * _SIGMA, 2 * steps + 1)
    n, block = blocks.shape
    count = jnp.full(n, block, jnp.int32) if valid is None else valid.astype(jnp.int32)
    if n == 0:
        return jnp.zeros(0, jnp.float32), jnp.zeros(0, jnp.float32)
    tiles = default_tiles(block) if tiles is None else tiles
    programs = -(-n // tiles.blocks)
    numbers = jnp.arange(block + 1, dtype=jnp.int32)
    table = histogram_weight(numbers[None], numbers, block)  # of a histogram with one count
    inputs = [blocks, jnp.asarray(factors), table] + ([] if valid is None else [count])
    kernel = functools.partial(
        *(_kernel, block, tuple(format.midpoints.tolist()), n),
        *(len(factors), float(factors[-1] - factors[0]) / (len(factors) - 1), tiles),
        # The interpreter has no barrier, and needs none.
        (lambda: None) if interpret else plt.debug_barrier,
    )
    shift, weight, _ = pl.pallas_call(
        kernel,
        grid=(programs,),
        in_specs=[_whole(x.shape) for x in inputs],
        out_specs=[
            *[pl.BlockSpec((tiles.blocks,), lambda i: (i,))] * 2,
            pl.BlockSpec((None, block + 1, tiles.blocks), lambda i: (i, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((programs * tiles.blocks,), jnp.float32),
            jax.ShapeDtypeStruct((programs * tiles.blocks,), jnp.int32),
            jax.ShapeDtypeStruct((programs, block + 1, tiles.blocks), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=1),
        interpret=interpret,
        name="search_shift",
    )(*inputs)
    # XLA makes bits of the sums, as in the search of XLA: its division is not that of the kernel.
    return shift[:n], bits_of(weight[:n], count, block)


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda i: (0,) * len(shape))


def _kernel(
    block: int,
    points: tuple[float, ...],
    n_blocks: int,
    n_candidates: int,
    step: float,
    tiles: Tiles,
    barrier: Callable[[], None],
    blocks_ref: Any,
    factors_ref: Any,
    table_ref: Any,
    *refs: Any,
) -> None:
    """One program. `sorted_ref`, [block + 1, tiles.blocks], is its part of the scratch buffer."""
    *valid_ref, shift_ref, weight_ref, sorted_ref = refs
    lane = lax.iota(jnp.int32, tiles.blocks)
    mine = pl.program_id(0) * tiles.blocks + lane
    mine = jnp.minimum(mine, n_blocks - 1)  # the last program repeats the last block
    count = plt.load(valid_ref[0].at[mine]) if valid_ref else jnp.full_like(lane, block)
    none = jnp.zeros_like(lane)

    def weights(place: Array) -> Array:
        w = plt.load(blocks_ref.at[mine, jnp.full_like(lane, place)]).astype(jnp.float32)
        return jnp.where(place < count, w, np.inf) if valid_ref else w

    def at(place: Array, **masked: Any) -> Array:
        return plt.load(sorted_ref.at[place, lane], **masked)

    _sort(weights, sorted_ref, block, tiles.chunk, barrier)
    plt.store(sorted_ref.at[jnp.full_like(lane, block), lane], jnp.full(lane.shape, np.inf, jnp.float32))
    barrier()
    median, low, high = at((count + 1) // 2 - 1), at(none), at(count - 1)
    spread = jnp.minimum(jnp.maximum(high - median, median - low), FLOAT_MAX)

    def candidate(i: Array) -> tuple[Array, Array]:
        """Shift and reciprocal of the scale."""
        shift = product(jnp.full_like(spread, factors_ref[i]), spread) + median
        scale = jnp.maximum(jnp.abs(high - shift), jnp.abs(low - shift))
        return shift, 1 / jnp.where(scale == 0, 1, scale)

    def better(best: Any, shift: Array, below: tuple[Array, ...]) -> Any:
        """`below`: how many weights do not exceed each point. The first of the best wins."""
        weight = sum(
            (plt.load(table_ref.at[end - start]) for start, end in _neighbors(none, below, count)),
            start=none,
        )
        wins = weight < best[1]
        return jnp.where(wins, shift, best[0]), jnp.where(wins, weight, best[1])

    def walk() -> Any:
        first, reciprocal = candidate(0)

        def halve(i: Array, below: tuple[Array, ...]) -> tuple[Array, ...]:
            half = block >> (i + 1)
            beyond = [(at(p + half - 1) - first) * reciprocal > x for p, x in zip(below, points, strict=True)]
            return tuple(jnp.where(b, p, p + half) for b, p in zip(beyond, below, strict=True))

        def try_one(i: Array, carry: Any) -> Any:
            below, shown, best = carry
            shift, reciprocal = candidate(i)

            def move(carry: Any) -> Any:
                left, below, shown = carry
                moves = [~((w - shift) * reciprocal > x) for w, x in zip(shown, points, strict=True)]
                below = tuple(p + m.astype(jnp.int32) for p, m in zip(below, moves, strict=True))
                shown = tuple(
                    at(p, mask=m, other=w) for p, m, w in zip(below, moves, shown, strict=True)
                )
                moved = functools.reduce(jnp.logical_or, moves).astype(jnp.int32).max()
                # The number left is no ornament: Triton crashes over a loop that only tests what
                # it carries.
                return jnp.where(moved > 0, left - 1, 0), below, shown

            start = jnp.int32(block + 1), below, shown
            _, below, shown = lax.while_loop(lambda carry: carry[0] > 0, move, start)
            return below, shown, better(best, shift, below)

        below = lax.fori_loop(0, block.bit_length() - 1, halve, (none,) * len(points))
        start = below, tuple(map(at, below)), worst
        return lax.fori_loop(0, n_candidates, try_one, start)[2]

    def count_each() -> Any:
        def try_one(i: Array, best: Any) -> Any:
            shift, reciprocal = candidate(i)

            def add(place: Array, below: tuple[Array, ...]) -> tuple[Array, ...]:
                x = (plt.load(sorted_ref.at[place]) - shift) * reciprocal
                real = place < count
                return tuple(
                    b + (real & ~(x > point)).astype(jnp.int32)
                    for b, point in zip(below, points, strict=True)
                )

            below = lax.fori_loop(0, block, add, (none,) * len(points))
            return better(best, shift, below)

        return lax.fori_loop(0, n_candidates, try_one, worst)

    worst = jnp.zeros_like(spread), jnp.full_like(lane, np.iinfo(np.int32).max)
    # From one candidate to the next a weight's place among the points, all of them within +-0.87,
    # falls by 0.13 * step or more; that must exceed what 10 roundings displace it by.
    rough = (spread < 2.0**-100) | (spread > 2.0**120)
    rough |= jnp.abs(median) * 2.0**-20 > step * spread
    if step < 1e-5:
        shift, weight = count_each()
    else:
        any_rough = (rough & (spread > 0)).astype(jnp.int32).max() > 0
        shift, weight = lax.cond(any_rough, count_each, walk)
    shift_ref[...] = jnp.clip(shift, -FLOAT_MAX, FLOAT_MAX)
    weight_ref[...] = weight


def _neighbors(none: Array, below: tuple[Array, ...], count: Array) -> Any:
    return itertools.pairwise((none, *below, count))


def _key(x: Float32[Array, " lanes"]) -> Array:
    """Integers that compare as the floats do, -0 before 0."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _value(key: Int[Array, " lanes"]) -> Array:
    return lax.bitcast_convert_type(key ^ ((key >> 31) & 0x7FFFFFFF), jnp.float32)


def _sort(read: Callable[[Any], Array], sorted_ref: Any, block: int, chunk: int, barrier: Callable[[], None]) -> None:
    """Sorts every column: read(place) for place = 0 .. block - 1 into the rows of `sorted_ref`.

    Chunks are sorted by Batcher's odd-even merge sort. Pairs of sorted runs are merged by a bitonic
    network, whose steps within a chunk are made in registers.
    """
    n_chunks = block // chunk
    rows = range(chunk)

    def load(first: Array) -> list[Array]:
        return [_key(plt.load(sorted_ref.at[first * chunk + row])) for row in rows]

    def store(first: Array, keys: list[Array]) -> None:
        for row in rows:
            plt.store(sorted_ref.at[first * chunk + row], _value(keys[row]))

    def each(n: Any, work: Callable[[Array], None]) -> None:
        lax.fori_loop(0, n, lambda i, carry: (work(i), carry)[1], 0)
        barrier()

    def sort_one(i: Array) -> None:
        store(i, _exchange([_key(read(i * chunk + row)) for row in rows], _odd_even_pairs(chunk)))

    def exchange(one: Array, other: Array, mirrored: bool) -> None:
        a, b = load(one), load(other)
        b = b[::-1] if mirrored else b
        larger = [jnp.maximum(x, y) for x, y in zip(a, b, strict=True)]
        store(one, [jnp.minimum(x, y) for x, y in zip(a, b, strict=True)])
        store(other, larger[::-1] if mirrored else larger)

    def finish(i: Array) -> None:
        store(i, _exchange(load(i), _bitonic_pairs(chunk)))

    def merge(level: Array) -> None:  # runs of 2**level chunks
        def mirror(i: Array) -> None:
            one = i + ((i >> level) << level)
            exchange(one, one ^ ((2 << level) - 1), True)

        def halve(j: Array) -> None:
            distance = level - 1 - j
            each(
                n_chunks // 2,
                lambda i: exchange(
                    i + ((i >> distance) << distance),
                    i + ((i >> distance) << distance) + (1 << distance),
                    False,
                ),
            )

        each(n_chunks // 2, mirror)
        each(level, halve)
        each(n_chunks, finish)

    each(n_chunks, sort_one)
    if n_chunks > 1:
        each(n_chunks.bit_length() - 1, merge)


def _exchange(keys: list[Array], pairs: list[tuple[int, int]]) -> list[Array]:
    """The smaller of each pair comes to stand in its first place."""
    keys = list(keys)
    for i, j in pairs:
        keys[i], keys[j] = jnp.minimum(keys[i], keys[j]), jnp.maximum(keys[i], keys[j])
    return keys


def _odd_even_pairs(n: int) -> list[tuple[int, int]]:
    """Batcher's network, which sorts n = 2**k numbers."""
    if n == 1:
        return []
    half = _odd_even_pairs(n // 2)
    return half + [(i + n // 2, j + n // 2) for i, j in half] + _odd_even_merge(0, n, 1)


def _odd_even_merge(start: int, n: int, stride: int) -> list[tuple[int, int]]:
    """Merges the sorted halves of places start, start + stride, .. below start + n."""
    if 2 * stride >= n:
        return [(start, start + stride)]
    even = _odd_even_merge(start, n, 2 * stride)
    odd = _odd_even_merge(start + stride, n, 2 * stride)
    ends = range(start + stride, start + n - stride, 2 * stride)
    return even + odd + [(i, i + stride) for i in ends]


def _bitonic_pairs(n: int) -> list[tuple[int, int]]:
    """Sorts n = 2**k numbers that rise and then fall, or fall and then rise."""
    distances = [n >> k for k in range(1, n.bit_length())]
    return [(i, i + d) for d in distances for i in range(n) if not i & d]
