"""x @ W^T with a frozen, packed W, by the fastest implementation that can serve.

In XLA's path, one fusion in front of the matrix product unpacks the codes, looks up the levels,
scales, shifts and casts. It serves all weights and devices, and is the reference for the other
implementations.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from irqlora_jax.quant import packing
from irqlora_jax.quant.choose import Implementation, choose, kernel, serves_all
from irqlora_jax.quant.formats import get_format
from irqlora_jax.quant.qtensor import QTensor

MatmulName = Literal["xla", "mosaic", "triton"]
FORWARD, BACKWARD = "matmul", "matmul_transposed"
"""y = x W^T, and the gradient of x, g W."""


def _place(x: Array, weight: QTensor) -> tuple[str, tuple[int, int], int]:
    return weight.format, weight.shape, math.prod(x.shape[:-1])


def _xla_forward(x: Array, weight: QTensor) -> Array:
    return x @ weight.dequantize(x.dtype).T


def _xla_backward(g: Array, weight: QTensor) -> Array:
    return g @ weight.dequantize(g.dtype)


MOSAIC = kernel("mosaic", "matmul_mosaic", FORWARD, BACKWARD, place=_place)
TRITON = kernel("triton", "matmul_triton", FORWARD, BACKWARD, place=_place)
XLA = Implementation("xla", serves_all, _xla_forward, _xla_backward, takes_updates=True)
IMPLEMENTATIONS = (MOSAIC, TRITON, XLA)
"""The preferred ones first."""


def preferred_layout(implementation: MatmulName | None) -> str:
    """The layout of codes (`packing.py`) that an implementation takes on this device."""
    if implementation is None:
        from irqlora_jax.kernels.measured import read_measurements  # type: ignore

        kind = jax.devices()[0].device_kind
        known = {(m.implementation, m.device) for m in read_measurements() if m.speedup > 1}
        return packing.FRAGMENTS if ("mosaic", kind) in known else packing.LAYOUT
    return packing.FRAGMENTS if implementation == "mosaic" else packing.LAYOUT


def with_preferred_layout(tree: Any, implementation: MatmulName | None) -> Any:
    """Moves the QTensors of a tree to the `preferred_layout`.

    Only blocks of 64 in 2 to 4 bits have several layouts. Other QTensors and arrays are unchanged.
    """
    layout = preferred_layout(implementation)

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, QTensor) or leaf.layout == layout:
            return leaf
        able = packing.has_fragments(leaf.block_size, get_format(leaf.format).bits)
        return leaf.with_layout(layout) if able else leaf

    return jax.tree.map(move, tree, is_leaf=lambda leaf: isinstance(leaf, QTensor))


def dense_weights(tree: Any, dtype: DTypeLike) -> Any:
    """Replaces QTensors by dense matrices in `dtype`, and widens narrower arrays to it.

    Results only differ by the order of sums. On a CPU, a product of few rows spends nearly all its
    time on unpacking the weights, and a dense copy saves that (benchmarks/cpu_speed.py).
    """

    def unpack(leaf: Any) -> Array:
        if isinstance(leaf, QTensor):
            return _dequantize(leaf, dtype)
        return leaf.astype(dtype) if leaf.dtype.itemsize < jnp.dtype(dtype).itemsize else leaf

    return jax.tree.map(unpack, tree, is_leaf=lambda leaf: isinstance(leaf, QTensor))


_dequantize = jax.jit(QTensor.dequantize, static_argnums=1)


def check_implementation(implementation: MatmulName | None, x: Any, weight: Any) -> None:
    """Checks that an implementation can serve. Needs only the shapes of x and the weight.

    Raises:
        ValueError: as for `dequant_matmul`.
    """
    if isinstance(weight, QTensor):

        def check(x: Array, weight: QTensor) -> Array:
            _choose(FORWARD, x, weight, implementation, IMPLEMENTATIONS)
            return x

        jax.eval_shape(check, x, weight)
    elif implementation not in (None, "xla"):
        raise ValueError(
            f"implementation = {implementation!r}: it takes packed weights, this one is "
            f"{weight.dtype}; expected 'xla' or None"
        )


def dequant_matmul(
    x: Float[Array, "*batch in"],
    weight: QTensor | Float[Array, "out in"],
    implementation: MatmulName | None = None,
    implementations: Sequence[Implementation] = IMPLEMENTATIONS,
) -> Float[Array, "*batch out"]:
    """x @ weight^T in the type of x.

    A QTensor is frozen: besides x only its `scale_update` and `shift_update` get gradients, and the
    backward pass keeps the packed weight, never a dequantized one. A plain array is an ordinary
    operand.

    Args:
        x: activations.
        weight: the matrix, [out, in].
        implementation: "xla"; "triton" or "mosaic": GPU kernels (kernels/README.md); None: a kernel
            if it can serve and was measured to be faster, else XLA's path.
        implementations: the implementations to choose from.

    Raises:
        ValueError: the implementation does not exist or cannot serve; the message says why, and
            which ones can.

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
        forward = _choose(FORWARD, x, weight, implementation, implementations)
        backward = _choose(BACKWARD, x, weight, implementation, implementations)
        updates = {name: getattr(weight, name) for name in _UPDATES}
        return _frozen_matmul(forward, backward, x, weight.without_updates(), updates)
    check_implementation(implementation, x, weight)
    return jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype))


def _choose(
    operation: str,
    x: Array,
    weight: QTensor,
    name: str | None,
    implementations: Sequence[Implementation],
) -> Implementation:
    rows, columns = weight.shape
    kind = jax.devices()[0].device_kind
    served = f"{weight.format} of [out, in] = [{rows}, {columns}] on {kind}"
    return choose(name, implementations, x, weight, operation=operation, served=served)


_UPDATES = ("scale_update", "shift_update")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _frozen_matmul(
    forward: Implementation,
    backward: Implementation,
    x: Array,
    weight: QTensor,
    updates: dict[str, Array | None],
) -> Array:
    x, weight = _behind_barrier(x, dataclasses.replace(weight, **updates))
    if forward.takes_updates or weight.shift_update is None:
        return forward.forward(x, weight)
    y = forward.forward(x, dataclasses.replace(weight, shift_update=None))
    return y + block_sums(x, weight) @ weight.shift_update.astype(x.dtype).T


def _forward(
    forward: Implementation, backward: Implementation, x: Array, weight: QTensor, updates: Any
) -> tuple[Array, Any]:
    trained = any(update is not None for update in updates.values())
    y: Any = _frozen_matmul(forward, backward, x, weight, updates)
    return y, (x if trained else None, weight, updates)


def _backward(
    forward: Implementation, backward: Implementation, saved: Any, g: Array
) -> tuple[Array, None, dict[str, Array | None]]:
    x, weight, updates = saved
    assert backward.backward is not None
    g, weight = _behind_barrier(g, dataclasses.replace(weight, **updates))
    if backward.takes_updates or weight.shift_update is None:
        of_x = backward.backward(g, weight)
    else:
        of_x = backward.backward(g, dataclasses.replace(weight, shift_update=None))
        each = jnp.repeat(g @ weight.shift_update.astype(g.dtype), weight.block_size, axis=-1)
        of_x = of_x + each[..., : weight.shape[1]]
    return of_x, None, _update_gradients(x, g, weight)


def _update_gradients(x: Array | None, g: Array, weight: QTensor) -> dict[str, Array | None]:
    """Gradients of the updates. The compiler drops them for updates that are not trained."""
    of: dict[str, Array | None] = dict.fromkeys(_UPDATES)
    if x is None:
        return of
    g = g.reshape(-1, g.shape[-1])
    if weight.shift_update is not None:
        sums = block_sums(x, weight).reshape(g.shape[0], -1)
        of["shift_update"] = (g.T @ sums).astype(weight.shift_update.dtype)
    if weight.scale_update is not None:
        products = blocks_of(g.T @ x.reshape(g.shape[0], -1), weight.block_size)
        levels = jnp.asarray(get_format(weight.format).table)
        levels = levels[blocks_of(weight.codes(), weight.block_size)]
        of_scale = jnp.sum(products.astype(jnp.float32) * levels, axis=-1)
        of["scale_update"] = of_scale.astype(weight.scale_update.dtype)
    return of


def block_sums(x: Float[Array, "*batch in"], weight: QTensor) -> Float[Array, "*batch blocks"]:
    """The sum of x over the inputs of every block."""
    return blocks_of(x, weight.block_size).sum(-1)


def blocks_of(x: Shaped[Array, "*batch in"], size: int) -> Shaped[Array, "*batch blocks size"]:
    """Cuts the last axis into blocks. The last block is padded with zeros."""
    missing = -x.shape[-1] % size
    x = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, missing),)) if missing else x
    return x.reshape(*x.shape[:-1], -1, size)


def _behind_barrier(x: Array, weight: QTensor) -> tuple[Array, QTensor]:
    """Puts x behind a barrier so XLA cannot merge this product with others that read x.

    These others are the products of the adapter, and of q, k and v. On GPUs, XLA would dequantize
    into one merged matrix, separately for forward and backward pass. The weight is not behind the
    barrier, so both passes share its dequantized form.
    """
    x, _ = jax.lax.optimization_barrier((x, weight.scale_offset))
    return x, weight


_frozen_matmul.defvjp(_forward, _backward)
