"""Grouped-query attention and rotary positions, as plain functions."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from irqlora_jax.llama_config import LlamaConfig


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
    mask: Bool[Array, "batch_or_1 1 seq slots"],
) -> Float[Array, "batch seq heads head_dim"]:
    """Grouped-query attention, its softmax in float32.

    Not `jax.nn.dot_product_attention`: that has no float16 on CPUs, and its gradient in half
    precision breaks under strict promotion of types.
    """
    batch, seq, heads, head_dim = q.shape
    grouped = q.reshape(batch, seq, k.shape[2], -1, head_dim)
    scores: Array = wide_einsum("btkgd,bskd->bkgts", grouped, k)  # type: ignore[assignment]
    scores = scores / math.sqrt(head_dim)
    # A query always sees its own slot, so no row of the softmax is empty.
    weights = jax.nn.softmax(scores, axis=-1, where=mask[:, :, None])
    y = jnp.einsum("bkgts,bskd->btkgd", weights.astype(v.dtype), v)
    return y.reshape(batch, seq, heads, head_dim)


def segment_positions(segment_ids: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """Positions that start again from 0 where a new segment begins."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1])[None, :], segment_ids.shape)
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
