"""Second-level ("double") quantization of the scales and shifts of blocks.

Each takes 8 bits per block, and a float32 per 256 blocks. A group of 256 is divided by its largest
magnitude and rounded to a table of 256 numbers whose spacing grows with their magnitude
(bitsandbytes' dynamic map, 7 decades). Scales are positive, so their mean over the matrix is
subtracted first (QLoRA, section 3). Shifts are not centered (IR-QLoRA's released code).

The zero points of integer formats need no second level: 8 bits hold them exactly (`encode_zero`).
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

GROUP = 256  # blocks that share a float32


def _dynamic_map() -> Float32[np.ndarray, "256"]:
    values = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2**decade + 1)
        means = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)
        values += [*means, *-means]
    return np.sort(np.asarray(values, np.float32))


DYNAMIC_MAP = _dynamic_map()
_MIDPOINTS = ((DYNAMIC_MAP[1:].astype(np.float64) + DYNAMIC_MAP[:-1]) / 2).astype(np.float32)


def encode_groups(
    values: Float32[Array, " n"], center: bool
) -> tuple[UInt8[Array, " n"], Float32[Array, " groups"], Float32[Array, ""]]:
    """Codes, the largest magnitude of every group of 256 (the last may be short), and the offset
    (the mean of all values if `center`, else 0).

    Examples:
        >>> codes, largest, offset = encode_groups(jnp.array([0.5, 2.0, -1.0, 0.0]), center=False)
        >>> codes.tolist(), largest.tolist(), float(offset)
        ([201, 255, 35, 127], [2.0], 0.0)
    """
    n = values.shape[0]
    offset = values.mean() if center else jnp.zeros((), jnp.float32)
    groups = jnp.pad(values - offset, (0, -n % GROUP)).reshape(-1, GROUP)
    largest = jnp.abs(groups).max(axis=1)
    unit = groups / jnp.where(largest > 0, largest, 1)[:, None]
    codes = jnp.searchsorted(jnp.asarray(_MIDPOINTS), unit, side="left").astype(jnp.uint8)
    return codes.reshape(-1)[:n], largest, offset


def decode_groups(
    codes: UInt8[Array, " n"], largest: Float32[Array, " groups"], offset: Float32[Array, ""]
) -> Float32[Array, " n"]:
    """Decodes the result of `encode_groups`.

    Examples:
        >>> scales = jnp.array([0.0, 1.0, 5.0])
        >>> [f"{x:.3f}" for x in decode_groups(*encode_groups(scales, center=True)).tolist()]
        ['-0.009', '1.004', '5.000']
    """
    n = codes.shape[0]
    unit = jnp.asarray(DYNAMIC_MAP)[codes]
    spread = jnp.broadcast_to(largest[:, None], (largest.shape[0], GROUP)).reshape(-1)[:n]
    return unit * spread + offset


def encode_zero(zero: Float32[Array, " n"], bits: int) -> UInt8[Array, " n"]:
    """Zero points in [0, 2**bits) as 8-bit fixed point with 8 - bits fractional bits.

    Examples:
        >>> encode_zero(jnp.array([0.0, 7.5, 15.9375]), 4).tolist()
        [0, 120, 255]
    """
    return jnp.round(zero * 2 ** (8 - bits)).astype(jnp.uint8)


def decode_zero(codes: UInt8[Array, "..."], bits: int) -> Float32[Array, "..."]:
    """The inverse of `encode_zero`, exact.

    Examples:
        >>> decode_zero(jnp.array([0, 120, 255], jnp.uint8), 4).tolist()
        [0.0, 7.5, 15.9375]
    """
    return codes.astype(jnp.float32) / 2 ** (8 - bits)
