"""A real model on a CPU: this package, transformers in float32, and llama.cpp, in turns.

    pip install xllamacpp
    python benchmarks/cpu_speed.py FILE.gguf --folder FOLDER [--parts generate read ...]

FOLDER is the same model, converted for transformers. Parts: greedy tokens after a short prompt; a
prompt of 512 tokens and one answer token; a training step of LoRA (transformers with PEFT;
llama.cpp does not train); how fast products of one row read their weights, which limits decoding;
seconds to quantize with each calibration (once, no peer). "Packed" computes with packed nf4
weights, "dense" with a dense copy, as `irqlora eval` does if memory allows. "Stream" returns every
token to Python. "Each layer" has an array for every layer and matrix, where "dense" has one for all
layers; packed weights read the prompt before it, as in `irqlora chat`.
llama.cpp uses the file's own 4-bit weights and rounds activations to 8 bits.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf_parity import LlamaCpp
from timing import Timing, compare, machine, table

from irqlora_jax import hf
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.config import TrainConfig
from irqlora_jax.generate.decode import generate, stream
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import by_layer
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.matmul import dense_weights, dequant_matmul
from irqlora_jax.runs.state import init_state, make_model, make_optimizer
from irqlora_jax.train.step import train_step

PARTS = ("generate", "prompt", "step", "read", "quantize")
NEW, PROMPT, BATCH, LENGTH, RANK = 32, 512, 4, 256, 16
Calls = dict[str, Callable[[], Any]]


class Bench:
    """The model in every form."""

    def __init__(self, file: Path, folder: Path, port: int) -> None:
        import torch
        import transformers

        self.file, self.torch = file, torch
        packed, self.config = hf.load_base(file, QuantConfig(calibration="none"))
        self.bases = {"packed": packed, "dense": dense_weights(packed, jnp.float32)}
        self.theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.llama_cpp = LlamaCpp(file, port)
        vocabulary = self.config.vocab_size
        draw = np.random.default_rng(0).integers(1000, vocabulary, BATCH * max(LENGTH, PROMPT))
        self.tokens = draw.astype(np.int32)

    def generate(self) -> Calls:
        """Greedy tokens, one at a time."""
        return self._answer(16, NEW)

    def prompt(self) -> Calls:
        """A prompt and one token."""
        return self._answer(PROMPT, 1)

    def _answer(self, length: int, new: int) -> Calls:
        prompt, model = self.tokens[:length].tolist(), Llama(self.config)
        ids = self.torch.tensor([prompt])

        def theirs() -> Any:
            with self.torch.no_grad():
                settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
                return self.theirs.generate(ids, **settings)

        calls: Calls = {
            f"here, {name}": functools.partial(generate, model, {"base": base}, [prompt], new)
            for name, base in self.bases.items()
        }
        if new > 1:
            calls |= self._streams(model, prompt, new)
        calls["transformers, float32"] = theirs
        calls["llama.cpp"] = lambda: self.llama_cpp.answer(prompt, new)
        return calls

    def _streams(self, model: Llama, prompt: list[int], new: int) -> Calls:
        """Token by token: with one dense copy, and as `irqlora chat` does."""
        packed, dense = ({"base": self.bases[name]} for name in ("packed", "dense"))
        layers = by_layer(packed["base"], self.config.num_hidden_layers)
        fast = model, {"base": dense_weights(layers, jnp.float32)}
        return {
            "here, stream, dense": lambda: list(stream(model, dense, prompt, new)),
            "here, stream, each layer": lambda: list(
                stream(model, packed, prompt, new, decoding=fast)
            ),
        }

    def step(self) -> Calls:
        """A training step of LoRA with AdamW on all linear layers, in float32."""
        tokens = self.tokens[: BATCH * LENGTH].reshape(BATCH, LENGTH)
        batch = {"tokens": jnp.asarray(tokens), "targets": jnp.ones((BATCH, LENGTH), bool)}
        config = TrainConfig(batch_size=BATCH, compute_dtype="float32", remat=False)
        model = make_model(self.config, AdapterConfig(method="lora", rank=RANK), config)
        optimizer = make_optimizer(config)
        state = init_state(model, optimizer, 0)
        advance = functools.partial(train_step, model=model, optimizer=optimizer, config=config)
        step = jax.jit(advance)
        calls: Calls = {
            f"here, {name}": functools.partial(step, state, base, batch)
            for name, base in self.bases.items()
        }
        calls["transformers + PEFT, float32"] = self._their_step(tokens)
        return calls

    def _their_step(self, tokens: np.ndarray) -> Callable[[], float]:
        from peft import LoraConfig, get_peft_model

        names = list(self.config.linear_shapes)
        lora = LoraConfig(r=RANK, lora_alpha=16, lora_dropout=0.0, target_modules=names)
        model = get_peft_model(self.theirs, lora)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = self.torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
        ids = self.torch.tensor(tokens, dtype=self.torch.int64)

        def run() -> float:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            self.torch.nn.utils.clip_grad_norm_(trained, 0.3)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return float(loss.detach())

        return run


def reading() -> Calls:
    """Products of one row with 30 matrices of 18 MB in float32, or the same in bfloat16.

    A loop over a stack of matrices copies each one before its product.
    """
    weights, x = np.ones((30, 1536, 3000), np.float32), np.ones((1, 3000), np.float32)

    def product(weights: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda _, w: (None, dequant_matmul(x, w)), None, weights)[1]

    single = jax.jit(product)
    each = jax.jit(lambda weights, x: [dequant_matmul(x, w) for w in weights])
    return {
        "NumPy, float32": lambda: weights @ x[0],
        "XLA, float32, a stack": functools.partial(single, jnp.asarray(weights), jnp.asarray(x)),
        "XLA, float32, 30 arrays": functools.partial(
            each, [jnp.asarray(w) for w in weights], jnp.asarray(x)
        ),
        "XLA, bfloat16, a stack": functools.partial(
            single, jnp.asarray(weights, jnp.bfloat16), jnp.asarray(x)
        ),
    }


def rows(times: Mapping[str, Timing], count: int) -> list[tuple[str, ...]]:
    """Tokens a second, and how many times as fast as each peer."""
    peers = [name for name in times if not name.startswith("here")]
    return [
        (name, time.rate(count), *(time.speedups(times[peer]) for peer in peers))
        for name, time in times.items()
    ]


def main() -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--port", type=int, default=18100, help="port for llama.cpp")
    args = parser.parse_args()
    print(machine(), flush=True)
    counts = {"generate": NEW, "prompt": PROMPT, "step": BATCH * LENGTH}
    shown = [part for part in args.parts if part in counts]
    if shown:
        bench = Bench(args.file, args.folder, args.port)
        for part in shown:
            times = compare(getattr(bench, part)(), args.repeats)
            peers = [f"to {name}" for name in times if not name.startswith("here")]
            print(f"\n{part}, {counts[part]} tokens\n")
            print(table(("who", "tokens/s", *peers), rows(times, counts[part])), flush=True)
    if "read" in args.parts:
        print("\nread, weights in 10^9 a second\n\n" + table(("product", "weights")), flush=True)
        for name, taken in compare(reading(), args.repeats).items():
            print(f"| {name} | {taken.rate(30 * 1536 * 3000 / 1e9)} |", flush=True)
    if "quantize" in args.parts:
        print("\nquantize to nf3\n\n" + table(("calibration", "seconds")), flush=True)
        for name in ("none", "icq", "joint", "robust"):
            start = time.perf_counter()
            quant = QuantConfig(format="nf3", calibration=name)
            jax.block_until_ready(hf.load_base(args.file, quant)[0])
            print(f"| {name} | {time.perf_counter() - start:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
