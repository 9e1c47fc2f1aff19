"""Logits against the LLaMA of transformers."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax import hf
from irqlora_jax.model.config import LlamaConfig, RopeScaling
from irqlora_jax.model.llama import Llama
from tests.models import (
    STORIES,
    needs_stories,
    random_tensors,
    stack_tensors,
    tiny_llama,
    write_gguf,
    write_model,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONFIGS = {
    "multi-head": tiny_llama(hidden_size=32, num_key_value_heads=4),
    "grouped, wide heads, linear scaling": tiny_llama(
        head_dim=16, rope_scaling=RopeScaling("linear", 4.0), rms_norm_eps=1e-5
    ),
    "dynamic scaling": tiny_llama(
        rope_scaling=RopeScaling("dynamic", 3.0), max_position_embeddings=64
    ),
    "yarn": tiny_llama(
        head_dim=32,
        rope_scaling=RopeScaling("yarn", 4.0, original_max_position_embeddings=40),
        max_position_embeddings=160,
    ),
    "yarn, no rounding, other limits": tiny_llama(
        head_dim=32,
        rope_scaling=RopeScaling(
            "yarn",
            4.0,
            original_max_position_embeddings=40,
            attention_factor=0.8,
            beta_fast=3.0,
            beta_slow=0.5,
            truncate=False,
        ),
        max_position_embeddings=160,
    ),
    "multi-query, tied": tiny_llama(
        hidden_size=32, num_key_value_heads=1, tie_word_embeddings=True, rms_norm_eps=1e-2
    ),
    "LLaMA 3": tiny_llama(
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64),
        max_position_embeddings=512,
        eos_token_ids=(38, 39),
    ),
    "LLaMA 3.2, narrow heads, tied": tiny_llama(
        hidden_size=48,
        num_attention_heads=6,
        head_dim=4,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", 32.0, 0.5, 8.0, 32),
        max_position_embeddings=512,
        tie_word_embeddings=True,
    ),
}


def compare(theirs, config, seq):
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, seq))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    base = stack_tensors(theirs.state_dict(), config)
    logits = jax.jit(Llama(config).apply)({"base": base}, jnp.asarray(tokens, jnp.int32))
    assert expected.std() > 0.5
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits(name):
    config = CONFIGS[name]
    settings = transformers.LlamaConfig(**config.to_dict(), initializer_range=0.2)
    assert LlamaConfig.from_dict(settings.to_dict()) == config
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(settings).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    # 160 positions: beyond those of the pretraining in both llama3 configurations.
    compare(theirs, config, 160)


@needs_stories
def test_logits_of_stories260k():
    config = LlamaConfig.from_dict(json.loads((STORIES / "config.json").read_text()))
    theirs = transformers.LlamaForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    compare(theirs, config, 200)


def test_logits_of_a_gguf_file(tmp_path: Path) -> None:
    """The folder holds what the blocks of the file stand for, in the order of transformers."""
    llama = tiny_llama(hidden_size=64, intermediate_size=96, head_dim=16, rms_norm_eps=1e-5)
    kinds = {"attn_q": "Q8_0", "attn_k": "Q4_1", "attn_v": "Q5_0", "attn_output": "Q4_0"}
    kinds |= {"ffn_gate": "Q5_1", "ffn_up": "BF16", "ffn_down": "F16", "token_embd": "Q8_0"}
    tensors = {name: 8 * value for name, value in random_tensors(llama).items()}
    types = lambda name: kinds.get(name.split(".")[-2], "F32")  # noqa: E731
    meant = write_gguf(tmp_path / "model.gguf", llama, tensors, types=types)
    folder = write_model(tmp_path / "folder", llama, meant)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(0, llama.vocab_size, (2, 50))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    base, found = hf.load_base(tmp_path / "model.gguf", None)
    logits = jax.jit(Llama(found).apply)({"base": base}, jnp.asarray(tokens, jnp.int32))
    assert expected.std() > 0.5
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
