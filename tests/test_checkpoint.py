"""A base comes back bit by bit, or not at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from irqlora_jax.checkpoint import load_base, save_base
from irqlora_jax.config import QuantConfig
from irqlora_jax.llama_config import LlamaConfig, RopeScaling
from irqlora_jax.quant.qtensor import quantize

CONFIG = LlamaConfig(
    vocab_size=10,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=12,
    rope_scaling=RopeScaling("llama3", 8.0),
    eos_token_ids=(2, 3),
)


def make(name: str) -> dict:
    parts = [
        quantize(jax.random.normal(jax.random.key(i), (40, 24)), QuantConfig(format=name))  # type: ignore[arg-type]
        for i in range(2)
    ]
    return {
        "embed_tokens": {"weight": jnp.ones((10, 24), jnp.bfloat16)},
        "layers": {"mlp": {"up_proj": {"weight": jax.tree.map(lambda *x: jnp.stack(x), *parts)}}},
        "norm": {"weight": jnp.ones(24, jnp.float16)},
    }


@pytest.mark.parametrize("name", ["nf4", "nf3", "int2"])
def test_round_trip(tmp_path, name: str) -> None:
    base = make(name)
    save_base(tmp_path / "base.safetensors", base, CONFIG)
    again, config = load_base(tmp_path / "base.safetensors")
    assert config == CONFIG
    assert jax.tree.structure(again) == jax.tree.structure(base)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(base), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]
    # The file is the arrays and little else (names and shapes).
    size = (tmp_path / "base.safetensors").stat().st_size
    assert 0 < size - sum(leaf.nbytes for leaf in jax.tree.leaves(base)) < 4096


def test_damaged_and_foreign_files_are_refused(tmp_path) -> None:
    path = tmp_path / "base.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_base(path)
    save_base(path, make("nf4"), CONFIG)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"base.safetensors: damaged"):
        load_base(path)
    save_file({"a": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="version None of a base: accepted is '1'"):
        load_base(path)
