"""From the bytes of a tile of packed weights to the weights, inside of a Triton kernel.

A block is taken apart into its fields: the codes that lie at the same bits of neighboring bytes.
They are neighboring inputs too (`packing.py`), so a field is dequantized by operations on whole
bytes, and meets inputs that lie in one piece. Of 3-bit blocks the fields are those of the plane of
high bits; two of them share a field of the plane of low bits.

    4 bits, block of 64:  2 fields of 32      2 bits:  4 of 16      3 bits:  8 of 8
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, UInt8

from irqlora_jax.quant import packing
from irqlora_jax.quant.formats import Format


@dataclasses.dataclass(frozen=True)
class Field:
    """Codes at the same bits of neighboring bytes.

    Attributes:
        start: the first of its inputs, within a block.
        plane: which run of `width` bytes of a block holds the codes, or their two low bits.
        shift: position of those bits in their byte.
        high_plane: which run holds the third bit, or None.
        high_shift: position of the third bit in its byte.
    """

    start: int
    plane: int
    shift: int
    high_plane: int | None = None
    high_shift: int = 0


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How blocks of packed codes are taken apart.

    Attributes:
        format: code book.
        block_size: weights of a block.
    """

    format: Format
    block_size: int

    @property
    def width(self) -> int:
        """Codes of a field of one block, and bytes of a run."""
        return self.block_size // 8 * (1 if self.format.bits == 3 else self.format.bits)

    @property
    def planes(self) -> int:
        """Runs of `width` bytes of a block."""
        return packing.packed_size(self.block_size, self.format.bits) // self.width

    @property
    def fields(self) -> tuple[Field, ...]:
        """All fields, in the order of their inputs."""
        bits, width = self.format.bits, self.width
        if bits == 3:
            return tuple(Field(i * width, i % 2, i // 2 * 2, 2, i) for i in range(8))
        return tuple(Field(i * width, 0, i * bits) for i in range(8 // bits))


def dequantize(
    blocks: Blocks,
    field: Field,
    planes: Sequence[UInt8[Array, "rows blocks width"]],
    scale: Float32[Array, "rows blocks 1"],
    shift: Float32[Array, "rows blocks 1"] | None,
    dtype: Any,
    inline_asm: Any,
) -> Float[Array, "rows columns"]:
    """A field of some blocks of some rows, blocks side by side: level * scale + shift in float32,
    rounded to `dtype`.

    Args:
        blocks: how they are taken apart.
        field: which one.
        planes: the bytes, run by run.
        scale: of every block.
        shift: of every block, or None.
        dtype: of the result.
        inline_asm: `elementwise_inline_asm` of Pallas, to look levels up by byte permutations;
            they are then rounded to float16 (dtype bfloat16 or float16). None for portable
            operations: selects, or the code itself where that is the level.
    """
    low = planes[field.plane]
    high = None if field.high_plane is None else planes[field.high_plane]
    factors = [scale] if shift is None else [scale, shift]
    if inline_asm is None:
        weights = _levels(_codes(blocks.format.bits, field, low, high), blocks.format) * scale
        weights = (weights if shift is None else weights + shift).astype(dtype)
    else:
        bytes_ = [low] if high is None else [low, high]
        (weights,) = inline_asm(
            ptx(blocks.format, field, shift is not None, dtype),
            args=[*bytes_, *(jnp.broadcast_to(one, low.shape) for one in factors)],
            constraints=",".join(["=r", "=r", *"r" * len(bytes_), *"ffff" * len(factors)]),
            pack=4,
            result_shape_dtypes=[jax.ShapeDtypeStruct(low.shape, dtype)],
        )
    return weights.reshape(low.shape[0], -1)


def _codes(bits: int, field: Field, low: Array, high: Array | None) -> Int32[Array, "..."]:
    mask = 2 ** min(bits, 2 if high is not None else bits) - 1
    codes = (low.astype(jnp.int32) >> field.shift) & mask
    if high is not None:
        codes |= ((high.astype(jnp.int32) >> field.high_shift) & 1) << 2
    return codes


def _levels(codes: Array, fmt: Format) -> Float32[Array, "..."]:
    if fmt.integer:
        return codes.astype(jnp.float32)
    levels: list[Any] = [jnp.float32(level) for level in fmt.levels]
    for bit in range(fmt.bits):
        odd = ((codes >> bit) & 1) != 0
        levels = [jnp.where(odd, b, a) for a, b in zip(levels[::2], levels[1::2], strict=True)]
    return levels[0]


def ptx(fmt: Format, field: Field, shifted: bool, dtype: Any) -> str:
    """PTX from four codes of a field, one in each byte of a register, to four weights.

    Operands: $0 and $1, two weights each; then the four bytes, the four bytes of the high plane if
    there is one, four scales, and four shifts if `shifted`.

    The levels in float16 lie in registers, their low bytes apart from their high ones. `prmt` picks
    four bytes by the nibbles of a register, of 2- and 4-bit codes those of two neighboring fields
    at once; what both have in common is written twice, and computed once.
    """
    table = np.asarray(fmt.levels, np.float16).view(np.uint8).reshape(-1, 2)
    table = np.resize(table, (max(8, len(table)), 2))
    # Of low and of high bytes: two registers for 8 levels, four for 16.
    halves = {
        name: [f"0x{word:08x}" for word in np.ascontiguousarray(half).view("<u4")]
        for name, half in zip("lh", table.T, strict=True)
    }
    text = [".reg .b32 c, d, s, t, m, q, l, h;", ".reg .b16 e<4>;", ".reg .f32 f<4>;"]
    odd, inside, operands = 0, field.shift, 3
    if field.high_plane is None:
        odd, inside = divmod(field.shift, 4)  # the nibble, and where in it
    text += [f"shr.u32 c, $2, {inside};"]
    if field.high_plane is not None:
        text += ["and.b32 c, c, 0x03030303;", f"shr.u32 d, $3, {field.high_shift};"]
        text += ["and.b32 d, d, 0x01010101;", "shl.b32 d, d, 2;", "or.b32 c, c, d;"]
        operands = 4
    many = len(fmt.levels) > 8
    # The highest bit of a nibble is not for picking: it tells which of two tables counts.
    text += [f"and.b32 s, c, 0x{'3' * 8 if fmt.bits == 2 else '7' * 8};"]
    text += ["shr.u32 t, c, 3;", "and.b32 t, t, 0x11111111;"] if many else []
    for pair in range(2):  # of bytes: those at the bottom of the register, then those at the top
        if pair:
            text += ["shr.u32 s, s, 16;", *(["shr.u32 t, t, 16;"] if many else [])]
        text += ["prmt.b32 m, 0x0000ff00, 0, t;"] if many else []
        for name, words in halves.items():
            text += [f"prmt.b32 {name}, {words[0]}, {words[1]}, s;"]
            if many:
                text += [f"prmt.b32 q, {words[2]}, {words[3]}, s;"]
                text += [f"lop3.b32 {name}, m, q, {name}, 0xca;"]  # m ? q : name
        text += [f"prmt.b32 q, l, h, {'0x7351' if odd else '0x6240'};"]
        text += [f"mov.b32 {{e{2 * pair}, e{2 * pair + 1}}}, q;"]
    for i in range(4):
        scale, shift = f"${operands + i}", f"${operands + 4 + i}"
        text += [f"cvt.f32.f16 f{i}, e{i};"]
        text += [f"fma.rn.f32 f{i}, f{i}, {scale}, {shift};" if shifted else
                 f"mul.rn.f32 f{i}, f{i}, {scale};"]  # fmt: skip
    kind = {"bfloat16": "bf16x2", "float16": "f16x2"}[jnp.dtype(dtype).name]
    text += [f"cvt.rn.{kind}.f32 ${i}, f{2 * i + 1}, f{2 * i};" for i in range(2)]
    return "{ " + " ".join(text) + " }"
