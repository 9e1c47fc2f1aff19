"""The memory of a training step on absent GPUs, and how it grows.

    python benchmarks/memory.py > benchmarks/results/DATE-memory.md

Needs jax-cuda13-plugin and jax-cuda13-pjrt, but no GPU: it compiles the step from shapes, for the
device of each row. "stored" (base, adapters, optimizer state) is computed exactly. "estimate" is
the peak that `--plan` prints without the CUDA plugin. Rank 64 on all seven layers, nf4 with ICQ,
IEC, attention by XLA, unless a row says otherwise. All figures are in GiB.
"""

import argparse
import dataclasses
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import jax

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.base.storage import abstract_base
from irqlora_jax.config import Config, TrainConfig
from irqlora_jax.data.config import DataConfig
from irqlora_jax.plan.gpus import DEVICES, OPTIONS, compile_only_devices
from irqlora_jax.plan.measure import MemoryNeed, PlanDevice, measure
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.sharding import MeshConfig
from irqlora_jax.text import aligned

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.architectures import MODELS

BUDGETS = {"7b": 7.0, "13b": 12.0, "65b": 44.0}


def need(
    device: str,
    model: str,
    rows: int = 1,
    tokens: int = 512,
    rank: int = 64,
    dtype: Any = "float32",
    form: Any = "nf4",
    estimate: bool = False,
    **train: Any,
) -> MemoryNeed:
    """The memory that a step with `rows` rows of `tokens` tokens needs."""
    config = Config(
        model="model",
        output_dir="folder",
        quant=QuantConfig(format=form, calibration="none" if form == "none" else "icq"),
        adapter=AdapterConfig(rank=rank, dtype=dtype),
        data=DataConfig(source_length=tokens // 2, target_length=tokens // 2),
        train=TrainConfig(**{"batch_size": rows} | train),
        mesh=MeshConfig(data=1),
    )
    llama = dataclasses.replace(MODELS[model], max_position_embeddings=tokens)
    memory = DEVICES[device].memory
    found = jax.devices("cpu") if estimate else compile_only_devices(DEVICES[device])
    if found is None:
        raise SystemExit("jax-cuda13-plugin and jax-cuda13-pjrt are not installed")
    target = PlanDevice(device, found, memory, memory, "estimate")
    if not estimate:
        target = dataclasses.replace(target, compiler="own", options=OPTIONS)
    return measure(config, abstract_base(llama, config.quant), llama, target)


def gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def row(device: str, model: str, estimate: bool = True, **settings: Any) -> tuple[str, ...]:
    found = need(device, model, **settings)
    stored = found.base.total + found.adapters + found.optimizer
    guess = need(device, model, estimate=True, **settings).peak if estimate else 0
    what = ", ".join(f"{k} {v}" for k, v in settings.items()) or "rows 1, tokens 512"
    sizes = (found.base.total, found.adapters, found.optimizer, found.host)
    sizes += (stored, found.step, found.peak)
    guessed = f"{gib(guess)} ({guess / found.peak - 1:+.1%})" if estimate else "-"
    budgeted = model in BUDGETS and not settings.get("rows")
    budget = f"{BUDGETS[model]:.0f}" if budgeted else "-"
    return f"{model} {device}: {what}", *map(gib, sizes), guessed, budget


HEAD = ("", "base", "adapters", "optimizer", "on host", "stored", "step", "peak", "estimate")


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    jax.config.update("jax_platforms", "cpu")
    versions = {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "jax-cuda13-plugin")}
    print("# Memory of a training step, compiled for absent GPUs\n")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print("\nCompiled without a GPU, not run. Command: `python benchmarks/memory.py`.\n")
    small, away = {"dtype": "bfloat16"}, {"offload_optimizer": True}
    tables = {
        "Budgets: 1 row of 512 tokens": lambda: [
            *(row(device, "7b") for device in ("h200", "l4", "t4")),
            row("l4", "7b", **away),
            row("l4", "13b"),
            row("l4", "13b", **away),
            row("a6000", "65b"),
            row("a6000", "65b", **small),
            row("a6000", "65b", **away),
            row("a6000", "65b", **small, **away),
            row("l4", "llama3"),
        ],
        "Growth with the tokens of a step (7B)": lambda: [
            row("h200", "7b", rows=r, tokens=t)
            for r, t in ((1, 512), (4, 512), (16, 512), (1, 2048), (4, 2048), (1, 8192))
        ],
        "Growth with the bits of a weight (7B)": lambda: [
            row("h200", "7b", estimate=False, form=f) for f in ("nf2", "nf3", "nf4", "none")
        ],
        "Growth with the rank (7B)": lambda: [
            row("h200", "7b", estimate=False, rank=r) for r in (8, 16, 64, 256)
        ],
        "Accumulation and no recomputation (7B, 16 rows)": lambda: [
            row("h200", "7b", estimate=False, rows=16, accumulation=16),
            row("h200", "7b", estimate=False, rows=16, remat=False),
        ],
    }
    for title, rows in tables.items():
        print(f"## {title}\n\n```\n{aligned([(*HEAD, 'budget'), *rows()])}\n```\n", flush=True)


if __name__ == "__main__":
    main()
