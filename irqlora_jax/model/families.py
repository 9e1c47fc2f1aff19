"""The kinds of models that `Llama` computes, by `model_type` of config.json.

They are LLaMAs with a few changes: biases, norms of the heads, sliding windows, layers without
rotations. The defaults of their files differ too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
    """What the models of one `model_type` have in common.

    Attributes:
        title: its name in texts.
        architecture: the class in transformers.
        biased: linear layers that always have a bias.
        head_norms: whether queries and keys of each head go through an RMS norm.
        options: fields of `LlamaConfig` that may be set. With "sliding_window" alone, all layers
            have the window.
        defaults: values of fields that a config.json may leave out, where LLaMA has other values.
            From the classes of configurations in transformers.
    """

    title: str
    architecture: str
    biased: tuple[str, ...] = ()
    head_norms: bool = False
    options: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_SOME_WINDOWS = ("sliding_window", "sliding_layers")
_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES = {
    "llama": Family("LLaMA", "LlamaForCausalLM", options=("attention_bias",)),
    "mistral": Family(
        "Mistral",
        "MistralForCausalLM",
        options=("sliding_window",),
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
    ),
    "qwen2": Family(
        "Qwen2",
        "Qwen2ForCausalLM",
        ("q_proj", "k_proj", "v_proj"),
        options=_SOME_WINDOWS,
        defaults=_QWEN,
    ),
    "qwen3": Family(
        "Qwen3",
        "Qwen3ForCausalLM",
        head_norms=True,
        options=("attention_bias", *_SOME_WINDOWS),
        defaults={**_QWEN, "head_dim": 128},
    ),
    "smollm3": Family(
        "SmolLM3",
        "SmolLM3ForCausalLM",
        options=("attention_bias", *_SOME_WINDOWS, "unrotated_layers"),
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "pad_token_id": 128004,
            "tie_word_embeddings": True,
            "rope_theta": 2000000.0,
            "no_rope_layer_interval": 4,
        },
    ),
}
"""By `model_type`."""
ACCEPTED = ", ".join(map(repr, FAMILIES))
