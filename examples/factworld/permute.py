"""Permutes a model without changing its function, which gives other quantization blocks."""

import jax
import jax.numpy as jnp


def permute(base: dict, config, key: jax.Array) -> dict:
    """Permutes the residual, feed-forward and value dimensions of a float base.

    The logits stay the same up to rounding, but the blocks of consecutive weights that share a
    scale change. Quantization is deterministic, so one base is one sample of its effect. Each key
    gives another sample.

    Args:
        base: float weights in the layout of `Llama` (layers on a leading axis).
        config: its `LlamaConfig`.
        key: seed of the draw. The whole model has one residual permutation. Each layer has its own
            permutations of feed-forward and value dimensions, the latter within key/value heads.

    Returns:
        A tree of the same structure.
    """
    residual_key, mlp_key, value_key = jax.random.split(key, 3)
    layers, kv_heads = config.num_hidden_layers, config.num_key_value_heads
    head_dim, groups = config.head_dim, config.num_attention_heads // kv_heads
    residual = jax.random.permutation(residual_key, config.hidden_size)

    def orders(key: jax.Array, count: int, size: int) -> jax.Array:
        keys = jax.random.split(key, count)
        return jax.vmap(lambda k: jax.random.permutation(k, size))(keys)

    mlp = orders(mlp_key, layers, config.intermediate_size)
    within = orders(value_key, layers * kv_heads, head_dim).reshape(layers, kv_heads, head_dim)
    heads = jnp.arange(kv_heads * groups) * head_dim
    # v_proj writes one head of values for each key/value head; o_proj reads it once for every query
    # head of the group.
    value = (heads[None, :kv_heads, None] + within).reshape(layers, -1)
    output = (heads[None, :, None] + jnp.repeat(within, groups, axis=1)).reshape(layers, -1)

    def weight(module: dict, *, rows: jax.Array | None = None, columns: jax.Array | None = None):
        w = module["weight"]
        if rows is not None:
            w = jnp.take_along_axis(w, rows[:, :, None], axis=1)
        if columns is not None:
            w = jnp.take_along_axis(w, columns[:, None, :], axis=2)
        return {"weight": w}

    same = jnp.broadcast_to(residual[None, :], (layers, config.hidden_size))
    attention, feed = base["layers"]["self_attn"], base["layers"]["mlp"]
    out = dict(base)
    for name in ("embed_tokens", "norm", "lm_head"):
        if name in base:
            out[name] = {"weight": base[name]["weight"][..., residual]}
    out["layers"] = {
        "self_attn": {
            "q_proj": weight(attention["q_proj"], columns=same),
            "k_proj": weight(attention["k_proj"], columns=same),
            "v_proj": weight(attention["v_proj"], rows=value, columns=same),
            "o_proj": weight(attention["o_proj"], rows=same, columns=output),
        },
        "mlp": {
            "gate_proj": weight(feed["gate_proj"], rows=mlp, columns=same),
            "up_proj": weight(feed["up_proj"], rows=mlp, columns=same),
            "down_proj": weight(feed["down_proj"], rows=same, columns=mlp),
        },
        "input_layernorm": {"weight": base["layers"]["input_layernorm"]["weight"][:, residual]},
        "post_attention_layernorm": {
            "weight": base["layers"]["post_attention_layernorm"]["weight"][:, residual]
        },
    }
    return out
