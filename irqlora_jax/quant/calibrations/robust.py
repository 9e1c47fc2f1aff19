"""Robust calibration: the joint search, with squared errors weighed for inputs of unknown size.

The error of an output is sum_j x_j (w_j - w'_j), and in trained models a few inputs x_j are far
larger than the rest. The weights alone do not tell which ones, but they are often among the largest
or the smallest weights of their blocks. The least error of the weights harms both kinds: it clips
large weights, and it moves the level 0 away from small ones. With r = |w| / (root mean square of
the block), the squared errors therefore get the factor

    2 r^2 + 1 / (r^2 + 0.02)

benchmarks/results/2026-11-29-calibration-real.md has the comparison with other factors, and with
measured inputs.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from irqlora_jax.quant.calibrations import joint
from irqlora_jax.quant.calibrations.calibration import Calibrated, Calibration
from irqlora_jax.quant.entropy import masked
from irqlora_jax.quant.formats import Format

_LARGE, _SMALL = 2.0, 0.02


def weigh(
    w: Float32[Array, "block b"], count: Int32[Array, " b"] | None
) -> Float32[Array, "block b"]:
    """The factors of the squared errors.

    Examples:
        >>> factors = weigh(jnp.array([[0.0], [0.5], [1.0], [2.0]]), None)
        >>> [round(x, 1) for x in factors.ravel().tolist()]
        [50.0, 5.1, 2.8, 6.4]
    """
    w = masked(jnp.abs(w), count, 0)
    largest = w.max(0, keepdims=True)
    squares = (w / jnp.where(largest > 0, largest, 1)) ** 2
    size = w.shape[0] if count is None else count.astype(jnp.float32)[None]
    mean = squares.sum(0, keepdims=True) / size
    relative = squares / jnp.where(mean > 0, mean, 1)
    return _LARGE * relative + 1 / (relative + _SMALL)


def _calibrate(
    blocks: Array,
    format: Format,
    symmetric: bool,
    options: Any,
    valid: Array | None,
    inputs: Array | None,
) -> Calibrated:
    found = joint.search(blocks, format, symmetric, float("inf"), valid=valid, weigh=weigh)
    return joint.calibrated(format, symmetric, *found)


ROBUST = Calibration("robust", "robust", "robust calibration", _calibrate, most_bits=4)
