"""One decoder layer: norms, attention and MLP, whose linear layers may have an adapter."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from irqlora_jax.adapters import scales
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.model.attention import attend, einsum_f32, rotate
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.tree import BIAS
from irqlora_jax.quant.matmul import MatmulName, dequant_matmul
from irqlora_jax.sharding import SPLIT_INPUTS, gather, split_activation

AttentionName = Literal["xla", "cudnn"]
Initializer = Callable[..., Array]
Cache = dict[str, Array]
"""Keys and values of the tokens seen: "k", "v" [layer, batch, slot, kv_head, head_dim], and
"length" [batch], the number of tokens in each row. The token at position p is in slot p."""

_UNLIMITED = 2**30
"""More slots than a cache has."""
_normal = nn.initializers.normal(0.02)


def rms_norm(
    x: Float[Array, "*batch hidden"], weight: Float[Array, " hidden"], eps: float
) -> Float[Array, "*batch hidden"]:
    """x / rms(x) * weight, computed in float32."""
    wide = x.astype(jnp.float32)
    scaled = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    weight = jnp.broadcast_to(weight.astype(jnp.float32), x.shape)
    return (scaled * weight).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that all parts of a model share.

    Attributes:
        config: the architecture.
        adapter: configuration of the adapters; None: no adapters.
        attention: implementation of `attend`.
        matmul: implementation of `dequant_matmul`.
        deterministic: no dropout.
    """

    config: LlamaConfig
    adapter: AdapterConfig | None
    attention: AttentionName | None
    matmul: MatmulName | None
    deterministic: bool


class Context(NamedTuple):
    """Inputs of all layers, besides the hidden states.

    Attributes:
        rope: cosines and sines of the positions.
        slots: slot in the cache for each token; None without a cache.
        segment_ids: segments of packed documents; None if rows are not packed.
    """

    rope: tuple[Float32[Array, "batch seq half"], Float32[Array, "batch seq half"]]
    slots: Int[Array, "batch seq"] | None
    segment_ids: Int[Array, "batch seq"] | None


def _frozen(
    module: nn.Module, shape: tuple[int, ...], init: Initializer = _normal, name: str = "weight"
) -> Any:
    """Returns a weight of the base. `Llama.init` has no base, so it makes a random weight."""

    def fresh() -> Array:
        return init(module.make_rng("params"), shape, jnp.float32)

    weight = module.variable("base", name, fresh).value
    if tuple(weight.shape) != shape:
        path = ".".join((*module.path, name))
        raise ValueError(f"base: {path} has shape {tuple(weight.shape)}: expected {shape}")
    return weight


class Weight(nn.Module):
    """A frozen array: embeddings, output matrix, weight of a norm."""

    shape: tuple[int, ...]
    init_fn: Initializer = _normal

    @nn.compact
    def __call__(self) -> Float[Array, "..."]:
        return _frozen(self, self.shape, self.init_fn)


class AdaptedLinear(nn.Module):
    """W x with a frozen W, plus the scaled update of the adapter if the layer is a target, plus a
    frozen bias if the architecture has one.

    With `mutable=["stats"]` it also returns the second moments of its inputs, "gram" [in, in] in
    float32: the sum of x x^T over all tokens. Data-driven calibrations need them.
    """

    shape: tuple[int, int]
    settings: Settings

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch seq in"], params: Mapping[str, Array] | None = None
    ) -> Float[Array, "batch seq out"]:
        """`params` are the parameters of the adapter; None: the layer is not a target."""
        assert self.name is not None

        def with_bias(y: Array) -> Array:
            y = split_activation(y, not split_inputs)
            if self.name not in self.settings.config.biased:
                return y
            bias = _frozen(self, self.shape[:1], nn.initializers.zeros, BIAS)
            return y + bias.astype(y.dtype)[None, None]

        split_inputs = self.name in SPLIT_INPUTS
        x = split_activation(x, split_inputs)
        if self.is_mutable_collection("stats"):
            gram = einsum_f32("bti,btj->ij", x, x)
            self.sow("stats", "gram", gram, init_fn=lambda: 0.0, reduce_fn=jnp.add)
        weight = gather(_frozen(self, self.shape), self.name)
        if params is None:
            return with_bias(dequant_matmul(x, weight, self.settings.matmul))
        adapter = self.settings.adapter
        assert adapter is not None
        frozen = adapter.chosen.frozen(adapter.options)
        leaves = {
            name: jax.lax.stop_gradient(leaf) if name in frozen else leaf
            for name, leaf in params.items()
        }
        own, leaves = scales.split(gather(leaves, self.name, adapter.splits))
        if own:
            weight = scales.put(own, weight)
        y = dequant_matmul(x, weight, self.settings.matmul)
        dropped = nn.Dropout(adapter.dropout)(x, deterministic=self.settings.deterministic)
        method, scale = adapter.chosen, adapter.scale_for(self.shape)
        y = y + method.apply(leaves, x, dropped, scale, weight)
        if method.gain is not None:
            y = y * method.gain(leaves, weight, scale).astype(y.dtype)[None, None]
        return with_bias(y)  # the gain is one of the weight alone


class _Block(nn.Module):
    """A part of a decoder layer: linear layers, and their adapters by name."""

    settings: Settings
    adapters: Mapping[str, Mapping[str, Array]]

    def linear(self, name: str, x: Array) -> Array:
        shape = self.settings.config.linear_shapes[name]
        return AdaptedLinear(shape, self.settings, name=name)(x, self.adapters.get(name))


class Attention(_Block):
    """Grouped-query attention with rotary positions."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        cache: Cache | None,
        layer: Int[Array, ""],
        context: Context,
    ) -> tuple[Float[Array, "batch seq hidden"], Cache | None]:
        config = self.settings.config

        def heads(name: str) -> Array:
            return self.linear(name, x).reshape(*x.shape[:2], -1, config.head_dim)

        def rotated(name: str, norm: str) -> Array:
            y = heads(name)
            if config.family.head_norms:
                weight = Weight((config.head_dim,), nn.initializers.ones, name=norm)()
                y = rms_norm(y, weight, config.rms_norm_eps)
            return y if turned is False else rotate(y, *rope)

        rope, slots = context.rope, context.slots
        turned = _of_layer(config.rotated, layer)
        if not isinstance(turned, bool):
            rope = jnp.where(turned, rope[0], 1), jnp.where(turned, rope[1], 0)
        q, k, v = rotated("q_proj", "q_norm"), rotated("k_proj", "k_norm"), heads("v_proj")
        if cache is not None:
            new = (layer, jnp.arange(x.shape[0])[:, None], slots)
            cache = {"k": cache["k"].at[new].set(k), "v": cache["v"].at[new].set(v)}
            k, v = cache["k"][layer], cache["v"][layer]
        given = slots, context.segment_ids, self.settings.attention
        # Layers whose windows no row reaches are alike, so cuDNN can serve them.
        windows = tuple(w if w and w < k.shape[1] else None for w in config.windows)
        window = _of_layer(windows, layer)
        y = attend(q, k, v, *given, window=window)
        return self.linear("o_proj", y.reshape(*x.shape[:2], -1)), cache


def _of_layer(values: tuple[Any, ...], layer: Int[Array, ""]) -> Any:
    """The value of a layer. It is static unless the layers of the loop differ."""
    if len(set(values)) == 1:
        return values[0]
    return jnp.asarray([_UNLIMITED if value is None else value for value in values])[layer]


class MLP(_Block):
    """SwiGLU: down(silu(gate x) * up x)."""

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq hidden"]) -> Float[Array, "batch seq hidden"]:
        gate = nn.silu(self.linear("gate_proj", x))
        return self.linear("down_proj", gate * self.linear("up_proj", x))


class Layer(nn.Module):
    """One decoder layer; the body of the scan."""

    settings: Settings

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "batch seq hidden"], Cache | None],
        own: tuple[Int[Array, ""], Mapping[str, Any]],
        context: Context,
    ) -> tuple[tuple[Float[Array, "batch seq hidden"], Cache | None], None]:
        config = self.settings.config
        layer, adapters = own

        def norm(name: str, x: Array) -> Array:
            weight = Weight((config.hidden_size,), nn.initializers.ones, name=name)()
            return rms_norm(x, weight, config.rms_norm_eps)

        # The cache of all layers is carried and updated in place; stacking new ones would copy it.
        x, cache = carry
        x = split_activation(x)
        attention = Attention(self.settings, adapters.get("self_attn", {}), name="self_attn")
        y, cache = attention(norm("input_layernorm", x), cache, layer, context)
        x = x + y
        mlp = MLP(self.settings, adapters.get("mlp", {}), name="mlp")
        x = x + mlp(norm("post_attention_layernorm", x))
        return (x, cache), None
