"""Scales and shifts of the blocks, trained together with an adapter (EfficientQAT's end-to-end
phase, arXiv 2407.11062, section 3.3, trains scales without an adapter).

    W = (1 + u) s levels[c] + t + v s

s and t are the stored scale and shift of a block. u and v are trained and start at 0. They are
relative to the scale, so one learning rate serves all blocks and also the adapter.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.sharding import Splits

SPLITS: Splits = {"block_scale": ("out", "blocks"), "block_shift": ("out", "blocks")}
"""The leaves u and v [out, blocks], and how a mesh splits them."""


def init(shape: tuple[int, int], block_size: int, dtype: DTypeLike) -> dict[str, Array]:
    """u and v, both 0.

    Examples:
        >>> {name: value.shape for name, value in init((8, 100), 64, jnp.float32).items()}
        {'block_scale': (8, 2), 'block_shift': (8, 2)}
    """
    blocks = shape[0], -(-shape[1] // block_size)
    return {name: jnp.zeros(blocks, dtype) for name in SPLITS}


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The leaves of this file, and all other parameters of a linear layer."""
    own = {name: value for name, value in params.items() if name in SPLITS}
    return own, {name: value for name, value in params.items() if name not in SPLITS}


def put(params: dict[str, Array], weight: Any) -> QTensor:
    """The weight with u and v applied.

    Args:
        params: {"block_scale": u, "block_shift": v}, both [out, blocks].
        weight: a QTensor [out, in]. It may have updates of an earlier training.

    Raises:
        ValueError: not a QTensor, its blocks differ, or it has outliers, which have no scale.
    """
    given = params["block_scale"].shape
    if not isinstance(weight, QTensor):
        raise ValueError("adapter.scales: the base is not quantized; expected 0")
    if weight.grid != given:
        raise ValueError(
            f"adapter.scales: {given[1]} blocks in a row, but the base has "
            f"{weight.grid[1]} of {weight.block_size} weights; expected its block size"
        )
    if weight.outliers is not None:
        raise ValueError(
            "adapter.scales: the base has outliers; expected 0, or a base without them"
        )
    scale = weight.scale()
    changes = {"scale_update": params["block_scale"], "shift_update": params["block_shift"]}
    updates = {name: scale * value.astype(jnp.float32) for name, value in changes.items()}
    for name, value in updates.items():
        earlier = getattr(weight, name)
        updates[name] = value if earlier is None else value + earlier.astype(jnp.float32)
    return dataclasses.replace(weight, **updates)
