"""A table of 16-bit levels, looked up by byte permutes: PTX for the layout "fragments".

PRMT takes 4 of the 8 bytes of two registers, by the three low bits of 4 nibbles of a third. A table
of up to 8 levels in half precision is two such pairs, one of low and one of high bytes; of 16
levels, twice two, and masks of the codes' high bits choose between them. 4 codes cost a permute for
each pair, one LOP3 for each choice, and two permutes that interleave the low and the high bytes. No
memory is read, and no level costs more than another.

The text works on what one thread holds of one row of a block of 64: 16 codes, which become the
8 registers of pairs that the tensor cores take (`packing.py` has the picture). Counted in 32-bit
instructions for the 16 codes, without the 8 multiply-adds and the 2 that double scale and shift:
42 of 4 bits, 25 of 3, 21 of 2.
"""

from collections.abc import Sequence
from typing import Literal

import ml_dtypes
import numpy as np
from jaxtyping import UInt32

Half = Literal["bfloat16", "float16"]


def byte_planes(
    levels: Sequence[float], dtype: Half
) -> tuple[UInt32[np.ndarray, " words"], UInt32[np.ndarray, " words"]]:
    """The low and the high bytes of the levels, 4 levels in each little-endian word.

    Args:
        levels: 4, 8 or 16 of them, rounded to `dtype` here.
        dtype: the half precision type.
    """
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    patterns = np.asarray(levels, np.float32).astype(kind).view(np.uint16)
    low, high = (patterns & 255).astype(np.uint8), (patterns >> 8).astype(np.uint8)
    return low.view("<u4"), high.view("<u4")


def dequantize_row(levels: Sequence[float], bits: int, dtype: Half) -> str:
    """PTX that makes pairs of weights, level * scale + shift, of what a thread holds of a row.

    Operands, 32 bits each: $0 to $7 are the pairs; pair 4h + p has the weights at
    k = 32h + 8p + 2c (low half) and that + 1. Then the codes, two words of 4 bits, one of 2 bits,
    one of 2 bits and the high bits (16, zero extended) for 3; then the scale (low half) and the
    shift (high half) in `dtype`.

    Raises:
        ValueError: the levels are not 2**bits, or bits not 2, 3 or 4.
    """
    if bits not in (2, 3, 4) or len(levels) != 2**bits:
        raise ValueError(f"bits = {bits} with {len(levels)} levels: accepted are 2**bits, of 2..4")
    lines = [".reg .b32 sel, top, up, a, b, low, high, pair, scale, shift;"]
    affine = f"${8 + operands(bits) - 1}"
    lines += [f"prmt.b32 scale, {affine}, 0, 0x1010;", f"prmt.b32 shift, {affine}, 0, 0x3232;"]
    planes = byte_planes(levels, dtype)
    if bits == 4:
        for half in range(2):
            lines += _four_bits(planes, f"${8 + half}", 4 * half)
    else:
        lines += _few_bits(planes, bits)
    kind = "bf16x2" if dtype == "bfloat16" else "f16x2"
    body = "\n".join(lines).replace("FMA", f"fma.rn.{kind}")
    return "{\n" + body + "\n}"


def operands(bits: int) -> int:
    """Inputs of `dequantize_row`."""
    return {4: 3, 3: 3, 2: 2}[bits]


def _four_bits(planes: Sequence[np.ndarray], word: str, first: int) -> list[str]:
    """Two groups of 4 codes of a word."""
    lines = [f"and.b32 sel, {word}, 0x77777777;"]
    for group in range(2):
        if group:
            lines += ["shr.u32 sel, sel, 16;", f"shl.b32 up, {word}, 4;"]
        # Selectors 8 to 15 spread the highest bit of bytes 0 to 3 over a byte each.
        lines.append(f"prmt.b32 top, {'up' if group else word}, 0, 0xba98;")
        for name, table in zip(("low", "high"), planes, strict=True):
            lines += [
                f"prmt.b32 a, {_hex(table[0])}, {_hex(table[1])}, sel;",
                f"prmt.b32 b, {_hex(table[2])}, {_hex(table[3])}, sel;",
                f"lop3.b32 {name}, top, b, a, 0xca;",  # top ? b : a
            ]
        lines += _interleave(first + 2 * group)
    return lines


def _few_bits(planes: Sequence[np.ndarray], bits: int) -> list[str]:
    """The four groups of a word of 16 codes: each half of it has near codes, and far ones."""
    lines = [".reg .b32 word, spread;"]
    if bits == 3:
        # High bits of the two cells, two places apart: the same place of the two halves.
        lines.append("mad.lo.u32 spread, $9, 0x40000, $9;")
    for far in range(2):
        lines.append(f"shr.u32 word, $8, {2 * far};")
        lines.append("and.b32 sel, word, 0x33333333;")
        if bits == 3:
            lines.append(f"shr.u32 top, spread, {far};")
            lines.append("lop3.b32 sel, top, 0x44444444, sel, 0xea;")  # (top & mask) | sel
        for half in range(2):
            if half:
                lines.append("shr.u32 sel, sel, 16;")
            for name, table in zip(("low", "high"), planes, strict=True):
                other = _hex(table[1]) if bits == 3 else "0"
                lines.append(f"prmt.b32 {name}, {_hex(table[0])}, {other}, sel;")
            lines += _interleave(4 * half + 2 * far)
    return lines


def _interleave(first: int) -> list[str]:
    """Bytes of 4 codes to two pairs, scaled and shifted."""
    lines = []
    for pair, selector in ((first, "0x5140"), (first + 1, "0x7362")):
        lines += [f"prmt.b32 pair, low, high, {selector};", f"FMA ${pair}, pair, scale, shift;"]
    return lines


def _hex(word: np.uint32) -> str:
    return f"0x{int(word):08x}"
