"""Adam with moments of 8 bits (Dettmers et al. 2021, 8-bit Optimizers via Block-wise Quantization).

Every block of 256 consecutive numbers of a layer's leaf, counted row by row, is divided by its
largest magnitude and rounded to the nearest of 256 numbers. These are spaced like floating-point
numbers whose exponent takes more bits the smaller they are (the paper's dynamic tree). The first
moment has a table of both signs; the second is never negative and has a table of its own.
"""

import math
from typing import Any, Literal, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float32, UInt8

BLOCK = 256
"""Numbers that share a maximum."""
SMALLEST = 4096
"""Leaves of a layer with fewer numbers keep the type of the adapter, as in bitsandbytes."""
Sign = Literal["signed", "unsigned"]
Shape = tuple[int, ...]


class Moment(NamedTuple):
    """A moment in 8 bits.

    Attributes:
        codes: uint8, in the shape of the leaf.
        absmax: float32, the largest magnitude of every block; the axes are those of the leaf, so
            that a mesh can split both alike.
    """

    codes: Any
    absmax: Any


_DECADES = 7


def dynamic_map(sign: Sign) -> Float32[np.ndarray, "256"]:
    """The numbers that codes stand for, in rising order, from -1 or 0 to 1.

    Decade d of 7 has 2**d numbers, or 2**(d + 1) without a sign: the midpoints of as many equal
    parts of 0.1 to 1, times 10**(d - 6). 0 and 1 are added. Computed in float32 step by step, so
    that the table equals the one of bitsandbytes bit by bit.
    """
    values = [np.float32(0), np.float32(1)]
    for decade, parts in enumerate(_parts(sign)):
        place = np.arange(parts + 1)
        step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(parts))
        # From both ends, with one rounding each, as torch.linspace counts.
        rising, falling = np.float64(np.float32(0.1)) + step * place, 1 - step * (parts - place)
        edges = np.where(place < (parts + 1) // 2, rising, falling).astype(np.float32)
        means = (edges[1:] + edges[:-1]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        values += [*means, *-means] if sign == "signed" else [*means]
    return np.sort(np.asarray(values, np.float32))


def _parts(sign: Sign) -> list[int]:
    """How many numbers of one sign each decade has."""
    return [2 ** (decade + (sign == "unsigned")) for decade in range(_DECADES)]


MAPS: dict[Sign, Float32[np.ndarray, "256"]] = {
    "signed": dynamic_map("signed"),
    "unsigned": dynamic_map("unsigned"),
}


def _nearest(unit: Float32[Array, "*any"], sign: Sign) -> UInt8[Array, "*any"]:
    """The code of the nearest number of the table; `unit` is from -1 to 1.

    The numbers of a decade are evenly spaced, so a line through them gives their places. This
    compiles and runs several times as fast as a search in the table.
    """
    table, size = MAPS[sign], jnp.abs(unit)
    zero = int(np.argmin(np.abs(table)))
    upper = table[zero:].astype(np.float64)  # 0, the decades, 1
    limits = ((upper[1:] + upper[:-1]) / 2).astype(np.float32)
    place, first = jnp.zeros_like(size), 1
    for decade, parts in enumerate(_parts(sign)):
        slope = np.float32(parts / 0.9 * 10.0 ** (6 - decade))
        line = jnp.round(size * slope + np.float32(first - parts / 9 - 0.5))
        inside = jnp.clip(line, first, first + parts - 1)
        place = jnp.where(size > limits[first - 1], inside, place)
        first += parts
    place = jnp.where(size > limits[-1], first, place).astype(jnp.int32)
    if sign == "signed":  # there is no -1
        place = jnp.where(unit < 0, -jnp.minimum(place, zero), place)
    return (place + zero).astype(jnp.uint8)


def grid(shape: Shape) -> Shape:
    """Shape of the maxima of a leaf of one layer. It has as many axes as the leaf.

    If rows consist of whole blocks, or blocks of whole rows, each block has its place on the axes.

    Examples:
        >>> grid((64, 4096)), grid((4096, 64)), grid((4096, 48))
        ((64, 16), (1024, 1), (768, 1))
    """
    *rows, size = shape
    if size % BLOCK == 0:
        return (*rows, size // BLOCK)
    if rows and BLOCK % size == 0 and rows[-1] * size % BLOCK == 0:
        return (*rows[:-1], rows[-1] * size // BLOCK, 1)
    return (-(-math.prod(shape) // BLOCK), *(1 for _ in rows))


def encode(x: Float32[Array, "*stack_and_leaf"], sign: Sign, stacked: bool = True) -> Moment:
    """Rounds every number to the nearest of the table, times the maximum of its block.

    Args:
        x: a leaf of all layers, or of one.
        sign: the table.
        stacked: whether the first axis is over the layers. A block is in one layer.

    Examples:
        >>> moment = encode(jnp.array([[0.5, -2.0, 0.0]]), "signed")
        >>> moment.codes.tolist(), moment.absmax.tolist()
        ([[201, 0, 127]], [[2.0]])
    """
    blocks = _blocks(x, stacked)
    absmax = jnp.abs(blocks).max(axis=-1)
    unit = blocks / jnp.where(absmax == 0, 1, absmax)[..., None]
    return Moment(_joined(_nearest(unit, sign), x.shape, stacked), absmax)


def decode(moment: Moment, sign: Sign, stacked: bool = True) -> Float32[Array, "*stack_and_leaf"]:
    """The numbers that a moment stands for.

    Examples:
        >>> moment = encode(jnp.array([[0.5, -2.0, 0.0]]), "signed")
        >>> decode(moment, "signed").round(3).tolist()
        [[0.49500003457069397, -1.9860000610351562, 0.0]]
    """
    units = jnp.asarray(MAPS[sign])[_blocks(moment.codes, stacked).astype(jnp.int32)]
    return _joined(units * moment.absmax[..., None], moment.codes.shape, stacked)


def _blocks(x: Array, stacked: bool) -> Array:
    """[*layers, *grid, 256]. A leaf that has no whole number of blocks is padded with 0."""
    layers, shape = x.shape[:stacked], x.shape[stacked:]
    rest = -math.prod(shape) % BLOCK
    if rest:
        flat = x.reshape(*layers, -1)
        x = jnp.pad(flat, [(0, 0)] * len(layers) + [(0, rest)])
    return x.reshape(*layers, *grid(shape), BLOCK)


def _joined(blocks: Array, shape: Shape, stacked: bool) -> Array:
    """The inverse of `_blocks`."""
    layers, size = shape[:stacked], math.prod(shape[stacked:])
    if size % BLOCK:
        blocks = blocks.reshape(*layers, -1)[..., :size]
    return blocks.reshape(shape)


@no_type_check  # moments are arrays or `Moment`s, and in jax.eval_shape shapes
def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` with moments that are stored in 8 bits between the steps.

    A step computes with float32, and the update does not contain the rounding of this step. Leaves
    below `SMALLEST` numbers a layer are as in optax. With the argument `layer` of `update`, the
    arrays are those of one layer.
    """
    adam = optax.scale_by_adam(b1, b2, eps)

    def small(x: Any) -> bool:
        return math.prod(x.shape[1:]) < SMALLEST

    def init(params: Any) -> optax.ScaleByAdamState:
        def zero(sign: Sign, x: Any) -> Any:
            return jnp.zeros_like(x) if small(x) else encode(jnp.zeros(x.shape), sign)

        first = jax.tree.map(lambda x: zero("signed", x), params)
        second = jax.tree.map(lambda x: zero("unsigned", x), params)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), first, second)

    def update(
        updates: Any, state: optax.ScaleByAdamState, params: Any = None, *, layer: Any = None
    ) -> tuple[Any, optax.ScaleByAdamState]:
        stacked = layer is None

        def read(sign: Sign, moments: Any) -> Any:
            wide = lambda x: decode(x, sign, stacked) if _is_moment(x) else x  # noqa: E731
            return jax.tree.map(wide, moments, is_leaf=_is_moment)

        def write(sign: Sign, old: Any, new: Any) -> Any:
            short = lambda x, y: encode(y, sign, stacked) if _is_moment(x) else y  # noqa: E731
            return jax.tree.map(short, old, new, is_leaf=_is_moment)

        dense = optax.ScaleByAdamState(
            state.count, read("signed", state.mu), read("unsigned", state.nu)
        )
        grads = jax.tree.map(lambda g, mu: g.astype(mu.dtype), updates, dense.mu)
        new: Any
        scaled, new = adam.update(grads, dense, params)
        scaled = jax.tree.map(lambda x, g: x.astype(g.dtype), scaled, updates)
        mu, nu = write("signed", state.mu, new.mu), write("unsigned", state.nu, new.nu)
        return scaled, optax.ScaleByAdamState(new.count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_moment(x: Any) -> bool:
    return isinstance(x, Moment)
