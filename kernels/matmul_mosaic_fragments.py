"""Turns packed codes in shared memory into the register operand of the tensor cores."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from irqlora_jax.kernels.matmul_mosaic_byte_table import dequantize_row
from irqlora_jax.kernels.matmul_mosaic_tiles import BLOCK, ROWS


def permuted(levels: Sequence[float], bits: int, dtype: str) -> Callable[[Any, Any], Any]:
    """A function of codes and `affine` in shared memory, for 64 rows of one block.

    It returns the weights in the registers from which the tensor cores take them.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    text = dequantize_row(levels, bits, dtype)
    layouts = byte_layouts(bits)
    row_layout = plgpu.Layout.WGMMA.reduce(1)

    @plgpu.inline_mgpu(
        arg_types=(*layouts, row_layout),
        return_type=plgpu.ShapeDtypeStruct((ROWS, BLOCK), jnp.dtype(dtype), plgpu.Layout.WGMMA),
    )
    def permute(_, *arrays):
        return _inline(text, arrays, dtype)

    def fragment(codes, scales):
        parts = [codes.at[:, pl.ds(0, 16)], codes.at[:, pl.ds(16, 8)]] if bits == 3 else [codes]
        loaded = [_load(one, layout) for one, layout in zip(parts, layouts, strict=True)]
        return permute(*loaded, _load(scales, row_layout))

    return fragment


def byte_layouts(bits: int) -> tuple[Any, ...]:
    """Which thread loads which bytes of 64 rows of a block, for each plane of the codes.

    Each of the four threads of a row loads 8, 4 or 2 neighboring bytes.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if bits == 4:
        return (plgpu.Layout.WGMMA_UPCAST_4X,)
    if bits == 2:
        return (plgpu.Layout.WGMMA_8BIT,)
    # WGMMA_8BIT in halves. jax may load WGMMA_8BIT itself with ldmatrix, which needs lines at
    # multiples of 16 bytes, but a line of 3-bit codes has 24 bytes.
    halves = plgpu.Layout.TILED(
        plgpu.Tiling(((64, 16), (16, 16), (8, 16), (4,), (2,))),
        warp_dims=(-8,),
        lane_dims=(-4, -3),
        vector_dim=-1,
    )
    return halves, plgpu.Layout.WGMMA


def _load(ref: Any, layout: Any) -> Array:
    """Loads from shared memory. jax 0.10 needs an index, later versions take none."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def _inline(text: str, arrays: Sequence[Any], dtype: str) -> Any:
    """Runs the PTX of `dequantize_row` on the registers of a thread, for each of its two rows."""
    import numpy as np
    from jax.experimental.mosaic import gpu as mgpu
    from jax.extend.mlir import ir
    from jax.extend.mlir.dialects import arith, vector

    # Only the llvm dialect has inline assembly, and jax.extend.mlir does not have that dialect.
    from jaxlib.mlir.dialects import llvm

    word = ir.IntegerType.get_signless(32)
    half = ir.BF16Type.get() if dtype == "bfloat16" else ir.F16Type.get()
    pair = ir.VectorType.get((2,), half)

    def words(row: int, array: Any) -> list[Any]:
        """The words of one plane in one of the thread's two rows."""
        pieces = array.registers.reshape(2, -1)[row]
        found = [whole(one) for one in pieces]
        if len(found) == 2:  # half words
            high = arith.shli(found[1][0], arith.constant(word, 16))
            return [arith.ori(found[0][0], high)]
        return found[0]

    def whole(register: Any) -> list[Any]:
        kind = ir.VectorType(register.type)
        bits = kind.shape[0] * mgpu.bitwidth(kind.element_type)
        part = ir.IntegerType.get_signless(min(bits, 32))
        number = bits // part.width
        parts = vector.bitcast(ir.VectorType.get((number,), part), register)
        found = [
            vector.extract(parts, dynamic_position=[], static_position=[i]) for i in range(number)
        ]
        return found if part == word else [arith.extui(word, one) for one in found]

    struct = llvm.StructType.get_literal((word,) * 8)
    layout = mgpu.WGMMA_LAYOUT
    registers = np.empty(layout.registers_shape((ROWS, BLOCK)), dtype=object)
    by_row = registers.reshape(8, 2)  # columns in steps of 8, the thread's two rows
    for row in range(2):
        held = [one for array in arrays for one in words(row, array)]
        constraints = ",".join(["=r"] * 8 + ["r"] * len(held))
        made = llvm.inline_asm(struct, held, text, constraints)
        for column in range(8):
            one = llvm.extractvalue(word, made, [column])
            vector_of_one = vector.broadcast(ir.VectorType.get((1,), word), one)
            by_row[column, row] = vector.bitcast(pair, vector_of_one)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
