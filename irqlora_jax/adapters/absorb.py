"""Puts what was trained into the floats of a quantized weight, exactly and without more codes.

An update that is the same for all weights of a block only changes the shift of the block. QA-LoRA
(arXiv 2309.14717, section 3.3) does this with the zero points of integers. A shift exists for
every format, so here it works for NormalFloat and FP4 too.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float32

from irqlora_jax.adapters import scales
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.quant.qtensor import QTensor


def absorb(
    adapter: AdapterConfig, params: dict[str, Array], weight: Any, dtype: DTypeLike = jnp.float32
) -> QTensor:
    """The weight with the trained update inside. The result needs no adapter.

    Args:
        adapter: configuration of the adapter.
        params: its parameters for one linear layer.
        weight: the frozen weight, a QTensor [out, in].
        dtype: type of the stored updates. float32 is exact up to one addition; float16 keeps an
            update to 0.05 %, in half of the memory.

    Raises:
        ValueError: the update is not constant within the blocks, or the weight is not a QTensor or
            has outliers. The message says what would do.
    """
    own, params = scales.split(params)
    if not isinstance(weight, QTensor):
        raise ValueError("the base is not quantized; expected kind merged")
    if weight.outliers is not None:
        raise ValueError(
            "the base has outliers, which have no shift to put the update into; expected kind "
            "merged, or a base without outliers"
        )
    change = _block_update(adapter, params, weight)
    if own:
        weight = scales.put(own, weight)
    if weight.shift_update is not None:
        change = weight.shift_update.astype(jnp.float32) + change
    updates = {"scale_update": weight.scale_update, "shift_update": change}
    return dataclasses.replace(
        weight,
        **{name: None if u is None else u.astype(dtype) for name, u in updates.items()},
    )


def _block_update(
    adapter: AdapterConfig, params: dict[str, Array], weight: QTensor
) -> Float32[Array, "out blocks"]:
    """The scaled update of every weight of a block."""
    method, (rows, columns), size = adapter.chosen, weight.shape, weight.block_size
    if method.reduced is None:
        raise ValueError(
            f"the update of {method.title} differs within a block; expected kind merged, or an "
            "adapter.method with pooled inputs: qalora, qalora_iec, qbara or qahira"
        )
    update = method.reduced(
        {name: value.astype(jnp.float32) for name, value in params.items()}, (rows, columns)
    )
    group = columns // update.shape[1]
    if group % size:
        raise ValueError(
            f"the update of {method.title} is constant over {group} inputs, but the blocks of the "
            f"base have {size} weights; expected a multiple of {size} (adapter.{method.name}; for "
            "qalora_iec also in / gcd(in, adapter.rank)), or kind merged"
        )
    return jnp.repeat(update, group // size, axis=1) * adapter.scale_for((rows, columns))
