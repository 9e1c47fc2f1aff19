"""Bayesian-LoRA: LoRA that learns its rank and the bits of its factors (arXiv 2406.13046).

    update = q(B) diag(q(E) gates) q(A) x

q is the gated quantizer of `gates.py`, with 2 to 32 bits for each of A, B and E. The nested rank
gates remove ranks from the last to the first. A penalty in the loss closes gates.

What differs from the released code, and why:

- The base is already quantized, and activations keep the type of the model. The release also
  quantizes the weight and the outputs of the base, and the outputs of A, E, B and the sum, so its
  adapter cannot be folded into a LoRA pair. Here only the weights of the adapter have gates.
- A and B start as in LoRA and E at 1, so the update starts at 0. In the release A and B have a
  standard deviation of 0.02 and E of 1, so the update does not start at 0.
- The range of a quantizer is the largest magnitude of its tensor, with a margin of one millionth. B
  starts at 0, so the release's range, which the first tensor fixes, would be 0. The margin keeps
  the ends of the range off the ties of the rounding, so the codes fit the bits.
- A leaf of gates stores (phi - threshold) / speed. Gates then learn `speed` times as fast as the
  other leaves under an optimizer like Adam. The release has no such factor.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from irqlora_jax.adapters import gates, lora
from irqlora_jax.adapters.method import Method, Params, Shape
from irqlora_jax.text import require

FACTORS = {"lora_A": "gates_A", "lora_B": "gates_B", "lora_E": "gates_E"}
"""The gates of each tensor, for 4, 8, 16 and 32 bits."""
_GATES = (*FACTORS.values(), "gates_rank")
_MARGIN = 1 + 1e-6


@dataclasses.dataclass(frozen=True)
class BayesianOptions:
    """Options of Bayesian-LoRA."""

    penalty: float = 0.001
    """Weight of the penalty in the loss. The penalty is the expected number of parts (2, 4, 8, 16
    and 32 bits) of all quantized tensors."""
    bits_gate: float = 2.0
    """Start of the gates of bits, phi. Gates above -0.935 are open in evaluation."""
    rank_gate: float = 6.0
    """Start of the rank gates, phi."""
    speed: float = 100.0
    """Learning rate of the gates as a multiple of the learning rate; 1 as released."""

    def __post_init__(self) -> None:
        ok = 0 <= self.penalty < math.inf
        require(ok, "adapter.bayesian.penalty", self.penalty, "a finite number of at least 0")
        ok = 0 < self.speed < math.inf
        require(ok, "adapter.bayesian.speed", self.speed, "a positive finite number")
        for name in ("bits_gate", "rank_gate"):
            value = getattr(self, name)
            ok = math.isfinite(value) and value > gates.THRESHOLD
            accepted = f"a finite number above {gates.THRESHOLD:.3f}, so that the gates start open"
            require(ok, f"adapter.bayesian.{name}", value, accepted)


def init(
    key: PRNGKeyArray,
    in_features: int,
    out_features: int,
    rank: int,
    options: BayesianOptions,
    dtype: DTypeLike = jnp.float32,
) -> Params:
    """LoRA's pair, lora_E of 1, and the gates.

    The first entry of gates_rank is not used: rank 1 always stays.

    Examples:
        >>> params = init(jax.random.key(0), 16, 8, 2, BayesianOptions())
        >>> {name: value.shape for name, value in params.items() if "gates" in name}
        {'gates_A': (4,), 'gates_B': (4,), 'gates_E': (4,), 'gates_rank': (2,)}
    """
    pair = lora.init(key, in_features, out_features, rank, dtype)
    bits = (options.bits_gate - gates.THRESHOLD) / options.speed
    ranks = (options.rank_gate - gates.THRESHOLD) / options.speed
    return {
        **pair,
        "lora_E": jnp.ones(rank, dtype),
        **{name: jnp.full(4, bits, dtype) for name in FACTORS.values()},
        "gates_rank": jnp.full(rank, ranks, dtype),
    }


def phi(leaf: Float[Array, " gates"], options: BayesianOptions) -> Float[Array, " gates"]:
    """The parameters of gates from their leaf.

    Examples:
        >>> params = init(jax.random.key(0), 16, 8, 2, BayesianOptions(bits_gate=3.0))
        >>> [f"{value:.2f}" for value in phi(params["gates_A"], BayesianOptions())]
        ['3.00', '3.00', '3.00', '3.00']
    """
    return gates.THRESHOLD + options.speed * leaf.astype(jnp.float32)


def prepare(
    params: Params, key: PRNGKeyArray, progress: Float[Array, ""], options: BayesianOptions
) -> Params:
    """The LoRA pair of a training step: it draws all gates.

    Args:
        params: of one layer.
        key: random key of the step and layer.
        progress: not used.
        options: of the method.
    """
    del progress
    # One draw for all gates compiles faster than one for each leaf.
    leaves = {name: phi(params[name], options) for name in _GATES}
    every = jnp.concatenate(list(leaves.values()))
    # Numbers of exactly 0 would have an infinite logarithm.
    uniform = jax.random.uniform(key, every.shape, minval=1e-6, maxval=1 - 1e-6)
    ends = list(itertools.accumulate(leaf.size for leaf in leaves.values()))
    drawn = dict(zip(leaves, jnp.split(gates.draw(every, uniform), ends[:-1]), strict=True))
    return _pair(params, drawn)


def fold(params: Params) -> Params:
    """The LoRA pair of evaluation: tensors of their learned bits. The ranks that the gates removed
    have a column of 0 in lora_B.

    Examples:
        >>> params = init(jax.random.key(0), 16, 8, 2, BayesianOptions())
        >>> params |= {"gates_A": -jnp.ones(4), "lora_B": jnp.ones((8, 2))}
        >>> params |= {"gates_rank": jnp.array([0.0, -1.0])}
        >>> pair = fold(params)
        >>> len(set(pair["lora_A"].flatten().tolist())), pair["lora_B"][0].round(3).tolist()
        (3, [1.0, 0.0])
    """
    opened = {name: params[name] > 0 for name in _GATES}
    return _pair(params, {name: z.astype(jnp.float32) for name, z in opened.items()})


def _pair(params: Params, z: Params) -> Params:
    a, b, e = (_quantize(params[leaf], z[name]) for leaf, name in FACTORS.items())
    return {"lora_A": a, "lora_B": b * (e * gates.nested(z["gates_rank"][1:]))[None, :]}


def _quantize(x: Array, z: Float[Array, "4"]) -> Array:
    x = x.astype(jnp.float32)
    end = jax.lax.stop_gradient(jnp.abs(x).max()) * _MARGIN
    end = jnp.where(end == 0, jnp.ones_like(end), end)
    return gates.quantize(x, z, -end, end)


def penalty(params: Params, options: BayesianOptions) -> Float[Array, ""]:
    """What one layer adds to the loss.

    Examples:
        >>> params = init(jax.random.key(0), 16, 8, 2, BayesianOptions())
        >>> f"{penalty(params, BayesianOptions(penalty=1.0)):.2f}"
        '14.22'
    """
    a, b, e, rank = (phi(params[name], options) for name in _GATES)
    cost = gates.bits_cost(a) + gates.bits_cost(b) + gates.rank_cost(rank[1:], e)
    return options.penalty * cost


def learned(params: Params) -> Params:
    """The bits of the tensors and the rank of one layer.

    Examples:
        >>> params = init(jax.random.key(0), 16, 8, 2, BayesianOptions())
        >>> params |= {"gates_A": jnp.array([1.0, 1.0, -1.0, 1.0])}
        >>> {name: int(value) for name, value in learned(params).items()}
        {'bits of A': 8, 'bits of B': 32, 'bits of E': 32, 'rank': 2}
    """
    bits = {
        f"bits of {leaf.removeprefix('lora_')}": 2 ** (1 + _open(params[name]))
        for leaf, name in FACTORS.items()
    }
    return {**bits, "rank": rank_of(params)}


def rank_of(params: Params) -> Int[Array, ""]:
    """The number of ranks that the gates left, from the first one on."""
    return 1 + _open(params["gates_rank"][1:])


def _open(leaf: Array) -> Array:
    """The number of open gates in front of the first closed one."""
    return jnp.cumprod((leaf > 0).astype(jnp.int32)).sum()


def _init(
    key: PRNGKeyArray, shape: Shape, rank: int, options: BayesianOptions, dtype: DTypeLike
) -> Params:
    return init(key, shape[1], shape[0], rank, options, dtype)


def _apply(params: Params, x: Array, dropped: Array, scale: float, weight: object) -> Array:
    return lora.apply(fold(params), x, dropped, scale)


BAYESIAN = Method(
    name="bayesian",
    title="Bayesian-LoRA",
    description="a Bayesian-LoRA adapter (learned rank and bits)",
    init=_init,
    apply=_apply,
    files={
        **lora.LORA.files,
        "lora_E": "lora_E",
        **{name: f"lora_{name}" for name in _GATES},
    },
    fold=lambda params, shape: fold(params),
    rank=rank_of,
    prepare=prepare,
    penalty=penalty,
    learned=learned,
    options=BayesianOptions(),
)
