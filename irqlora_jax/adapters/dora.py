"""DoRA: LoRA with a trained length for each row of the weight (arXiv 2402.09353, eq. 5).

    W' = m * (W + s B A) / ||W + s B A||,    the norm of each row, m [out]

A row belongs to one output (the paper writes the transposed matrix and calls it a column). As in
section 4.3 and in PEFT, the norm gets no gradient. m starts as the norm, so the update starts at 0.

The output is (m / norm) (W x + s B A x). Neither W nor W + s B A is kept between steps:

    norm^2 = ||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>    of each row

W A^T is a product with the packed weight, like W x for `rank` tokens. Dropout acts only in front of
A, as in LoRA. PEFT also drops inputs of (m / norm - 1) W x, which needs a second product with W.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from irqlora_jax.adapters import lora
from irqlora_jax.adapters.method import Method, Params
from irqlora_jax.quant.matmul import dequant_matmul
from irqlora_jax.quant.qtensor import QTensor


def row_norms(
    params: Params, weight: QTensor | Float[Array, "out in"], scale: Float[Array, ""] | float
) -> Float32[Array, " out"]:
    """||W + s B A|| of each row, without a gradient.

    Examples:
        >>> pair = {"lora_A": jnp.array([[1.0, 0.0]]), "lora_B": jnp.array([[1.0], [0.0]])}
        >>> row_norms(pair, jnp.array([[2.0, 4.0], [6.0, 8.0]]), 1.0).tolist()
        [5.0, 10.0]
    """
    frozen = {leaf: value.astype(jnp.float32) for leaf, value in params.items()}
    frozen, weight = jax.lax.stop_gradient((frozen, weight))
    a, b = frozen["lora_A"], frozen["lora_B"]
    wide = weight.dequantize() if isinstance(weight, QTensor) else weight.astype(jnp.float32)
    own = jnp.sum(wide * wide, axis=1)
    cross = jnp.sum(dequant_matmul(a, weight).T * b, axis=1)
    inner = jnp.matmul(a, a.T, precision="highest")
    low = jnp.sum(jnp.matmul(b, inner, precision="highest") * b, axis=1)
    # Rounding can make a sum that should be 0 negative.
    return jnp.sqrt(jnp.maximum(own + 2 * scale * cross + scale**2 * low, 0))


def gain(
    params: Params, weight: QTensor | Float[Array, "out in"], scale: Float[Array, ""] | float
) -> Float32[Array, " out"]:
    """m / norm, the factor of each output; 1 for a row of zeros."""
    norms = row_norms(params, weight, scale)
    safe = jnp.where(norms > 0, norms, 1)
    return jnp.where(norms > 0, params["magnitude"].astype(jnp.float32) / safe, 1)


def _init(key: Array, shape: tuple[int, int], rank: int, options: Any, dtype: Any) -> Params:
    pair = lora.init(key, shape[1], shape[0], rank, dtype)
    # Only the weight gives the magnitude. A start without it must not go unnoticed.
    return pair | {"magnitude": jnp.full(shape[:1], jnp.nan, dtype)}


def _from_weight(params: Params, weight: Any, scale: float) -> Params:
    norms = row_norms(params, weight, scale)
    return params | {"magnitude": norms.astype(params["magnitude"].dtype)}


def _delta(params: Params, shape: tuple[int, int]) -> Array:
    return jnp.matmul(params["lora_B"], params["lora_A"], precision="highest")


DORA = Method(
    name="dora",
    title="DoRA",
    description="a DoRA adapter",
    init=_init,
    from_weight=_from_weight,
    apply=lambda params, x, dropped, scale, weight: lora.apply(params, x, dropped, scale),
    gain=gain,
    delta=_delta,
    files={**lora.LORA.files, "magnitude": "lora_magnitude_vector"},
    peft=lambda adapter: lora.peft_fields(adapter, dora=True),
    splits={**lora.LORA.splits, "magnitude": ("out",)},
    faster=("lora_B", "magnitude"),
)
