"""DoRA: norms without W + s B A, starts on packed bases, and meshes that split the inputs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.adapters import dora
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.dora import DORA
from irqlora_jax.config import TrainConfig
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.runs.state import init_state, make_optimizer
from irqlora_jax.sharding import MeshConfig, make_mesh, tree_shardings
from irqlora_jax.train.step import sharded_state
from tests.models import LLAMA, random_base, tiny_llama

QUANT = QuantConfig(format="nf4", block_size=8, calibration="none", outliers=0.02)
WIDE = tiny_llama(
    hidden_size=64, intermediate_size=128, num_attention_heads=8, num_key_value_heads=8
)


def layer(packed: bool) -> tuple[dict[str, jax.Array], Any, np.ndarray]:
    """Parameters, the weight, and the weight as float64."""
    keys = jax.random.split(jax.random.key(0), 4)
    weight: Any = jax.random.normal(keys[0], (24, 40))
    weight = quantize(weight, QUANT) if packed else weight
    params = {
        "lora_A": jax.random.normal(keys[1], (3, 40)),
        "lora_B": jax.random.normal(keys[2], (24, 3)),
        "magnitude": jax.random.uniform(keys[3], (24,), minval=1.0, maxval=9.0),
    }
    dense = weight.dequantize() if packed else weight
    return params, weight, np.asarray(dense, np.float64)


@pytest.mark.parametrize("packed", [False, True])
def test_norms_merged_weight_and_output_follow_eq_5(packed: bool) -> None:
    params, weight, dense = layer(packed)
    a, b, m = (np.asarray(params[name], np.float64) for name in ("lora_A", "lora_B", "magnitude"))
    whole = dense + 0.7 * b @ a
    norms = np.linalg.norm(whole, axis=1)
    np.testing.assert_allclose(dora.row_norms(params, weight, 0.7), norms, rtol=1e-6)
    expected = (m / norms)[:, None] * whole
    merged = DORA.merged(params, jnp.asarray(dense, jnp.float32), jnp.float32(0.7))
    np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-5)
    x = jax.random.normal(jax.random.key(5), (3, 40))
    y = x @ jnp.asarray(dense, jnp.float32).T + DORA.apply(params, x, x, 0.7, weight)
    y = y * dora.gain(params, weight, 0.7)[None]
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ expected.T, rtol=0, atol=1e-4)


def test_a_row_of_zeros_stays_finite() -> None:
    params, weight, _ = layer(packed=False)
    params |= {"lora_B": jnp.zeros((24, 3)), "magnitude": jnp.zeros(24)}
    assert dora.gain(params, weight.at[2].set(0), 1.0)[2] == 1


@pytest.mark.parametrize("quant", [QuantConfig(format="none"), QUANT], ids=["float", "packed"])
def test_a_start_with_the_base_changes_nothing(quant: QuantConfig) -> None:
    base = random_base(LLAMA, quant)
    model = Llama(LLAMA, AdapterConfig(method="dora", rank=4, alpha=8.0))
    adapters = model.init_adapters(jax.random.key(0), base=base)
    tokens = jnp.arange(3, 13)[None]
    plain: Any = Llama(LLAMA).apply({"params": {}, "base": base}, tokens)
    same: Any = model.apply({"params": adapters, "base": base}, tokens)
    np.testing.assert_allclose(same, plain, rtol=0, atol=1e-5)
    # Without the base, the lack is not silent.
    bare = model.init_adapters(jax.random.key(0))
    assert np.isnan(bare["layers"]["mlp"]["up_proj"]["magnitude"]).all()
    # What is given stays.
    given = jax.tree.map(lambda x: x + 1, adapters)
    again = model.init_adapters(jax.random.key(0), given, base)
    jax.tree.map(np.testing.assert_array_equal, again, given)


def test_a_start_from_a_pair_has_the_norm_with_the_pair() -> None:
    base = random_base(LLAMA)
    model = Llama(LLAMA, AdapterConfig(method="dora", rank=4, alpha=8.0))
    fresh = model.init_adapters(jax.random.key(0))
    pairs = jax.tree.map(lambda x: x + 0.1, fresh)
    for group in pairs["layers"].values():
        for leaves in group.values():
            del leaves["magnitude"]
    start = model.init_adapters(jax.random.key(0), pairs, base)
    pair = pairs["layers"]["mlp"]["down_proj"]
    weight = base["layers"]["mlp"]["down_proj"]["weight"]
    for i in range(LLAMA.num_hidden_layers):
        whole = weight[i] + 2.0 * pair["lora_B"][i] @ pair["lora_A"][i]
        found = start["layers"]["mlp"]["down_proj"]["magnitude"][i]
        np.testing.assert_allclose(found, jnp.linalg.norm(whole, axis=1), rtol=1e-5)


@functools.cache
def logits_and_gradients(shape: tuple[int, int, int]) -> Any:
    base = random_base(WIDE, QuantConfig(format="nf4", block_size=8, calibration="none"))
    model = Llama(WIDE, AdapterConfig(method="dora", rank=8, alpha=16.0))
    optimizer = make_optimizer(TrainConfig(compute_dtype="float32"), DORA)
    mesh = make_mesh(MeshConfig(*shape), 8)
    with jax.set_mesh(mesh):
        base = jax.device_put(base, tree_shardings(mesh, base))
        init = functools.partial(init_state, model, optimizer, 0)
        state = sharded_state(mesh, init, False, None, base, splits=DORA.splits)
        adapters = state.adapters
        tokens = jnp.asarray(np.random.default_rng(0).integers(3, WIDE.vocab_size, (8, 12)))

        @jax.jit
        def both(adapters: Any) -> Any:
            def loss(adapters: Any) -> Any:
                logits: Any = model.apply({"params": adapters, "base": base}, tokens)
                return jnp.mean(jnp.square(logits)), logits

            moved = jax.tree.map(lambda x: x + 0.05 * jnp.cos(x * 30), adapters)
            return jax.value_and_grad(loss, has_aux=True)(moved)

        (_, logits), grads = both(adapters)
    return np.asarray(logits), jax.tree.map(np.asarray, (adapters, grads))


@pytest.mark.long
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 2, 2), (1, 8, 1)])
def test_every_mesh_gives_the_norms_of_one_device(shape: tuple[int, int, int]) -> None:
    one, rest = logits_and_gradients((1, 1, 1))
    split, split_rest = logits_and_gradients(shape)
    np.testing.assert_allclose(split, one, rtol=0, atol=1e-5 * np.abs(one).max())
    for a, b in zip(jax.tree.leaves(split_rest), jax.tree.leaves(rest), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(np.abs(b).max(), 1e-3))
