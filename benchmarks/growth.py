"""How memory and traffic grow with devices and with the model, from compiled training steps.

    python benchmarks/growth.py [--parts devices models]

`devices`: LLaMA-7B on 1, 2, 4 and 8 H100s with mesh.fsdp, one row a device (the work of a device is
fixed) or 8 rows in all (the whole work is fixed). `models`: the fewest GPUs of a kind on which each
model trains, of 1, 2, 4 and 8 in one host, with 95 % of their memory. Every step is nf4 with ICQ,
IEC of rank 64 in bfloat16 on all layers, rows of 512 tokens. The GPUs are not there: nothing runs.
Prints a line of JSON each. Needs jax-cuda13-plugin and jax-cuda13-pjrt.
"""

import argparse
import json
from typing import Any

import jax

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.base.storage import abstract_base
from irqlora_jax.config import Config, TrainConfig
from irqlora_jax.plan.collectives import collectives, total_bytes
from irqlora_jax.plan.gpus import DEVICES
from irqlora_jax.plan.measure import MemoryNeed, compile_step, find_plan_device
from irqlora_jax.sharding import MeshConfig
from tests.architectures import MODELS

SIZES = ("7b", "13b", "30b", "65b", "70b")
COUNTS = (1, 2, 4, 8)
KINDS = ("4090", "a6000", "a100-80")
USABLE = 0.95


def step(size: str, kind: str, count: int, rows: int) -> tuple[MemoryNeed, Any]:
    """The memory and the program of a step on `count` GPUs of a host."""
    adapter, train = AdapterConfig(rank=64, dtype="bfloat16"), TrainConfig(batch_size=rows)
    mesh = MeshConfig(1, count, 1)
    config = Config("model", "folder", adapter=adapter, train=train, mesh=mesh)
    target = find_plan_device(f"{count}x{kind}", count)
    limit = int(USABLE * DEVICES[kind].memory)
    return compile_step(
        config, abstract_base(MODELS[size], config.quant), MODELS[size], target, limit
    )


def devices() -> None:
    """Prints the growth with the number of devices."""
    for fixed in ("work of a device", "whole work"):
        for count in COUNTS:
            rows = count if fixed == "work of a device" else 8
            need, program = step("7b", "h100", count, rows)
            found = collectives(program.as_text(), count)
            values = {"fixed": fixed, "devices": count, "rows": rows}
            values |= {"gib_a_device": round(need.peak / 2**30, 2)}
            values |= {"base_gib": round(need.base.total / 2**30, 2)}
            values |= {"collectives": sum(one.times for one in found)}
            print(
                json.dumps(values | {"sent_gib": round(total_bytes(found) / 2**30, 2)}), flush=True
            )


def models() -> None:
    """Prints the fewest GPUs for each model."""
    for size in SIZES:
        for kind in KINDS:
            values: dict[str, Any] = {"model": size, "gpu": kind, "count": None}
            for count in COUNTS:
                need, program = step(size, kind, count, count)
                if program is not None and need.peak <= USABLE * DEVICES[kind].memory:
                    values |= {"count": count, "gib_a_device": round(need.peak / 2**30, 2)}
                    break
            print(json.dumps(values), flush=True)


def main() -> None:
    """Prints the parts."""
    parts = {"devices": devices, "models": models}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=list(parts))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    for part in parser.parse_args().parts:
        parts[part]()


if __name__ == "__main__":
    main()
