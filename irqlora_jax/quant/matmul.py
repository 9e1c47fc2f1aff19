"""x @ W^T with a frozen, packed W.

The XLA path unpacks, looks up, scales, shifts and casts in one fusion in front of the matrix
product; it is the reference for every other implementation.
"""

from typing import Literal

import jax
from jaxtyping import Array, Float

from irqlora_jax.quant.qtensor import QTensor


def dequant_matmul(
    x: Float[Array, "*batch in"],
    weight: QTensor | Float[Array, "out in"],
    implementation: Literal["xla"] | None = None,
) -> Float[Array, "*batch out"]:
    """x @ weight^T in the type of x.

    A QTensor is frozen: the gradient goes to x alone, and the backward pass keeps the packed
    weight, never a dequantized one. A plain array is an ordinary operand.

    Args:
        x: activations.
        weight: the matrix, [out, in].
        implementation: "xla", or None for the fastest that can serve.

    Raises:
        ValueError: no such implementation.
    """
    if implementation not in (None, "xla"):
        raise ValueError(f"implementation = {implementation!r}: accepted is None or 'xla'")
    if isinstance(weight, QTensor):
        return _frozen_matmul(x, weight)
    return x @ weight.astype(x.dtype).T


@jax.custom_vjp
def _frozen_matmul(x: Array, weight: QTensor) -> Array:
    return x @ weight.dequantize(x.dtype).T


def _forward(x: Array, weight: QTensor) -> tuple[Array, QTensor]:
    return _frozen_matmul(x, weight), weight


def _backward(weight: QTensor, g: Array) -> tuple[Array, None]:
    return g @ weight.dequantize(g.dtype), None


_frozen_matmul.defvjp(_forward, _backward)
