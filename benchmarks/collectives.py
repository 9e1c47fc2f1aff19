"""What the devices of a mesh send each other in a training step, from compiled programs.

    python benchmarks/collectives.py [--cases 65b-8 70b-16 ...] [--without_options]

Compiles the step (nf4 with ICQ, IEC of rank 64 on all layers, 512 tokens a row, a row a device) for
H100s that are not there: nothing runs. Prints a line of JSON for each mesh: GiB of each device, how
often each collective runs, the GiB that each device sends, how many gathers have other work between
their start and their end (in the median so many fusions and products), and the seconds that all of
this takes at least, by arithmetic: 450 GB/s in a host (NVLink) and 50 GB/s between hosts (400 Gb/s
a GPU). Needs jax-cuda13-plugin and jax-cuda13-pjrt.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time

import jax

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.base.storage import abstract_base
from irqlora_jax.config import Config, TrainConfig
from irqlora_jax.model.tree import linear_stacks
from irqlora_jax.plan.collectives import KINDS, collectives, shape_bytes, total_bytes
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


def measure(case: str) -> dict[str, object]:
    """The figures of a case."""
    size, fleet, mesh = CASES[case]
    llama, count = MODELS[size], math.prod(dataclasses.astuple(mesh))
    rows = mesh.data * mesh.fsdp  # type: ignore[operator]
    adapter, train = AdapterConfig(rank=64, dtype="bfloat16"), TrainConfig(batch_size=rows)
    config = Config("model", "folder", adapter=adapter, train=train, mesh=mesh)
    base = abstract_base(llama, config.quant)
    target, started = find_plan_device(fleet, count), time.perf_counter()
    need, program = compile_step(config, base, llama, target)
    text = program.as_text()
    found = collectives(text, count)
    stacks = {
        leaf.shape
        for _, weight in linear_stacks(base)
        if isinstance(weight, QTensor)
        for leaf in jax.tree.leaves(weight)
        if leaf.ndim > 2
    }
    whole = [one for one in found if any(sizes in stacks for _, sizes in one.shapes)]
    packed = sum(
        one.times * (len(one.group) - 1) / len(one.group) * sum(map(shape_bytes, one.shapes))
        for one in found
        if one.kind == "all-gather" and all(kind == "u8" for kind, _ in one.shapes)
    )
    far = [one for one in found if one.crosses(count // target.hosts)]
    near = total_bytes(found) - total_bytes(far)
    assert target.link is not None
    seconds = near / (target.link * 1e9) + total_bytes(far) / (NETWORK * 1e9)
    seconds = near / (target.link * 1e9) + total_bytes(far) / (NETWORK * 1e9)
    gathers = [one for one in found if one.kind == "all-gather"]
    return {
        "case": case,
        "mesh": dataclasses.asdict(mesh),
        "gib_a_device": round(need.peak / 2**30, 2),
        "base_gib": round(need.base.total / 2**30, 2),
        "whole_stacks_gathered": len(whole),
        "times": {k: sum(one.times for one in found if one.kind == k) for k in KINDS},
        "sent_gib": {
            k: round(total_bytes(one for one in found if one.kind == k) / 2**30, 3) for k in KINDS
        },
        "packed_gathers_gib": round(packed / 2**30, 3),
        "between_hosts_gib": round(total_bytes(far) / 2**30, 3),
        "overlapped_gathers": sum(one.times for one in gathers if one.overlapped),
        "median_overlap": statistics.median(one.overlapped for one in gathers) if gathers else 0,
        "seconds_at_least": round(seconds, 3),
        "compile_seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    """Prints the figures of the chosen cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--without_options", action="store_true", help="without OVERLAP")
    asked = parser.parse_args()
    if asked.without_options:
        OVERLAP.clear()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    for case in asked.cases:
        print(json.dumps(measure(case)), flush=True)


if __name__ == "__main__":
    main()
