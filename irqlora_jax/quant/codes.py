"""The codes of weights for given scales and shifts: nearest levels, or with error feedback."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int, UInt8

from irqlora_jax.quant.entropy import quotient
from irqlora_jax.quant.feedback import round_with_feedback
from irqlora_jax.quant.formats import Format


class Feedback(NamedTuple):
    """Order of the columns, and the `feedback_factor` of the inputs in this order."""

    order: Int[Array, " in"]
    factor: Float32[Array, "in in"]


def encode_codes(
    blocks: Float32[Array, "n size"],
    fmt: Format,
    scale: Float32[Array, " n"],
    zero: Float32[Array, " n"] | None,
    shift: Float32[Array, " n"] | None,
) -> UInt8[Array, "n size"]:
    """Finds the code of the level nearest to each weight."""
    centered = blocks if shift is None else blocks - shift[:, None]
    safe = jnp.where(scale == 0, 1, scale)[:, None]
    if fmt.integer:
        assert zero is not None
        # Adds a whole zero point after rounding, as in the released code, which affects ties.
        whole = jnp.floor(zero)[:, None]
        codes = jnp.round(quotient(centered, safe) + (zero[:, None] - whole)) + whole
        return jnp.clip(codes, 0, 2**fmt.bits - 1).astype(jnp.uint8)
    # Multiplies by the reciprocal like bitsandbytes; integers divide. This affects ties.
    rank = rank_of(centered * (1 / safe), fmt)
    if fmt.order == tuple(range(len(fmt.order))):
        return rank
    return jnp.asarray(fmt.order, jnp.uint8)[rank]


def rank_of(x: Float32[Array, "..."], fmt: Format) -> UInt8[Array, "..."]:
    """How many decision points are below x: the place of its level in ascending order."""
    if fmt.bits == 8:  # a program of 255 comparisons would take long to compile
        points = jnp.asarray(fmt.midpoints)
        return jnp.searchsorted(points, x, side="left").astype(jnp.uint8)
    rank = jnp.zeros(x.shape, jnp.uint8)
    for midpoint in fmt.midpoints:
        rank += (x > midpoint).astype(jnp.uint8)
    return rank


def codes_with_feedback(
    weight: Float32[Array, "out in"],
    kept: Bool[Array, "out in"] | None,
    fmt: Format,
    size: int,
    feedback: Feedback,
    scale: Float32[Array, "out blocks"],
    zero: Float32[Array, "out blocks"] | None,
    shift: Float32[Array, "out blocks"] | None,
) -> UInt8[Array, "out in"]:
    """The codes of whole rows with error feedback. Outliers pass on what reaches them."""
    if zero is not None:
        shift = -zero * scale
    levels = jnp.asarray(fmt.table)

    def round_column(column: Array, index: Array) -> tuple[Array, Array]:
        own = jax.tree.map(lambda x: x[:, index // size], (scale, zero, shift))
        if kept is not None:
            column = jnp.where(kept[:, index], weight[:, index], column)
        codes = encode_codes(column[:, None], fmt, own[0], own[1], None if fmt.integer else own[2])
        values = levels[codes[:, 0]] * own[0]
        values = values if own[2] is None else values + own[2]
        return codes[:, 0], values if kept is None else jnp.where(kept[:, index], column, values)

    return round_with_feedback(weight, feedback.factor, round_column, feedback.order)
