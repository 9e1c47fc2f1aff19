"""IEC, information elastic connection: LoRA whose two factors also pass their input on
(IR-QLoRA, section 3.3).

    U1(x) = A x + beta1 * spread(x, rank)            eq. 12
    U2(u) = B u + beta2 * spread(u, out_features)    eq. 13
    update = U2(U1(x))

`spread` has no parameters: it averages n features over g = gcd(n, m) contiguous windows and repeats
every mean m/g times side by side. The paper writes the repetition as a concatenation of copies; its
merging rule (eq. 16) and the released code repeat in place, and only that folds into a LoRA pair.
"""

import math

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from irqlora_jax.adapters import lora
from irqlora_jax.adapters.lora import Params
from irqlora_jax.sharding import split_activation


def init(
    key: PRNGKeyArray,
    in_features: int,
    out_features: int,
    rank: int,
    dtype: DTypeLike = jnp.float32,
) -> Params:
    """LoRA's pair, and the two scalars beta1 and beta2, both 0 (as released)."""
    pair = lora.init(key, in_features, out_features, rank, dtype)
    return pair | {"beta1": jnp.zeros((), dtype), "beta2": jnp.zeros((), dtype)}


def spread(x: Float[Array, "*batch n"], size: int) -> Float[Array, "*batch size"]:
    """Means over gcd(n, size) contiguous windows, each repeated to fill `size` features."""
    windows = math.gcd(x.shape[-1], size)
    means = x.reshape(*x.shape[:-1], windows, -1).mean(-1)
    return jnp.repeat(means, size // windows, axis=-1)


def apply(
    params: Params, x: Float[Array, "*batch in"], dropped: Float[Array, "*batch in"]
) -> Float[Array, "*batch out"]:
    """U2(U1(x)). The connection sees x itself, not what dropout left of it (as released)."""
    a, b, beta1, beta2 = (params[k].astype(x.dtype) for k in ("lora_A", "lora_B", "beta1", "beta2"))
    u = split_activation(dropped @ a.T + beta1 * spread(x, a.shape[0]))
    return u @ b.T + beta2 * spread(u, b.shape[0])


def fold(params: Params) -> Params:
    """The LoRA pair with the same update, exactly (eq. 16, for shapes that do not divide too)."""
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
