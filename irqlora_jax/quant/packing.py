"""Codes to bytes and back. A block of B codes becomes B * bits / 8 bytes, in one of two layouts.

8 bits: a byte is a code, and there is only the layout "planes".

"planes", for blocks of any multiple of 8 codes. Neighboring codes lie in neighboring bytes, so
unpacking is a shift and a mask over whole vectors:

4 bits, B/2 bytes:      byte j = code[j] | code[j + B/2] << 4

    bit   7 6 5 4 3 2 1 0
          [j+B/2] [ j   ]

2 bits, B/4 bytes:      byte j = code[j] | code[j + B/4] << 2 | code[j + B/2] << 4 | ...

    bit   7 6       5 4      3 2      1 0
         [j+3B/4]  [j+B/2]  [j+B/4]  [j]

3 bits, B/4 + B/8 bytes: the plane of the two low bits as above, then the plane of the high bits,
                        byte j = high[j] | high[j + B/8] << 1 | ... | high[j + 7B/8] << 7

"fragments", for blocks of 64 codes: each GPU thread loads exactly the codes that it passes to the
tensor cores. In a row of their 16-bit operand, thread c of four has columns 2c, 2c + 1, 2c + 8 and
2c + 9 of every 16. So the block is cut into 8 cells of 8 codes. Slots 0 to 7 of cell 2c + h hold

    k = 32h + 2c + (0, 1, 8, 9, 16, 17, 24, 25)

The cells are stored in order. The bits of a cell are placed for byte permutes (PRMT), whose
selectors are the three low bits of the nibbles of half a word:

4 bits: 8 little-endian words of 32 bits. Nibble j holds the three low bits of slot j. The high bits
of slots 0 to 3 are the top bits of the four bytes, so a permute can spread each over its byte. The
high bits of slots 4 to 7 are four bits lower:

    bit   31 30-28 27 26-24 23 22-20 19 18-16 15 14-12 11 10-8  7  6-4  3  2-0
          3h [7  ] 7h [6  ] 2h [5  ] 6h [4  ] 1h [3  ] 5h [2 ]  0h [1 ] 4h [0]

2 bits: 8 half words. Each nibble holds a slot and the slot 4 further on:

    bit   15 14  13 12  11 10  9 8  7 6  5 4  3 2  1 0
          [ 7 ]  [ 3 ]  [ 6 ]  [2]  [5]  [1]  [4]  [0]

3 bits: the 8 half words of the two low bits as above, then 4 half words of the high bits. Half
word c belongs to cells 2c and 2c + 1. From bit 0 on, its nibble i holds slots i and i + 4 of cell
2c + 1, then slots i and i + 4 of cell 2c:

    bit   15 .. 12 .. 4     3       2       1       0
          i = 3 .. 1       [h0 4]  [h0 0]  [h1 4]  [h1 0]   (i = 0)

In every layout, blocks share no bytes, so a matrix can be cut between any two blocks.

The codes of scales and shifts are packed over the rows (`pack_rows`), because rows have few blocks,
and any number of them.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt8

LAYOUT = "planes"
"""The layout that `quantize` writes."""

FRAGMENTS = "fragments"
LAYOUTS = (LAYOUT, FRAGMENTS)
FRAGMENT_BLOCK = 64
"""The block size of "fragments"."""


def has_fragments(block_size: int, bits: int) -> bool:
    """Whether codes can have the layout "fragments"."""
    return block_size == FRAGMENT_BLOCK and bits < 8


def packed_size(block_size: int, bits: int) -> int:
    """Bytes of one packed block, in every layout; `block_size` is a multiple of 8."""
    return block_size * bits // 8


def pack(
    codes: UInt8[Array, "*blocks size"], bits: int, layout: str = LAYOUT
) -> UInt8[Array, "*blocks bytes"]:
    """Packs each block (last axis) of codes below 2**bits, bits 2, 3, 4 or 8.

    Raises:
        ValueError: no such layout, or it does not support this block size or 8 bits.

    Examples:
        >>> codes = jnp.arange(8, dtype=jnp.uint8)
        >>> bytes(pack(codes, 4)).hex(" ")  # code j below, code j + 4 above
        '40 51 62 73'
        >>> bytes(pack(codes, 3)).hex(" ")  # two low bits of 0, 2, 4, 6, of 1, 3, 5, 7; high bits
        '88 dd f0'
    """
    _check(layout, codes.shape[-1], bits)
    if layout == FRAGMENTS:
        return _pack_fragments(codes, bits)
    if bits == 3:
        return jnp.concatenate([_pack_plane(codes & 3, 2), _pack_plane(codes >> 2, 1)], axis=-1)
    return _pack_plane(codes, bits)


def unpack(
    packed: UInt8[Array, "*blocks bytes"], bits: int, layout: str = LAYOUT
) -> UInt8[Array, "*blocks size"]:
    """The inverse of `pack`.

    Raises:
        ValueError: as for `pack`.

    Examples:
        >>> codes = jnp.arange(64, dtype=jnp.uint8) % 8
        >>> packed = pack(codes, 3, "fragments")
        >>> packed.size, bool((unpack(packed, 3, "fragments") == codes).all())
        (24, True)
    """
    _check(layout, packed.shape[-1] * 8 // bits, bits)
    if layout == FRAGMENTS:
        return _unpack_fragments(packed, bits)
    if bits == 3:
        split = packed.shape[-1] * 2 // 3
        low, high = packed[..., :split], packed[..., split:]
        return _unpack_plane(low, 2) | (_unpack_plane(high, 1) << 2)
    return _unpack_plane(packed, bits)


def packed_rows(rows: int, bits: int) -> int:
    """Rows of bytes that `pack_rows` makes of rows of codes."""
    return rows if bits == 8 else -(-rows // 8) * bits


def pack_rows(
    codes: UInt8[Array, "*lead rows blocks"], bits: int
) -> UInt8[Array, "*lead packed blocks"]:
    """Packs 8 rows of codes below 2**bits into `bits` rows of bytes; 8 bits stay as they are.

    Byte i of 8 rows holds bit i of their codes, the first row in its lowest bit. Missing rows count
    as 0. So every column can be cut off, and 8 rows from the next 8.

    Examples:
        >>> codes = jnp.arange(8, dtype=jnp.uint8)[:, None]
        >>> bytes(pack_rows(codes, 3)).hex(" ")
        'aa cc f0'
    """
    if bits == 8:
        return codes
    *lead, rows, blocks = codes.shape
    codes = jnp.pad(codes, [(0, 0)] * len(lead) + [(0, -rows % 8), (0, 0)])
    eight = codes.reshape(-1, 1, 8, blocks)
    planes = ((eight >> _numbers(bits, 1)) & np.uint8(1)) << _numbers(8, 2)
    return jnp.sum(planes, axis=2, dtype=jnp.uint8).reshape(*lead, -1, blocks)


def unpack_rows(
    packed: UInt8[Array, "*lead packed blocks"], bits: int, rows: int
) -> UInt8[Array, "*lead rows blocks"]:
    """The inverse of `pack_rows` for a number of rows."""
    if bits == 8:
        return packed
    *lead, _, blocks = packed.shape
    planes = packed.reshape(-1, bits, 1, blocks)
    found = ((planes >> _numbers(8, 2)) & np.uint8(1)) << _numbers(bits, 1)
    codes = jnp.sum(found, axis=1, dtype=jnp.uint8).reshape(*lead, -1, blocks)
    return codes[..., :rows, :]


def _numbers(n: int, axis: int) -> UInt8[np.ndarray, "..."]:
    """0 .. n - 1 along one of 4 axes."""
    shape = [1] * 4
    shape[axis] = n
    return np.arange(n, dtype=np.uint8).reshape(shape)


def _check(layout: str, block_size: int, bits: int) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout = {layout!r}: expected {' or '.join(map(repr, LAYOUTS))}")
    if layout == FRAGMENTS and block_size != FRAGMENT_BLOCK:
        raise ValueError(
            f"layout = {layout!r}: expected blocks of {FRAGMENT_BLOCK}, these have {block_size}"
        )
    if layout == FRAGMENTS and bits == 8:
        raise ValueError(f"layout = {layout!r}: expected codes of 2, 3 or 4 bits, these have 8")


def _pack_plane(codes: Array, bits: int) -> Array:
    parts = codes.reshape(*codes.shape[:-1], 8 // bits, -1)
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape((1,) * (parts.ndim - 2) + (-1, 1))
    return jnp.sum(parts << shifts, axis=-2, dtype=jnp.uint8)  # the fields do not overlap


def _unpack_plane(packed: Array, bits: int) -> Array:
    # Shifts field i by i, `bits` times, and not once by i * bits. XLA would compute that product
    # outside the loop over the layers, once for each use inside. Then CPUs would not recognize the
    # weights dequantized with the two results as equal.
    shape = (*packed.shape[:-1], 8 // bits, packed.shape[-1])
    parts = jnp.broadcast_to(packed[..., None, :], shape)
    field = lax.broadcasted_iota(jnp.uint8, shape, len(shape) - 2)
    for _ in range(bits):
        parts = parts >> field
    return (parts & np.uint8(2**bits - 1)).reshape(*packed.shape[:-1], -1)


def _pack_fragments(codes: Array, bits: int) -> Array:
    lead = codes.shape[:-1]
    # k = 32 h + 8 p + 2 c + e to c, h, p, e: the slot is 2 p + e.
    parts = codes.reshape(*lead, 2, 4, 4, 2)
    parts = jnp.moveaxis(parts, -2, -4)
    even, odd = parts[..., 0], parts[..., 1]  # [c, h, p]
    if bits == 4:
        tops = parts.reshape(*lead, 4, 2, 8) >> 3
        low = (even & 7) | ((odd & 7) << 4)
        return (low | (tops[..., :4] << 7) | (tops[..., 4:] << 3)).reshape(*lead, -1)
    near = (even & 3) | ((odd & 3) << 4)
    plane = (near[..., :2] | (near[..., 2:] << 2)).reshape(*lead, -1)
    if bits == 2:
        return plane
    tops = (parts >> 2).reshape(*lead, 4, 2, 2, 2, 2)  # c, h, slot // 4, byte, nibble of the byte
    first, second = tops[..., 0, :, :, :], tops[..., 1, :, :, :]
    nibbles = second[..., 0, :, :] | (second[..., 1, :, :] << 1)
    nibbles = nibbles | (first[..., 0, :, :] << 2) | (first[..., 1, :, :] << 3)
    high = (nibbles[..., 0] | (nibbles[..., 1] << 4)).reshape(*lead, -1)
    return jnp.concatenate([plane, high], axis=-1)


def _unpack_fragments(packed: Array, bits: int) -> Array:
    lead = packed.shape[:-1]
    if bits == 4:
        cells = packed.reshape(*lead, 4, 2, 4)
        low = jnp.stack([cells & 7, (cells >> 4) & 7], axis=-1)
        tops = jnp.concatenate([cells >> 7, (cells >> 3) & 1], axis=-1)
        parts = low | (tops.reshape(low.shape) << 3)
    else:
        cells = packed[..., :16].reshape(*lead, 4, 2, 2)
        near = jnp.stack([cells & 3, (cells >> 4) & 3], axis=-1)
        far = jnp.stack([(cells >> 2) & 3, cells >> 6], axis=-1)
        parts = jnp.concatenate([near, far], axis=-2)
        if bits == 3:
            high = packed[..., 16:].reshape(*lead, 4, 2)
            nibbles = jnp.stack([high & 15, high >> 4], axis=-1)  # c, byte, nibble of the byte
            fields = [(nibbles >> shift) & 1 for shift in (2, 3, 0, 1)]
            parts = parts | (jnp.stack(fields, axis=-3).reshape(parts.shape) << 2)
    # c, h, p, e back to h, p, c, e.
    return jnp.moveaxis(parts, -4, -2).reshape(*lead, -1)
