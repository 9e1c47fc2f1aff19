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
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt32

from irqlora_jax.devices import compute_capability
from irqlora_jax.kernels import byte_table
from irqlora_jax.quant import packing
from irqlora_jax.quant.formats import get_format
from irqlora_jax.quant.matmul import XLA, Implementation
from irqlora_jax.quant.qtensor import QTensor

BLOCK = packing.FRAGMENT_BLOCK
ROWS = 64  # of W that a warp group has
MULTIPROCESSORS = 132
_CHUNK = 64  # columns of a tile that leave at once
_SHARED = 224 << 10  # bytes of shared memory for tiles; a block has 3 KiB more for the rest


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
        batch: rows of x that a tile has: 8, 16, 32, 64, 128 or 256.
        warp_groups: that multiply, each of them 64 rows of W.
        blocks: quantization blocks of 64 inputs that are copied at once.
        stages: copies on their way or in use.
        together: steps between two points at which all products are done.
        splits: parts of the inputs that are summed apart.
        band: tiles of W that are computed with the same rows of x before the next ones.
        grid: blocks of the kernel, one for each multiprocessor.
    """

    batch: int
    warp_groups: int = 2
    blocks: int = 1
    stages: int = 4
    together: int = 4
    splits: int = 1
    band: int = 8
    grid: int = MULTIPROCESSORS

    def __post_init__(self) -> None:
        if self.batch not in (8, 16, 32, 64, 128, 256):
            raise ValueError(f"batch = {self.batch}: accepted is 8, 16, 32, 64, 128 or 256")
        for name in ("warp_groups", "blocks", "together", "splits", "band", "grid"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} = {value}: accepted is 1 or more")
        if self.stages < 2:
            raise ValueError(f"stages = {self.stages}: accepted is 2 or more")

    @property
    def rows(self) -> int:
        """Rows of W that a tile has."""
        return ROWS * self.warp_groups

    def shared_memory(self, bits: int) -> int:
        """Bytes of shared memory that a block of the kernel takes, but for its barriers."""
        codes = self.rows * packing.packed_size(BLOCK, bits)
        stage = self.blocks * (codes + 4 * self.rows + 2 * BLOCK * self.batch)
        result = self.rows * min(self.batch, _CHUNK) * (4 if self.splits > 1 else 2)
        return self.stages * stage + result


def default_tiles(m: int, n: int, k: int, bits: int, grid: int = MULTIPROCESSORS) -> Tiles:
    """Tiles for x of [m, k] and W of [n, k].

    Args:
        m: rows of x.
        n: outputs.
        k: inputs.
        bits: of a code.
        grid: multiprocessors.
    """
    # TMA copies in units of 16 bytes: 3-bit blocks of 24 come in pairs, which leaves too few stages
    # for the widest tiles. With few rows of x the weight is what is read, in longer lines then.
    sizes = (8, 16, 32, 64, 128) if bits == 3 else (8, 16, 32, 64, 128, 256)
    batch = next((size for size in sizes if m <= size), sizes[-1])
    blocks = 4 if batch <= 64 else 2 if bits == 3 else 1
    steps = -(-k // (BLOCK * blocks))
    tiles = -(-m // batch) * -(-n // (2 * ROWS))

    def cost(splits: int) -> float:
        # Rounds of the grid, times the steps of a tile and what starting and ending one costs.
        return -(-tiles * splits // grid) * (-(-steps // splits) + 2.0) + 0.1 * splits

    splits = min(range(1, min(8, steps) + 1), key=cost) if m <= 256 else 1
    found = Tiles(batch, blocks=blocks, together=4 // blocks, splits=splits, grid=grid)
    stages = 8 if batch <= 64 else 5
    while stages > 2 and dataclasses.replace(found, stages=stages).shared_memory(bits) > _SHARED:
        stages -= 1
    return dataclasses.replace(found, stages=stages)


def refusal(x: Array, weight: QTensor, device: Any = None) -> str | None:
    """Why the kernel cannot serve x and W on a device (by default jax's first); None if it can."""
    device = jax.devices()[0] if device is None else device
    capability = compute_capability(device)
    if capability != (9, 0):
        return f"it needs compute capability 9.0, {device.device_kind} has {_dotted(capability)}"
    if len(mesh := jax.sharding.get_abstract_mesh().shape) and math.prod(mesh.values()) > 1:
        return f"it runs on one device, the mesh has {math.prod(mesh.values())}"
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
        tiles: how to cut the work, by default `default_tiles`.
    """
    rows = x.reshape(-1, x.shape[-1])
    (m, k), n = rows.shape, weight.shape[0]
    fmt = get_format(weight.format)
    if m == 0:
        return jnp.zeros((*x.shape[:-1], n), x.dtype)
    tiles = tiles or default_tiles(m, n, k, fmt.bits)
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
    chunk = min(batch, _CHUNK)
    partial = tiles.splits > 1
    n_padded = n + -n % ROWS
    if partial:
        shape, kind = (tiles.splits, n_padded, grid[1] * batch), jnp.dtype(jnp.float32)
        out_block = (groups, ROWS, chunk)
    else:
        shape, kind = (m, n_padded), jnp.dtype(dtype)
        out_block = (groups, chunk, ROWS)
    fragment = _permuted(levels, bits, dtype)

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
            plgpu.set_max_registers(min(free, 240), action="increase")
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


def _permuted(levels: Sequence[float], bits: int, dtype: str) -> Callable[[Any, Any], Any]:
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


MOSAIC = Implementation("mosaic", refusal, matmul, XLA.backward)
