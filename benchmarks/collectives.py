"""What the devices of a mesh send each other in a training step, from compiled programs.

    python benchmarks/collectives.py [--cases 65b-8 70b-16 ...] [--options pipelined buffered ...]

Compiles the step (nf4 with ICQ, IEC of rank 64 on all layers, 512 tokens a row, a row a device) for
H100s that are not there: nothing runs. Prints a line of JSON for each mesh and each choice of
compiler options ("used": those of irqlora_jax). Needs jax-cuda13-plugin and jax-cuda13-pjrt.

GiB are those of a device in a step. "packed_gathers" has codes, scales and shifts of the base, and
"in_bfloat16" the same weights with 16 bits each. "by_adapter" is sent between hosts by each network
adapter. "turns" says how often the gathers run: of 80 layers, 79 times if those of the next layer
start in the turn of this one. "median_overlap" counts fusions and products that start between the
start and the end of a gather. "loop_copies" are copied within a device by the loops with gathers.
"seconds_at_least" is arithmetic: 450 GB/s in a host (NVLink) and 50 GB/s for each network adapter,
one a GPU (400 Gb/s).
"""

import argparse
import dataclasses
import json
import math
import statistics
import time

import jax

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.base.storage import abstract_base, measure_base
from irqlora_jax.config import Config, TrainConfig
from irqlora_jax.model.tree import linear_stacks
from irqlora_jax.plan.collectives import (
    KINDS,
    collectives,
    running_lines,
    seconds_at_least,
    shape_bytes,
    total_bytes,
)
from irqlora_jax.plan.measure import compile_step, find_plan_device
from irqlora_jax.plan.plan import NETWORK
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.sharding import OVERLAP, MeshConfig
from tests.architectures import MODELS

CASES = {
    "65b-8": ("65b", "8xh100", MeshConfig(1, 8, 1)),
    "65b-8-tensor": ("65b", "8xh100", MeshConfig(1, 4, 2)),
    "70b-16": ("70b", "2x8xh100", MeshConfig(1, 16, 1)),
    "70b-16-tensor": ("70b", "2x8xh100", MeshConfig(1, 8, 2)),
    "70b-16-data": ("70b", "2x8xh100", MeshConfig(2, 8, 1)),
    "7b-8-data": ("7b", "8xh100", MeshConfig(8, 1, 1)),
}


_PIPELINED = {"xla_gpu_enable_pipelined_all_gather": True}
_BUFFERED = {"xla_gpu_enable_while_loop_double_buffering": True}
OPTIONS = {
    "used": dict(OVERLAP),
    "none": {},
    "pipelined": _PIPELINED,
    "buffered": _BUFFERED,
    "both": _PIPELINED | _BUFFERED,
    "scheduler": {"xla_gpu_enable_latency_hiding_scheduler": True},
    "no-scheduler": {"xla_gpu_enable_latency_hiding_scheduler": False},
}


def measure(case: str, options: str) -> dict[str, object]:
    """The figures of a case."""
    size, fleet, mesh = CASES[case]
    llama, count = MODELS[size], math.prod(dataclasses.astuple(mesh))
    rows = mesh.data * mesh.fsdp  # type: ignore[operator]
    adapter, train = AdapterConfig(rank=64, dtype="bfloat16"), TrainConfig(batch_size=rows)
    config = Config("model", "folder", adapter=adapter, train=train, mesh=mesh)
    base = abstract_base(llama, config.quant)
    target, started = find_plan_device(fleet, count), time.perf_counter()
    OVERLAP.clear()
    OVERLAP.update(OPTIONS[options])
    need, program = compile_step(config, base, llama, target)
    text = program.as_text()
    found, local = collectives(text, count), count // target.hosts
    stacks = {
        leaf.shape
        for _, weight in linear_stacks(base)
        if isinstance(weight, QTensor)
        for leaf in jax.tree.leaves(weight)
        if leaf.ndim > 2
    }
    whole = [one for one in found if any(sizes in stacks for _, sizes in one.shapes)]
    gathers = [one for one in found if one.kind == "all-gather"]
    packed = sum(
        one.times * (len(one.group) - 1) / len(one.group) * shape_bytes(shape)
        for one in gathers
        for shape in one.shapes
        if shape[0] == "u8"
    )
    copies = sum(
        line.times * sum(map(shape_bytes, line.shapes))
        for line in running_lines(text)
        if line.operation == "copy"
        and line.times > 1
        and any(" all-gather-start(" in other for other in line.lines)
    )
    assert target.link is not None
    seconds = seconds_at_least(found, local, target.link * 1e9, NETWORK * 1e9)
    return {
        "case": case,
        "options": options,
        "mesh": dataclasses.asdict(mesh),
        "gib_a_device": _gib(need.peak, 2),
        "base_gib": _gib(need.base.total, 2),
        "whole_stacks_gathered": len(whole),
        "times": {k: sum(one.times for one in found if one.kind == k) for k in KINDS},
        "sent_gib": {k: _gib(total_bytes(one for one in found if one.kind == k)) for k in KINDS},
        "packed_gathers_gib": _gib(packed),
        "in_bfloat16_gib": _gib(packed * 16 / measure_base(base).bits),
        "by_adapter_gib": _gib(sum(one.times * one.network_bytes(local) for one in found)),
        "turns": sorted({one.times for one in gathers}),
        "overlapped_gathers": sum(one.times for one in gathers if one.overlapped),
        "median_overlap": statistics.median(one.overlapped for one in gathers) if gathers else 0,
        "loop_copies_gib": _gib(copies),
        "seconds_at_least": round(seconds, 3),
        "compile_seconds": round(time.perf_counter() - started, 1),
    }


def _gib(size: float, digits: int = 3) -> float:
    return round(size / 2**30, digits)


def main() -> None:
    """Prints the figures of the chosen cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--options", nargs="+", default=["used"], choices=list(OPTIONS))
    asked = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    for case in asked.cases:
        for options in asked.options:
            print(json.dumps(measure(case, options)), flush=True)


if __name__ == "__main__":
    main()
