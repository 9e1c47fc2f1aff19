"""Grouped-query attention and rotary positions, as plain functions."""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from irqlora_jax.machine import compute_capability
from irqlora_jax.model.config import LlamaConfig


def rope_frequencies(config: LlamaConfig) -> Float32[Array, " half"]:
    """Radians per position of each of the head_dim / 2 rotations."""
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = 1 / jnp.power(jnp.float32(config.rope_theta), exponent)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    # llama3: long waves are stretched by `factor`, short ones stay, and those between are blended.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def rotate(
    x: Float[Array, "batch seq heads head_dim"],
    cos: Float32[Array, "batch seq half"],
    sin: Float32[Array, "batch seq half"],
) -> Float[Array, "batch seq heads head_dim"]:
    """Turns feature i together with feature i + head_dim / 2, as in Hugging Face's weights."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def wide_einsum(subscripts: str, a: Array, b: Array) -> Array:
    """An einsum summed in and returned as float32, whose gradients are products in a's type.

    Left to itself, the float32 cotangent would make float32 products of half-precision arrays.
    """
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def wide_einsum_forward(subscripts: str, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return wide_einsum(subscripts, a, b), (a, b)


def wide_einsum_backward(subscripts: str, saved: tuple[Array, Array], g: Array) -> Any:
    _, transpose = jax.vjp(functools.partial(jnp.einsum, subscripts), *saved)
    return transpose(g.astype(saved[0].dtype))


wide_einsum.defvjp(wide_einsum_forward, wide_einsum_backward)


def attend(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch slots kv_heads head_dim"],
    v: Float[Array, "batch slots kv_heads head_dim"],
    slots: Int[Array, "batch seq"] | None = None,
    segment_ids: Int[Array, "batch seq"] | None = None,
    implementation: Literal["xla", "cudnn"] | None = None,
    chunk: int = 256,
) -> Float[Array, "batch seq heads head_dim"]:
    """Causal grouped-query attention, its softmax in float32.

    Args:
        q: queries.
        k: keys.
        v: values.
        slots: of a cache, where each query stands among the keys; it sees those up to its own.
            None: query i stands in slot i.
        segment_ids: packed documents; a query sees only those of its own segment. Not with a cache.
        implementation: "cudnn", the flash attention of NVIDIA's library; "xla", some queries after
            the others; None, the fastest that can serve.
        chunk: queries whose scores "xla" holds at one time. More than twice as many are cut up, and
            their scores computed again in the backward pass: memory grows linearly with `seq`.

    Raises:
        ValueError: the implementation asked for cannot serve; says why.
    """
    refusal = None if implementation == "xla" else _cudnn_refusal(q, k, slots, segment_ids)
    if implementation == "cudnn" and refusal is not None:
        raise ValueError(f"attention = 'cudnn': {refusal}; accepted here is 'xla' or None")
    if implementation != "xla" and refusal is None:
        return _cudnn(q, k, v)
    batch, seq, *features = q.shape
    if slots is None:
        slots = jnp.broadcast_to(jnp.arange(seq)[None, :], (batch, seq))
    # Heads in front: a product for each of them, of matrices that lie in one piece.
    keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)

    def some(queries: tuple[Array, Array, Array | None]) -> Array:
        q, slots, ids = queries
        mask = jnp.arange(k.shape[1])[None, None, :] <= slots[:, :, None]
        if ids is not None:
            assert segment_ids is not None
            mask &= ids[:, :, None] == segment_ids[:, None, :]
        return _plain(q, keys, values, mask)

    if seq <= 2 * chunk:
        return some((q, slots, segment_ids))
    count = -(-seq // chunk)

    def cut(x: Array) -> Array:
        padding = [(0, 0), (0, count * chunk - seq)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding, mode="edge")  # copies of the last query: they see something
        return jnp.swapaxes(x.reshape(batch, count, chunk, *x.shape[2:]), 0, 1)

    y = jax.lax.map(jax.checkpoint(some), jax.tree.map(cut, (q, slots, segment_ids)))
    return jnp.swapaxes(y, 0, 1).reshape(batch, count * chunk, *features)[:, :seq]


def _plain(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch kv_heads slots head_dim"],
    v: Float[Array, "batch kv_heads slots head_dim"],
    mask: Bool[Array, "batch seq slots"],
) -> Float[Array, "batch seq heads head_dim"]:
    batch, seq, heads, head_dim = q.shape
    grouped = q.reshape(batch, seq, k.shape[1], -1, head_dim).transpose(0, 2, 3, 1, 4)
    scores: Array = wide_einsum("bkgtd,bksd->bkgts", grouped, k)  # type: ignore[assignment]
    scores = jnp.where(mask[:, None, None], scores * (1 / math.sqrt(head_dim)), -jnp.inf)
    # A query always sees its own slot, so no row of the softmax is empty. It is divided by its sum
    # behind the product: then the gradient sums over features, and never over slots.
    chances = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    y: Array = wide_einsum("bkgts,bksd->bkgtd", chances.astype(v.dtype), v)  # type: ignore[assignment]
    y = (y / chances.sum(axis=-1, keepdims=True)).astype(q.dtype)
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, seq, heads, head_dim)


def _cudnn(q: Array, k: Array, v: Array) -> Array:
    with jax.numpy_dtype_promotion("standard"):  # it scales by a float64
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _cudnn_refusal(
    q: Array, k: Array, slots: Array | None, segment_ids: Array | None
) -> str | None:
    """Why cuDNN cannot serve, if it cannot."""
    device = jax.devices()[0]
    if (compute_capability(device) or (0, 0)) < (8, 0):
        needs = "an NVIDIA GPU of compute capability 8.0 or more"
        return f"it needs {needs}, the device is {device.device_kind}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"it takes heads of a multiple of 8 up to 128 features, not {q.shape[-1]}"
    if slots is not None:
        return "it serves no cache of keys and values"
    if segment_ids is not None:
        # Through jax it takes a mask of all pairs of tokens alone, and writes its gradient too.
        return "it serves no packed rows"
    try:
        jax.eval_shape(lambda *x: jax.vjp(_cudnn, *x)[0], q, k, k)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"jax {jax.__version__} says: {error}"
    return None


def segment_positions(segment_ids: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """Positions that start again from 0 where a new segment begins."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1])[None, :], segment_ids.shape)
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
