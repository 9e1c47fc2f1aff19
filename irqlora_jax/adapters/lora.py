"""LoRA, the plain low-rank update: y += (alpha / rank) * B A x (Hu et al. 2021; QLoRA, eq. 5).

Every adapter method is one file with the same three functions:
    init(key, in_features, out_features, rank, dtype) -> parameters of one linear layer
    apply(parameters, x, dropout_x) -> the update of the output, before alpha / rank
    fold(parameters) -> the plain pair {"lora_A", "lora_B"} that computes the same update
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from irqlora_jax.sharding import split_activation

Params = dict[str, Array]


def init(
    key: PRNGKeyArray,
    in_features: int,
    out_features: int,
    rank: int,
    dtype: DTypeLike = jnp.float32,
) -> Params:
    """lora_A [rank, in] uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5), lora_B [out, rank] 0."""
    bound = 1 / math.sqrt(in_features)
    return {
        "lora_A": jax.random.uniform(key, (rank, in_features), dtype, -bound, bound),
        "lora_B": jnp.zeros((out_features, rank), dtype),
    }


def apply(
    params: Params, x: Float[Array, "*batch in"], dropped: Float[Array, "*batch in"]
) -> Float[Array, "*batch out"]:
    """B A x. `dropped` is x after dropout, which stands in front of A alone."""
    del x
    a, b = (params[name].astype(dropped.dtype) for name in ("lora_A", "lora_B"))
    return split_activation(dropped @ a.T) @ b.T


def fold(params: Params) -> Params:
    """A plain pair already."""
    return params
