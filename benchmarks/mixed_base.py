"""What a base of mixed formats costs beside a uniform one: seconds to load and to compile, a step.

    python benchmarks/mixed_base.py [--layers 24] [--hidden 256] [--ties 1 2 4 8] [--turns 7]

A random LLaMA is written to a temporary folder; the sizes of its matrices differ, so that
`quant.budget` mixes formats in nearly every layer. Each choice ties the formats over groups of
layers (`quant.allocation.tie`). "stacks" are the runs of equal layers, each with a compiled loop.
The steps run in turns; compilation runs once, without a cache. The least error that the budget
allows is given relative to that of untied layers.
"""

import argparse
import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file
from timing import compare, line, machine, table
from train_step import random_batch

from irqlora_jax import hf
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.base.budget import BUDGET_FILE, choose_rules
from irqlora_jax.config import TrainConfig
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import stacks, weight_name, weight_shapes
from irqlora_jax.quant.budget import AllocationOptions
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.runs.state import init_state, make_optimizer
from irqlora_jax.train.step import train_step

UNIFORM = QuantConfig(format="nf3", calibration="none")
BUDGET = 3.1875
"""Bits a weight, about as many as `UNIFORM` has."""
COLUMNS = ("base", "stacks", "rules", "error", "load (s)", "compile (s)", "to uniform")
COLUMNS += ("step (ms)", "speed to uniform (min-max)")


def write_model(folder: Path, llama: LlamaConfig) -> None:
    """A random model, whose matrices have different sizes."""
    rng, (layered, single) = np.random.default_rng(0), weight_shapes(llama)
    places = [(path, shape, None) for path, shape in single.items()]
    places += [(p, s, i) for p, s in layered.items() for i in range(llama.num_hidden_layers)]
    tensors = {}
    for path, shape, layer in places:
        size = 0.02 * (rng.uniform(0.5, 2) if len(shape) == 2 and layer is not None else 1)
        mean = 1.0 if len(shape) == 1 else 0.0
        tensors[weight_name(path, layer)] = rng.normal(mean, size, shape).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    about = llama.to_dict() | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(about))


def compiled(
    args: argparse.Namespace, llama: LlamaConfig, base: Any
) -> tuple[Callable[[], Any], float]:
    """A training step, and the seconds to compile it."""
    settings = TrainConfig(batch_size=args.batch, compute_dtype="float32")
    model = Llama(llama, AdapterConfig(method="lora", rank=16), remat=settings.remat)
    optimizer, batch = make_optimizer(settings), random_batch(args)
    state = init_state(model, optimizer, 0)
    step = functools.partial(train_step, model=model, optimizer=optimizer, config=settings)
    start = time.perf_counter()
    program = jax.jit(step).lower(state, base, batch).compile()
    seconds = time.perf_counter() - start
    return functools.partial(program, state, base, batch), seconds


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = functools.partial(parser.add_argument, type=int)
    add("--layers", default=24)
    add("--hidden", default=256)
    add("--vocab", default=2048)
    add("--batch", default=2)
    add("--length", default=128)
    add("--ties", nargs="+", default=[1, 2, 4, 8])
    add("--turns", default=7)
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    llama = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        head_dim=64,
        max_position_embeddings=args.length,
    )
    print(machine())
    few = AllocationOptions(("nf2", "nf3", "nf4"), (64,), (8,))
    steps, about = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        write_model(folder, llama)
        quants, errors = {"uniform nf3": UNIFORM}, {}
        for tie in args.ties:
            own = dataclasses.replace(few, tie=tie)
            asked = QuantConfig(calibration="none", budget=BUDGET, allocation=own)
            name = f"budget, {tie} tied" if tie > 1 else "budget"
            quants[name] = choose_rules(folder, asked, Path(temporary) / "errors")
            file = Path(temporary) / "errors" / BUDGET_FILE
            errors[name] = json.loads(file.read_text())["error"]
        for quant in quants.values():
            hf.load_base(folder, quant)  # compiles the quantizers
        least = min(errors.values())
        for name, quant in quants.items():
            start = time.perf_counter()
            base = jax.block_until_ready(hf.load_base(folder, quant)[0])
            loaded = time.perf_counter() - start
            steps[name], seconds = compiled(args, llama, base)
            error = f"{errors[name] / least:.3f}" if name in errors else ""
            about[name] = len(stacks(base, args.layers)), len(quant.rules), error, loaded, seconds
    times = compare(steps, args.turns)
    first = next(iter(about))
    print(f"\n{args.layers} layers, hidden {args.hidden}, {args.batch} x {args.length} tokens\n")
    print(table(COLUMNS))
    for name, (count, rules, error, loaded, seconds) in about.items():
        cells = [name, str(count), str(rules), error, f"{loaded:.2f}", f"{seconds:.1f}"]
        cells += [f"{seconds / about[first][-1]:.1f}", times[name].milliseconds()]
        print(line([*cells, times[name].speedups(times[first])]))


if __name__ == "__main__":
    main()
