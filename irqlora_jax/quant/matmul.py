"""x @ W^T with a frozen, packed W, by the fastest implementation that can serve.

The XLA path unpacks, looks up, scales, shifts and casts in one fusion in front of the matrix
product; it serves everything, and is the reference for every other implementation.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
from jaxtyping import Array, Float

from irqlora_jax.quant.qtensor import QTensor


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A way to compute x @ W^T, and with it the gradient of x.

    Attributes:
        name: as asked for.
        refusal: of x and W, why it cannot serve them (device, shape, format or version of jax);
            None if it can.
        forward: of x and W, x @ W^T in the type of x.
        backward: of the gradient g and W, g @ W in the type of g.
    """

    name: str
    refusal: Callable[[Array, QTensor], str | None]
    forward: Callable[[Array, QTensor], Array]
    backward: Callable[[Array, QTensor], Array]


def _serves_all(x: Array, weight: QTensor) -> None:
    return None


def _xla_forward(x: Array, weight: QTensor) -> Array:
    return x @ weight.dequantize(x.dtype).T


def _xla_backward(g: Array, weight: QTensor) -> Array:
    return g @ weight.dequantize(g.dtype)


XLA = Implementation("xla", _serves_all, _xla_forward, _xla_backward)
IMPLEMENTATIONS = (XLA,)
"""The fastest first; the last one serves everything."""


def dequant_matmul(
    x: Float[Array, "*batch in"],
    weight: QTensor | Float[Array, "out in"],
    implementation: Literal["xla", "mosaic", "triton"] | None = None,
    implementations: Sequence[Implementation] = IMPLEMENTATIONS,
) -> Float[Array, "*batch out"]:
    """x @ weight^T in the type of x.

    A QTensor is frozen: the gradient goes to x alone, and the backward pass keeps the packed
    weight, never a dequantized one. A plain array is an ordinary operand.

    Args:
        x: activations.
        weight: the matrix, [out, in].
        implementation: the name of one, or None for the first that can serve.
        implementations: those there are, the fastest first.

    Raises:
        ValueError: the implementation asked for does not exist or cannot serve; says why, and
            which would.
    """
    if isinstance(weight, QTensor):
        return _frozen_matmul(_choose(x, weight, implementation, implementations), x, weight)
    if implementation not in (None, "xla"):
        raise ValueError(
            f"implementation = {implementation!r}: it takes packed weights, this one is "
            f"{weight.dtype}; accepted here is 'xla' or None"
        )
    return x @ weight.astype(x.dtype).T


def _choose(
    x: Array, weight: QTensor, name: str | None, implementations: Sequence[Implementation]
) -> Implementation:
    """The implementation of that name, or the first one that can serve."""
    refusals = {one.name: one.refusal(x, weight) for one in implementations}
    serving = [one for one in implementations if refusals[one.name] is None]
    if name is None:
        return serving[0]
    for one in serving:
        if one.name == name:
            return one
    reason = refusals.get(name, "there is no such kernel in this version")
    rows, columns = weight.shape
    would = " or ".join(repr(one.name) for one in serving)
    raise ValueError(
        f"implementation = {name!r}: {reason}; {would} serves {weight.format} of "
        f"[out, in] = [{rows}, {columns}] on {jax.devices()[0].device_kind}"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _frozen_matmul(chosen: Implementation, x: Array, weight: QTensor) -> Array:
    return chosen.forward(*_apart(x, weight))


def _forward(chosen: Implementation, x: Array, weight: QTensor) -> tuple[Array, QTensor]:
    return _frozen_matmul(chosen, x, weight), weight


def _backward(chosen: Implementation, weight: QTensor, g: Array) -> tuple[Array, None]:
    return chosen.backward(*_apart(g, weight)), None


def _apart(x: Array, weight: QTensor) -> tuple[Array, QTensor]:
    """The same, such that XLA does not merge the product with others of x (its adapter's, or those
    of q, k and v): for GPUs it would dequantize into larger matrices, one for each direction.

    Products are merged if they share an operand, so x comes from a barrier of this weight alone.
    The weight itself does not: what it is dequantized to is the same in both directions.
    """
    x, _ = jax.lax.optimization_barrier((x, weight.scale_offset))
    return x, weight


_frozen_matmul.defvjp(_forward, _backward)
