"""The plain quantizer: the largest weight of a block determines its scale (QLoRA). For integers,
the range of the block determines scale and zero point."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from irqlora_jax.quant.calibrations.calibration import Calibrated, Calibration
from irqlora_jax.quant.calibrations.icq_integer import plain_range
from irqlora_jax.quant.formats import Format


def block_ends(
    blocks: Float[Array, "n block"], valid: Int[Array, " n"] | None
) -> tuple[Float32[Array, " n"], Float32[Array, " n"]]:
    """The smallest and the largest weight of every block."""
    low = high = blocks.astype(jnp.float32)
    if valid is not None:
        inside = jnp.arange(blocks.shape[1])[None, :] < valid[:, None]
        low, high = jnp.where(inside, low, jnp.inf), jnp.where(inside, high, -jnp.inf)
    return low.min(axis=1), high.max(axis=1)


def _calibrate(
    blocks: Array,
    format: Format,
    symmetric: bool,
    options: Any,
    valid: Array | None,
    inputs: Array | None,
) -> Calibrated:
    if format.integer:
        scale, zero = plain_range(blocks, format.bits, symmetric, valid)
        return Calibrated(scale=scale, zero=zero)
    low, high = block_ends(blocks, valid)
    return Calibrated(low=low, high=high)


PLAIN = Calibration("none", "", "no calibration", _calibrate)
GPTQ = Calibration("gptq", "GPTQ", "GPTQ (rounding with error feedback)", _calibrate, feedback=True)
