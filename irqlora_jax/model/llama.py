"""LLaMA 1, 2 and 3 as a functional Flax (linen) module: frozen base, trained adapters.

There are two collections: `base` holds the frozen weights (QTensors or float arrays), `params` the
adapters. Both use Hugging Face's names, and stack the layers on a leading axis for `nn.scan`.
Layers in different formats are in separate stacks (`tree.py`), which are scanned one after the
other. The module itself holds no arrays; all are passed to `apply`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.model.attention import (
    attend,
    einsum_f32,
    rope_frequencies,
    rotate,
    segment_positions,
)
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.tree import LAYERS, linear_path, stacks
from irqlora_jax.quant.matmul import MatmulName, dequant_matmul
from irqlora_jax.sharding import SPLIT_INPUTS, gather, split_activation

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
AttentionName = Literal["xla", "cudnn"]
Initializer = Callable[..., Array]
Cache = dict[str, Array]
"""Keys and values of the tokens seen: "k", "v" [layer, batch, slot, kv_head, head_dim], and
"length" [batch], the number of tokens in each row. The token at position p is in slot p."""


_normal = nn.initializers.normal(0.02)


def head_weight(base: Mapping[str, Any]) -> Float[Array, "vocab hidden"]:
    """The output matrix: `lm_head`, or the embeddings if the two are tied."""
    name = "lm_head" if "lm_head" in base else "embed_tokens"
    return gather(base[name]["weight"], name)


def head_logits(
    hidden: Float[Array, "*batch hidden"], weight: Float[Array, "vocab hidden"]
) -> Float32[Array, "*batch vocab"]:
    """Logits from `Llama.features` and `head_weight`; products in the type of `hidden`."""
    return einsum_f32("...h,vh->...v", hidden, weight.astype(hidden.dtype))


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


def _frozen(module: nn.Module, shape: tuple[int, ...], init: Initializer = _normal) -> Any:
    """Returns a weight of the base. `Llama.init` has no base, so it makes a random weight."""

    def fresh() -> Array:
        return init(module.make_rng("params"), shape, jnp.float32)

    weight = module.variable("base", "weight", fresh).value
    if tuple(weight.shape) != shape:
        name = ".".join((*module.path, "weight"))
        raise ValueError(f"base: {name} has shape {tuple(weight.shape)}: expected {shape}")
    return weight


class Weight(nn.Module):
    """A frozen array: embeddings, output matrix, weight of a norm."""

    shape: tuple[int, ...]
    init_fn: Initializer = _normal

    @nn.compact
    def __call__(self) -> Float[Array, "..."]:
        return _frozen(self, self.shape, self.init_fn)


class AdaptedLinear(nn.Module):
    """W x with a frozen W, plus the scaled update of the adapter if the layer is a target.

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
        split_inputs = self.name in SPLIT_INPUTS
        x = split_activation(x, split_inputs)
        if self.is_mutable_collection("stats"):
            gram = einsum_f32("bti,btj->ij", x, x)
            self.sow("stats", "gram", gram, init_fn=lambda: 0.0, reduce_fn=jnp.add)
        weight = gather(_frozen(self, self.shape), self.name)
        y = dequant_matmul(x, weight, self.settings.matmul)
        if params is not None:
            adapter = self.settings.adapter
            assert adapter is not None
            method, frozen = adapter.chosen, adapter.chosen.frozen(adapter.options)
            dropped = nn.Dropout(adapter.dropout)(x, deterministic=self.settings.deterministic)
            leaves = {
                name: jax.lax.stop_gradient(leaf) if name in frozen else leaf
                for name, leaf in params.items()
            }
            leaves = gather(leaves, self.name, method.splits)
            y = y + method.apply(leaves, x, dropped, adapter.scale, weight)
        return split_activation(y, not split_inputs)


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
        def heads(name: str) -> Array:
            return self.linear(name, x).reshape(*x.shape[:2], -1, self.settings.config.head_dim)

        rope, slots = context.rope, context.slots
        q, k, v = rotate(heads("q_proj"), *rope), rotate(heads("k_proj"), *rope), heads("v_proj")
        if cache is not None:
            new = (layer, jnp.arange(x.shape[0])[:, None], slots)
            cache = {"k": cache["k"].at[new].set(k), "v": cache["v"].at[new].set(v)}
            k, v = cache["k"][layer], cache["v"][layer]
        y = attend(q, k, v, slots, context.segment_ids, self.settings.attention)
        return self.linear("o_proj", y.reshape(*x.shape[:2], -1)), cache


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


class Llama(nn.Module):
    """LLaMA with adapters.

    `apply({"params": adapters, "base": base}, tokens)` gives logits; `init(key, tokens)` gives
    fresh adapters and a random float base, for pretraining.

    Attributes:
        config: the architecture.
        adapter: configuration of the adapters; None: the base alone, with empty "params".
        compute_dtype: type of the activations. Norms, rotations, softmax and logits are float32.
        remat: recompute each layer in the backward pass instead of keeping its activations.
        unroll: layers per iteration of the compiled loop. Values above 1 take longer to compile,
            and are faster if layers are tiny.
        attention: implementation of `attend`; None: the fastest for the device.
        matmul: implementation of `dequant_matmul`; None: the fastest one by measurement.
    """

    config: LlamaConfig
    adapter: AdapterConfig | None = None
    compute_dtype: str = "float32"
    remat: bool = False
    unroll: int = 1
    attention: AttentionName | None = None
    matmul: MatmulName | None = None

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        *,
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        deterministic: bool = True,
    ) -> Float32[Array, "batch seq vocab"]:
        """Logits of the token after each token.

        Args:
            tokens: rows, padded on the right if at all: attention is causal and ignores padding.
            positions: for the rotations (default: counted from the start of the row or segment).
            segment_ids: segments of packed documents; a token attends only to its own segment.
            deterministic: no dropout. If False, pass `rngs={"dropout": key}`.
        """
        hidden, head, _ = self._trunk(tokens, positions, segment_ids, deterministic)
        return head_logits(hidden, head)

    def features(
        self,
        tokens: Int[Array, "batch seq"],
        *,
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        deterministic: bool = True,
        cache: Cache | None = None,
    ) -> Float[Array, "batch seq hidden"]:
        """Returns the hidden states after the last norm, the input of `head_logits`.

        The arguments are those of `__call__`, and `cache`, with the tokens before the rows. With a
        cache, pass no positions or segments.
        """
        return self._trunk(tokens, positions, segment_ids, deterministic, cache)[0]

    def decode(
        self,
        tokens: Int[Array, "batch seq"],
        cache: Cache,
        lengths: Int[Array, " batch"] | None = None,
    ) -> tuple[Float32[Array, "batch vocab"], Cache]:
        """Appends tokens to the cache, for prefill (many tokens) and decoding (one token).

        Args:
            tokens: the next tokens of each row, padded on the right.
            cache: from `init_cache` or the previous call. The caller must make it large enough:
                tokens beyond its slots are lost.
            lengths: number of tokens in each row without padding (default: all).

        Returns:
            Logits of the token after the last token of each row, and the new cache.
        """
        hidden, head, slots = self._trunk(tokens, None, None, True, cache)
        assert slots is not None
        if lengths is None:
            lengths = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        # Padding went to slots >= length. No query attends to them before they are overwritten.
        return head_logits(last, head), slots | {"length": cache["length"] + lengths}

    @nn.nowrap
    def init_cache(self, batch: int, slots: int) -> Cache:
        """An empty cache for rows of up to `slots` tokens."""
        config = self.config
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        shape = (layers, batch, slots, heads, config.head_dim)
        # Two separate arrays, because a caller may donate the cache.
        k, v = (jnp.zeros(shape, self.compute_dtype) for _ in range(2))
        return {"k": k, "v": v, "length": jnp.zeros((batch,), jnp.int32)}

    @nn.nowrap
    def init_adapters(
        self, key: PRNGKeyArray, pairs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Makes adapters without effect. Values depend only on the key and the place of the layer.

        Args:
            key: random key.
            pairs: pairs from `hf.load_loftq` to start from instead.
        """
        adapter = self.adapter
        if adapter is None:
            return {}
        layers = jnp.arange(self.config.num_hidden_layers)
        tree: dict[str, Any] = {}
        for place, (name, shape) in enumerate(self.config.linear_shapes.items()):
            if name not in adapter.targets:
                continue
            module_key = jax.random.fold_in(key, place)

            def fresh(layer: Array, module_key: Array = module_key, shape: Any = shape) -> Any:
                key = jax.random.fold_in(module_key, layer)
                options, dtype = adapter.options, adapter.dtype
                return adapter.chosen.init(key, shape, adapter.rank, options, dtype)

            group, _ = linear_path(name)
            start = {} if pairs is None else pairs[LAYERS][group][name]
            tree.setdefault(group, {})[name] = jax.vmap(fresh)(layers) | start
        return {LAYERS: tree}

    @nn.compact
    def _trunk(
        self,
        tokens: Array,
        positions: Array | None,
        segment_ids: Array | None,
        deterministic: bool,
        cache: Cache | None = None,
    ) -> tuple[Array, Array, Cache | None]:
        """Hidden states, the output matrix, and the cache's new "k" and "v"."""
        config, depth = self.config, self.config.num_hidden_layers
        if self.compute_dtype not in COMPUTE_DTYPES:
            accepted = ", ".join(COMPUTE_DTYPES)
            raise ValueError(f"compute_dtype = {self.compute_dtype!r}: expected {accepted}")
        index = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)
        if cache is not None:
            positions = index + cache["length"][:, None]
        if positions is None:
            positions = index if segment_ids is None else segment_positions(segment_ids)
        angles = positions[:, :, None].astype(jnp.float32) * rope_frequencies(config)[None, None, :]
        rope = (jnp.cos(angles), jnp.sin(angles))

        table = (config.vocab_size, config.hidden_size)
        embeddings = gather(Weight(table, name="embed_tokens")(), "embed_tokens")
        x = embeddings[tokens].astype(self.compute_dtype)
        settings = Settings(config, self.adapter, self.attention, self.matmul, deterministic)
        scanned = nn.scan(
            nn.remat(Layer, prevent_cse=False) if self.remat else Layer,
            variable_axes={"base": 0, "stats": 0},
            split_rngs={"params": True, "dropout": True},
            unroll=self.unroll,
            in_axes=(0, nn.broadcast),  # type: ignore[arg-type]
        )
        stored = None if cache is None else {"k": cache["k"], "v": cache["v"]}
        slots = None if cache is None else positions
        context, adapters = Context(rope, slots, segment_ids), self._adapters()
        for name, layers in stacks(self.variables.get("base", {}), depth).items():
            part = adapters
            if len(layers) < depth:
                part = jax.tree.map(lambda x, of=layers: x[of.start : of.stop], adapters)
            own = jnp.arange(layers.start, layers.stop), part
            (x, stored), _ = scanned(settings, name=name)((x, stored), own, context)
        norm = Weight((config.hidden_size,), nn.initializers.ones, name="norm")()
        x = rms_norm(x, norm, config.rms_norm_eps)
        head = embeddings if config.tie_word_embeddings else Weight(table, name="lm_head")()
        return x, head, stored

    def _adapters(self) -> Mapping[str, Any]:
        """The adapters of all layers, one stack. `Llama.init` makes fresh ones."""
        if self.adapter is None:
            return {}
        if self.is_initializing() and not self.has_variable("params", LAYERS):
            fresh = self.init_adapters(self.make_rng("params"))
            self.put_variable("params", LAYERS, fresh[LAYERS])
        given = self.get_variable("params", LAYERS)
        fresh = jax.eval_shape(self.init_adapters, jax.random.key(0))[LAYERS]
        given_shapes, wanted_shapes = (
            {
                jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape
                for path, leaf in jax.tree.leaves_with_path(tree)
            }
            for tree in (given, fresh)
        )
        for name in sorted(given_shapes.keys() | wanted_shapes.keys()):
            found, wanted = (of.get(name, "nothing") for of in (given_shapes, wanted_shapes))
            if found != wanted:
                raise ValueError(f"params: {name}: shape {found}, expected {wanted}")
        return given
