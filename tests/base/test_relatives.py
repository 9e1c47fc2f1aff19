"""Bases of models that differ a little from LLaMA: biases, norms of heads, kinds of layers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax import hf
from irqlora_jax.base.budget import find_room
from irqlora_jax.base.file import read_base, save_base
from irqlora_jax.base.fit_layer import StoredLinear, dense_weights
from irqlora_jax.base.mesh import check_mesh
from irqlora_jax.base.storage import abstract_base, measure_base
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.budget import AllocationOptions
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.sharding import LINEAR_NAMES, MeshConfig, make_mesh, tree_shardings
from tests.models import PLAIN, RELATIVES, assert_same, random_base, write_config, write_model


@pytest.mark.parametrize("name", RELATIVES)
def test_a_base_is_what_was_planned_and_comes_back(name: str, tmp_path: Path) -> None:
    llama = RELATIVES[name]
    base, found = hf.load_base(write_model(tmp_path / "model", llama), PLAIN)
    assert found == llama
    planned = abstract_base(llama, PLAIN, np.float32)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), planned, base)
    assert jax.tree.all(same)
    assert measure_base(planned) == measure_base(base)
    save_base(tmp_path / "base.safetensors", base, llama, PLAIN)
    again, read = read_base(tmp_path / "base.safetensors")
    assert read == llama
    assert_same(again, base)


def test_weights_that_do_not_fit_the_kind_of_model_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path, RELATIVES["Qwen2"], model_type="llama")
    with pytest.raises(ValueError, match=r"does not account for: .*q_proj\.bias"):
        hf.load_base(folder, None)
    write_config(folder, RELATIVES["LLaMA with biases"])
    with pytest.raises(ValueError, match=r"no tensor .*o_proj\.bias"):
        hf.load_base(folder, None)


@pytest.mark.parametrize("name", ["Qwen3", "SmolLM3"])
def test_a_mesh_computes_the_same(name: str) -> None:
    llama = RELATIVES[name]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), 4)
    check_mesh(mesh, llama, QuantConfig(format="none"))
    base, tokens = random_base(llama, scale=0.3), jnp.arange(48).reshape(4, 12) % 40
    expected = jax.jit(Llama(llama).apply)({"base": base}, tokens)
    with jax.set_mesh(mesh):
        placed = jax.device_put(base, tree_shardings(mesh, base))
        found = jax.jit(Llama(llama).apply)({"base": placed}, tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    spread = placed["layers"]["self_attn"]["q_proj"]
    assert spread["bias"].sharding.is_fully_replicated
    assert not spread["weight"].sharding.is_fully_replicated


def test_training_of_a_layer_keeps_what_is_not_quantized() -> None:
    base = random_base(RELATIVES["Qwen3"])
    weights = jax.tree.map(lambda x: x[1], base["layers"])
    linears = {name: StoredLinear(None, {}) for name in LINEAR_NAMES}
    assert_same(dense_weights(weights, linears), weights)
    kept = dense_weights(weights, {})
    assert set(kept["self_attn"]) == {"q_norm", "k_norm", *LINEAR_NAMES[:4]}
    assert set(kept["self_attn"]["q_proj"]) == {"bias"} and "mlp" not in kept


def test_a_budget_counts_biases_and_norms() -> None:
    few = AllocationOptions(formats=("nf3", "nf4"), block_sizes=(64,), scale_bits=(8,))
    llama, quant = RELATIVES["Qwen3"], QuantConfig(budget="100 KB", allocation=few)
    room = find_room(llama, quant, lambda _: np.dtype(np.float32))
    rest = measure_base(abstract_base(llama, PLAIN, np.float32)).rest
    assert room.limit == 8 * (100_000 - rest)
