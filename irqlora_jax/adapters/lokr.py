"""LoKr: the update of the weight is a Kronecker product (LyCORIS, arXiv 2309.14859; PEFT's LoKr).

    W += s kron(w1, w2),    w1 [l, m], w2 [k, n],    out = l k, in = m n

A factor can itself be a product of two matrices of rank r: w2 = w2_a w2_b if r < max(k, n) / 2, and
w1 = w1_a w1_b only with `decompose_both` and r < max(l, m) / 2. With both factors full this is
KronA (arXiv 2212.10650) with its scale s = alpha / rank. KronA-B and KronA-B-res are not part of
this method: they stand beside a feed-forward block, and the second one adds a residual.

The product is never built during training: with x as a matrix X [m, n], the update of the output is
w1 X w2^T as a vector.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from irqlora_jax.adapters.method import Method, Params, Shape
from irqlora_jax.text import require


@dataclasses.dataclass(frozen=True)
class LokrOptions:
    """Options of LoKr. The names are PEFT's."""

    decompose_both: bool = False
    """Also replace the first factor by a product of two matrices, if the rank is small enough."""
    decompose_factor: int = -1
    """Rows and columns of the first factor: the largest divisor of out and in that is not above
    this number (`factorize`). -1: as close to the square root as possible."""
    init: Literal["default", "lycoris"] = "default"
    """The part that starts at 0. "default": the first factor, as PEFT. "lycoris": the second."""

    def __post_init__(self) -> None:
        field, factor = "adapter.lokr.decompose_factor", self.decompose_factor
        require(factor == -1 or factor >= 1, field, factor, "-1 or a whole number of at least 1")
        known = ("default", "lycoris")
        require(self.init in known, "adapter.lokr.init", self.init, " or ".join(known))


def factorize(size: int, factor: int = -1) -> tuple[int, int]:
    """Splits a size into two factors, the smaller one first (PEFT's and LyCORIS' rule).

    A `factor` that divides the size is one of both. Else the first one is the largest divisor up to
    `factor`, and at most the square root. -1 means no limit.

    PEFT returns a dividing `factor` first, even if it is the larger one.

    Examples:
        >>> factorize(128), factorize(96, 16), factorize(96, 7), factorize(64, 16)
        ((8, 16), (16, 6), (6, 16), (16, 4))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    first = max(d for d in range(1, limit + 1) if size % d == 0)
    return first, size // first


def shapes(shape: Shape, rank: int, options: LokrOptions) -> dict[str, Shape]:
    """Shapes of the leaves of a layer [out, in].

    Examples:
        >>> shapes((64, 256), 4, LokrOptions())
        {'lokr_w1': (8, 16), 'lokr_w2_a': (8, 4), 'lokr_w2_b': (4, 16)}
    """
    outer, inner = zip(*(factorize(size, options.decompose_factor) for size in shape), strict=True)

    def leaves(name: str, size: Shape, decompose: bool) -> dict[str, Shape]:
        if decompose and 2 * rank < max(size):
            return {f"{name}_a": (size[0], rank), f"{name}_b": (rank, size[1])}
        return {name: size}

    return leaves("lokr_w1", outer, options.decompose_both) | leaves("lokr_w2", inner, True)


_ZERO = {"default": ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b")}
"""The leaves that start at 0."""


def init(
    key: PRNGKeyArray,
    shape: Shape,
    rank: int,
    options: LokrOptions,
    dtype: DTypeLike = jnp.float32,
) -> Params:
    """One factor is 0 (`LokrOptions.init`); the rest is uniform in +-1/sqrt(its last axis).

    Examples:
        >>> params = init(jax.random.key(0), (64, 256), 4, LokrOptions())
        >>> bool((params["lokr_w1"] == 0).all()), params["lokr_w2_a"].shape
        (True, (8, 4))
    """
    found = shapes(shape, rank, options)
    params: Params = {}
    for own, (leaf, size) in zip(jax.random.split(key, len(found)), found.items(), strict=True):
        bound = 1 / math.sqrt(size[-1])
        drawn = jax.random.uniform(own, size, dtype, -bound, bound)
        params[leaf] = jnp.zeros(size, dtype) if leaf in _ZERO[options.init] else drawn
    return params


def apply(
    params: Params, dropped: Float[Array, "*batch in"], scale: float = 1.0
) -> Float[Array, "*batch out"]:
    """scale * kron(w1, w2) x, without the Kronecker product.

    `dropped` is x after dropout. (PEFT's LoKr has no dropout of inputs.)

    Examples:
        >>> params = {"lokr_w1": jnp.array([[2.0]]), "lokr_w2": jnp.array([[1.0, 1.0]])}
        >>> apply(params, jnp.array([3.0, 4.0])).tolist()
        [14.0]
    """
    p = {leaf: value.astype(dropped.dtype) for leaf, value in params.items()}
    first = [p["lokr_w1"]] if "lokr_w1" in p else [p["lokr_w1_b"], p["lokr_w1_a"]]
    inner = p["lokr_w2"] if "lokr_w2" in p else p["lokr_w2_b"]
    u = dropped.reshape(*dropped.shape[:-1], first[0].shape[1], inner.shape[1])
    u = (u @ inner.T) * scale
    for factor in first:  # between the factors of w2, where u is smallest
        u = jnp.einsum("lm,...mr->...lr", factor, u)
    if "lokr_w2_a" in p:
        u = u @ p["lokr_w2_a"].T
    return u.reshape(*dropped.shape[:-1], -1)


def factors(params: Params) -> tuple[Float[Array, "l m"], Float[Array, "k n"]]:
    """w1 and w2 as matrices."""

    def whole(name: str) -> Array:
        if name in params:
            return params[name]
        # Accelerators would otherwise multiply float32 with reduced precision.
        return jnp.matmul(params[f"{name}_a"], params[f"{name}_b"], precision="highest")

    return whole("lokr_w1"), whole("lokr_w2")


def delta(params: Params, shape: Shape) -> Float[Array, "out in"]:
    """kron(w1, w2), the update of the weight at scale 1, for merging.

    Examples:
        >>> params = {"lokr_w1": jnp.array([[1.0, 2.0]]), "lokr_w2": jnp.array([[3.0], [4.0]])}
        >>> delta(params, (2, 2)).tolist()
        [[3.0, 6.0], [4.0, 8.0]]
    """
    return jnp.kron(*factors(params)).reshape(shape)


def _peft(adapter: Any) -> dict[str, Any]:
    options: LokrOptions = adapter.lokr
    return {
        "peft_type": "LOKR",
        "r": adapter.rank,
        "alpha": adapter.alpha,
        "rank_dropout": 0.0,
        "rank_dropout_scale": False,
        "module_dropout": 0.0,
        "use_effective_conv2d": False,
        "decompose_both": options.decompose_both,
        "decompose_factor": options.decompose_factor,
        "init_weights": True if options.init == "default" else options.init,
    }


_LEAVES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")

LOKR = Method(
    name="lokr",
    title="LoKr",
    description="a LoKr adapter",
    init=init,
    apply=lambda params, x, dropped, scale, weight: apply(params, dropped, scale),
    files={leaf: leaf for leaf in _LEAVES},
    delta=delta,
    peft=_peft,
    splits={},
    faster=(),
    has_pair=False,
    scalings=("rank",),
    options=LokrOptions(),
)
