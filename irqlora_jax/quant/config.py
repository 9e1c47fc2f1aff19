"""Configuration of the quantizer."""

import dataclasses
from typing import Literal

from irqlora_jax.text import require

Format = Literal["nf4", "nf3", "nf2", "fp4", "int4", "int3", "int2", "none"]


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How the frozen linear layers are stored."""

    format: Format = "nf4"
    """Code book. "none" keeps the weights as they are (plain LoRA)."""
    block_size: int = 64
    """Weights that share a scale and a shift; a multiple of 8."""
    calibration: Literal["none", "icq", "joint"] = "icq"
    """"none": scale from the largest weight. "icq": also the shift (NormalFloat, FP4) or the range
    (integers) that maximizes the entropy of each block's codes (IR-QLoRA, section 3.2). "joint":
    the scale and the shift that maximize entropy - error_weight * error / variance."""
    error_weight: float = 100.0
    """Joint only: bits of entropy that a relative squared error of 1 costs. 0: entropy alone; .inf:
    error alone."""
    refine_steps: int = 4
    """Joint only: least-squares steps at the end; a block keeps those by which its error falls."""
    symmetric: bool = False
    """Integers only: zero point fixed in the middle of the codes."""
    search: Literal["range", "zero_point"] = "range"
    """Integers only, what ICQ moves: the "range" as in the released code, or the "zero_point" at a
    fixed scale as in the paper's text."""
    search_range: float = 0.1
    """ICQ only, lambda of the paper: half-width of the search (NormalFloat: in standard deviations
    of the block, integers: as a fraction of the block's range)."""
    search_steps: int | None = None
    """ICQ only, n of the paper: 2n+1 candidates. Null: 100, for integers 50."""
    codes_from: Literal["stored", "exact"] = "stored"
    """Statistics that the codes are computed against: the "stored" (rounded) scale and shift, which
    the dequantizer uses, or the "exact" ones, as the released code does (for parity only)."""

    def __post_init__(self) -> None:
        size = self.block_size
        require(size > 0 and size % 8 == 0, "quant.block_size", size, "a positive multiple of 8")
        width = self.search_range
        require(0 < width < 1, "quant.search_range", width, "a number between 0 and 1")
        steps = self.search_steps
        ok = steps is None or steps >= 1
        require(ok, "quant.search_steps", steps, "a whole number of at least 1, or null")
        weight = self.error_weight
        require(weight >= 0, "quant.error_weight", weight, "a number from 0 to .inf")
        ok = self.refine_steps >= 0
        require(ok, "quant.refine_steps", self.refine_steps, "a whole number of at least 0")
        integer = self.format.startswith("int")
        ok = integer or not self.symmetric
        require(ok, "quant.symmetric", self.symmetric, f"false with quant.format {self.format}")
        ok = integer or self.search == "range"
        require(ok, "quant.search", self.search, f"range with quant.format {self.format}")
        ok = not (self.symmetric and self.search == "zero_point")
        require(ok, "quant.search", self.search, "range with quant.symmetric true")
        ok = self.calibration != "joint" or self.search == "range"
        require(ok, "quant.search", self.search, "range with quant.calibration joint")

    @property
    def label(self) -> str:
        """Format and calibration as a table names them."""
        how = {"none": "", "icq": " + ICQ", "joint": " + joint"}[self.calibration]
        return self.format + how if how else f"plain {self.format}"
