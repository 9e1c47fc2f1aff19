"""x @ W^T and g @ W with packed W, one kernel each, by the Triton backend of Pallas.

For NVIDIA GPUs of compute capability 8.0 or more. No dequantized weight is ever written to memory:
every program dequantizes its tiles in float32 and rounds them to the type of the activations, as
XLA's path does. Sums are float32.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from irqlora_jax.kernels import triton_backend
from irqlora_jax.kernels.matmul_triton_dequantize import Blocks, Field, dequantize
from irqlora_jax.kernels.matmul_triton_factors import Factors
from irqlora_jax.kernels.matmul_triton_tiles import Tiles, default_tiles
from irqlora_jax.kernels.measured import tuned_tiles
from irqlora_jax.kernels.triton_backend import announce, backend
from irqlora_jax.quant import packing, stats
from irqlora_jax.quant.formats import get_format
from irqlora_jax.quant.qtensor import QTensor

BLOCK_SIZES = (32, 64, 128, 256)
"""The sizes of Triton's arrays are powers of two, and its products have at least 16 terms."""


def refusal(x: Array, weight: QTensor) -> str | None:
    """Why the kernels cannot serve x and W on jax's first device; None if they can."""
    return triton_backend.refusal() or _unfit(x, weight, interpret=False)


def matmul(
    x: Float[Array, "*batch in"],
    weight: QTensor,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "*batch out"]:
    """x @ weight^T, summed in float32, in the type of x.

    Args:
        x: activations, bfloat16 or float16; float32 too if interpreted.
        weight: one matrix [out, in] in the layout "planes", with a block size of `BLOCK_SIZES`.
        tiles: how the work is cut; None: the tiles that `measured.json` has for this place, or
            else `default_tiles`.
        interpret: whether XLA interprets the kernel, on any device.

    Raises:
        ValueError: another type, layout or block size, or a stack of matrices.
    """
    rows = x.reshape(-1, x.shape[-1])
    out, _ = weight.shape
    tiles = tiles or _tiles("matmul", weight, rows.shape[0])
    y = _call(_forward_kernel, rows, weight, out, tiles, interpret)
    return y.reshape(*x.shape[:-1], out)


def matmul_transposed(
    g: Float[Array, "*batch out"],
    weight: QTensor,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "*batch in"]:
    """g @ weight, summed in float32, in the type of g, with the arguments of `matmul`."""
    rows = g.reshape(-1, g.shape[-1])
    _, features = weight.shape
    tiles = tiles or _tiles("matmul_transposed", weight, rows.shape[0])
    dx = _call(_transposed_kernel, rows, weight, features, tiles, interpret)
    return dx.reshape(*g.shape[:-1], features)


def _tiles(operation: str, weight: QTensor, rows: int) -> Tiles:
    """`default_tiles`, with the fields that were measured to be faster on this device."""
    bits = get_format(weight.format).bits
    tiles = default_tiles(rows, *weight.shape, bits, transposed=operation != "matmul")
    kind = jax.devices()[0].device_kind
    tuned = tuned_tiles(operation, "triton", kind, weight.format, weight.shape, rows)
    return dataclasses.replace(tiles, **tuned)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """What a kernel knows about W and its tiles when it is traced.

    Attributes:
        blocks: how blocks of W split into fields.
        factors: how the kernel gets scales and shifts.
        shape: [out, in] of W.
        tile_blocks: blocks in a row of a tile of W.
        tiles: the tiles that were asked for.
        steps: tiles that one program sums.
        splits: programs that share a sum.
        inline_asm: whether byte permutations look levels up.
    """

    blocks: Blocks
    factors: Factors
    shape: tuple[int, int]
    tile_blocks: int
    tiles: Tiles
    steps: int
    splits: int
    inline_asm: bool

    def columns(self, first: Array | int, field: Field) -> Int32[Array, " columns"]:
        """The inputs of a field, in the tile that begins with block `first`."""
        width = self.blocks.width
        lane = jnp.arange(self.tile_blocks * width)
        # Not `//` and `%`: they handle negative numbers, which hides from the compiler that
        # neighboring lanes read neighboring columns.
        block, inside = jax.lax.div(lane, width), jax.lax.rem(lane, width)
        return (first + block) * self.blocks.block_size + field.start + inside

    def fetch(self, refs: Sequence[Any], rows: Array, first: Array) -> "_Raw":
        """Loads a tile of W: these rows, and the blocks from `first` on.

        Rows and blocks outside W repeat its last row or block.
        """
        packed_ref, *factor_refs = refs
        last = self.factors.row_blocks - 1
        block = jnp.minimum(first + jnp.arange(self.tile_blocks), last)
        row, block = jnp.minimum(rows, self.shape[0] - 1)[:, None, None], block[None, :, None]
        width = self.blocks.width
        byte = jnp.arange(width)[None, None, :]
        planes = [
            _load(packed_ref.at[row, block, byte + plane * width])
            for plane in range(self.blocks.planes)
        ]
        return planes, self.factors.fetch(_load, factor_refs, row, block)

    def dequantize(
        self, refs: Sequence[Any], raw: "_Raw", dtype: Any
    ) -> list[Float[Array, "rows columns"]]:
        """The dequantized fields of a tile of W."""
        planes, stored = raw
        scale, shift = self.factors.decode(_load, refs[1:], stored)
        asm = backend().elementwise_inline_asm if self.inline_asm else None
        return [
            dequantize(self.blocks, field, planes, scale, shift, dtype, asm)
            for field in self.blocks.fields
        ]


_Raw = tuple[list[Array], list[Array]]
"""A loaded tile of W: bytes [rows, blocks, width] for each plane, and the result of `fetch`."""


def _call(
    kernel: Any, rows: Array, weight: QTensor, features: int, tiles: Tiles, interpret: bool
) -> Float[Array, "rows features"]:
    """Runs one of the kernels over all tiles."""
    if (reason := _unfit(rows, weight, interpret)) is not None:
        raise ValueError(f"implementation = 'triton': {reason}")
    if not interpret:
        announce()
    out, row_blocks = weight.packed.shape[:2]
    blocks = Blocks(get_format(weight.format), weight.block_size)
    tile_blocks = max(tiles.block_k // blocks.block_size, -(-16 // blocks.width), 1)
    across, down = -(-row_blocks // tile_blocks), -(-out // tiles.block_n)  # tiles of W
    summed, apart = (across, down) if kernel is _forward_kernel else (down, across)
    steps = -(-summed // min(tiles.splits, summed))
    splits = -(-summed // steps)
    permute = tiles.permute and not interpret
    shifted = weight.shift_codes is not None
    # The kernel itself decodes only the default second level.
    decoded = tiles.decode == "xla" or weight.second_level != stats.DEFAULT
    factors = Factors(blocks.format, row_blocks, shifted, decoded)
    cut = _Cut(blocks, factors, weight.shape, tile_blocks, tiles, steps, splits, permute)
    count = rows.shape[0]
    parts = pl.pallas_call(
        functools.partial(kernel, cut),
        # Consecutive programs read the same tiles of W.
        grid=(-(-count // tiles.block_m), apart, splits),
        out_shape=jax.ShapeDtypeStruct(
            (splits, count, features), jnp.float32 if splits > 1 else rows.dtype
        ),
        compiler_params=backend().CompilerParams(
            num_warps=tiles.num_warps, num_stages=tiles.num_stages
        ),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(rows, weight.packed, *factors.operands(weight))
    return parts[0] if splits == 1 else parts.sum(axis=0).astype(rows.dtype)


def _forward_kernel(cut: _Cut, x_ref: Any, *refs: Any) -> None:
    """Computes one tile [block_m, block_n] of x @ W^T.

    W is the left factor, [block_n, inputs] x [inputs, block_m]. The tensor cores take that factor
    from registers, where the kernel dequantizes it, and the right factor may have few columns.
    """
    *weight_refs, out_ref = refs
    tiles, inputs = cut.tiles, cut.shape[1]
    m = pl.program_id(0) * tiles.block_m + jnp.arange(tiles.block_m)
    n = pl.program_id(1) * tiles.block_n + jnp.arange(tiles.block_n)
    part = pl.program_id(2)
    row = jnp.minimum(m, x_ref.shape[0] - 1)[:, None]
    columns = cut.splits * cut.steps * cut.tile_blocks * cut.blocks.block_size

    def step(i: Array, total: Array) -> Array:
        first = (part * cut.steps + i) * cut.tile_blocks
        weights = cut.dequantize(weight_refs, cut.fetch(weight_refs, n, first), x_ref.dtype)
        for field, w in zip(cut.blocks.fields, weights, strict=True):
            k = cut.columns(first, field)[None, :]
            total += _product(
                w, _load(x_ref.at[row, k], k < inputs if columns > inputs else None).T
            )
        return total

    zeros = jnp.zeros((tiles.block_n, tiles.block_m), jnp.float32)
    _store(out_ref, part, m, n, jax.lax.fori_loop(0, cut.steps, step, zeros).T)


def _transposed_kernel(cut: _Cut, g_ref: Any, *refs: Any) -> None:
    """Computes one tile [block_m, block_k] of g @ W, field by field.

    The sum goes over the rows of W, but the bytes of a row are contiguous. So W has to go through
    shared memory. It stays there for one step, for two reasons. The tensor cores multiply one tile
    while the next one is dequantized and the one after that is loaded. And without the step the
    compiler would let every warp dequantize all the weights that it needs.
    """
    *weight_refs, out_ref = refs
    tiles, outputs = cut.tiles, cut.shape[0]
    m = pl.program_id(0) * tiles.block_m + jnp.arange(tiles.block_m)
    first = pl.program_id(1) * cut.tile_blocks
    part = pl.program_id(2)
    row = jnp.minimum(m, g_ref.shape[0] - 1)[:, None]
    ragged = cut.splits * cut.steps * tiles.block_n > outputs

    def rows(i: Array | int) -> Array:
        return (part * cut.steps + i) * tiles.block_n + jnp.arange(tiles.block_n)

    def step(i: Array, carry: Any) -> Any:
        totals, weights, raw = carry
        n = rows(i)[None, :]
        g = _load(g_ref.at[row, n], n < outputs if ragged else None)
        later = cut.fetch(weight_refs, rows(i + 2), first)
        totals = [total + _product(g, w) for total, w in zip(totals, weights, strict=True)]
        return totals, cut.dequantize(weight_refs, raw, g_ref.dtype), later

    wide = (tiles.block_m, cut.tile_blocks * cut.blocks.width)
    zeros = [jnp.zeros(wide, jnp.float32) for _ in cut.blocks.fields]
    now, later = (cut.fetch(weight_refs, rows(i), first) for i in range(2))
    carry = (zeros, cut.dequantize(weight_refs, now, g_ref.dtype), later)
    totals, _, _ = jax.lax.fori_loop(0, cut.steps, step, carry)
    for field, total in zip(cut.blocks.fields, totals, strict=True):
        _store(out_ref, part, m, cut.columns(first, field), total)


def _product(a: Array, b: Array) -> Array:
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=exact, preferred_element_type=jnp.float32)


def _load(at: Any, mask: Array | None = None) -> Array:
    if mask is None:
        return backend().load(at)
    return backend().load(at, mask=jnp.broadcast_to(mask, at.shape), other=0)


def _store(ref: Any, part: Array, m: Array, n: Array, values: Array) -> None:
    inside = (m < ref.shape[1])[:, None] & (n < ref.shape[2])[None, :]
    at = ref.at[part, m[:, None], n[None, :]]
    backend().store(at, values.astype(ref.dtype), mask=inside)


def _unfit(x: Array, weight: QTensor, interpret: bool) -> str | None:
    """Why the kernels do not take these operands, or None."""
    accepted = ("bfloat16", "float16", *(("float32",) if interpret else ()))
    if x.dtype.name not in accepted:
        return f"it takes {' and '.join(accepted)}, not {x.dtype}"
    if get_format(weight.format).bits == 8:
        return "it takes codes of 2, 3 and 4 bits, not 8"
    if weight.layout != packing.LAYOUT:
        return f"it takes layout {packing.LAYOUT!r}, not {weight.layout!r}"
    if weight.block_size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        return f"it takes blocks of {sizes} weights, not {weight.block_size}"
    if weight.outliers is not None:
        return "it takes no weights with outliers"
    if weight.scale_update is not None:
        return "it takes no weights with updates of their scales"
    if weight.packed.ndim != 3:
        return f"it takes one matrix, not {weight.packed.shape[:-3]} of them"
    return None
