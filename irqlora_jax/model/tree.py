"""Names of tensors, in this package's trees and in the files of Hugging Face and PEFT."""

from typing import Any

from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.sharding import LINEAR_NAMES

Tree = dict[str, Any]
Keys = tuple[str, ...]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

ADAPTER_LEAVES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "beta1": "lora_A_scale",
    "beta2": "lora_B_scale",
}
"""Our name and the file's. The two scalars are those of released IR-QLoRA adapters."""


def linear_path(name: str) -> Keys:
    """Where a linear layer stands in a decoder layer: q_proj -> (self_attn, q_proj)."""
    block = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return block, name


def weight_name(path: Keys, layer: int | None = None) -> str:
    """Name of a weight in a LLaMA file: (self_attn, q_proj), 3 ->
    model.layers.3.self_attn.q_proj.weight."""
    prefix = "" if path == ("lm_head",) else "model."
    middle = "" if layer is None else f"layers.{layer}."
    return f"{prefix}{middle}{'.'.join(path)}.weight"


def adapter_name(path: Keys, layer: int, leaf: str) -> str:
    """Name of a part of an adapter in a PEFT file, `leaf` one of `ADAPTER_LEAVES`."""
    return f"base_model.model.model.layers.{layer}.{'.'.join(path)}.{ADAPTER_LEAVES[leaf]}"


def weight_shapes(config: LlamaConfig) -> tuple[dict[Keys, tuple[int, ...]], dict[Keys, tuple]]:
    """Shapes of the weights of a layer, and of those outside the layers."""
    norm, table = (config.hidden_size,), (config.vocab_size, config.hidden_size)
    layered = {linear_path(name): config.linear_shapes[name] for name in LINEAR_NAMES}
    layered |= {("input_layernorm",): norm, ("post_attention_layernorm",): norm}
    single = {("embed_tokens",): table, ("norm",): norm}
    if not config.tie_word_embeddings:
        single[("lm_head",)] = table
    return layered, single


def insert(tree: Tree, path: Keys, value: Any) -> None:
    """Puts a value into nested dictionaries, which come into being on the way."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value
