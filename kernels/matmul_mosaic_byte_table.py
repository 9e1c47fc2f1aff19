"""Looks 16-bit levels up in a table by byte permutes: PTX for the layout "fragments".

PRMT selects 4 of the 8 bytes of two registers. The three low bits of the 4 nibbles in a third
register say which. In half precision, a table of up to 8 levels is two pairs of registers: one pair
has the low bytes, one the high bytes. A table of 16 levels is four pairs, and masks of the codes'
high bits choose between them. For 4 codes this takes one permute for each pair, one LOP3 for each
choice, and two permutes that interleave the low and the high bytes. It reads no memory, and every
level costs the same.

The text works on the codes that one thread holds of one row of a block of 64. It turns these 16
codes into 8 registers of pairs, as the tensor cores take them (`packing.py` has the picture). The
16 codes take 42 instructions of 32 bits with 4-bit codes, 25 with 3 bits, and 21 with 2 bits. That
does not count the 8 multiply-adds, and the 2 instructions that duplicate scale and shift.
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
    """The low bytes and the high bytes of the levels, 4 levels in each little-endian word.

    Args:
        levels: 4, 8 or 16 of them. This function rounds them to `dtype`.
        dtype: the half precision type.
    """
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    patterns = np.asarray(levels, np.float32).astype(kind).view(np.uint16)
    low, high = (patterns & 255).astype(np.uint8), (patterns >> 8).astype(np.uint8)
    return low.view("<u4"), high.view("<u4")


def dequantize_row(levels: Sequence[float], bits: int, dtype: Half) -> str:
    """PTX that makes pairs of weights, level * scale + shift, from a thread's codes of one row.

    All operands have 32 bits:
    - $0 to $7, the pairs. Pair 4h + p has the weights k = 32h + 8p + 2c (low half) and k + 1.
    - The codes. 4 bits: two words. 2 bits: one word. 3 bits: one word of the low two bits, and one
      of the high bits (16, zero extended).
    - The scale (low half) and the shift (high half) in `dtype`.

    Raises:
        ValueError: there are not 2**bits levels, or bits is not 2, 3 or 4.
    """
    if bits not in (2, 3, 4) or len(levels) != 2**bits:
        raise ValueError(
            f"bits = {bits} with {len(levels)} levels: expected 2, 3 or 4 with 2**bits"
        )
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
    """How many inputs the PTX of `dequantize_row` has."""
    return {4: 3, 3: 3, 2: 2}[bits]


def _four_bits(planes: Sequence[np.ndarray], word: str, first: int) -> list[str]:
    """The two groups of 4 codes in a word."""
    lines = [f"and.b32 sel, {word}, 0x77777777;"]
    for group in range(2):
        if group:
            lines += ["shr.u32 sel, sel, 16;", f"shl.b32 up, {word}, 4;"]
        # Selectors 8 to 15 fill a byte with the highest bit of a source byte.
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
    """The four groups of 4 codes in a word of 16: each half has near codes and far codes."""
    lines = [".reg .b32 word, spread;"]
    if bits == 3:
        # The high bits of the two cells are two places apart. Moves both to the same place, one in
        # each half of the word.
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
    """Turns the low and high bytes of 4 codes into two pairs, then scales and shifts them."""
    lines = []
    for pair, selector in ((first, "0x5140"), (first + 1, "0x7362")):
        lines += [f"prmt.b32 pair, low, high, {selector};", f"FMA ${pair}, pair, scale, shift;"]
    return lines


def _hex(word: np.uint32) -> str:
    return f"0x{int(word):08x}"
