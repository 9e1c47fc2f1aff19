"""From packed codes in shared memory to the register operand of the tensor cores (Mosaic GPU)."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from irqlora_jax.kernels import byte_table, mosaic_tiles

BLOCK, ROWS = mosaic_tiles.BLOCK, mosaic_tiles.ROWS


def permuted(levels: Sequence[float], bits: int, dtype: str) -> Callable[[Any, Any], Any]:
    """Of the codes of 64 rows of a block and their `affine`, in shared memory: the weights as the
    tensor cores take them from registers."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    text = byte_table.dequantize_row(levels, bits, dtype)
    # A row of a block is shared by four threads: each has so many neighboring bytes of it.
    plane = {8: plgpu.Layout.WGMMA_UPCAST_4X, 4: plgpu.Layout.WGMMA_8BIT, 2: plgpu.Layout.WGMMA}
    layouts = {4: (plane[8],), 3: (plane[4], plane[2]), 2: (plane[4],)}[bits]
    row_layout = plgpu.Layout.WGMMA.reduce(1)

    @plgpu.inline_mgpu(
        arg_types=(*layouts, row_layout),
        return_type=plgpu.ShapeDtypeStruct((ROWS, BLOCK), jnp.dtype(dtype), plgpu.Layout.WGMMA),
    )
    def permute(_, *arrays):
        return _inline(text, arrays, dtype)

    def fragment(codes, scales):
        if bits == 3:
            from jax.experimental import pallas as pl

            parts = [codes.at[:, pl.ds(0, 16)], codes.at[:, pl.ds(16, 8)]]
        else:
            parts = [codes]
        loaded = [_load(one, layout) for one, layout in zip(parts, layouts, strict=True)]
        return permute(*loaded, _load(scales, row_layout))

    return fragment


def _load(ref: Any, layout: Any) -> Array:
    """From shared memory. jax 0.10 wants an index, later ones take none."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def _inline(text: str, arrays: Sequence[Any], dtype: str) -> Any:
    """The PTX of `byte_table` on the registers of a thread, for each of its two rows."""
    import numpy as np
    from jax.experimental.mosaic import gpu as mgpu
    from jax.extend.mlir import ir
    from jax.extend.mlir.dialects import arith, vector

    # jax.extend.mlir has no llvm dialect, and no other one has inline assembly.
    from jaxlib.mlir.dialects import llvm

    word = ir.IntegerType.get_signless(32)
    half = ir.BF16Type.get() if dtype == "bfloat16" else ir.F16Type.get()
    pair = ir.VectorType.get((2,), half)

    def words(register: Any) -> list[Any]:
        kind = ir.VectorType(register.type)
        bits = kind.shape[0] * mgpu.bitwidth(kind.element_type)
        whole = ir.IntegerType.get_signless(min(bits, 32))
        parts = vector.bitcast(ir.VectorType.get((bits // whole.width,), whole), register)
        found = [
            vector.extract(parts, dynamic_position=[], static_position=[i])
            for i in range(bits // whole.width)
        ]
        return found if whole == word else [arith.extui(word, one) for one in found]

    struct = llvm.StructType.get_literal((word,) * 8)
    layout = mgpu.WGMMA_LAYOUT
    registers = np.empty(layout.registers_shape((ROWS, BLOCK)), dtype=object)
    by_row = registers.reshape(8, 2)  # columns in steps of 8, the thread's two rows
    for row in range(2):
        held = [one for array in arrays for one in words(array.registers.reshape(2)[row])]
        constraints = ",".join(["=r"] * 8 + ["r"] * len(held))
        made = llvm.inline_asm(struct, held, text, constraints)
        for column in range(8):
            one = llvm.extractvalue(word, made, [column])
            vector_of_one = vector.broadcast(ir.VectorType.get((1,), word), one)
            by_row[column, row] = vector.bitcast(pair, vector_of_one)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
