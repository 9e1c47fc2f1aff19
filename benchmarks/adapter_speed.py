"""Training and decoding with each adapter, at about equal numbers of trained parameters.

    python benchmarks/adapter_speed.py MODEL [--batch 4] [--length 128] [--adapters lora dora ...]

MODEL is a Hugging Face folder or a .gguf file for which the adapters of
examples/smollm2/claim_adapters.py make sense: SmolLM2-135M. All compute in float32 with a dense
copy of the nf3 base, as `irqlora chat` does on a CPU. The calls run in turns. A step is compared
with LoRA's. Decoding is compared with the model without an adapter, which is also the speed of a
merged model and of a base that has absorbed its adapter.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import compare, machine, table

from irqlora_jax import hf
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.config import TrainConfig
from irqlora_jax.generate.decode import generate
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.matmul import dense_weights
from irqlora_jax.runs.state import init_state, make_model, make_optimizer
from irqlora_jax.train.step import train_step

sys.path.append(str(Path(__file__).parent.parent / "examples" / "smollm2"))
import claim_adapters

PROMPT, NEW = 16, 16
NO_ADAPTER = "none, merged, absorbed"


def main() -> None:
    """Prints the table."""
    methods = claim_adapters.METHODS
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--adapters", nargs="+", choices=methods, default=list(methods))
    args = parser.parse_args()
    print(machine(), flush=True)
    packed, llama = hf.load_base(args.model, QuantConfig(format="nf3", calibration="none"))
    base = dense_weights(packed, jnp.float32)
    shape = args.batch, args.length
    tokens = np.random.default_rng(0).integers(1000, llama.vocab_size, shape, dtype=np.int32)
    batch = {"tokens": jnp.asarray(tokens), "targets": jnp.ones(shape, bool)}
    config = TrainConfig(batch_size=args.batch, compute_dtype="float32", matmul="xla", remat=False)
    prompts = [tokens[0, :PROMPT].tolist()]
    without = functools.partial(generate, Llama(llama), {"base": base}, prompts, NEW)
    steps: dict[str, Any] = {}
    answers: dict[str, Any] = {NO_ADAPTER: without}
    trained = {NO_ADAPTER: 0}
    for name in dict.fromkeys(("qlora", *args.adapters)):
        adapter = AdapterConfig(**methods[name].adapter)
        model, optimizer = make_model(llama, adapter, config), make_optimizer(config)
        state = init_state(model, optimizer, 0, base=base)
        trained[name] = sum(leaf.size for leaf in jax.tree.leaves(state.adapters))
        advance = functools.partial(train_step, model=model, optimizer=optimizer, config=config)
        steps[name] = functools.partial(jax.jit(advance), state, base, batch)
        variables = {"params": state.adapters, "base": base}
        answers[name] = functools.partial(generate, model, variables, prompts, NEW)
    stepped = compare(steps, args.repeats)
    answered = compare(answers, args.repeats)
    rows = []
    for name, count in trained.items():
        step, answer = stepped.get(name), answered[name]
        cells = [name, f"{count:,}", "-", "-"]
        if step is not None:
            cells[2:] = [step.rate(args.batch * args.length), step.speedups(stepped["qlora"])]
        rows.append((*cells, answer.rate(NEW), answer.speedups(answered[NO_ADAPTER])))
    columns = ("adapter", "trained", "step, tokens/s", "to LoRA", "decoding, tokens/s", "to none")
    print(table(columns, rows))


if __name__ == "__main__":
    main()
