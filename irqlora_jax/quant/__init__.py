"""Quantized matrices: formats, calibrations, storage and products."""

from irqlora_jax.quant.calibrations import icq as icq
from irqlora_jax.quant.calibrations import icq_integer as icq_integer
from irqlora_jax.quant.calibrations import joint as joint
