"""Several devices give every method the steps that one device gives (LoRA, IEC and DoRA have tests
of their own), also where the mesh cuts a pooled group."""

import functools
import re
from typing import Any

import jax
import numpy as np
import pytest

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.qahira import QahiraOptions
from irqlora_jax.adapters.qalora import QaloraOptions
from irqlora_jax.adapters.qalora_iec import QaloraIecOptions
from irqlora_jax.adapters.qbara import QbaraOptions
from irqlora_jax.config import TrainConfig
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.runs.state import init_state, make_optimizer
from irqlora_jax.sharding import MeshConfig, bytes_by_device, make_mesh, put_batch, tree_shardings
from irqlora_jax.train.step import sharded_state, state_shardings, train_step
from tests.models import long, random_base, tiny_llama

pytestmark = pytest.mark.usefixtures("optimizer_promotion")

BLOCK, GROUP = 8, 16
# An axis of 2 devices splits the 2 groups of o_proj, but cuts the second of 3 groups of down_proj.
LLAMA = tiny_llama(
    hidden_size=32,
    intermediate_size=3 * GROUP,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
)
TARGETS = ("q_proj", "o_proj", "down_proj")
TRAIN = TrainConfig(steps=3, batch_size=4, learning_rate=1e-2, compute_dtype="float32")
ADAPTERS: dict[str, dict[str, Any]] = {
    "scales": {"method": "lora", "scales": BLOCK},
    "lokr": {"method": "lokr"},
    "bayesian": {"method": "bayesian"},
    "binary": {"method": "binary"},
    "qalora": {"method": "qalora", "qalora": QaloraOptions(group=GROUP)},
    "qalora_iec": {"method": "qalora_iec", "qalora_iec": QaloraIecOptions(group=GROUP)},
    "qbara": {"method": "qbara", "qbara": QbaraOptions(k_in=GROUP)},
    "qahira": {"method": "qahira", "qahira": QahiraOptions(k_in=GROUP)},
}


def make_batch(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, LLAMA.vocab_size, (TRAIN.batch_size, 12), dtype=np.int32)
    return {"tokens": tokens, "targets": rng.random(tokens.shape) < 0.7}


@functools.cache
def host_base() -> Any:
    base = random_base(LLAMA, QuantConfig(block_size=BLOCK, calibration="none"), scale=0.05)
    return jax.tree.map(np.asarray, base)


def trained(name: str, shape: tuple[int, int, int]) -> tuple[list[float], Any, Any, Any, str]:
    """The losses of three steps, the adapters before and after them, logits, and the program."""
    adapter = AdapterConfig(rank=4, alpha=8.0, dropout=0.1, targets=TARGETS, **ADAPTERS[name])
    model, optimizer = Llama(LLAMA, adapter=adapter), make_optimizer(TRAIN, adapter.chosen)
    mesh = make_mesh(MeshConfig(*shape), TRAIN.batch_size)

    def step_and_logits(state: Any, base: Any, batch: Any) -> tuple[Any, Any, Any]:
        options = {"model": model, "optimizer": optimizer, "config": TRAIN}
        state, metrics = train_step(state, base, batch, **options)
        logits = model.apply({"params": state.adapters, "base": base}, batch["tokens"])
        return state, metrics["loss"], logits

    with jax.set_mesh(mesh):
        base = jax.device_put(host_base(), tree_shardings(mesh, host_base()))
        start = sharded_state(mesh, lambda: init_state(model, optimizer, 1), splits=adapter.splits)
        where = state_shardings(mesh, start, False, adapter.splits), None, None
        batches = [put_batch(mesh, make_batch(step)) for step in range(TRAIN.steps)]
        jitted = jax.jit(step_and_logits, out_shardings=where)
        program = jitted.lower(start, base, batches[0]).compile()
        state, logits, losses = start, None, []
        for batch in batches:
            state, loss, logits = program(state, base, batch)
            losses.append(float(loss))
    return losses, start.adapters, state.adapters, logits, program.as_text() or ""


@pytest.mark.parametrize(
    "name",
    ["scales", "lokr", "qalora", *long("qalora_iec", "qbara", "qahira", "bayesian", "binary")],
)
def test_a_mesh_gives_the_steps_of_one_device(name: str) -> None:
    losses, start, adapters, logits, program = trained(name, (1, 2, 2))
    expected, _, expected_adapters, expected_logits, _ = trained(name, (1, 1, 1))
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-4)
    same = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
    jax.tree.map(same, adapters, expected_adapters)
    # It learns, so the comparison is of updates that are not 0.
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), adapters, start)
    assert min(jax.tree.leaves(moved)) > 1e-3
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(adapters))
    most = max(bytes_by_device(adapters).values())
    if name == "lokr":  # its factors follow neither outputs nor inputs alone: devices copy them
        assert most == stored
        return
    assert most < 0.5 * stored
    # Inputs of a layer are gathered only where a device cuts a pooled group.
    gathered = re.findall(r"= f32\[2,12,(\d+)\]\S* all-gather\(", program)
    wide = {int(width) for width in gathered} & {LLAMA.hidden_size, LLAMA.intermediate_size}
    assert wide == ({LLAMA.intermediate_size} if name.startswith("q") else set())
