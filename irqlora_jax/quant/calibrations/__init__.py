"""Calibrations: how the scales and shifts of blocks are chosen. One file per method."""

from irqlora_jax.quant.calibrations.calibration import Calibrated as Calibrated
from irqlora_jax.quant.calibrations.calibration import Calibration as Calibration
from irqlora_jax.quant.calibrations.icq import ICQ
from irqlora_jax.quant.calibrations.importance import IMPORTANCE
from irqlora_jax.quant.calibrations.joint import JOINT
from irqlora_jax.quant.calibrations.plain import GPTQ
from irqlora_jax.quant.calibrations.plain import PLAIN as PLAIN
from irqlora_jax.quant.calibrations.robust import ROBUST

CALIBRATIONS: dict[str, Calibration] = {
    one.name: one for one in (PLAIN, ICQ, JOINT, ROBUST, IMPORTANCE, GPTQ)
}
