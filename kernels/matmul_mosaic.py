"""x @ W^T on Hopper GPUs, with W in 2, 3 or 4 bits until it is in registers (Mosaic GPU).

The kernel computes W x^T: then W is the operand of the tensor cores (wgmma) that may come from
registers, so that a dequantized weight exists nowhere else, and x, in shared memory, is the one
whose size may be as small as 8. In the layout "fragments" a thread loads just the codes of its part
of the operand; they become levels by byte permutes (`byte_table.py`), and weights by one
multiply-add for two of them.

A warp group copies (TMA) what the others, 64 rows of W each, multiply. The blocks of the grid stay
on their multiprocessors and take one tile after the other, in an order that keeps what the second
level cache holds in use; the copies for the next tile start while the last one is still computed.
Few rows of x leave too few tiles for all multiprocessors. Then several blocks share a tile, each a
part of the inputs, and XLA adds their float32 sums in fixed order.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt32

from irqlora_jax.devices import compute_capability
from irqlora_jax.kernels import measured, mosaic_fragments, mosaic_tiles
from irqlora_jax.quant import packing
from irqlora_jax.quant.formats import get_format
from irqlora_jax.quant.matmul import XLA, Implementation, was_faster
from irqlora_jax.quant.qtensor import QTensor

Tiles, default_tiles = mosaic_tiles.Tiles, mosaic_tiles.default_tiles
BLOCK, CHUNK, ROWS = mosaic_tiles.BLOCK, mosaic_tiles.CHUNK, mosaic_tiles.ROWS


def refusal(x: Array, weight: QTensor, device: Any = None) -> str | None:
    """Why the kernel cannot serve x and W on a device (by default jax's first); None if it can."""
    device = jax.devices()[0] if device is None else device
    capability = compute_capability(device)
    if capability != (9, 0):
        return f"it needs compute capability 9.0, {device.device_kind} has {_dotted(capability)}"
    mesh = jax.sharding.get_abstract_mesh()
    sizes = [size for name, size in mesh.shape.items() if name not in mesh.manual_axes]
    if math.prod(sizes) > 1:  # within shard_map all axes are manual
        return f"it runs on one device, the mesh has {math.prod(sizes)}"
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes x in bfloat16 or float16, this one is {x.dtype}"
    if weight.block_size != BLOCK:
        return f"it takes blocks of {BLOCK}, this weight has block_size = {weight.block_size}"
    if weight.layout != packing.FRAGMENTS:
        return (
            f"it takes layout 'fragments', not {weight.layout!r}: weight.with_layout('fragments')"
        )
    bits = get_format(weight.format).bits
    unit = 2 * BLOCK if bits == 3 else BLOCK
    if weight.shape[1] % unit:
        return f"it takes inputs in multiples of {unit}, this weight has {weight.shape[1]}"
    if weight.packed.ndim != 3:
        return f"it takes one weight, this one has leading axes {weight.packed.shape[:-3]}"
    return _missing()


def matmul(
    x: Float[Array, "*batch in"], weight: QTensor, tiles: Tiles | None = None
) -> Float[Array, "*batch out"]:
    """x @ weight^T in the type of x, bfloat16 or float16; sums are float32.

    The levels, and the scale and the shift of a block, are rounded to the type of x before they are
    multiplied and added, which rounds once.

    Args:
        x: activations.
        weight: in the layout "fragments", in blocks of 64.
        tiles: how to cut the work; by default as was measured to be the fastest here
            (`measured.py`), or `default_tiles`.
    """
    rows = x.reshape(-1, x.shape[-1])
    (m, k), n = rows.shape, weight.shape[0]
    fmt = get_format(weight.format)
    if m == 0:
        return jnp.zeros((*x.shape[:-1], n), x.dtype)
    if tiles is None:
        kind = jax.devices()[0].device_kind
        tuned = measured.tuned_tiles("matmul", "mosaic", kind, fmt.name, weight.shape, m)
        tiles = dataclasses.replace(default_tiles(m, n, k, fmt.bits), **tuned)
    dtype = jnp.dtype(x.dtype).name
    rows = jnp.pad(rows, ((0, -m % 8), (0, 0)))  # the copies are made of groups of 8 rows
    product = _product(rows.shape[0], n, k, fmt.bits, fmt.levels, dtype, tiles)
    codes = weight.packed.reshape(n, -1)
    found = product(codes, affine(weight, x.dtype), rows)
    if tiles.splits > 1:
        # One after the other, not as a reduction whose order is the compiler's.
        found = functools.reduce(jnp.add, list(found)).T.astype(x.dtype)
    return found[:m, :n].reshape(*x.shape[:-1], n)


def affine(weight: QTensor, dtype: DTypeLike) -> UInt32[Array, "blocks padded"]:
    """Scale (low half) and shift (high half) of every block, a column for each row of W.

    Columns are padded to a multiple of 4: TMA wants lines of a multiple of 16 bytes.
    """
    scale, shift = weight.scale(), weight.shift()
    low = lax.bitcast_convert_type(scale.astype(dtype), jnp.uint16).astype(jnp.uint32)
    both = low
    if shift is not None:
        high = lax.bitcast_convert_type(shift.astype(dtype), jnp.uint16).astype(jnp.uint32)
        both = low | (high << 16)
    return jnp.pad(both.T, ((0, 0), (0, -both.shape[0] % 4)))


def _product(
    m: int,
    n: int,
    k: int,
    bits: int,
    levels: tuple[float, ...],
    dtype: str,
    tiles: Tiles,
) -> Callable[[Array, Array, Array], Array]:
    """The kernel, of codes [n, bytes], `affine` and x [m, k].

    It makes x W^T, [m, n padded to 64], or with several splits their float32 sums, transposed:
    [splits, n padded to 64, m padded to whole tiles].

    Args:
        m: rows of x, a multiple of 8.
        n: outputs.
        k: inputs.
        bits: of a code.
        levels: of the format.
        dtype: of x.
        tiles: how to cut the work.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    groups, batch, stages = tiles.warp_groups, tiles.batch, tiles.stages
    line = packing.packed_size(BLOCK, bits)
    grid = (-(-n // tiles.rows), -(-m // batch))
    steps = -(-k // (BLOCK * tiles.blocks * tiles.splits))
    chunk = min(batch, CHUNK)
    partial = tiles.splits > 1
    n_padded = n + -n % ROWS
    if partial:
        shape, kind = (tiles.splits, n_padded, grid[1] * batch), jnp.dtype(jnp.float32)
        out_block = (groups, ROWS, chunk)
    else:
        shape, kind = (m, n_padded), jnp.dtype(dtype)
        out_block = (groups, chunk, ROWS)
    fragment = mosaic_fragments.permuted(levels, bits, dtype)

    def body(codes, scales, x, out, codes_s, scales_s, x_s, out_s, full, empty):
        group = lax.axis_index("group")
        first = lax.axis_index("block")
        total = grid[0] * grid[1] * tiles.splits
        rounds = (total - first + tiles.grid - 1) // tiles.grid

        def origin(turn):
            """Of tile and part: row of W, row of x, first step."""
            index = first + turn * tiles.grid
            split, index = index % tiles.splits, index // tiles.splits
            row, column = plgpu.planar_snake(index, grid, 0, tiles.band)
            return row * tiles.rows, column * batch, split * steps, split

        def copy():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, rounds)
            def _(turn):
                row, column, start, _ = origin(turn)

                @pl.loop(0, steps)
                def _(step):
                    count = turn * steps + step
                    slot = lax.rem(count, stages)

                    @pl.when(count >= stages)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    block = (start + step) * tiles.blocks
                    rows = pl.ds(row, tiles.rows)
                    bytes_ = pl.ds(block * line, tiles.blocks * line)
                    inputs = pl.ds(block * BLOCK, tiles.blocks * BLOCK)
                    arrived = full.at[slot]
                    plgpu.copy_gmem_to_smem(codes.at[rows, bytes_], codes_s.at[slot], arrived)
                    plgpu.copy_gmem_to_smem(
                        scales.at[pl.ds(block, tiles.blocks), rows], scales_s.at[slot], arrived
                    )
                    plgpu.copy_gmem_to_smem(
                        x.at[pl.ds(column, batch), inputs], x_s.at[slot], arrived
                    )

        def multiply():
            free = (512 - 40) // groups // 8 * 8
            plgpu.set_max_registers(min(free, 256), action="increase")
            mine = pl.ds(group * ROWS, ROWS)

            @pl.loop(0, rounds)
            def _(turn):
                row, column, _, split = origin(turn)

                def products(sums, begin, number):
                    """Of some steps. The weights of a block are made while the product before it
                    is computed. All are done at the end: the registers of one that is not may be
                    given to others by the assembler when the loop starts again."""
                    for index in range(number):
                        slot = lax.rem(begin + index, stages)
                        plgpu.barrier_wait(full.at[slot])
                        for block in range(tiles.blocks):
                            piece = codes_s.at[slot, mine, pl.ds(block * line, line)]
                            weights = fragment(piece, scales_s.at[slot, block, mine])
                            inputs = x_s.at[slot, :, pl.ds(block * BLOCK, BLOCK)]
                            plgpu.wgmma(sums, weights, inputs.T)
                            plgpu.wgmma_wait(1)
                            if index and not block:
                                plgpu.barrier_arrive(empty.at[lax.rem(begin + index - 1, stages)])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[lax.rem(begin + number - 1, stages)])

                def accumulate(sums):
                    begin, together = turn * steps, min(tiles.together, steps)

                    @pl.loop(0, steps // together)
                    def _(several):
                        products(sums, begin + several * together, together)

                    if left := steps % together:
                        products(sums, begin + steps - left, left)
                    return sums[...]

                sums = pl.run_scoped(accumulate, plgpu.ACC((ROWS, batch), jnp.float32))
                rows = pl.ds(row + group * ROWS, ROWS)
                for begin in range(0, batch, chunk):
                    piece = sums[:, begin : begin + chunk].astype(kind)
                    columns = pl.ds(column + begin, chunk)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    if partial:
                        out_s[group] = piece
                        there = out.at[split, rows, columns]
                    else:
                        piece = plgpu.layout_cast(piece, plgpu.Layout.WGMMA_TRANSPOSED)
                        out_s.at[group].T[...] = piece
                        there = out.at[columns, rows]
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(out_s.at[group], there)

            plgpu.wait_smem_to_gmem(0)

        lax.cond(group == groups, copy, multiply)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, kind),
        grid=(tiles.grid,),
        grid_names=("block",),
        num_threads=groups + 1,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((stages, tiles.rows, tiles.blocks * line), jnp.uint8),
            plgpu.SMEM((stages, tiles.blocks, tiles.rows), jnp.uint32),
            plgpu.SMEM(
                (stages, batch, tiles.blocks * BLOCK), dtype, transforms=_swizzled(BLOCK, 16)
            ),
            plgpu.SMEM(
                out_block, kind, transforms=_swizzled(out_block[-1], jnp.dtype(kind).itemsize * 8)
            ),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="dequant_matmul",
    )


def _swizzled(columns: int, bits: int) -> tuple[Any, ...]:
    """Tiles of 8 rows, in which the banks of shared memory take turns."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    swizzle = plgpu.find_swizzle(columns * bits, "tile")
    return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)


@functools.cache
def _missing() -> str | None:
    """What the installed jax lacks."""
    try:
        from jax.experimental.mosaic import gpu as mgpu
        from jax.experimental.pallas import mosaic_gpu as plgpu
    except ImportError as error:
        return f"it needs jax.experimental.pallas.mosaic_gpu: {error}"
    names = ("kernel", "inline_mgpu", "load", "planar_snake", "LoweringSemantics")
    missing = [name for name in names if not hasattr(plgpu, name)]
    if not hasattr(mgpu, "WGMMA_LAYOUT_UPCAST_4X"):
        missing.append("WGMMA_LAYOUT_UPCAST_4X")
    return f"jax {jax.__version__} has no {', '.join(missing)} in Mosaic GPU" if missing else None


def _dotted(capability: tuple[int, int] | None) -> str:
    return "none" if capability is None else ".".join(map(str, capability))


MOSAIC = Implementation("mosaic", refusal, matmul, XLA.backward, was_faster("mosaic"))
