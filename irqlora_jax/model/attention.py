"""Grouped-query attention and rotary positions, as plain functions."""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from irqlora_jax.machine import compute_capability
from irqlora_jax.model.config import LlamaConfig, RopeScaling
from irqlora_jax.quant.choose import Implementation, choose, serves_all


def rope_frequencies(
    config: LlamaConfig, length: Int[Array, ""] | None = None
) -> Float32[Array, " half"]:
    """Radians per position of each of the head_dim / 2 rotations.

    Args:
        config: the architecture.
        length: number of positions, for dynamic scaling (default: max_position_embeddings).
    """
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    scaling, theta = config.rope_scaling, jnp.float32(config.rope_theta)
    if scaling is not None and scaling.rope_type == "dynamic" and length is not None:
        most = config.max_position_embeddings
        longer = jnp.maximum(length, most).astype(jnp.float32) / most
        power = config.head_dim / (config.head_dim - 2)
        theta = theta * (scaling.factor * longer - (scaling.factor - 1)) ** power
    frequencies = 1 / jnp.power(theta, exponent)
    if scaling is None or scaling.rope_type == "dynamic":
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "yarn":
        divided = _yarn_ramp(config, scaling)
        return frequencies / scaling.factor * divided + frequencies * (1 - divided)
    # llama3 stretches long waves by `factor`, keeps short ones, and blends the ones between.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn_ramp(config: LlamaConfig, scaling: RopeScaling) -> Float32[Array, " half"]:
    """How far each frequency is divided: from 0 for short waves to 1 for long ones."""
    original, size = scaling.original_max_position_embeddings, config.head_dim

    def feature(turns: float) -> float:
        """The wave with this many turns within the original context."""
        ratio = math.log(original / (turns * 2 * math.pi))
        return size * ratio / (2 * math.log(config.rope_theta))

    low, high = feature(scaling.beta_fast), feature(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    width = high - low or 0.001
    return jnp.clip((jnp.arange(size // 2, dtype=jnp.float32) - low) / width, 0, 1)


def rope_rotations(
    config: LlamaConfig, positions: Int[Array, "batch seq"]
) -> tuple[Float32[Array, "batch seq half"], Float32[Array, "batch seq half"]]:
    """Cosines and sines of the rotations at these positions."""
    scaling, length = config.rope_scaling, None
    if scaling is not None and scaling.rope_type == "dynamic":
        length = positions.max() + 1  # of all rows together, as in transformers
    frequencies = rope_frequencies(config, length)[None, None, :]
    angles = positions[:, :, None].astype(jnp.float32) * frequencies
    if scaling is None or scaling.scale == 1:
        return jnp.cos(angles), jnp.sin(angles)
    return jnp.cos(angles) * scaling.scale, jnp.sin(angles) * scaling.scale


def rotate(
    x: Float[Array, "batch seq heads head_dim"],
    cos: Float32[Array, "batch seq half"],
    sin: Float32[Array, "batch seq half"],
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotates the pairs of features (i, i + head_dim / 2), as Hugging Face's weights expect."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum_f32(subscripts: str, a: Array, b: Array) -> Array:
    """An einsum that sums in float32 and returns float32.

    Its gradients are products in the type of `a`. The gradient of jax would multiply the
    half-precision arrays in float32, because the cotangent is float32.
    """
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def einsum_f32_forward(subscripts: str, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return einsum_f32(subscripts, a, b), (a, b)


def einsum_f32_backward(subscripts: str, saved: tuple[Array, Array], g: Array) -> Any:
    _, transpose = jax.vjp(functools.partial(jnp.einsum, subscripts), *saved)
    return transpose(g.astype(saved[0].dtype))


einsum_f32.defvjp(einsum_f32_forward, einsum_f32_backward)


def attend(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch slots kv_heads head_dim"],
    v: Float[Array, "batch slots kv_heads head_dim"],
    slots: Int[Array, "batch seq"] | None = None,
    segment_ids: Int[Array, "batch seq"] | None = None,
    implementation: Literal["xla", "cudnn"] | None = None,
    chunk: int = 256,
    window: int | Int[Array, ""] | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Causal grouped-query attention. The softmax is float32.

    Args:
        q: queries.
        k: keys.
        v: values.
        slots: slot of each query in the key-value cache; a query attends to slots up to its own.
            None: query i is in slot i.
        segment_ids: segments of packed documents; a query attends only to its own segment. Not
            with a cache.
        implementation: "cudnn": flash attention of NVIDIA's library. "xla": one chunk of queries
            at a time. None: the first of these that can serve.
        chunk: queries whose scores "xla" holds at the same time. With more than two chunks, the
            backward pass recomputes the scores, so memory grows linearly with `seq`.
        window: number of slots that a query attends to, its own and those before it. None: no
            limit. An array, if it differs between the layers of a loop.

    Raises:
        ValueError: the implementation cannot serve; the message says why, and which ones can.
    """
    if isinstance(window, int) and window >= k.shape[1]:
        window = None
    operands = q, k, v, slots, segment_ids, window
    chosen = choose(implementation, _IMPLEMENTATIONS, *operands, setting="attention")
    return chosen.forward(*operands, chunk)


def _in_chunks(
    q: Array,
    k: Array,
    v: Array,
    slots: Array | None,
    segment_ids: Array | None,
    window: int | Array | None,
    chunk: int,
) -> Array:
    """The implementation "xla"."""
    batch, seq, *features = q.shape
    if slots is None:
        slots = jnp.broadcast_to(jnp.arange(seq)[None, :], (batch, seq))
    # Heads come first, so that the matrices of each head are contiguous.
    keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)

    def attend_to_all(queries: tuple[Array, Array, Array | None]) -> Array:
        q, slots, ids = queries
        keys_at = jnp.arange(k.shape[1])[None, None, :]
        mask = keys_at <= slots[:, :, None]
        if window is not None:
            mask &= keys_at > slots[:, :, None] - window
        if ids is not None:
            assert segment_ids is not None
            mask &= ids[:, :, None] == segment_ids[:, None, :]
        return _plain(q, keys, values, mask)

    if seq <= 2 * chunk:
        return attend_to_all((q, slots, segment_ids))
    count = -(-seq // chunk)

    def cut(x: Array) -> Array:
        padding = [(0, 0), (0, count * chunk - seq)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding, mode="edge")  # copies of the last query, so that each sees a key
        return jnp.swapaxes(x.reshape(batch, count, chunk, *x.shape[2:]), 0, 1)

    y = jax.lax.map(jax.checkpoint(attend_to_all), jax.tree.map(cut, (q, slots, segment_ids)))
    return jnp.swapaxes(y, 0, 1).reshape(batch, count * chunk, *features)[:, :seq]


def _plain(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch kv_heads slots head_dim"],
    v: Float[Array, "batch kv_heads slots head_dim"],
    mask: Bool[Array, "batch seq slots"],
) -> Float[Array, "batch seq heads head_dim"]:
    batch, seq, heads, head_dim = q.shape
    grouped = q.reshape(batch, seq, k.shape[1], -1, head_dim).transpose(0, 2, 3, 1, 4)
    scores: Array = einsum_f32("bkgtd,bksd->bkgts", grouped, k)  # type: ignore[assignment]
    scores = jnp.where(mask[:, None, None], scores * (1 / math.sqrt(head_dim)), -jnp.inf)
    # A query always attends to its own slot, so no row of the softmax is empty. Dividing by the
    # sum of the row after the product lets the gradient sum over features, not over slots.
    chances = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    y: Array = einsum_f32("bkgts,bksd->bkgtd", chances.astype(v.dtype), v)  # type: ignore[assignment]
    y = (y / chances.sum(axis=-1, keepdims=True)).astype(q.dtype)
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, seq, heads, head_dim)


def _cudnn(q: Array, k: Array, v: Array, *_: Any) -> Array:
    with jax.numpy_dtype_promotion("standard"):  # jax scales by a float64 inside
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _cudnn_refusal(
    q: Array,
    k: Array,
    v: Array,
    slots: Array | None,
    segment_ids: Array | None,
    window: int | Array | None,
) -> str | None:
    """Why cuDNN cannot serve, or None."""
    device = jax.devices()[0]
    if (compute_capability(device) or (0, 0)) < (8, 0):
        needs = "an NVIDIA GPU of compute capability 8.0 or more"
        return f"it needs {needs}, the device is {device.device_kind}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"it takes a head_dim that is a multiple of 8 up to 128, not {q.shape[-1]}"
    if slots is not None:
        return "it does not support a key-value cache"
    if segment_ids is not None:
        # jax passes segments only as a mask over all pairs of tokens, and computes the gradient of
        # that mask too.
        return "it does not support packed rows"
    if window is not None:
        return "it does not support rows longer than the sliding window"
    try:
        jax.eval_shape(lambda *x: jax.vjp(_cudnn, *x)[0], q, k, v)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"jax {jax.__version__} says: {error}"
    return None


_IMPLEMENTATIONS = (
    Implementation("cudnn", _cudnn_refusal, _cudnn),
    Implementation("xla", serves_all, _in_chunks),
)


def segment_positions(segment_ids: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """Position of each token in its segment, from 0."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1])[None, :], segment_ids.shape)
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
