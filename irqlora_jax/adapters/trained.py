"""Pairs that start as LoRA's, for the training of each decoder layer (`quant.training`).

The update is 0 at first, so the quantizer gets the weight itself. The training of the layer then
changes the pair together with the ranges (ApiQ, arXiv 2402.05147, which has the same start) or with
weights, scales and shifts. An `Initialization` only makes the start; `base/train_layer.py` trains.
"""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from irqlora_jax.adapters import lora
from irqlora_jax.adapters.method import Initialization
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.quant.inputs import InputMoments
from irqlora_jax.quant.qtensor import QTensor


def start(
    weight: Float[Array, "out in"],
    quant: QuantConfig,
    rank: int,
    scale: float,
    options: Any,
    key: PRNGKeyArray,
    dtype: DTypeLike = jnp.float32,
    *,
    gram: Float[Array, "in in"] | InputMoments | None = None,
    damping: float = 0.01,
) -> tuple[QTensor, Float[Array, "rank in"], Float[Array, "out rank"]]:
    """The quantized weight, a random lora_A and a lora_B of 0. See `Initialization.fit`.

    Raises:
        ValueError: as `quantize`.
    """
    del scale, options
    rows, columns = weight.shape
    pair = lora.init(key, columns, rows, rank, dtype)
    packed = quantize(weight, quant, gram=gram if quant.needs_inputs else None, damping=damping)
    return packed, pair["lora_A"], pair["lora_B"]


TRAINED = Initialization(name="trained", title="trained pairs", fit=start, trained=True)
