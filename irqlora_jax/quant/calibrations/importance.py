"""Importance calibration: the scale and shift of least error, weighed by the inputs of the layer.

The error of an output is sum_j x_j (w_j - w'_j). If the inputs were not correlated, its mean square
would be sum_j E[x_j^2] (w_j - w'_j)^2. So the joint search (`joint.py`) minimizes the squared error
of each block with the factors E[x_j^2], as llama.cpp's importance matrix does. The storage is the
same as without them.
"""

from typing import Any

from jaxtyping import Array

from irqlora_jax.quant.calibrations import joint
from irqlora_jax.quant.calibrations.calibration import Calibrated, Calibration
from irqlora_jax.quant.formats import Format


def _calibrate(
    blocks: Array,
    format: Format,
    symmetric: bool,
    options: Any,
    valid: Array | None,
    inputs: Array | None,
) -> Calibrated:
    found = joint.search(blocks, format, symmetric, float("inf"), valid=valid, inputs=inputs)
    return joint.calibrated(format, symmetric, *found)


IMPORTANCE = Calibration(
    "importance",
    "importance",
    "importance calibration",
    _calibrate,
    needs="inputs",
    most_bits=4,
)
