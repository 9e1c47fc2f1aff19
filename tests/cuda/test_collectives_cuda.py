"""What GPUs send each other in a training step, compiled for absent ones."""

import dataclasses
import math

import jax
import pytest

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.base.storage import abstract_base
from irqlora_jax.config import Config, TrainConfig
from irqlora_jax.data.config import DataConfig
from irqlora_jax.model.tree import linear_stacks
from irqlora_jax.plan.collectives import Collective, collectives, shape_bytes
from irqlora_jax.plan.gpus import compile_only_devices, parse_fleet
from irqlora_jax.plan.measure import compile_step, find_plan_device
from irqlora_jax.sharding import OVERLAP, MeshConfig
from tests.architectures import MODELS
from tests.models import PLAIN, tiny_llama

pytestmark = pytest.mark.usefixtures("optimizer_promotion")
LAYERS = 5


def tiny_step(parts: int = 1) -> list[Collective]:
    """The collectives of a step of 8 rows a part on 8 GPUs with fsdp."""
    llama = tiny_llama(
        num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=128, head_dim=16, vocab_size=48
    )
    quant = dataclasses.replace(PLAIN, block_size=32)
    data = DataConfig(source_length=16, target_length=16)
    train = TrainConfig(batch_size=8 * parts, accumulation=parts, compute_dtype="float32")
    adapter, mesh = AdapterConfig(rank=4), MeshConfig(1, 8, 1)
    config = Config("m", "f", quant=quant, adapter=adapter, train=train, mesh=mesh, data=data)
    base = abstract_base(llama, quant)
    _, program = compile_step(config, base, llama, find_plan_device("8xh100", 8))
    return collectives(program.as_text(), 8)


@pytest.fixture(autouse=True)
def plugin() -> None:
    if compile_only_devices(parse_fleet("h100").device) is None:
        pytest.skip("needs jax-cuda13-plugin and jax-cuda13-pjrt")


@pytest.mark.parametrize("pipelined", [True, pytest.param(False, marks=pytest.mark.long)])
def test_the_weights_of_the_next_layer_travel_during_this_one(
    pipelined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer is gathered before the loop, and the loop gathers the other ones."""
    for name in OVERLAP:
        monkeypatch.setitem(OVERLAP, name, pipelined)
    found = tiny_step()
    codes = [one for one in found if "u8" in (kind for kind, _ in one.shapes)]
    turns = {one.times for one in codes}
    assert turns == ({1, LAYERS - 1} if pipelined else {LAYERS})
    # They do not wait at once: other work starts before their end.
    assert all(one.overlapped for one in codes if one.times > 1)


@pytest.mark.long
@pytest.mark.parametrize("parts", [2, 3])
def test_every_part_of_a_step_gathers_the_weights(parts: int) -> None:
    """The compiler does not say how often it runs the loop over the parts."""

    def codes(parts: int) -> float:
        return sum(
            one.times * shape_bytes(shape)
            for one in tiny_step(parts)
            for shape in one.shapes
            if one.kind == "all-gather" and shape[0] == "u8"
        )

    assert codes(parts) == parts * codes(1) > 0


@pytest.mark.long
@pytest.mark.parametrize(
    ("size", "fleet", "mesh", "budget"),
    [
        ("65b", "8xh100", MeshConfig(1, 8, 1), 9),
        ("65b", "8xh100", MeshConfig(1, 4, 2), 9),
        ("70b", "2x8xh100", MeshConfig(1, 16, 1), 6),
        ("70b", "2x8xh100", MeshConfig(1, 8, 2), 6),
    ],
)
def test_large_models_keep_to_their_budget(
    size: str, fleet: str, mesh: MeshConfig, budget: int
) -> None:
    """A row of 512 tokens for each part of the batch, rank 64 on all layers, nf4 with ICQ."""
    adapter = AdapterConfig(rank=64, dtype="bfloat16")
    count = mesh.fsdp * mesh.tensor
    config = Config("m", "f", adapter=adapter, train=TrainConfig(batch_size=mesh.fsdp), mesh=mesh)
    llama, base = MODELS[size], abstract_base(MODELS[size], config.quant)
    need, program = compile_step(config, base, llama, find_plan_device(fleet, count))
    assert need.peak <= budget * 2**30
    # No gather makes more than the packed arrays of one layer.
    stacks = [leaf for _, weight in linear_stacks(base) for leaf in jax.tree.leaves(weight)]
    codes = [
        math.prod(shape)
        for one in collectives(program.as_text(), count)
        for kind, shape in one.shapes
        if kind == "u8"
    ]
    assert codes and max(codes) <= max(math.prod(leaf.shape[1:]) for leaf in stacks)
