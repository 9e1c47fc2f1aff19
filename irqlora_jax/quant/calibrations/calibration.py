"""The contract of a calibration: how the scales and shifts of blocks are chosen.

A calibration is one file that defines one `Calibration`, and one line of `CALIBRATIONS`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array

from irqlora_jax.quant.formats import Format


class Calibrated(NamedTuple):
    """What a search found, one float32 for each of n blocks.

    Attributes:
        scale: the scale. None: max|w - shift|, from `low` and `high`.
        zero: integer formats: the zero point.
        shift: NormalFloat and FP4: the shift; None is 0.
        low: smallest weight of the block; needed where `scale` is None.
        high: largest weight of the block; needed where `scale` is None.
    """

    scale: Array | None = None
    zero: Array | None = None
    shift: Array | None = None
    low: Array | None = None
    high: Array | None = None


@dataclasses.dataclass(frozen=True)
class Calibration:
    """All that the rest of the package knows of a calibration.

    Attributes:
        name: value of `quant.calibration`.
        title: short name for tables, such as "ICQ"; "" for the plain quantizer.
        description: the name as a sentence of a model card uses it.
        search: (blocks [n, block], format, symmetric, options, valid) -> what it found. `valid` is
            the number of real weights of each block [n], or None where all are real; the padding of
            a block must not count. The function is traced by jax.jit.
        options: default options, a frozen dataclass; None for a calibration without options. A
            calibration with options has a field of its name in `QuantConfig`.
        refusal: (format, symmetric, options) -> a sentence that says which setting the calibration
            cannot serve and what it accepts, or None.
    """

    name: str
    title: str
    description: str
    search: Callable[[Array, Format, bool, Any, Array | None], Calibrated]
    options: Any = None
    refusal: Callable[[Format, bool, Any], str | None] = lambda format, symmetric, options: None
