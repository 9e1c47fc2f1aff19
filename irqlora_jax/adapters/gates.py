"""Gated quantizers and nested rank gates (Bayesian Bits, arXiv 2005.07093, as B-LoRA uses them).

A tensor is a sum of parts of 2, 4, 8, 16 and 32 bits. Each part rounds the error that the coarser
parts leave. A gate z multiplies a part and all finer parts:

    q = x2 + z4 (x4 + z8 (x8 + z16 (x16 + z32 x32)))

A gate is a hard-concrete variable with one parameter phi. Training draws it; evaluation sets it to
0 or 1.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

BITS = (2, 4, 8, 16, 32)
"""Bits with 0, 1, 2, 3 and 4 open gates."""
TEMPERATURE, ZETA, GAMMA = 2 / 3, 1.1, -0.1
LIMIT = 0.34
"""Evaluation opens a gate if its probability to be 0 is below this limit."""

_OFFSET = TEMPERATURE * math.log(-GAMMA / ZETA)
THRESHOLD = _OFFSET - math.log(LIMIT / (1 - LIMIT))
"""Evaluation opens the gates with a phi above this one, about -0.935."""


@jax.custom_jvp
def round_through(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Rounds half to even. The gradient passes unchanged.

    Examples:
        >>> value, slope = jax.value_and_grad(round_through)(jnp.float32(1.4))
        >>> float(value), float(slope)
        (1.0, 1.0)
    """
    return jnp.round(x)


round_through.defjvps(lambda tangent, answer, x: tangent)


def draw(phi: Float[Array, "*gates"], uniform: Float[Array, "*gates"]) -> Float[Array, "*gates"]:
    """Gates z in [0, 1] for uniform random numbers in (0, 1).

    Examples:
        >>> draw(jnp.array([-9.0, 0.0, 9.0]), jnp.full(3, 0.5)).tolist()
        [0.0, 0.5, 1.0]
    """
    logit = jnp.log(uniform) - jnp.log(1 - uniform) + phi
    return jnp.clip(jax.nn.sigmoid(logit / TEMPERATURE) * (ZETA - GAMMA) + GAMMA, 0, 1)


def is_open(phi: Float[Array, "*gates"]) -> Bool[Array, "*gates"]:
    """Gates of evaluation.

    Examples:
        >>> is_open(jnp.array([-1.0, -0.9])).tolist()
        [False, True]
    """
    return phi > THRESHOLD


def open_probability(phi: Float[Array, "*gates"]) -> Float[Array, "*gates"]:
    """Probability that a drawn gate is not 0.

    Examples:
        >>> f"{open_probability(jnp.float32(2)):.3f}"
        '0.973'
    """
    return jax.nn.sigmoid(phi - _OFFSET)


def quantize(
    x: Float[Array, "*shape"], gates: Float[Array, "4"], low: Array, high: Array
) -> Float[Array, "*shape"]:
    """Sums the parts of x whose gates are open. dq/dx is 1.

    Args:
        x: float32.
        gates: of 4, 8, 16 and 32 bits.
        low, high: range. The step of 2 bits is 2/3 high for signed ranges, 1/3 high for others.
            Values outside of the range are not clipped.

    Examples:
        >>> x, end = jnp.array([-0.4, 0.2, 0.7]), jnp.float32(0.9)
        >>> [f"{y:.2f}" for y in quantize(x, jnp.zeros(4), -end, end)]
        ['-0.60', '0.00', '0.60']
        >>> [f"{y:.2f}" for y in quantize(x, jnp.ones(4), -end, end)]
        ['-0.40', '0.20', '0.70']
    """
    step = _divide(high - jnp.where(low < 0, -high, jnp.zeros_like(high)), 3)
    rest, parts = x, []
    for bits in BITS:
        if bits > 2:
            step = _divide(step, 2 ** (bits // 2) + 1)
        part = step * round_through(_divide(rest, step))
        parts.append(part)
        rest = rest - part
    total = parts[-1]
    for part, gate in zip(parts[-2::-1], gates[::-1], strict=True):
        total = part + gate * total
    return total


def _divide(x: Array, by: Array | int) -> Array:
    """x / by, correctly rounded, because the ends of a range are ties of the rounding. XLA would
    multiply with 1 / by for a constant or a scalar."""
    divisor = jnp.broadcast_to(jnp.asarray(by, x.dtype), x.shape)
    return x / jax.lax.optimization_barrier(divisor)


def nested(gates: Float[Array, " gates"]) -> Float[Array, " rank"]:
    """1 for every rank that stays: all ranks before the first gate that is closed.

    The first rank has no gate and always stays. Rounding passes gradients.

    Examples:
        >>> nested(jnp.array([1.0, 0.9, 0.2, 1.0])).tolist()
        [1.0, 1.0, 1.0, 0.0, 0.0]
    """
    kept = round_through(jnp.cumprod(gates))
    return jnp.concatenate([jnp.ones(1, gates.dtype), kept])


def bits_cost(phi: Float[Array, "4"]) -> Float[Array, ""]:
    """1 + P4 (1 + P8 (1 + P16 (1 + P32))): the expected number of parts of a tensor.

    Examples:
        >>> float(bits_cost(jnp.full(4, -99.0))), float(bits_cost(jnp.full(4, 99.0)))
        (1.0, 5.0)
    """
    cost = jnp.ones((), phi.dtype)
    for probability in open_probability(phi)[::-1]:
        cost = 1 + probability * cost
    return cost


def rank_cost(rank_phi: Float[Array, " gates"], phi: Float[Array, "4"]) -> Float[Array, ""]:
    """`bits_cost` of a vector with one entry for each rank, times the mean probability of its
    rank gates; 0 without rank gates."""
    if rank_phi.size == 0:
        return jnp.zeros((), phi.dtype)
    return open_probability(rank_phi).mean() * bits_cost(phi)
