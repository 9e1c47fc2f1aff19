"""Compares the device memory that a training step takes with the figure of `--plan`.

    python benchmarks/peak.py [--size 7b --batch 1 --length 512]

The plan needs only a config.json. Then the script runs three steps with these shapes and zero
weights, and asks the device for its peak of memory in use. Both must agree within 5 %; exit code 1
otherwise. A CPU keeps no such record: then the script prints only the plan's figures.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from timing import machine, table, verdict
from train_step import SHIFTED, add_size, fill_size, llama, random_batch, shape

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.config import Config, TrainConfig
from irqlora_jax.data.config import DataConfig
from irqlora_jax.plan.measure import find_plan_device, measure, read_base_shapes
from irqlora_jax.runs.state import init_state, make_model, make_optimizer
from irqlora_jax.sharding import make_mesh
from irqlora_jax.train.step import make_step, sharded_state

BOUND = 0.05


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_size(parser)
    args = fill_size(parser.parse_args())
    train = TrainConfig(batch_size=args.batch, compute_dtype=args.dtype, remat=args.remat)
    print(f"{machine()}\n\n{shape(args)}; nf4, ICQ, IEC\n", flush=True)
    with tempfile.TemporaryDirectory() as name:
        values = llama(args).to_dict() | {"dtype": args.dtype}
        (Path(name) / "config.json").write_text(json.dumps(values))
        config = Config(
            model=name,
            output_dir="",
            quant=SHIFTED,
            adapter=AdapterConfig(rank=args.rank),
            data=DataConfig(format="text", sequence_length=args.length),
            train=train,
        )
        shapes, architecture = read_base_shapes(config)
    target = dataclasses.replace(find_plan_device(None, 1), devices=jax.devices()[:1])
    need = measure(config, shapes, architecture, target)
    mesh = make_mesh(config.mesh, args.batch)
    with jax.set_mesh(mesh):
        model = make_model(architecture, config.adapter, train)
        optimizer = make_optimizer(train)
        base = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        state = sharded_state(mesh, lambda: init_state(model, optimizer, 0))
        step = make_step(mesh, state, model=model, optimizer=optimizer, config=train)
        stored = peak_bytes()
        for _ in range(3):
            state, _ = step(state, base, random_batch(args))
        jax.block_until_ready(state)
    seen = peak_bytes()
    rows = [
        ("plan: base", need.base.total),
        ("plan: adapters", need.adapters),
        ("plan: optimizer state", need.optimizer),
        ("plan: gradients, activations and temporaries", need.step),
        ("plan: peak", need.peak),
    ]
    if seen is not None and stored is not None:
        rows += [("measured before the first step: peak", stored), ("measured: peak", seen)]
    print(table(("", "GiB"), [(what, f"{size / 2**30:.3f}") for what, size in rows]))
    if seen is None:
        print("\nnot measured: this device keeps no record of its peak memory")
        return 0
    off = seen / need.peak - 1
    met = abs(off) <= BOUND
    print(f"\nmeasured to plan: {off:+.1%}, must be within {BOUND:.0%}: {verdict(met)}")
    return 0 if met or args.size == "tiny" else 1


def peak_bytes() -> int | None:
    """Peak memory in use on the first device since the start, or None."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


if __name__ == "__main__":
    sys.exit(main())
