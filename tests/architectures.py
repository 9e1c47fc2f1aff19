"""The published architectures: LLaMA and relatives."""

from typing import Any

from irqlora_jax.model.config import LlamaConfig, RopeScaling


def llama(hidden: int, wide: int, layers: int, heads: int, **more: Any) -> LlamaConfig:
    fields: dict[str, Any] = {"vocab_size": 32000, "num_key_value_heads": heads} | more
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=2048,
        **fields,
    )


# LLaMA2 7B and 13B differ from LLaMA in their context alone.
MODELS = {
    "7b": llama(4096, 11008, 32, 32),
    "13b": llama(5120, 13824, 40, 40),
    "30b": llama(6656, 17920, 60, 52),
    "65b": llama(8192, 22016, 80, 64),
    "70b": llama(8192, 28672, 80, 64, num_key_value_heads=8),  # LLaMA2
    "llama3": llama(4096, 14336, 32, 32, num_key_value_heads=8, vocab_size=128256),
    "mistral": llama(
        *(4096, 14336, 32, 32),
        num_key_value_heads=8,
        model_type="mistral",
        sliding_window=4096,
        sliding_layers=tuple(range(32)),
    ),
    "qwen2.5": llama(
        *(3584, 18944, 28, 28), num_key_value_heads=4, vocab_size=152064, model_type="qwen2"
    ),
    "llama3.1": llama(
        *(4096, 14336, 32, 32),
        num_key_value_heads=8,
        vocab_size=128256,
        rope_scaling=RopeScaling("llama3", 8.0),
    ),
}
