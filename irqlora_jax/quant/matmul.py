"""x @ W^T with a frozen, packed W, by the fastest implementation that can serve.

The XLA path unpacks, looks up, scales, shifts and casts in one fusion in front of the matrix
product; it serves everything, and is the reference for every other implementation.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jaxtyping import Array, Float

from irqlora_jax.quant import packing
from irqlora_jax.quant.qtensor import QTensor

MatmulName = Literal["xla", "mosaic", "triton"]
Product = Callable[[Array, QTensor], Array]
FORWARD, BACKWARD = "matmul", "matmul_transposed"
"""y = x W^T, and the gradient of x, g W."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A way to compute x @ W^T, and with it the gradient of x.

    Attributes:
        name: as asked for.
        refusal: of x and W, why it cannot serve them (device, shape, format or version of jax);
            None if it can.
        forward: of x and W, x @ W^T in the type of x.
        backward: of the gradient g and W, g @ W in the type of g.
        is_faster: of an operation ("matmul", or "matmul_transposed" for the gradient), x and W,
            whether it was measured to be faster here than XLA's path. Only then is it taken without
            being asked for.
    """

    name: str
    refusal: Callable[[Array, QTensor], str | None]
    forward: Product
    backward: Product
    is_faster: Callable[[str, Array, QTensor], bool]


def was_faster(name: str) -> Callable[[str, Array, QTensor], bool]:
    """`Implementation.is_faster` by what is committed (kernels/measured.py)."""

    def is_faster(operation: str, x: Array, weight: QTensor) -> bool:
        from irqlora_jax.kernels import measured  # type: ignore

        kind, rows = jax.devices()[0].device_kind, math.prod(x.shape[:-1])
        return measured.is_faster(operation, name, kind, weight.format, weight.shape, rows)

    return is_faster


def _serves_all(x: Array, weight: QTensor) -> None:
    return None


def _is_reference(operation: str, x: Array, weight: QTensor) -> bool:
    return True


def _xla_forward(x: Array, weight: QTensor) -> Array:
    return x @ weight.dequantize(x.dtype).T


def _xla_backward(g: Array, weight: QTensor) -> Array:
    return g @ weight.dequantize(g.dtype)


XLA = Implementation("xla", _serves_all, _xla_forward, _xla_backward, _is_reference)
"""The reference: it serves everything."""


def candidates(name: MatmulName | None) -> tuple[Implementation, ...]:
    """The implementations to choose from, those to be preferred first.

    Kernels are imported only where one is asked for or was measured to be faster at a product.
    """
    from irqlora_jax.kernels.measured import read_measurements  # type: ignore

    if name == "xla":
        return (XLA,)
    if name is None and all(one.operation == "search" for one in read_measurements()):
        return (XLA,)
    from irqlora_jax.kernels.matmul_mosaic import MOSAIC  # type: ignore
    from irqlora_jax.kernels.matmul_triton import TRITON  # type: ignore

    return (MOSAIC, TRITON, XLA)


def preferred_layout(implementation: MatmulName | None) -> str:
    """The layout (`packing.py`) that codes should have for an implementation on this device."""
    if implementation is None:
        from irqlora_jax.kernels.measured import read_measurements  # type: ignore

        kind = jax.devices()[0].device_kind
        known = {(m.implementation, m.device) for m in read_measurements() if m.speedup > 1}
        return packing.FRAGMENTS if ("mosaic", kind) in known else packing.LAYOUT
    return packing.FRAGMENTS if implementation == "mosaic" else packing.LAYOUT


def laid_out(tree: Any, implementation: MatmulName | None) -> Any:
    """A tree of arrays and QTensors with the codes of those that have several layouts (blocks of
    64) as `preferred_layout` says."""
    layout = preferred_layout(implementation)

    def lay(leaf: Any) -> Any:
        if isinstance(leaf, QTensor) and leaf.layout != layout and leaf.block_size == 64:
            return leaf.with_layout(layout)
        return leaf

    return jax.tree.map(lay, tree, is_leaf=lambda leaf: isinstance(leaf, QTensor))


def require(implementation: MatmulName | None, x: Any, weight: Any) -> None:
    """Checks that an implementation can serve, from shapes alone.

    Raises:
        ValueError: as `dequant_matmul`.
    """
    if isinstance(weight, QTensor):

        def serve(x: Array, weight: QTensor) -> Array:
            _choose(FORWARD, x, weight, implementation, candidates(implementation))
            return x

        jax.eval_shape(serve, x, weight)
    elif implementation not in (None, "xla"):
        raise ValueError(
            f"implementation = {implementation!r}: it takes packed weights, this one is "
            f"{weight.dtype}; accepted here is 'xla' or None"
        )


def dequant_matmul(
    x: Float[Array, "*batch in"],
    weight: QTensor | Float[Array, "out in"],
    implementation: MatmulName | None = None,
    implementations: Sequence[Implementation] | None = None,
) -> Float[Array, "*batch out"]:
    """x @ weight^T in the type of x.

    A QTensor is frozen: the gradient goes to x alone, and the backward pass keeps the packed
    weight, never a dequantized one. A plain array is an ordinary operand.

    Args:
        x: activations.
        weight: the matrix, [out, in].
        implementation: "xla"; "triton" or "mosaic", kernels for GPUs (kernels/README.md); None: a
            kernel where it can serve and was measured to be faster, else XLA's path.
        implementations: others than `candidates`.

    Raises:
        ValueError: the implementation asked for does not exist or cannot serve; says why, and
            which would.

    Examples:
        >>> import jax.numpy as jnp
        >>> from irqlora_jax import QuantConfig, quantize
        >>> weight = quantize(jnp.eye(16), QuantConfig(block_size=8, calibration="none"))
        >>> dequant_matmul(jnp.arange(16.0), weight)[:4].tolist()
        [0.0, 1.0, 2.0, 3.0]
        >>> jax.grad(lambda x: dequant_matmul(x, weight).sum())(jnp.ones(16))[:4].tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    if isinstance(weight, QTensor):
        if implementations is None:
            implementations = candidates(implementation)
        both = (FORWARD, BACKWARD)
        chosen = [_choose(one, x, weight, implementation, implementations) for one in both]
        return _frozen_matmul(chosen[0].forward, chosen[1].backward, x, weight)
    require(implementation, x, weight)
    return x @ weight.astype(x.dtype).T


def _choose(
    operation: str,
    x: Any,
    weight: QTensor,
    name: str | None,
    implementations: Sequence[Implementation],
) -> Implementation:
    """The implementation of that name, or the first one that is faster and can serve."""
    if name is None:
        return next(
            one
            for one in implementations
            if one.is_faster(operation, x, weight) and one.refusal(x, weight) is None
        )
    refusals = {one.name: one.refusal(x, weight) for one in implementations}
    serving = [one for one in implementations if refusals[one.name] is None]
    for one in serving:
        if one.name == name:
            return one
    reason = refusals.get(name, "there is no such implementation")
    rows, columns = weight.shape
    would = " or ".join(repr(one.name) for one in serving)
    raise ValueError(
        f"implementation = {name!r}: {reason}; {would} serves {weight.format} of "
        f"[out, in] = [{rows}, {columns}] on {jax.devices()[0].device_kind}"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _frozen_matmul(forward: Product, backward: Product, x: Array, weight: QTensor) -> Array:
    return forward(*_apart(x, weight))


def _forward(
    forward: Product, backward: Product, x: Array, weight: QTensor
) -> tuple[Array, QTensor]:
    return _frozen_matmul(forward, backward, x, weight), weight


def _backward(forward: Product, backward: Product, weight: QTensor, g: Array) -> tuple[Array, None]:
    return backward(*_apart(g, weight)), None


def _apart(x: Array, weight: QTensor) -> tuple[Array, QTensor]:
    """The same, such that XLA does not merge the product with others of x (its adapter's, or those
    of q, k and v): for GPUs it would dequantize into larger matrices, one for each direction.

    Products are merged if they share an operand, so x comes from a barrier of this weight alone.
    The weight itself does not: what it is dequantized to is the same in both directions.
    """
    x, _ = jax.lax.optimization_barrier((x, weight.scale_offset))
    return x, weight


_frozen_matmul.defvjp(_forward, _backward)
