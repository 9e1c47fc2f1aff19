"""LoRA, the plain low-rank update: y += (alpha / rank) * B A x (Hu et al. 2021; QLoRA, eq. 5)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from irqlora_jax.adapters.method import Method, Params
from irqlora_jax.sharding import split_activation


def init(
    key: PRNGKeyArray,
    in_features: int,
    out_features: int,
    rank: int,
    dtype: DTypeLike = jnp.float32,
) -> Params:
    """lora_A [rank, in] uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5), lora_B [out, rank] 0.

    Examples:
        >>> params = init(jax.random.key(0), 16, 8, rank=2)
        >>> {name: value.shape for name, value in params.items()}
        {'lora_A': (2, 16), 'lora_B': (8, 2)}
    """
    bound = 1 / math.sqrt(in_features)
    return {
        "lora_A": jax.random.uniform(key, (rank, in_features), dtype, -bound, bound),
        "lora_B": jnp.zeros((out_features, rank), dtype),
    }


def apply(
    params: Params,
    x: Float[Array, "*batch in"],
    dropped: Float[Array, "*batch in"],
    scale: float = 1.0,
) -> Float[Array, "*batch out"]:
    """scale * B A x. `dropped` is x after dropout, which is applied only in front of A.

    Examples:
        >>> params = {"lora_A": jnp.array([[1.0, 2.0]]), "lora_B": jnp.array([[1.0], [0.0]])}
        >>> x = jnp.array([[3.0, 4.0]])
        >>> apply(params, x, x, scale=0.5).tolist()
        [[5.5, 0.0]]
    """
    del x
    a, b = (params[name].astype(dropped.dtype) for name in ("lora_A", "lora_B"))
    return expand(split_activation(dropped @ a.T) * scale, b)


@jax.custom_vjp
def expand(u: Float[Array, "*batch rank"], b: Float[Array, "out rank"]) -> Array:
    """u @ b^T, with a cheaper gradient of b.

    This gradient transposes the few features of u. The gradient of jax would transpose the gradient
    of all outputs, which CPUs do in memory.
    """
    return u @ b.T


def _expand_forward(u: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return u @ b.T, (u, b)


def _expand_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    u, b = saved
    rows, gradients = u.reshape(-1, u.shape[-1]), g.reshape(-1, g.shape[-1])
    return g @ b, (rows.T @ gradients).T


expand.defvjp(_expand_forward, _expand_backward)


def fold(params: Params) -> Params:
    """Returns the parameters, which already are a plain pair.

    Examples:
        >>> params = init(jax.random.key(0), 16, 8, rank=2)
        >>> fold(params) is params
        True
    """
    return params


def peft_fields(adapter: Any, dora: bool = False) -> dict[str, Any]:
    """Fields of PEFT's adapter_config.json; `adapter` is an `AdapterConfig`."""
    return {
        "peft_type": "LORA",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.scaling == "sqrt_rank",
        "use_dora": dora,
        "bias": "none",
        "fan_in_fan_out": False,
    }


LORA = Method(
    name="lora",
    title="LoRA",
    description="a LoRA adapter",
    init=lambda key, shape, rank, options, dtype: init(key, shape[1], shape[0], rank, dtype),
    apply=lambda params, x, dropped, scale, weight: apply(params, x, dropped, scale),
    files={"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"},
    fold=lambda params, shape: fold(params),
    peft=peft_fields,
)
