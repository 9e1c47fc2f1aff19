"""Collectives of compiled programs: counted as by hand, and none that undoes the split."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.base.storage import abstract_base
from irqlora_jax.config import Config, TrainConfig
from irqlora_jax.data.config import DataConfig
from irqlora_jax.model.tree import linear_stacks
from irqlora_jax.plan.collectives import (
    Collective,
    collectives,
    seconds_at_least,
    total_bytes,
)
from irqlora_jax.plan.gpus import parse_fleet
from irqlora_jax.plan.measure import PlanDevice, compile_step
from irqlora_jax.plan.plan import _with_data
from irqlora_jax.sharding import MeshConfig
from tests.models import PLAIN, tiny_llama

LAYERS = 5
LLAMA = tiny_llama(
    num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=128, head_dim=16, vocab_size=48
)


def test_counts_and_bytes_are_those_of_a_program_by_hand() -> None:
    """A loop of 3 turns gathers 16 x 8 floats over 4 devices; one sum over 2 devices follows."""
    grid = np.array(jax.devices()).reshape(2, 4)
    mesh = Mesh(grid, ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)

    def put(*axes: Any) -> NamedSharding:
        return NamedSharding(mesh, P(*axes))

    def program(x: jax.Array, weights: jax.Array) -> jax.Array:
        def turn(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
            weight = jax.lax.with_sharding_constraint(weight, put())
            return jnp.tanh(x @ weight), None

        return jax.lax.scan(turn, x, weights)[0].sum(0)

    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=put("rows"))
    weights = jax.ShapeDtypeStruct((3, 16, 16), jnp.float32, sharding=put(None, "columns"))
    text = jax.jit(program, out_shardings=put()).lower(x, weights).compile().as_text()
    found = collectives(text, 8)
    assert [(one.kind, one.times) for one in found] == [("all-gather", 3), ("all-reduce", 1)]
    gather, reduction = found
    assert gather.group == (0, 1, 2, 3) and reduction.group == (0, 4)
    assert gather.nbytes == 16 * 16 * 4 * 3 / 4 and reduction.nbytes == 2 * 16 * 4 * 1 / 2
    assert total_bytes(found) == 3 * gather.nbytes + reduction.nbytes
    # Hosts of 4 devices: the gather stays inside, and four sums share the four adapters of a host.
    assert gather.network_bytes(4) == 0 and reduction.network_bytes(4) == reduction.nbytes
    # Hosts of 2 devices: each ring has two of them, and leaves the host once.
    assert gather.network_bytes(2) == gather.nbytes / 2
    seconds = seconds_at_least(found, 2, link=8.0, network=1.0)
    assert seconds == 3 * gather.nbytes / 2 + reduction.nbytes
    assert seconds_at_least(found, 8, link=8.0, network=1.0) == total_bytes(found) / 8


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
    ],
)
def test_every_form_of_groups(text: str, group: tuple[int, ...]) -> None:
    line = f"%y = u8[16]{{0}} all-gather(%x), {text}, dimensions={{0}}"
    (found,) = collectives(f"ENTRY %main (x: u8[4]) -> u8[16] {{\n  {line}\n}}", 8)
    assert found == Collective("all-gather", (("u8", (16,)),), group, 1, 0)


def test_work_during_a_collective_is_counted() -> None:
    text = """ENTRY %main (x: u8[4]) -> u8[16] {
  %a.1 = (u8[4]{0}, u8[16]{0}) all-gather-start(%x), replica_groups={{0,1,2,3}}, dimensions={0}
  %a = (u8[4]{0}, u8[16]{0}) all-gather-start(%x), replica_groups={{0,1,2,3}}, dimensions={0}
  %b = f32[4]{0} fusion(%x), kind=kLoop, calls=%body
  %c = u8[16]{0} all-gather-done(%a.1)
  %d = f32[4]{0} custom-call(%b), custom_call_target="gemm"
  %e = u8[16]{0} all-gather-done(%a)
  %f = f32[4]{0} fusion(%x), kind=kLoop, calls=%body
}"""
    found = collectives(text, 4)
    assert [one.overlapped for one in found] == [1, 2]
    assert [one.shapes for one in found] == [(("u8", (16,)),)] * 2


def test_the_result_alone_of_a_permutation_counts() -> None:
    text = """ENTRY %main (x: u8[4]) -> u8[4] {
  %a = (u8[4]{0}, u8[4]{0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  ROOT %b = u8[4]{0} collective-permute-done(%a)
}"""
    (found,) = collectives(text, 2)
    assert found.shapes == (("u8", (4,)),) and found.nbytes == 4


@pytest.mark.parametrize(
    ("start", "test", "times"),
    [
        ("0", "direction=LT", 3),
        ("1", "direction=LT", None),
        ("0", "direction=NE", None),
    ],
)
def test_the_length_of_a_loop_is_read_from_its_test(
    start: str, test: str, times: int | None
) -> None:
    """As the compiler writes loops around pipelined loops."""
    text = f"""%body (x: (s32[], u8[4])) -> (s32[], u8[4]) {{
  %y = u8[4]{{0}} all-reduce(%x), replica_groups={{{{0,1}}}}, to_apply=%add
}}
%fused (i: s32[]) -> pred[] {{
  %bound = s32[] constant(3)
  ROOT %r = pred[] compare(%i, %bound), {test}
}}
%less (x: (s32[], u8[4])) -> pred[] {{
  ROOT %f = pred[] fusion(%x), kind=kLoop, calls=%fused
}}
ENTRY %main (x: u8[4]) -> u8[4] {{
  %zero = s32[] constant({start})
  %a = s32[] copy(%zero)
  %t = (s32[], u8[4]{{0}}) tuple(%a, %x)
  %z = (s32[], u8[4]{{0}}) while(%t), condition=%less, body=%body
}}"""
    if times is None:
        with pytest.raises(ValueError, match="unknown turns"):
            collectives(text, 2)
    else:
        assert [one.times for one in collectives(text, 2)] == [times]


def test_a_loop_of_unknown_length_is_refused() -> None:
    text = """%body (x: u8[4]) -> u8[4] {
  %y = u8[4]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
}
ENTRY %main (x: u8[4]) -> u8[4] {
  %z = u8[4]{0} while(%x), condition=%less, body=%body
}"""
    with pytest.raises(ValueError, match="unknown turns"):
        collectives(text, 2)


@pytest.mark.parametrize("mesh", [MeshConfig(1, 8, 1), MeshConfig(2, 2, 2)])
def test_no_step_gathers_a_whole_stack(mesh: MeshConfig, optimizer_promotion: None) -> None:
    """Weights are gathered layer by layer and packed, twice a step: forward and backward."""
    quant = dataclasses.replace(PLAIN, block_size=32)
    base, data = abstract_base(LLAMA, quant), DataConfig(source_length=16, target_length=16)
    train = TrainConfig(batch_size=8, compute_dtype="float32")
    adapter = AdapterConfig(rank=4)
    config = Config("m", "f", quant=quant, adapter=adapter, train=train, mesh=mesh, data=data)
    target = PlanDevice("CPU", jax.devices(), 2**40, 2**40)
    _, program = compile_step(config, base, LLAMA, target)
    found = collectives(program.as_text(), 8)
    packed = {weight.packed.shape for _, weight in linear_stacks(base)}
    codes = [shape for one in found for kind, shape in one.shapes if kind == "u8"]
    assert codes and max(map(math.prod, codes)) <= max(math.prod(shape[1:]) for shape in packed)
    assert all(one.times == LAYERS for one in found if one.shapes[0][0] == "u8")
    # The floats that are gathered are adapters and embeddings, no dequantized weights.
    dense = {
        math.prod(shape) // split for shape in LLAMA.linear_shapes.values() for split in (1, 2)
    }
    gathers = [one for one in found if one.kind == "all-gather"]
    floats = [shape for one in gathers for kind, shape in one.shapes if kind == "f32"]
    assert not dense & set(map(math.prod, floats))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("h100", (1, 1, False)),
        ("8xa100-80", (1, 8, True)),
        ("2x8xH100", (2, 8, True)),
        ("2 x 4 x l4", (2, 4, True)),
    ],
)
def test_names_of_several_gpus(name: str, found: tuple[int, int, bool]) -> None:
    fleet = parse_fleet(name)
    assert (fleet.hosts, fleet.count, fleet.given) == found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("8xh10", "plan = 'h10': expected one of"),
        ("0xh100", "plan = '0xh100': expected numbers of at least 1"),
        ("2x2x2xh100", "plan = '2xh100': expected one of"),
        ("8xh100", "has 8 devices, but mesh.data x mesh.fsdp x mesh.tensor = 1 x 3 x 1"),
        ("3000000xh100", "but mesh.data x mesh.fsdp x mesh.tensor = 1 x 3 x 1"),
        ("3xh100", "mesh.data x mesh.fsdp = 3 cannot split the 16 rows of a batch"),
    ],
)
def test_what_a_plan_for_several_gpus_refuses(name: str, message: str) -> None:
    config = Config("m", "f", mesh=MeshConfig(1, 3, 1))
    with pytest.raises(ValueError, match="expected") as caught:
        _with_data(config, name)
    assert message in str(caught.value)


def test_a_plan_fills_the_devices_with_copies() -> None:
    config = Config("m", "f", mesh=MeshConfig(None, 4, 1))
    assert _with_data(config, "2x8xh100").mesh.data == 4
    assert _with_data(config, "h100").mesh.data == 1
