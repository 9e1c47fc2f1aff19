"""Training of a quantized decoder layer: against ApiQ's released code, and by its promises."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.base import train_layer as module
from irqlora_jax.base.train_layer import Data, Job, StoredLinear
from irqlora_jax.model.layer import Settings
from irqlora_jax.model.tree import insert, linear_path
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.quant.trained import ApiqOptions, round_matrix
from irqlora_jax.sharding import LINEAR_NAMES
from tests.models import tiny_llama

pytestmark = pytest.mark.usefixtures("optimizer_promotion")

# --------------------------------------------------------------------- ApiQ's released code

GOLDEN = Path(__file__).parents[1] / "golden"
RELEASED = json.loads((GOLDEN / "apiq_bw.json").read_text())
SETTINGS = Settings(
    tiny_llama(
        hidden_size=RELEASED["hidden"],
        intermediate_size=RELEASED["ffn"],
        num_attention_heads=RELEASED["heads"],
        num_key_value_heads=RELEASED["kv_heads"],
        head_dim=16,
        rms_norm_eps=RELEASED["rms_norm_eps"],
        rope_theta=RELEASED["rope_theta"],
    ),
    AdapterConfig(method="lora", rank=RELEASED["lora_r"], alpha=float(RELEASED["lora_alpha"])),
    "xla",
    None,
    deterministic=True,
)


def own_tensors(tensors: dict[str, np.ndarray], block: int) -> dict[str, np.ndarray]:
    prefix = f"block{block}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def released_layer(own: dict[str, np.ndarray], quant: QuantConfig) -> tuple[Any, Any]:
    """The float weights of a block, and its linear layers with the pairs at the start."""
    weights: dict[str, Any] = {}
    linears = {}
    for name in ("input_layernorm", "post_attention_layernorm"):
        weights[name] = {"weight": jnp.asarray(own[f"{name}.weight"])}
    for name in LINEAR_NAMES:
        weight = jnp.asarray(own[f"{name}.weight"])
        insert(weights, (*linear_path(name), "weight"), weight)
        pair = {leaf: jnp.asarray(own[f"{name}.{leaf}"]) for leaf in ("lora_A", "lora_B")}
        linears[name] = StoredLinear(quantize(weight, quant), pair)
    return weights, linears


@pytest.mark.parametrize("run", RELEASED["runs"])
def test_steps_of_the_released_code(run: str) -> None:
    """Losses, gradients and results of 20 steps for each of two blocks, without storage."""
    settings = RELEASED["runs"][run]
    options = ApiqOptions(epochs=RELEASED["epochs"], same_inputs=settings["aug_loss"])
    symmetric = settings["symmetric"]
    quant = QuantConfig(f"int{settings['bits']}", calibration="none", symmetric=symmetric)
    whole = tuple((name, symmetric) for name in LINEAR_NAMES)
    job = Job(SETTINGS, options, whole, module._WHOLE)
    init = load_file(GOLDEN / "apiq_bw_init.safetensors")
    full = found = init["inputs"]
    final, acts = (GOLDEN / f"apiq_bw_{run}_{part}.safetensors" for part in ("final", "acts"))
    for block in range(RELEASED["layers"]):
        weights, linears = released_layer(own_tensors(init, block), quant)
        data = Data(found, full, options.batch)
        wanted = data.wanted(job, weights)
        leaves, curve = module.fit(job, weights, linears, LINEAR_NAMES, data, wanted, run)
        np.testing.assert_allclose(curve[:, 0], settings["losses"][block], rtol=1e-5)
        np.testing.assert_allclose(curve[:, 1], settings["grad_norms"][block], rtol=1e-5)
        base = module._dense(weights, linears)
        for name in LINEAR_NAMES:
            numbers = options.numbers(leaves[name], linears[name].weight, symmetric)
            dense = round_matrix(numbers, linears[name].weight)
            insert(base, (*linear_path(name), "weight"), dense)
        pairs = {
            name: {leaf: own[leaf] for leaf in ("lora_A", "lora_B")} for name, own in leaves.items()
        }
        full = np.concatenate([batch[0][0] for batch in wanted])
        found = np.asarray(module._outputs(job, base, pairs, jnp.asarray(found))[0])
        if not final.exists():
            continue
        released = own_tensors(load_file(final), block)
        theirs = {"down": "lowbound_factor", "up": "upbound_factor"}
        for name, own in leaves.items():
            for leaf in ("down", "up", "lora_A", "lora_B"):
                expected = released[f"{name}.{theirs.get(leaf, leaf)}"].reshape(own[leaf].shape)
                np.testing.assert_allclose(own[leaf], expected, atol=1e-5)
        outputs = own_tensors(load_file(acts), block)
        np.testing.assert_allclose(full, outputs["fp_out"], atol=1e-5)
        np.testing.assert_allclose(found, outputs["quant_out"], atol=1e-5)
