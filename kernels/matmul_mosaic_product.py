"""The kernel behind `matmul_mosaic.py`: the loops of both products with a packed W on Hopper GPUs.

One warp group copies (TMA) the operands that the others multiply. The blocks of the grid stay on
their multiprocessors and take one tile after the other, in an order that reuses the contents of the
second-level cache. The copies for the next tile start while the last one is still computed. Few
rows give too few tiles for all multiprocessors. Then several blocks share a tile: each sums a part
of the terms, and XLA adds their float32 sums in a fixed order.

The kernel computes the transposed result: then W is the operand that needs 64 rows, and x or g the
operand that may have as few as 8. In W x^T the tensor cores take W from the registers in which the
kernel makes it. In W^T g^T the sum goes over the rows of W, so that the registers would have to
hold W transposed. The tensor cores can transpose an operand that they read from shared memory. So
each warp group stores its 64 x 64 weights there. It uses three places in turn, which belong to it
alone: one is written while the tensor cores read another. The third place is for warps that are
behind: a warp may see that a product is done, and go on to write, before the other warps of its
group see it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from irqlora_jax.kernels import matmul_mosaic_fragments
from irqlora_jax.kernels.matmul_mosaic_tiles import BLOCK, CHUNK, PLACES, ROWS, Tiles
from irqlora_jax.quant import packing


def product(
    m: int,
    width: int,
    terms: int,
    bits: int,
    levels: tuple[float, ...],
    dtype: str,
    tiles: Tiles,
    transposed: bool = False,
) -> Callable[[Array, Array, Array], Array]:
    """The kernel: a function of codes [rows of W, bytes], `affine` and x [m, terms padded to 64].

    It computes x W^T or, if `transposed`, x W: [m, width padded to 64]. With several splits it
    returns their float32 sums, transposed: [splits, width padded to 64, m padded to whole tiles].

    Args:
        m: rows of x, a multiple of 8.
        width: columns of the result: the rows of W or, if transposed, its columns.
        terms: terms of each sum: the columns of W or, if transposed, its rows.
        bits: width of a code.
        levels: levels of the format.
        dtype: type of x.
        tiles: how the work is cut.
        transposed: whether the sum goes over the rows of W.

    Raises:
        ValueError: the tiles take 3-bit blocks one by one; TMA needs pairs of them.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    groups, batch, stages = tiles.warp_groups, tiles.batch, tiles.stages
    line = packing.packed_size(BLOCK, bits)
    grid = (-(-width // tiles.width), -(-m // batch))
    steps = -(-terms // (BLOCK * tiles.blocks * tiles.splits))
    chunk = min(batch, CHUNK)
    partial = tiles.splits > 1
    padded = width + -width % ROWS
    if partial:
        shape, kind = (tiles.splits, padded, grid[1] * batch), jnp.dtype(jnp.float32)
        out_block = (groups, ROWS, chunk)
    else:
        shape, kind = (m, padded), jnp.dtype(dtype)
        out_block = (groups, chunk, ROWS)
    fragment = matmul_mosaic_fragments.permuted(levels, bits, dtype)

    def of_weight(own: Any, term: Any) -> tuple[Any, Any]:
        """W's (row, column) from an index of the result's columns and an index of the terms."""
        return (term, own) if transposed else (own, term)

    high, wide = of_weight(groups, tiles.blocks)  # blocks of 64 x 64 of W in a step
    if wide * line % 16:
        name = "warp_groups" if transposed else "blocks"
        raise ValueError(f"{name} = {wide}: expected a multiple of 2 with {bits} bits")

    def body(codes, scales, x, out, codes_s, scales_s, x_s, out_s, full, empty, *places):
        group = lax.axis_index("group")
        first = lax.axis_index("block")
        total = grid[0] * grid[1] * tiles.splits
        rounds = (total - first + tiles.grid - 1) // tiles.grid

        def origin(turn):
            """Of a tile and split: block of 64 result columns, row of x, first step, split."""
            index = first + turn * tiles.grid
            split, index = index % tiles.splits, index // tiles.splits
            own, row = plgpu.planar_snake(index, grid, 0, tiles.band)
            return own * groups, row * batch, split * steps, split

        def copy():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, rounds)
            def _(turn):
                own, row, start, _ = origin(turn)

                @pl.loop(0, steps)
                def _(step):
                    count = turn * steps + step
                    slot = lax.rem(count, stages)

                    @pl.when(count >= stages)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    term = (start + step) * tiles.blocks
                    down, across = of_weight(own, term)
                    rows = pl.ds(down * BLOCK, high * BLOCK)
                    bytes_ = pl.ds(across * line, wide * line)
                    taken = pl.ds(term * BLOCK, tiles.blocks * BLOCK)
                    arrived = full.at[slot]
                    plgpu.copy_gmem_to_smem(codes.at[rows, bytes_], codes_s.at[slot], arrived)
                    plgpu.copy_gmem_to_smem(
                        scales.at[pl.ds(across, wide), rows], scales_s.at[slot], arrived
                    )
                    plgpu.copy_gmem_to_smem(x.at[pl.ds(row, batch), taken], x_s.at[slot], arrived)

        def weights(step, block):
            """64 x 64 weights as the operand that the tensor cores take."""
            slot = lax.rem(step, stages)
            down, across = of_weight(group, block)
            rows, bytes_ = pl.ds(down * BLOCK, BLOCK), pl.ds(across * line, line)
            made = fragment(codes_s.at[slot, rows, bytes_], scales_s.at[slot, across, rows])
            if not transposed:
                return made
            place = places[0].at[group, lax.rem(step * tiles.blocks + block, PLACES)]
            place[...] = made
            plgpu.commit_smem()
            return place.T

        def multiply():
            free = (512 - 40) // groups // 8 * 8
            plgpu.set_max_registers(min(free, 256), action="increase")

            @pl.loop(0, rounds)
            def _(turn):
                own, row, _, split = origin(turn)

                def products(sums, begin, number):
                    """Adds the products of some steps.

                    The weights of a block are made while the previous product is computed. All
                    products are done at the end: when the loop starts again, the assembler may
                    give the registers of an unfinished product to other values.
                    """
                    for index in range(number):
                        slot = lax.rem(begin + index, stages)
                        plgpu.barrier_wait(full.at[slot])
                        for block in range(tiles.blocks):
                            left = weights(begin + index, block)
                            right = x_s.at[slot, :, pl.ds(block * BLOCK, BLOCK)]
                            plgpu.wgmma(sums, left, right.T)
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
                columns = pl.ds((own + group) * ROWS, ROWS)
                for begin in range(0, batch, chunk):
                    piece = sums[:, begin : begin + chunk].astype(kind)
                    rows = pl.ds(row + begin, chunk)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    if partial:
                        out_s[group] = piece
                        there = out.at[split, columns, rows]
                    else:
                        piece = plgpu.layout_cast(piece, plgpu.Layout.WGMMA_TRANSPOSED)
                        out_s.at[group].T[...] = piece
                        there = out.at[rows, columns]
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(out_s.at[group], there)

            plgpu.wait_smem_to_gmem(0)

        lax.cond(group == groups, copy, multiply)

    half = _swizzled(BLOCK, 16)
    scratch = [
        plgpu.SMEM((stages, high * BLOCK, wide * line), jnp.uint8),
        plgpu.SMEM((stages, wide, high * BLOCK), jnp.uint32),
        plgpu.SMEM((stages, batch, tiles.blocks * BLOCK), dtype, transforms=half),
        plgpu.SMEM(
            out_block, kind, transforms=_swizzled(out_block[-1], jnp.dtype(kind).itemsize * 8)
        ),
        plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
    ]
    if transposed:
        scratch.append(plgpu.SMEM((groups, PLACES, ROWS, BLOCK), dtype, transforms=half))
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, kind),
        grid=(tiles.grid,),
        grid_names=("block",),
        num_threads=groups + 1,
        thread_name="group",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="dequant_matmul_transposed" if transposed else "dequant_matmul",
    )


def _swizzled(columns: int, bits: int) -> tuple[Any, ...]:
    """Tiles of 8 rows, swizzled so that their rows fall into different banks of shared memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    swizzle = plgpu.find_swizzle(columns * bits, "tile")
    return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)
