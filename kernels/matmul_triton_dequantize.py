"""Dequantizes a tile of packed weights inside a Triton kernel.

A block consists of fields: a field is the codes at the same bits of neighboring bytes. These codes
belong to neighboring inputs too (`packing.py`). So operations on whole bytes dequantize a field,
and its inputs are contiguous. With 3 bits, the plane of high bits defines the fields; two of them
share a field of the plane of low bits.

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
        start: its first input, within a block.
        plane: the run of `width` bytes of a block that holds the codes, or their two low bits.
        shift: position of those bits in their byte.
        high_plane: the run of bytes that holds the third bit, or None.
        high_shift: position of the third bit in its byte.
    """

    start: int
    plane: int
    shift: int
    high_plane: int | None = None
    high_shift: int = 0


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How blocks of packed codes split into fields.

    Attributes:
        format: code book.
        block_size: weights in a block.
    """

    format: Format
    block_size: int

    @property
    def width(self) -> int:
        """Number of codes in a field of one block, and of bytes in a run."""
        return self.block_size // 8 * (1 if self.format.bits == 3 else self.format.bits)

    @property
    def planes(self) -> int:
        """Number of runs of `width` bytes in a block."""
        return packing.packed_size(self.block_size, self.format.bits) // self.width

    @property
    def fields(self) -> tuple[Field, ...]:
        """The fields of a block, in the order of their inputs."""
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
    """Dequantizes one field: level * scale + shift in float32, rounded to `dtype`.

    The result has the field's weights of each row, block after block.

    Args:
        blocks: how blocks split into fields.
        field: the field.
        planes: the bytes, one array for each run.
        scale: one for each block.
        shift: one for each block, or None.
        dtype: type of the result.
        inline_asm: `elementwise_inline_asm` of Pallas: byte permutations look up levels that are
            rounded to float16, and `dtype` must be bfloat16 or float16. None: portable operations,
            which are selects, or nothing at all for integers, where the code is the level.
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
    """PTX that turns four codes of a field, one in each byte of a register, into four weights.

    Operands: $0 and $1, two weights each; then the four bytes, the four bytes of the high plane if
    there is one, four scales, and four shifts if `shifted`.

    Registers hold the levels in float16, low bytes and high bytes apart. `prmt` picks four bytes by
    the nibbles of a register. With 2 and 4 bits these nibbles belong to two neighboring fields. The
    PTX of both fields repeats the common part, and the compiler computes it once.
    """
    table = np.asarray(fmt.levels, np.float16).view(np.uint8).reshape(-1, 2)
    table = np.resize(table, (max(8, len(table)), 2))
    # Low bytes and high bytes each fill two registers for 8 levels, four for 16.
    halves = {
        name: [f"0x{word:08x}" for word in np.ascontiguousarray(half).view("<u4")]
        for name, half in zip("lh", table.T, strict=True)
    }
    text = [".reg .b32 c, d, s, t, m, q, l, h;", ".reg .b16 e<4>;", ".reg .f32 f<4>;"]
    odd, inside, operands = 0, field.shift, 3
    if field.high_plane is None:
        odd, inside = divmod(field.shift, 4)  # the nibble of the byte, and the place in it
    text += [f"shr.u32 c, $2, {inside};"]
    if field.high_plane is not None:
        text += ["and.b32 c, c, 0x03030303;", f"shr.u32 d, $3, {field.high_shift};"]
        text += ["and.b32 d, d, 0x01010101;", "shl.b32 d, d, 2;", "or.b32 c, c, d;"]
        operands = 4
    many = len(fmt.levels) > 8
    # Only the low bits of a nibble pick a byte. Its highest bit chooses one of two tables.
    text += [f"and.b32 s, c, 0x{'3' * 8 if fmt.bits == 2 else '7' * 8};"]
    text += ["shr.u32 t, c, 3;", "and.b32 t, t, 0x11111111;"] if many else []
    for pair in range(2):  # the low two bytes of the register, then the high two
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
