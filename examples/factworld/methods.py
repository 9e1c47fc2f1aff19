"""The methods that ablation.py compares."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.loftq import LoftqOptions
from irqlora_jax.quant.calibrations.joint import JointOptions


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the table: how to quantize and what to train."""

    quant: Mapping[str, Any]
    """Fields of QuantConfig besides the format; format "none" is full precision."""
    adapter: Mapping[str, Any] | None
    """Fields of AdapterConfig besides rank and alpha. None: not finetuned."""
    frozen: tuple[str, ...] = ()
    """Parameters of the adapter that stay at 0."""
    rank: int = 8
    """Alpha is twice the rank, so alpha / rank is always 2."""
    lora_plus_ratio: float = 1.0
    """As in TrainConfig."""

    def adapter_config(self) -> AdapterConfig | None:
        """The adapter; None without a finetune."""
        if self.adapter is None:
            return None
        return AdapterConfig(**({"rank": self.rank, "alpha": 2.0 * self.rank} | dict(self.adapter)))

    @property
    def full(self) -> bool:
        """Whether nothing is quantized. Then each seed has one run, not one for each format."""
        return self.quant.get("format") == "none"


_PLAIN, _ICQ = {"calibration": "none"}, {"calibration": "icq"}
_ERROR = {"calibration": "joint", "joint": JointOptions(float("inf"))}
_FEEDBACK = {"calibration": "importance", "rounding": "feedback"}
_LORA, _IEC = {"method": "lora"}, {"method": "iec"}
METHODS = {
    "full": Method({"format": "none"}, None),
    "full+lora": Method({"format": "none"}, _LORA),
    "plain": Method(_PLAIN, None),
    "qlora": Method(_PLAIN, _LORA),
    "icq": Method(_ICQ, _LORA),
    "iec": Method(_PLAIN, _IEC),
    "u1": Method(_PLAIN, _IEC, frozen=("beta2",)),
    "u2": Method(_PLAIN, _IEC, frozen=("beta1",)),
    "ir-qlora": Method(_ICQ, _IEC),
    "joint": Method({"calibration": "joint"}, _LORA),
    "error": Method(_ERROR, _LORA),
    "error+loftq": Method(_ERROR, _LORA | {"init": "loftq", "loftq": LoftqOptions(3)}),
    "robust": Method({"calibration": "robust"}, _LORA),
    "importance": Method({"calibration": "importance"}, _LORA),
    "feedback": Method(_FEEDBACK, _LORA),
    "feedback+cloq": Method(_FEEDBACK, _LORA | {"init": "cloq"}),
}
"""Those with importance calibration read rows that are trained on."""
_LATER = ("robust", "importance", "feedback", "feedback+cloq")
DEFAULT = tuple(name for name in METHODS if name not in _LATER)
"""The rows of the committed ablation."""
