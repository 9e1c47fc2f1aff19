"""Second-level ("double") quantization of the scales and shifts of blocks.

With the defaults, each takes 8 bits per block, and a float32 per 256 blocks. A group of 256 is
divided by its largest magnitude and rounded to a table of 256 numbers whose spacing grows with
their magnitude (bitsandbytes' dynamic map, 7 decades). Scales are positive, so their mean over the
matrix is subtracted first (QLoRA, section 3). Shifts are not centered (IR-QLoRA's released code).

LQ-LoRA (arXiv 2311.12023) has fewer bits with evenly spaced numbers. The smallest scale of the
matrix is subtracted, and whole numbers 0 .. 2**bits - 1 stand for the rest of a group, up to its
largest. Shifts have both signs, so theirs are -n .. n with n = 2**(bits - 1) - 1.

The zero points of integer formats need no second level: 8 bits hold them exactly (`encode_zero`).
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from irqlora_jax.quant.entropy import quotient
from irqlora_jax.text import require

GROUP = 256
"""Default number of blocks that share a maximum."""
ScaleRule = Literal["dynamic", "uniform"]
ScaleType = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class SecondLevel:
    """How scales and shifts are stored. `quant.scale_*` documents the choices.

    Attributes:
        rule: "dynamic" or "uniform".
        bits: width of a code; 8 with "dynamic".
        group: blocks that share a maximum, counted row by row.
        dtype: type of the maxima.
    """

    rule: ScaleRule = "dynamic"
    bits: int = 8
    group: int = GROUP
    dtype: ScaleType = "float32"

    def __post_init__(self) -> None:
        rules, types = ("dynamic", "uniform"), ("float32", "bfloat16", "float16")
        require(self.rule in rules, "quant.scale_rule", self.rule, " or ".join(rules))
        accepted = "8 with quant.scale_rule dynamic" if self.rule == "dynamic" else "2 to 8"
        low = 8 if self.rule == "dynamic" else 2
        require(self.bits in range(low, 9), "quant.scale_bits", self.bits, accepted)
        accepted = "a whole number from 16 to 256"
        require(self.group in range(16, 257), "quant.scale_group", self.group, accepted)
        require(self.dtype in types, "quant.scale_dtype", self.dtype, ", ".join(types))


DEFAULT = SecondLevel()


def _dynamic_map() -> Float32[np.ndarray, "256"]:
    values = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2**decade + 1)
        means = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)
        values += [*means, *-means]
    return np.sort(np.asarray(values, np.float32))


DYNAMIC_MAP = _dynamic_map()
_MIDPOINTS = ((DYNAMIC_MAP[1:].astype(np.float64) + DYNAMIC_MAP[:-1]) / 2).astype(np.float32)

_LEAST = 1e-35
"""Smaller maxima of the uniform rule count as 0."""


def encode_groups(
    values: Float32[Array, " n"], center: bool, level: SecondLevel = DEFAULT
) -> tuple[UInt8[Array, " n"], Float[Array, " groups"], Float32[Array, ""]]:
    """Codes, the largest magnitude of every group (the last may be short), and the offset.

    The offset is 0 without `center`. With it, it is the mean of all values, or their minimum by
    the uniform rule. Maxima beyond float16 become its largest number, and the codes saturate.

    Examples:
        >>> codes, largest, offset = encode_groups(jnp.array([0.5, 2.0, -1.0, 0.0]), center=False)
        >>> codes.tolist(), largest.tolist(), float(offset)
        ([201, 255, 35, 127], [2.0], 0.0)
        >>> level = SecondLevel("uniform", bits=2)
        >>> codes, largest, offset = encode_groups(jnp.array([0.5, 1.5, 1.0, 3.5]), True, level)
        >>> codes.tolist(), largest.tolist(), float(offset)
        ([0, 1, 0, 3], [3.0], 0.5)
    """
    n, uniform = values.shape[0], level.rule == "uniform"
    offset = jnp.zeros((), jnp.float32)
    if center:
        offset = values.min() if uniform else values.mean()
    groups = jnp.pad(values - offset, (0, -n % level.group)).reshape(-1, level.group)
    largest = jnp.abs(groups).max(axis=1)
    if uniform:  # the quotient below would overflow
        largest = jnp.where(largest < _LEAST, 0, largest)
    largest = jnp.minimum(largest, float(jnp.finfo(level.dtype).max)).astype(level.dtype)
    wide = largest.astype(jnp.float32)[:, None]
    if uniform:
        top, bottom = _ends(level, center)
        steps = jnp.round(groups * quotient(jnp.float32(top), jnp.where(wide > 0, wide, 1)))
        codes = (jnp.clip(steps, bottom, top) - bottom).astype(jnp.uint8)
    else:
        unit = groups / jnp.where(wide > 0, wide, 1)
        codes = jnp.searchsorted(jnp.asarray(_MIDPOINTS), unit, side="left").astype(jnp.uint8)
    return codes.reshape(-1)[:n], largest, offset


def decode_groups(
    codes: UInt8[Array, " n"],
    largest: Float[Array, " groups"],
    offset: Float32[Array, ""],
    center: bool = True,
    level: SecondLevel = DEFAULT,
) -> Float32[Array, " n"]:
    """Decodes the result of `encode_groups`.

    Examples:
        >>> scales = jnp.array([0.0, 1.0, 5.0])
        >>> [f"{x:.3f}" for x in decode_groups(*encode_groups(scales, center=True)).tolist()]
        ['-0.009', '1.004', '5.000']
    """
    n = codes.shape[0]
    wide = largest.astype(jnp.float32)[:, None]
    spread = jnp.broadcast_to(wide, (wide.shape[0], level.group)).reshape(-1)[:n]
    if level.rule == "dynamic":
        return jnp.asarray(DYNAMIC_MAP)[codes] * spread + offset
    top, bottom = _ends(level, center)
    steps = codes.astype(jnp.float32) + bottom
    step = quotient(jnp.float32(top), jnp.where(spread > 0, spread, 1))
    return jnp.where(spread > 0, quotient(steps, step), 0) + offset


def _ends(level: SecondLevel, center: bool) -> tuple[float, float]:
    """The largest and the smallest step of the uniform rule."""
    top = 2**level.bits - 1 if center else 2 ** (level.bits - 1) - 1
    return float(top), 0.0 if center else -float(top)


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
