"""Rounding with straight-through gradients, to train the numbers that a matrix is stored with.

Rounding has the gradient 0 almost everywhere. The straight-through estimator takes the gradient of
x for the gradient of round(x), and keeps 0 for weights beyond the ends of the code book:

    value = s * code((w - t) / s) + t        d value / d w = 1 inside, 0 outside

The gradients of the scale s and of the shift t follow by the chain rule. For u = (w - t) / s and
its level l, they are l - u and 0 inside, and l and 1 outside. Values are exactly those that a
QTensor with the same scales and shifts stands for.

`clipped_integers` and `clipped_levels` compute scales and shifts from clip factors, as ApiQ does
(arXiv 2402.05147, section 4). The rules for their gradients are those of its released code.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32

from irqlora_jax.quant.codes import rank_of
from irqlora_jax.quant.entropy import quotient
from irqlora_jax.quant.formats import Format

_SMALLEST, _LARGEST = 1e-5, 1e4
"""Bounds of a scale in ApiQ's code. Zero points stay within +-_LARGEST."""


@jax.custom_jvp
def straight_through(
    x: Float32[Array, "*shape"], rounded: Float32[Array, "*shape"]
) -> Float32[Array, "*shape"]:
    """Returns `rounded`, bit by bit, with the gradient of x.

    Examples:
        >>> x = jnp.array([0.4, 1.7])
        >>> straight_through(x, jnp.round(x)).tolist()
        [0.0, 2.0]
        >>> jax.grad(lambda x: straight_through(x, jnp.round(x)).sum())(x).tolist()
        [1.0, 1.0]
    """
    return rounded


@straight_through.defjvp
def _straight_through_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    return primals[1], tangents[0]


def _bounded(x: Array, low: float, high: float) -> Array:
    """Clips x. The gradient is 1 on the closed interval; jnp.clip has 1/2 at its ends."""
    return jnp.where((x >= low) & (x <= high), x, lax.stop_gradient(jnp.clip(x, low, high)))


def round_to_levels(
    weight: Float32[Array, "*blocks size"],
    scale: Float32[Array, "*blocks"],
    shift: Float32[Array, "*blocks"] | None,
    format: Format,
) -> Float32[Array, "*blocks size"]:
    """The values of NormalFloat or FP4 nearest to the weights.

    Args:
        weight: weights, cut into blocks.
        scale: one for each block.
        shift: one for each block; None: 0.
        format: code book.

    Examples:
        >>> from irqlora_jax.quant.formats import get_format
        >>> weight, scale = jnp.array([[0.3, 0.9, 2.0]]), jnp.ones(1)
        >>> value = lambda w, s: round_to_levels(w, s, None, get_format("nf2")).sum()
        >>> [x.tolist() for x in jax.grad(value, (0, 1))(weight, scale)]
        [[[1.0, 1.0, 0.0]], [1.0525684356689453]]
    """
    levels = np.sort(format.table)
    places = scale[..., None], None if shift is None else shift[..., None]
    centered = weight if places[1] is None else weight - places[1]
    # Multiplies by the reciprocal, as `encode.py` does for these formats. This affects ties.
    x = centered * (1 / jnp.where(places[0] == 0, 1, places[0]))
    nearest = jnp.asarray(levels)[rank_of(x, format)]
    level = straight_through(_bounded(x, float(levels[0]), float(levels[-1])), nearest)
    values = level * places[0]
    return values if places[1] is None else values + places[1]


def round_to_integers(
    weight: Float32[Array, "*blocks size"],
    scale: Float32[Array, "*blocks"],
    zero: Float32[Array, "*blocks"],
    format: Format,
) -> Float32[Array, "*blocks size"]:
    """The values s * (code - zero) of integers, with code = clip(round(w / s) + zero).

    A zero point z that is no whole number is rounded together with the weight: round(w / s + z -
    floor(z)) + floor(z). Weights whose code before the clip is 0 or the largest one are inside of
    the range.

    Args:
        weight: weights, cut into blocks.
        scale: one for each block, positive.
        zero: one for each block.
        format: code book.

    Examples:
        >>> from irqlora_jax.quant.formats import get_format
        >>> weight, scale = jnp.array([[-0.8, 0.6, 3.4]]), jnp.ones(1)
        >>> value = lambda w: round_to_integers(w, scale, jnp.ones(1), get_format("int2"))
        >>> value(weight).tolist(), jax.grad(lambda w: value(w).sum())(weight).tolist()
        ([[-1.0, 1.0, 2.0]], [[1.0, 1.0, 0.0]])
    """
    step, zero = scale[..., None], zero[..., None]
    whole = lax.stop_gradient(jnp.floor(zero))
    x = quotient(weight, step) + (zero - whole)
    code = straight_through(x, jnp.round(x)) + whole
    return step * (_bounded(code, 0.0, 2.0**format.bits - 1) - zero)


def clipped_integers(
    low: Float32[Array, "*blocks"],
    high: Float32[Array, "*blocks"],
    down: Float32[Array, "*blocks"],
    up: Float32[Array, "*blocks"],
    format: Format,
    symmetric: bool,
) -> tuple[Float32[Array, "*blocks"], Float32[Array, "*blocks"]]:
    """ApiQ's scale and zero point of integers.

    The range is [sigmoid(down) * low, sigmoid(up) * high]. The zero point is rounded without a
    straight-through gradient, so it has none. A symmetric range has the zero point 2**(bits - 1) -
    1, not the 2**(bits - 1) of `plain_range`.

    Args:
        low: smallest weight of each block.
        high: largest weight of each block.
        down: clip factor of the smallest weight, before the sigmoid.
        up: clip factor of the largest weight, before the sigmoid.
        format: code book.
        symmetric: fix the zero point.

    Examples:
        >>> from irqlora_jax.quant.formats import get_format
        >>> ends, factors = (jnp.array([-1.0]), jnp.array([2.0])), (jnp.zeros(1), jnp.zeros(1))
        >>> [x.tolist() for x in clipped_integers(*ends, *factors, get_format("int2"), False)]
        [[0.5], [1.0]]
    """
    low, high = jax.nn.sigmoid(down) * low, jax.nn.sigmoid(up) * high
    if symmetric:
        middle = 2.0 ** (format.bits - 1) - 1
        reach = jnp.maximum(jnp.abs(high), jnp.abs(low))
        scale = _bounded(quotient(reach, middle), _SMALLEST, _LARGEST)
        return scale, jnp.full_like(scale, middle)
    scale = _bounded(quotient(high - low, 2.0**format.bits - 1), _SMALLEST, _LARGEST)
    zero = jnp.round(jnp.clip(quotient(-low, scale), -_LARGEST, _LARGEST))
    return scale, lax.stop_gradient(zero)


def clipped_levels(
    low: Float32[Array, "*blocks"],
    high: Float32[Array, "*blocks"],
    down: Float32[Array, "*blocks"],
    up: Float32[Array, "*blocks"],
    format: Format,
    shifted: bool,
) -> tuple[Float32[Array, "*blocks"], Float32[Array, "*blocks"] | None]:
    """Scale and shift of NormalFloat and FP4 from clip factors. ApiQ itself has only integers.

    With a shift, the levels spread over the clipped range, as ApiQ's asymmetric integers do. The
    shift is not rounded here, so it has a gradient. Without a shift, the larger end of the range
    determines the scale, as for ApiQ's symmetric integers.

    Args:
        low: smallest weight of each block.
        high: largest weight of each block.
        down: clip factor of the smallest weight, before the sigmoid.
        up: clip factor of the largest weight, before the sigmoid.
        format: code book.
        shifted: whether the blocks have a shift.

    Examples:
        >>> from irqlora_jax.quant.formats import get_format
        >>> ends, factors = (jnp.array([-1.0]), jnp.array([3.0])), (jnp.zeros(1), jnp.zeros(1))
        >>> [x.tolist() for x in clipped_levels(*ends, *factors, get_format("nf2"), True)]
        [[1.0], [0.5]]
    """
    low, high = jax.nn.sigmoid(down) * low, jax.nn.sigmoid(up) * high
    first, last = min(format.levels), max(format.levels)
    if not shifted:
        return jnp.maximum(jnp.abs(high), jnp.abs(low)) / last, None
    scale = (high - low) / (last - first)
    return scale, high - last * scale
