"""LoRA with binary factors, trained with ProxConnect++ (arXiv 2402.17710).

A latent factor w has an entry for every bit. A forward quantizer F computes the factor from it, a
backward quantizer B the gradient (equation 7): the gradient of w is B(w) times that of F(w).

    pair      F             B
    bc        sign          1
    bnn       sign          1 for |w| <= 1, else 0
    bnn+      sign          SS', the slope of SignSwish
    bnn++     SignSwish     SS'

SignSwish SS becomes steeper with mu, which grows during the training: it tends to sign. Evaluation
uses sign. The paper binarizes whole networks. Our adapter binarizes both factors of a LoRA pair:

    update = diag(scale_B) F(B) diag(scale_A) F(A) x

scale_A [rank] and scale_B [out] are float. scale_B starts at 0, so the update does too. The rules
are for weights of about 1, so w is a latent factor divided by the bound of its start, 1 / sqrt(in).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from irqlora_jax.adapters import lora
from irqlora_jax.adapters.method import Method, Params, Shape
from irqlora_jax.sharding import PAIR
from irqlora_jax.text import require

Quantizer = Callable[[Array, Array], Array]
"""(w, mu) -> an array of the shape of w."""


def sign(w: Float[Array, "..."], mu: Array | float = 0.0) -> Float[Array, "..."]:
    """1 for 0 and above, else -1.

    Examples:
        >>> sign(jnp.array([-0.5, 0.0, 2.0])).tolist()
        [-1.0, 1.0, 1.0]
    """
    del mu
    return jnp.where(w >= 0, jnp.ones_like(w), -jnp.ones_like(w))


def sign_swish(w: Float[Array, "..."], mu: Array | float) -> Float[Array, "..."]:
    """SS(w) = 2 s (1 + mu w (1 - s)) - 1 with s = sigmoid(mu w). |SS| is at most 1.2.

    Examples:
        >>> sign_swish(jnp.array([-9.0, 0.0, 9.0]), 5.0).tolist()
        [-1.0, 0.0, 1.0]
    """
    s = jax.nn.sigmoid(mu * w)
    return 2 * s * (1 + mu * w * (1 - s)) - 1


def sign_swish_slope(w: Float[Array, "..."], mu: Array | float) -> Float[Array, "..."]:
    """SS'(w) = mu (2 - mu w tanh(mu w / 2)) / (1 + cosh(mu w)): negative for |mu w| above 2.4.

    Examples:
        >>> [f"{y:.2f}" for y in sign_swish_slope(jnp.array([0.0, 1.0]), 3.0)]
        ['3.00', '-0.19']
    """
    u = jnp.clip(mu * w, -80, 80)  # cosh of more is infinite
    return mu * (2 - u * jnp.tanh(u / 2)) / (1 + jnp.cosh(u))


PAIRS: dict[str, tuple[Quantizer, Quantizer]] = {
    "bc": (sign, lambda w, mu: jnp.ones_like(w)),
    "bnn": (sign, lambda w, mu: (jnp.abs(w) <= 1).astype(w.dtype)),
    "bnn+": (sign, sign_swish_slope),
    "bnn++": (sign_swish, sign_swish_slope),
}
"""Forward and backward quantizers."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def binarize(pair: str, w: Float[Array, "*shape"], mu: Float[Array, ""]) -> Float[Array, "*shape"]:
    """F(w), with the gradient of B(w).

    Examples:
        >>> w = jnp.array([-2.0, 0.5])
        >>> binarize("bnn", w, jnp.float32(1)).tolist()
        [-1.0, 1.0]
        >>> jax.grad(lambda w: binarize("bnn", w, jnp.float32(1)).sum())(w).tolist()
        [0.0, 1.0]
    """
    return PAIRS[pair][0](w, mu)


def _binarize_forward(pair: str, w: Array, mu: Array) -> tuple[Array, tuple[Array, Array]]:
    return binarize(pair, w, mu), (w, mu)


def _binarize_backward(pair: str, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    w, mu = saved
    return g * PAIRS[pair][1](w, mu), jnp.zeros_like(mu)


binarize.defvjp(_binarize_forward, _binarize_backward)


@dataclasses.dataclass(frozen=True)
class BinaryOptions:
    """Options of binary factors."""

    pair: Literal["bc", "bnn", "bnn+", "bnn++"] = "bnn++"
    """Forward and backward quantizer of ProxConnect++."""
    mu_start: float = 1.0
    """mu at the first step ("bnn+", "bnn++")."""
    mu_end: float = 30.0
    """mu at the last step. It grows linearly."""

    def __post_init__(self) -> None:
        require(self.pair in PAIRS, "adapter.binary.pair", self.pair, ", ".join(PAIRS))
        for name in ("mu_start", "mu_end"):
            value = getattr(self, name)
            ok = 0 < value < math.inf
            require(ok, f"adapter.binary.{name}", value, "a positive finite number")
        ok = self.mu_start <= self.mu_end
        require(ok, "adapter.binary.mu_end", self.mu_end, f"at least mu_start = {self.mu_start}")


def init(
    key: PRNGKeyArray,
    in_features: int,
    out_features: int,
    rank: int,
    dtype: DTypeLike = jnp.float32,
) -> Params:
    """Latent factors uniform in +-1/sqrt(in). scale_A has the standard deviation of LoRA's A, and
    scale_B is 0.

    Examples:
        >>> params = init(jax.random.key(0), 16, 8, rank=2)
        >>> {name: value.shape for name, value in params.items()}
        {'lora_A': (2, 16), 'lora_B': (8, 2), 'scale_A': (2,), 'scale_B': (8,)}
    """
    first, second = jax.random.split(key)
    bound = 1 / math.sqrt(in_features)
    return {
        "lora_A": jax.random.uniform(first, (rank, in_features), dtype, -bound, bound),
        "lora_B": jax.random.uniform(second, (out_features, rank), dtype, -bound, bound),
        "scale_A": jnp.full(rank, bound / math.sqrt(3), dtype),
        "scale_B": jnp.zeros(out_features, dtype),
    }


def fold(params: Params) -> Params:
    """The LoRA pair of evaluation: signs times scales.

    Examples:
        >>> params = {"lora_A": jnp.array([[0.1, -0.2]]), "scale_A": jnp.array([3.0])}
        >>> params |= {"lora_B": jnp.array([[0.3], [-0.1]]), "scale_B": jnp.array([1.0, 2.0])}
        >>> {name: value.tolist() for name, value in fold(params).items()}
        {'lora_A': [[3.0, -3.0]], 'lora_B': [[1.0], [-2.0]]}
    """
    return _pair(params, sign(params["lora_A"]), sign(params["lora_B"]))


def _pair(params: Params, a: Array, b: Array) -> Params:
    scale_a, scale_b = params["scale_A"][:, None], params["scale_B"][:, None]
    return {"lora_A": a * scale_a, "lora_B": b * scale_b}


def prepare(
    params: Params, key: PRNGKeyArray, progress: Float[Array, ""], options: BinaryOptions
) -> Params:
    """The LoRA pair of a training step: F of the latent factors, times scales.

    Args:
        params: of one layer.
        key: not used.
        progress: share of the steps that are done, from 0 to 1.
        options: of the method.
    """
    del key
    mu = options.mu_start + progress * (options.mu_end - options.mu_start)
    unit = math.sqrt(params["lora_A"].shape[1])
    a, b = (
        binarize(options.pair, params[name].astype(jnp.float32) * unit, mu)
        for name in ("lora_A", "lora_B")
    )
    return _pair(
        {name: leaf.astype(jnp.float32) for name, leaf in params.items()},
        jnp.asarray(a),
        jnp.asarray(b),
    )


def pack(params: Params) -> Params:
    """One bit for each entry of a factor: 1 for the sign +1. A row has whole bytes, and the first
    entry is the lowest bit of the first byte.

    Examples:
        >>> params = init(jax.random.key(0), 16, 8, rank=2)
        >>> packed = pack(params | {"lora_A": jnp.array([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]])})
        >>> packed["lora_A"].tolist(), packed["lora_B"].shape
        ([[5], [6]], (8, 1))
    """
    bits = {
        name: jnp.packbits(params[name] >= 0, axis=-1, bitorder="little")
        for name in ("lora_A", "lora_B")
    }
    return params | bits


def unpack(packed: Params, fresh: Params) -> Params:
    """Latent factors at their bounds, with the packed signs.

    Examples:
        >>> params = init(jax.random.key(0), 16, 8, rank=2)
        >>> again = unpack(pack(params), params)
        >>> again["lora_A"].shape, bool((sign(again["lora_A"]) == sign(params["lora_A"])).all())
        ((2, 16), True)
    """
    bound = 1 / math.sqrt(fresh["lora_A"].shape[1])
    factors = {}
    for name in ("lora_A", "lora_B"):
        like = fresh[name]
        bits = jnp.unpackbits(packed[name], axis=-1, count=like.shape[1], bitorder="little")
        factors[name] = (bits.astype(like.dtype) * 2 - 1) * jnp.asarray(bound, like.dtype)
    return packed | factors


def _init(
    key: PRNGKeyArray, shape: Shape, rank: int, options: BinaryOptions, dtype: DTypeLike
) -> Params:
    return init(key, shape[1], shape[0], rank, dtype)


def _apply(params: Params, x: Array, dropped: Array, scale: float, weight: object) -> Array:
    return lora.apply(fold(params), x, dropped, scale)


BINARY = Method(
    name="binary",
    title="binary LoRA",
    description="a LoRA adapter with binary factors (BNN++)",
    init=_init,
    apply=_apply,
    files={
        "lora_A": "lora_A_signs",
        "lora_B": "lora_B_signs",
        "scale_A": "lora_A_scales",
        "scale_B": "lora_B_scales",
    },
    fold=lambda params, shape: fold(params),
    has_pair=False,
    prepare=prepare,
    pack=pack,
    unpack=unpack,
    splits={**PAIR, "scale_B": ("out",)},
    options=BinaryOptions(),
)
