"""The ICQ search for NormalFloat and FP4 as one GPU kernel (Pallas, Triton backend).

`search_shift` finds exactly the floats that `quant/calibrations/icq.py` finds. JAX deprecates this
backend of Pallas from 0.11 on; a kernel for its successor, Mosaic, would be a second file.

Each thread searches one block. It sorts the weights into its own column of a scratch buffer, which
the first-level cache holds. For one candidate, the weights that do not exceed a decision point are
the start of that column. So one pointer for each point counts them: it points to the first weight
that exceeds the point. All counts are differences of pointers, and the entropy is a sum over a
table of integers. As the shift grows, a weight that does not exceed a point never exceeds it again,
so pointers only rise. A candidate takes one or a few passes over the pointers: a pass compares the
weight at each pointer with the pointer's point, by the operations of the quantizer, and moves the
pointer on if the weight does not exceed the point. In a block of 64 normal weights, the pointers
move 66 times over the 201 candidates of nf4; counting would take 193,000 comparisons.

Rounding could break that order if candidates differ by little more than a rounding error, or if
magnitudes are near the ends of float32. Then the kernel counts the weights for each candidate.

Cost, from the instructions compiled for an H200 (tests/cuda/test_search_cuda.py): for 32 blocks of
64, 201 candidates take 84 instructions and 2.3 passes of 157 each, and sorting takes 6,700. That is
47 warp instructions for each weight, or 0.34 s for LLaMA-7B at the issue rate. An H100 took
0.62 s (kernels/README.md).
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

from irqlora_jax.kernels import triton_backend
from irqlora_jax.quant.calibrations.icq import SIGMA
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

    from irqlora_jax.kernels.search_triton_sort import sort_columns
except ImportError:  # a later jax without this backend; `refusal` says so
    plt = None

_BLOCKS = (16, 32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut. It changes no result.

    Attributes:
        blocks: blocks of a program, a power of two; with 32 for each warp, one for each thread.
        warps: warps of a program. Several need barriers to agree on another pass, one does not.
        chunk: weights that a thread sorts in registers at a time, a power of two up to the block.
    """

    blocks: int = 32
    warps: int = 1
    chunk: int = 8


def default_tiles() -> Tiles:
    """Tiles that keep a thread within 64 registers: then each core of a GPU holds 32 programs."""
    return Tiles()


def refusal(
    blocks: Array | jax.ShapeDtypeStruct, format: Format | str, device: Any = None
) -> str | None:
    """Why the kernel cannot serve; None if it can.

    Args:
        blocks: weights, [n, block].
        format: code book.
        device: a jax device; None: the first one.
    """
    format = get_format(format) if isinstance(format, str) else format
    return triton_backend.refusal(device) or _unserved(blocks, format)


def _unserved(blocks: Array | jax.ShapeDtypeStruct, format: Format) -> str | None:
    if format.integer:
        return f"it takes NormalFloat and FP4 formats, not {format.name}"
    return unserved_blocks(blocks)


def unserved_blocks(blocks: Array | jax.ShapeDtypeStruct) -> str | None:
    """Why the search kernels do not take blocks [n, block], or None."""
    if blocks.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"it takes float32, bfloat16 and float16, not {blocks.dtype}"
    n, block = blocks.shape
    if block not in _BLOCKS:
        return f"it takes blocks of {', '.join(map(str, _BLOCKS))} weights, not {block}"
    if (n + 1024) * (block + 1) >= 2**31:  # offsets are 32-bit integers
        return f"it takes fewer than 2**31 weights, not {n * block}"
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
) -> tuple[Float32[Array, " n"], Float32[Array, " n"], Float32[Array, " n"], Float32[Array, " n"]]:
    """`icq.shift_and_ends`: shift, entropy of the codes, least and largest weight of every block.

    While it runs, it needs a buffer of 4 bytes for each weight.

    Args:
        blocks: finite weights in blocks of 16, 32, 64, 128 or 256.
        format: code book, not an integer one.
        search_range: lambda of the paper, below 1.
        steps: n of the paper; there are 2 * steps + 1 candidates.
        valid: number of real elements in each block (at least 1); None: all.
        tiles: how the work is cut; None: `default_tiles`.
        interpret: whether XLA interprets the kernel, on any device.

    Raises:
        ValueError: the kernel does not take the blocks or the format; the search range is not in
            (0, 1).
    """
    format = get_format(format) if isinstance(format, str) else format
    if (reason := _unserved(blocks, format)) is not None:
        raise ValueError(f"search_triton: {reason}")
    require_range(search_range)
    factors = spaced(-search_range * SIGMA, search_range * SIGMA, 2 * steps + 1)
    n, block = blocks.shape
    if n == 0:
        empty = jnp.zeros(0, jnp.float32)
        return empty, empty, empty, empty
    count = jnp.full(n, block, jnp.int32) if valid is None else valid.astype(jnp.int32)
    numbers = jnp.arange(block + 1, dtype=jnp.int32)
    table = histogram_weight(numbers[None], numbers, block)  # for histograms with a single count
    inputs = [blocks, jnp.asarray(factors), table] + ([] if valid is None else [count])
    if not interpret:
        triton_backend.announce()
    tiles = default_tiles() if tiles is None else tiles
    programs = -(-n // tiles.blocks)
    kernel = functools.partial(
        _kernel,
        tuple(format.midpoints.tolist()),
        float(factors[-1] - factors[0]) / (len(factors) - 1),
        tiles,
        # The interpreter has no barrier and needs none.
        (lambda: None) if interpret else plt.debug_barrier,
    )
    row = pl.BlockSpec((tiles.blocks,), lambda i: (i,))
    column = pl.BlockSpec((None, block + 1, tiles.blocks), lambda i: (i, 0, 0))
    each = [
        jax.ShapeDtypeStruct((programs * tiles.blocks,), dtype)
        for dtype in (jnp.float32, jnp.int32, jnp.float32, jnp.float32)
    ]
    shift, weight, low, high, _ = pl.pallas_call(
        kernel,
        grid=(programs,),
        in_specs=[whole(x.shape) for x in inputs],
        out_specs=[row] * len(each) + [column],
        out_shape=[
            *each,
            jax.ShapeDtypeStruct((programs, block + 1, tiles.blocks), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=1),
        interpret=interpret,
        name="search_shift",
    )(*inputs)
    # XLA turns the sums into bits, as in its own search.
    return shift[:n], bits_of(weight[:n], count, block), low[:n], high[:n]


def whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    """Gives every program the whole array."""
    return pl.BlockSpec(shape, lambda i: (0,) * len(shape))


Counts = tuple[Array, ...]  # for each point, how many weights do not exceed it
Found = tuple[Array, Array]  # the best shift so far, and its sum over the table


def _kernel(
    points: tuple[float, ...],
    step: float,
    tiles: Tiles,
    barrier: Callable[[], None],
    blocks_ref: Any,
    factors_ref: Any,
    table_ref: Any,
    *refs: Any,
) -> None:
    """One program. `sorted_ref`, [block + 1, tiles.blocks], is its part of the scratch buffer.

    The compiler must not fuse a product and a sum into one rounding. `product` prevents that where
    a sum follows; elsewhere products are only compared.
    """
    *valid_ref, shift_ref, weight_ref, low_ref, high_ref, sorted_ref = refs
    n_blocks, block = blocks_ref.shape
    lane = lax.iota(jnp.int32, tiles.blocks)
    mine = pl.program_id(0) * tiles.blocks + lane
    mine = jnp.minimum(mine, n_blocks - 1)  # the last program repeats the last block
    none, count = jnp.zeros_like(lane), jnp.full_like(lane, block)
    if valid_ref:
        count = jnp.clip(plt.load(valid_ref[0].at[mine]), 1, block)

    def read(place: Array) -> Array:
        w = plt.load(blocks_ref.at[mine, jnp.full_like(lane, place)]).astype(jnp.float32)
        return jnp.where(place < count, w, np.inf) if valid_ref else w

    def at(place: Array, **masked: Array) -> Array:
        return plt.load(sorted_ref.at[place, lane], **masked)

    sort_columns(read, sorted_ref, block, min(tiles.chunk, block), barrier)
    end = jnp.full_like(lane, block)
    plt.store(sorted_ref.at[end, lane], jnp.full(lane.shape, np.inf, jnp.float32))
    barrier()
    median, low, high = at((count + 1) // 2 - 1), at(none), at(count - 1)
    spread = jnp.minimum(jnp.maximum(high - median, median - low), FLOAT_MAX)

    def candidate(i: Array | int) -> tuple[Array, Array]:
        """The shift of candidate i, and the reciprocal of its scale."""
        shift = product(jnp.full_like(spread, factors_ref[i]), spread) + median
        scale = jnp.maximum(jnp.abs(high - shift), jnp.abs(low - shift))
        return shift, 1 / jnp.where(scale == 0, 1, scale)

    def better(found: Found, shift: Array, below: Counts) -> Found:
        weight = none
        for smaller, larger in itertools.pairwise((none, *below, count)):
            weight += plt.load(table_ref.at[larger - smaller])
        wins = weight < found[1]  # the first of the best
        return jnp.where(wins, shift, found[0]), jnp.where(wins, weight, found[1])

    def walk() -> Found:
        first, reciprocal = candidate(0)

        def halve(i: Array, below: Counts) -> Counts:
            half = block >> (i + 1)
            return tuple(
                jnp.where((at(p + half - 1) - first) * reciprocal > point, p, p + half)
                for p, point in zip(below, points, strict=True)
            )

        def try_one(i: Array, carry: tuple[Counts, Counts, Found]) -> tuple[Counts, Counts, Found]:
            below, shown, found = carry
            shift, reciprocal = candidate(i)

            def move(carry: tuple[Array, Counts, Counts]) -> tuple[Array, Counts, Counts]:
                left, below, shown = carry
                stays = [(w - shift) * reciprocal > x for w, x in zip(shown, points, strict=True)]
                below = tuple(
                    jnp.where(stay, p, p + 1) for stay, p in zip(stays, below, strict=True)
                )
                shown = tuple(
                    at(p, mask=~stay, other=w)
                    for p, stay, w in zip(below, stays, shown, strict=True)
                )
                moved = ~functools.reduce(jnp.logical_and, stays)
                # Counts the passes left, because the compiler crashes on a loop in which only the
                # condition reads a value.
                return jnp.where(moved.astype(jnp.int32).max() > 0, left - 1, 0), below, shown

            passes = jnp.int32(block + 1)  # at most
            _, below, shown = lax.while_loop(lambda c: c[0] > 0, move, (passes, below, shown))
            return below, shown, better(found, shift, below)

        below = lax.fori_loop(0, block.bit_length() - 1, halve, (none,) * len(points))
        shown = tuple(at(p) for p in below)
        return lax.fori_loop(0, factors_ref.shape[0], try_one, (below, shown, worst))[2]

    def count_each() -> Found:
        def try_one(i: Array, found: Found) -> Found:
            shift, reciprocal = candidate(i)

            def add(place: Array, below: Counts) -> Counts:
                x = (plt.load(sorted_ref.at[place]) - shift) * reciprocal
                more = (place < count).astype(jnp.int32)
                return tuple(
                    jnp.where(x > point, p, p + more)
                    for p, point in zip(below, points, strict=True)
                )

            return better(found, shift, lax.fori_loop(0, block, add, (none,) * len(points)))

        return lax.fori_loop(0, factors_ref.shape[0], try_one, worst)

    worst = jnp.zeros_like(spread), jnp.full_like(lane, np.iinfo(np.int32).max)
    # Neighboring shifts are equal, or differ by at least half a step. Then a weight falls by
    # 0.06 * step in units of the scale (points are within +-0.87), far more than its rounding error
    # of 4e-7. This holds unless the scale or its reciprocal overflows. NaN counts as rough.
    width = high - low
    rough = ~(width <= 2.0**120) | (width < 2.0**-100) & (width != 0)
    if step < 1e-4:
        found = count_each()
    else:
        found = lax.cond(rough.astype(jnp.int32).max() > 0, count_each, walk)
    shift_ref[...] = jnp.clip(found[0], -FLOAT_MAX, FLOAT_MAX)
    weight_ref[...] = found[1]
    low_ref[...], high_ref[...] = low, high
