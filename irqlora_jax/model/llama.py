"""LLaMA and its relatives as a functional Flax (linen) module: frozen base, trained adapters.

There are two collections: `base` holds the frozen weights (QTensors or float arrays), `params` the
adapters. Both use Hugging Face's names, and stack the layers on a leading axis for `nn.scan`.
Layers in different formats are in separate stacks (`tree.py`), which are scanned one after the
other. The module itself holds no arrays; all are passed to `apply`.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from irqlora_jax.adapters import scales
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.model.attention import einsum_f32, rope_rotations, segment_positions
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.layer import (
    AttentionName,
    Cache,
    Context,
    Layer,
    Settings,
    Weight,
    rms_norm,
)
from irqlora_jax.model.tree import LAYERS, linear_path, stacks
from irqlora_jax.quant.matmul import MatmulName
from irqlora_jax.sharding import gather

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


def head_weight(base: Mapping[str, Any]) -> Float[Array, "vocab hidden"]:
    """The output matrix: `lm_head`, or the embeddings if the two are tied."""
    name = "lm_head" if "lm_head" in base else "embed_tokens"
    return gather(base[name]["weight"], name)


def head_logits(
    hidden: Float[Array, "*batch hidden"], weight: Float[Array, "vocab hidden"]
) -> Float32[Array, "*batch vocab"]:
    """Logits from `Llama.features` and `head_weight`; products in the type of `hidden`."""
    return einsum_f32("...h,vh->...v", hidden, weight.astype(hidden.dtype))


class Llama(nn.Module):
    """A LLaMA, or a relative of it, with adapters.

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
        self,
        key: PRNGKeyArray,
        pairs: Mapping[str, Any] | None = None,
        base: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Makes adapters without effect. Values depend only on the key and the place of the layer.

        Args:
            key: random key.
            pairs: pairs from `hf.load_loftq`, or all leaves of an adapter, to start from instead.
            base: the frozen weights, for a method with leaves that start from them (DoRA's
                magnitudes, which are NaN without them).
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
                own = adapter.chosen.init(key, shape, adapter.rank, options, dtype)
                if adapter.scales:
                    own |= scales.init(shape, adapter.scales, dtype)
                return own

            group, _ = linear_path(name)
            start = {} if pairs is None else pairs[LAYERS][group][name]
            leaves = jax.vmap(fresh)(layers) | start
            if base is not None and adapter.chosen.from_weight is not None:
                leaves = self._from_base(leaves, base, (group, name)) | start
            tree.setdefault(group, {})[name] = leaves
        return {LAYERS: tree}

    @nn.nowrap
    def _from_base(
        self, leaves: Mapping[str, Array], base: Mapping[str, Any], path: tuple[str, str]
    ) -> dict[str, Array]:
        """The leaves of one projection in all layers, with those that start from its weights."""
        assert self.adapter is not None and self.adapter.chosen.from_weight is not None
        start = self.adapter.chosen.from_weight
        scale = self.adapter.scale_for(self.config.linear_shapes[path[1]])
        parts: list[Any] = []
        for stack, layers in stacks(base, self.config.num_hidden_layers).items():
            own = jax.tree.map(lambda x, of=layers: x[of.start : of.stop], leaves)
            weights = base[stack][path[0]][path[1]]["weight"]
            # Layer by layer, because weights may be dequantized on the way.
            parts.append(jax.lax.map(lambda both: start(both[0], both[1], scale), (own, weights)))
        return jax.tree.map(lambda *each: jnp.concatenate(each), *parts)

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
        rope = rope_rotations(config, positions)

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
