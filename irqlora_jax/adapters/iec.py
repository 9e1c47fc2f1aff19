"""IEC (information elastic connection): LoRA where both factors also pass on their input
(IR-QLoRA, section 3.3).

    U1(x) = A x + beta1 * spread(x, rank)            eq. 12
    U2(u) = B u + beta2 * spread(u, out_features)    eq. 13
    update = U2(U1(x))

`spread` has no parameters: it averages n features over g = gcd(n, m) contiguous windows and repeats
every mean m/g times in place. The paper writes the repetition as a concatenation of copies, but its
merging rule (eq. 16) and the released code repeat in place. Only that folds into a LoRA pair.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from irqlora_jax.adapters import lora
from irqlora_jax.adapters.method import Method, Params
from irqlora_jax.sharding import split_activation
from irqlora_jax.text import require


def init(
    key: PRNGKeyArray,
    in_features: int,
    out_features: int,
    rank: int,
    dtype: DTypeLike = jnp.float32,
) -> Params:
    """LoRA's pair, and the scalars beta1 and beta2, which start at 0 (as released).

    Examples:
        >>> import jax
        >>> sorted(init(jax.random.key(0), 16, 8, rank=2))
        ['beta1', 'beta2', 'lora_A', 'lora_B']
    """
    pair = lora.init(key, in_features, out_features, rank, dtype)
    return pair | {"beta1": jnp.zeros((), dtype), "beta2": jnp.zeros((), dtype)}


def spread(x: Float[Array, "*batch n"], size: int) -> Float[Array, "*batch size"]:
    """Means over gcd(n, size) contiguous windows, each repeated to fill `size` features.

    Examples:
        >>> x = jnp.array([1.0, 2.0, 3.0, 4.0])
        >>> spread(x, 2).tolist(), spread(x, 6).tolist()
        ([1.5, 3.5], [1.5, 1.5, 1.5, 3.5, 3.5, 3.5])
    """
    windows = math.gcd(x.shape[-1], size)
    means = x.reshape(*x.shape[:-1], windows, -1).mean(-1)
    return jnp.repeat(means, size // windows, axis=-1)


def apply(
    params: Params,
    x: Float[Array, "*batch in"],
    dropped: Float[Array, "*batch in"],
    scale: float = 1.0,
) -> Float[Array, "*batch out"]:
    """scale * U2(U1(x)). The connection takes x itself, before dropout (as released).

    The connections are computed as part of A and B (`fold`), which are smaller than activations.
    Computed separately, their gradients would read all outputs once more.

    Examples:
        >>> pair = {"lora_A": jnp.zeros((1, 2)), "lora_B": jnp.zeros((2, 1))}
        >>> x = jnp.array([3.0, 5.0])  # the mean of both, times beta1, goes to both outputs
        >>> apply(pair | {"beta1": jnp.float32(0.5), "beta2": jnp.float32(1)}, x, x).tolist()
        [2.0, 2.0]
    """
    pair = fold({name: value.astype(jnp.float32) for name, value in params.items()})
    if dropped is x:
        return lora.apply(pair, x, x, scale)
    a, b, beta1 = (p.astype(x.dtype) for p in (params["lora_A"], pair["lora_B"], params["beta1"]))
    u = split_activation(dropped @ a.T + beta1 * spread(x, a.shape[0]))
    return lora.expand(u * scale, b)


def fold(params: Params) -> Params:
    """The LoRA pair with exactly the same update (eq. 16, also for shapes that do not divide).

    Examples:
        >>> pair = {"lora_A": jnp.zeros((2, 4)), "lora_B": jnp.zeros((4, 2))}
        >>> folded = fold(pair | {"beta1": jnp.float32(1), "beta2": jnp.float32(1)})
        >>> folded["lora_A"].tolist()
        [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
        >>> folded["lora_B"].tolist()
        [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    """
    a, b = params["lora_A"], params["lora_B"]
    (rank, in_features), out_features = a.shape, b.shape[0]
    return {
        "lora_A": a + params["beta1"] * _connection(in_features, rank, a.dtype),
        "lora_B": b + params["beta2"] * _connection(rank, out_features, b.dtype),
    }


def _connection(n: int, size: int, dtype: DTypeLike) -> Float[Array, "size n"]:
    """`spread` from n to `size` features as a matrix."""
    windows = math.gcd(n, size)
    rows, columns = jnp.arange(size) // (size // windows), jnp.arange(n) // (n // windows)
    return (rows[:, None] == columns[None, :]).astype(dtype) * jnp.asarray(windows / n, dtype)


@dataclasses.dataclass(frozen=True)
class IecOptions:
    """Options of IEC."""

    connections: Literal["both", "u1", "u2"] = "both"
    """Connections to train: around A ("u1"), around B ("u2"), or "both" (IR-QLoRA, table 4). The
    scalar of a connection that is not trained stays 0."""

    def __post_init__(self) -> None:
        known = ("both", "u1", "u2")
        field, value = "adapter.iec.connections", self.connections
        require(value in known, field, value, ", ".join(known))


IEC = Method(
    name="iec",
    title="LoRA with IEC",
    description="an IEC adapter (information elastic connection)",
    init=lambda key, shape, rank, options, dtype: init(key, shape[1], shape[0], rank, dtype),
    apply=lambda params, x, dropped, scale, weight: apply(params, x, dropped, scale),
    # The names of the scalars in released IR-QLoRA adapters.
    files=lora.LORA.files | {"beta1": "lora_A_scale", "beta2": "lora_B_scale"},  # type: ignore[operator]
    fold=lambda params, shape: fold(params),
    frozen=lambda options: {"both": (), "u1": ("beta2",), "u2": ("beta1",)}[options.connections],
    # The rule of LoRA+ in PEFT for parameters of one dimension.
    faster=("lora_B", "beta1", "beta2"),
    options=IecOptions(),
)
