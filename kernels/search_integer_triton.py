"""The ICQ searches for integer formats as one GPU kernel (Pallas, Triton backend).

`search` finds exactly the floats that `search_range` and `search_zero_point` of
`quant/calibrations/icq_integer.py` find. `search_triton.py` is the kernel for the other formats.

Each thread searches one block. It copies the weights once into a column of a scratch buffer, so
that neighboring threads read neighboring addresses. For each candidate it goes over them once, by
the operations of the quantizer. It counts the codes of 8 weights in 4-bit fields of an integer (a
second integer counts codes above 7), and adds these to fields of 8 or 16 bits. The entropy is a sum
over a table of integers. The results are the index of the best candidate and the ends of the block;
XLA makes scale and zero point from them, as in its own search. The sorted pointers of
`search_triton.py` would save little here: a code needs no comparisons, and there are half as many
candidates.

Cost, from the instructions compiled for an H200 (tests/cuda/test_search_cuda.py): for 32 blocks of
32 in int4, 101 candidates take 111 instructions each, and 142 for every 8 weights. That is 67
warp instructions for each weight, or 0.49 s for LLaMA-7B at the issue rate; int3 takes 0.39 s, int2
0.38 s. An H100 took 0.60, 0.49 and 0.46 s (kernels/README.md).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32, Int, Int32

from irqlora_jax.kernels import triton_backend
from irqlora_jax.kernels.search_triton import unserved_blocks, whole
from irqlora_jax.quant.calibrations.icq_integer import Candidates, limits
from irqlora_jax.quant.entropy import FLOAT_MAX, bits_of, histogram_weight

try:
    from jax.experimental.pallas import triton as plt
except ImportError:  # a later jax without this backend; `refusal` says so
    plt = None

_CHUNK = 8  # weights that are counted in fields of 4 bits
_MAGIC = np.float32(1.5 * 2**23)  # floats near it are whole numbers; the next one has bits + 1


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut. It changes no result.

    Attributes:
        blocks: blocks of a program, a power of two; with 32 for each warp, one for each thread.
        warps: warps of a program.
    """

    blocks: int = 32
    warps: int = 1


def refusal(blocks: Array | jax.ShapeDtypeStruct, bits: int, device: Any = None) -> str | None:
    """Why the kernel cannot serve; None if it can.

    Args:
        blocks: weights, [n, block].
        bits: width of a code.
        device: a jax device; None: the first one.
    """
    return triton_backend.refusal(device) or _unserved(blocks, bits)


def _unserved(blocks: Array | jax.ShapeDtypeStruct, bits: int) -> str | None:
    if bits not in (2, 3, 4):
        return f"it takes integers of 2, 3 and 4 bits, not {bits}"
    return unserved_blocks(blocks)


def search(
    blocks: Float[Array, "n block"],
    candidates: Candidates,
    valid: Int[Array, " n"] | None = None,
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[Float32[Array, " n"], Float32[Array, " n"], Float32[Array, " n"]]:
    """Scale, zero point and entropy of every block's first best candidate.

    While it runs, it needs a buffer of 4 bytes for each weight.

    Args:
        blocks: finite weights in blocks of 16, 32, 64, 128 or 256.
        candidates: `icq_integer.range_candidates` or `zero_point_candidates`.
        valid: number of real elements in each block (at least 1); None: all.
        tiles: how the work is cut; None: `Tiles()`.
        interpret: whether XLA interprets the kernel, on any device.

    Raises:
        ValueError: the kernel does not take the blocks or the bits.
    """
    if (reason := _unserved(blocks, candidates.bits)) is not None:
        raise ValueError(f"search_integer_triton: {reason}")
    n, block = blocks.shape
    if n == 0:
        empty = jnp.zeros(0, jnp.float32)
        return empty, empty, empty
    count = jnp.full(n, block, jnp.int32) if valid is None else valid.astype(jnp.int32)
    sizes = jnp.arange(block + 1, dtype=jnp.int32)
    table = histogram_weight(sizes[None], sizes, block)  # for histograms with a single count
    numbers = jnp.asarray(candidates.numbers)
    inputs = [blocks, numbers, table] + ([] if valid is None else [count])
    if not interpret:
        triton_backend.announce()
    tiles = Tiles() if tiles is None else tiles
    programs = -(-n // tiles.blocks)
    # The interpreter has no barrier and needs none.
    barrier = (lambda: None) if interpret else plt.debug_barrier
    row = pl.BlockSpec((tiles.blocks,), lambda i: (i,))
    column = pl.BlockSpec((None, block, tiles.blocks), lambda i: (i, 0, 0))
    each = [
        jax.ShapeDtypeStruct((programs * tiles.blocks,), dtype)
        for dtype in (jnp.int32, jnp.int32, jnp.float32, jnp.float32)
    ]
    index, weight, low, high, _ = pl.pallas_call(
        functools.partial(_kernel, candidates, tiles, barrier),
        grid=(programs,),
        in_specs=[whole(x.shape) for x in inputs],
        out_specs=[row] * len(each) + [column],
        out_shape=[
            *each,
            jax.ShapeDtypeStruct((programs, block, tiles.blocks), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=1),
        interpret=interpret,
        name="search_integer",
    )(*inputs)
    ends = limits(low[:n], high[:n], candidates.symmetric)
    scale, zero = candidates.at(*ends, numbers[index[:n]])
    return scale, zero, bits_of(weight[:n], count, block)


def _kernel(
    candidates: Candidates,
    tiles: Tiles,
    barrier: Callable[[], None],
    blocks_ref: Any,
    numbers_ref: Any,
    table_ref: Any,
    *refs: Any,
) -> None:
    """One program. `column_ref`, [block, tiles.blocks], is its part of the scratch buffer."""
    *valid_ref, index_ref, weight_ref, low_ref, high_ref, column_ref = refs
    n_blocks, block = blocks_ref.shape
    top = 2**candidates.bits - 1
    lane = lax.iota(jnp.int32, tiles.blocks)
    mine = pl.program_id(0) * tiles.blocks + lane
    mine = jnp.minimum(mine, n_blocks - 1)  # the last program repeats the last block
    none, count = jnp.zeros_like(lane), jnp.full_like(lane, block)
    if valid_ref:
        count = jnp.clip(plt.load(valid_ref[0].at[mine]), 1, block)

    def copy(i: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        for place in (i * _CHUNK + row for row in range(_CHUNK)):
            w = plt.load(blocks_ref.at[mine, jnp.full_like(lane, place)]).astype(jnp.float32)
            inside = jnp.where(place < count, w, 0) if valid_ref else w
            low, high = jnp.minimum(low, inside), jnp.maximum(high, inside)
            # Padding takes code 0.
            plt.store(column_ref.at[place], jnp.where(place < count, w, -np.inf))
        return low, high

    zeros = jnp.zeros(lane.shape, jnp.float32)
    low, high = lax.fori_loop(0, block // _CHUNK, copy, (zeros, zeros))
    barrier()
    ends = limits(low, high, candidates.symmetric)
    alone = plt.load(table_ref.at[count])

    def try_one(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        scale, zero = candidates.at(*ends, numbers_ref[i], _rounded)
        base = jnp.floor(zero)
        fraction = zero - base
        offset = base.astype(jnp.int32)

        def code(place: Array) -> Array:
            # `entropy.quotient` is not needed: Triton does not turn the division into a product.
            x = plt.load(column_ref.at[place]) / scale + fraction
            return _whole_number(jnp.clip(x, -base, top - base)) + offset

        counts = _histogram(code, block, candidates.bits, none)
        weight = plt.load(table_ref.at[jnp.maximum(counts[0] - (block - count), 0)])
        for number in counts[1:]:
            weight += plt.load(table_ref.at[number])
        # If the range overflows, all weights have the same code, whatever the quotients are.
        weight = jnp.where(scale <= FLOAT_MAX, weight, alone)
        wins = weight < found[1]  # the first of the best
        return jnp.where(wins, i, found[0]), jnp.where(wins, weight, found[1])

    worst = none, jnp.full_like(lane, np.iinfo(np.int32).max)
    index_ref[...], weight_ref[...] = lax.fori_loop(0, numbers_ref.shape[0], try_one, worst)
    low_ref[...], high_ref[...] = low, high


def _rounded(x: Float32[Array, " blocks"]) -> Float32[Array, " blocks"]:
    """jnp.round for |x| < 2**22, except for the sign of 0."""
    return _whole_number(x).astype(jnp.float32)


def _whole_number(x: Float32[Array, " blocks"]) -> Int32[Array, " blocks"]:
    """Rounds |x| < 2**22 half to even. Subtracts as integers: XLA could cancel a float sum."""
    bits = lax.bitcast_convert_type(x + _MAGIC, jnp.int32)
    return bits - _MAGIC.view(np.int32)


def _histogram(code: Callable[[Array], Array], block: int, bits: int, none: Array) -> list[Array]:
    """How many weights of every block have each code; `code` maps a place to a code."""
    width = 8 if block < 256 else 16
    parts = range(width // 4)
    mask = sum(15 << width * i for i in range(32 // width))
    n_words = 2 if bits == 4 else 1  # one for codes 0 .. 7, one for codes 8 .. 15

    def add(i: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        every = above = none
        for place in (i * _CHUNK + row for row in range(_CHUNK)):
            found = code(place)
            spot = jnp.left_shift(1, 4 * (found & 7))
            every += spot
            if bits == 4:
                above += jnp.where(found > 7, spot, 0)
        words = (every - above, above)[:n_words]
        fields = [(word >> 4 * part) & mask for word in words for part in parts]
        return tuple(total + field for total, field in zip(totals, fields, strict=True))

    totals = lax.fori_loop(0, block // _CHUNK, add, (none,) * (n_words * len(parts)))
    counts = []
    for level in range(2**bits):
        word, field = divmod(level, 8)
        place, part = divmod(field, len(parts))
        counts.append((totals[word * len(parts) + part] >> width * place) & (2**width - 1))
    return counts
