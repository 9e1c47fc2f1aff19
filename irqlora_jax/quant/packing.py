"""Codes to bytes and back. A block of B codes becomes B * bits / 8 bytes, in planes.

4 bits, B/2 bytes:      byte j = code[j] | code[j + B/2] << 4

    bit   7 6 5 4 3 2 1 0
          [j+B/2] [ j   ]

2 bits, B/4 bytes:      byte j = code[j] | code[j + B/4] << 2 | code[j + B/2] << 4 | ...

    bit   7 6       5 4      3 2      1 0
         [j+3B/4]  [j+B/2]  [j+B/4]  [j]

3 bits, B/4 + B/8 bytes: the plane of the two low bits as above, then the plane of the high bits,
                        byte j = high[j] | high[j + B/8] << 1 | ... | high[j + 7B/8] << 7

Neighboring codes lie in neighboring bytes, so unpacking is a shift and a mask over whole vectors.
Blocks stay apart, so a matrix can be cut between any two of them.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

LAYOUT = "planes"


def packed_size(block_size: int, bits: int) -> int:
    """Bytes of one packed block; `block_size` is a multiple of 8."""
    return block_size * bits // 8


def pack(codes: UInt8[Array, "*blocks size"], bits: int) -> UInt8[Array, "*blocks bytes"]:
    """Packs each block (last axis) of codes below 2**bits, bits 2, 3 or 4."""
    if bits == 3:
        return jnp.concatenate([_pack_plane(codes & 3, 2), _pack_plane(codes >> 2, 1)], axis=-1)
    return _pack_plane(codes, bits)


def unpack(packed: UInt8[Array, "*blocks bytes"], bits: int) -> UInt8[Array, "*blocks size"]:
    """The inverse of `pack`."""
    if bits == 3:
        split = packed.shape[-1] * 2 // 3
        low, high = packed[..., :split], packed[..., split:]
        return _unpack_plane(low, 2) | (_unpack_plane(high, 1) << 2)
    return _unpack_plane(packed, bits)


def _pack_plane(codes: Array, bits: int) -> Array:
    parts = codes.reshape(*codes.shape[:-1], 8 // bits, -1)
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape((1,) * (parts.ndim - 2) + (-1, 1))
    return jnp.sum(parts << shifts, axis=-2, dtype=jnp.uint8)  # the fields do not overlap


def _unpack_plane(packed: Array, bits: int) -> Array:
    # Shifts by numbers, not by an array of them: that would be computed outside of the loop over
    # the layers, once for each time that it is used in there, and CPUs would then take what is
    # dequantized with the one and with the other for two different weights.
    fields = [(packed >> np.uint8(shift)) & np.uint8(2**bits - 1) for shift in range(0, 8, bits)]
    return jnp.concatenate(fields, axis=-1)
