"""A budget for the size of a base, and the formats that share it (`base/budget.py`)."""

import dataclasses
import fractions
import itertools
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from irqlora_jax.quant.formats import FORMATS
from irqlora_jax.text import refusal, require

FIT = "fit"
"""The budget of the largest base that fits the device."""
_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_ACCEPTED = (
    'bits a weight such as 2.75, a size such as "27GB" or "900MB" (also GiB and MiB), or "fit"'
)
ErrorKind = Literal["weights", "inputs", "fisher", "sensitivity"]
_ERRORS = get_args(ErrorKind)


@dataclasses.dataclass(frozen=True)
class Budget:
    """A limit for what is stored.

    Attributes:
        amount: bits a weight of the linear layers, or bytes of the base; None: what fits.
        whole: whether the amount is the size of the whole base, in bytes.
    """

    amount: fractions.Fraction | None
    whole: bool


def parse_budget(value: float | str) -> Budget:
    """Reads `quant.budget`.

    Raises:
        ValueError: neither bits, nor a size, nor "fit".

    Examples:
        >>> parse_budget(2.75).amount, parse_budget("1.5 GB").amount
        (Fraction(11, 4), Fraction(1500000000, 1))
        >>> parse_budget("fit")
        Budget(amount=None, whole=True)
    """
    if value == FIT:
        return Budget(None, True)
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{0,15})?)\s*([a-z]*)", str(value).strip().lower())
    unit = found[2] if found is not None else None
    if (
        found is None
        or (unit and unit not in _UNITS)
        or not (amount := fractions.Fraction(found[1]))
    ):
        raise refusal("quant.budget", value, _ACCEPTED)
    return Budget(amount * _UNITS[unit], True) if unit else Budget(amount, False)


@dataclasses.dataclass(frozen=True)
class AllocationOptions:
    """How `quant.budget` chooses."""

    formats: tuple[str, ...] = ("nf2", "nf3", "nf4")
    """Formats to choose from. Every format is offered with every block size and every number of
    bits of a scale."""
    block_sizes: tuple[int, ...] = (32, 64, 128)
    """Block sizes to choose from."""
    scale_bits: tuple[int, ...] = (4, 8)
    """Bits of a stored scale or shift to choose from. Fewer than 8 have `scale_rule` uniform."""
    errors: ErrorKind = "weights"
    """Whose sum is the least. "weights": squared errors of the weights. "inputs": relative squared
    errors of the outputs, for the inputs of a text (`calibrate.data`). "fisher": squared errors of
    the weights, weighed by the squared gradients of a text (with `calibrate.metric` gradients;
    LQ-LoRA). "sensitivity": squared errors of the weights, scaled for each matrix to the loss
    that `irqlora sensitivity` measured. They are computed with `quant.calibration`, or without one
    if it needs a text. A pair that `adapter.init` fits is not considered: the errors are those
    before it corrects some of them (`base.budget.choose_rules` can consider it)."""
    sensitivity: str | None = None
    """The sensitivity.json for `errors` sensitivity."""
    tie: int = 1
    """Number of consecutive layers that are stored alike. More layers give fewer rules and compile
    faster, and the error is a little larger."""

    def __post_init__(self) -> None:
        where = "quant.allocation"
        for name in ("formats", "block_sizes", "scale_bits"):
            value = getattr(self, name)
            ok = len(value) > 0 and len(set(value)) == len(value)
            require(ok, f"{where}.{name}", value, "a list of different values")
        for name in self.formats:
            require(name in FORMATS, f"{where}.formats", name, ", ".join(FORMATS))
        for bits in self.scale_bits:
            require(bits in range(2, 9), f"{where}.scale_bits", bits, "numbers from 2 to 8")
        require(self.errors in _ERRORS, f"{where}.errors", self.errors, ", ".join(_ERRORS))
        ok = (self.errors == "sensitivity") == (self.sensitivity is not None)
        accepted = "the sensitivity.json of irqlora sensitivity" if not self.sensitivity else "null"
        require(
            ok, f"{where}.sensitivity", self.sensitivity, f"{accepted} with errors {self.errors}"
        )
        require(self.tie >= 1, f"{where}.tie", self.tie, "a whole number of at least 1")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AllocationOptions":
        """Reads the output of `dataclasses.asdict`, or JSON of it."""
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**given)

    @property
    def needs_text(self) -> bool:
        """Whether the errors depend on a text."""
        return self.errors in ("inputs", "fisher")

    @property
    def candidates(self) -> tuple[dict[str, Any], ...]:
        """The fields of `quant` that every candidate sets.

        Examples:
            >>> AllocationOptions(("nf3",), (64,), (4, 8)).candidates[0]
            {'format': 'nf3', 'block_size': 64, 'scale_bits': 4, 'scale_rule': 'uniform'}
        """
        return tuple(
            {"format": format, "block_size": size, "scale_bits": bits}
            | ({"scale_rule": "uniform"} if bits < 8 else {})
            for format, size, bits in itertools.product(
                self.formats, self.block_sizes, self.scale_bits
            )
        )
