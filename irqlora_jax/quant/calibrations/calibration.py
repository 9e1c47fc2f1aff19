"""The contract of a calibration: how the scales and shifts of blocks are chosen.

A calibration is one file that defines a `Calibration`, plus one entry in `CALIBRATIONS`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from jaxtyping import Array

from irqlora_jax.quant.formats import Format


class Calibrated(NamedTuple):
    """Results of a search: arrays with one float32 for each of n blocks.

    Attributes:
        scale: the scale. None: max|w - shift|, computed from `low` and `high`.
        zero: integer formats: the zero point.
        shift: NormalFloat and FP4: the shift; None means 0.
        low: smallest weight of the block; required if `scale` is None.
        high: largest weight of the block; required if `scale` is None.
    """

    scale: Array | None = None
    zero: Array | None = None
    shift: Array | None = None
    low: Array | None = None
    high: Array | None = None


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Everything that the rest of the package knows about a calibration.

    Attributes:
        name: value of `quant.calibration`.
        title: short name for tables, such as "ICQ"; "" for the plain quantizer.
        description: the name for use in a sentence of a model card.
        search: (blocks [n, block], format, symmetric, options, valid, inputs) -> `Calibrated`.
            `valid` [n] is the number of real weights in each block (None: all). Padding must not
            affect the result. `inputs` [period, block] are the second moments of the inputs, where
            block i has row i % period; None with `needs` "nothing". jax.jit traces the function.
        needs: "inputs" if the search needs the second moments of the layer's inputs.
        feedback: whether the codes are always computed with error feedback (`quant/feedback.py`).
        options: default options, a frozen dataclass; None for a calibration without options. A
            calibration with options needs a field with its name in `QuantConfig`.
        refusal: (format, symmetric, options) -> a sentence that names the unsupported setting and
            the accepted ones; None if all settings are supported.
        most_bits: width of the widest codes that the search supports.
    """

    name: str
    title: str
    description: str
    search: Callable[[Array, Format, bool, Any, Array | None, Array | None], Calibrated]
    needs: Literal["nothing", "inputs"] = "nothing"
    feedback: bool = False
    options: Any = None
    refusal: Callable[[Format, bool, Any], str | None] = lambda format, symmetric, options: None
    most_bits: int = 8
