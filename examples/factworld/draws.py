"""Compares ICQ with plain quantization over several draws of one base, without a finetune.

    python examples/factworld/draws.py [--base base-small] [--draws 6]

Every draw permutes the model without changing its function (permute.py) and quantizes it in both
ways. Prints accuracy and bits per fact on the held-out questions, and the paired difference with
its standard error.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import world as factworld
from permute import permute

from irqlora_jax import hf
from irqlora_jax.evaluate import load_questions, score_questions
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize


def quantized(base: dict, config: QuantConfig) -> dict:
    """The base with every linear layer quantized."""

    def stack(weights: jax.Array) -> Any:
        packed = [quantize(weight, config) for weight in weights]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *packed)

    layers = dict(base["layers"])
    for group in ("self_attn", "mlp"):
        layers[group] = {
            name: {"weight": stack(linear["weight"])} for name, linear in layers[group].items()
        }
    return base | {"layers": layers}


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="base-small", help="folder in examples/factworld")
    parser.add_argument("--draws", type=int, default=6, help="permutations, at least 2")
    args = parser.parse_args()
    folder = factworld.FOLDER / args.base
    base, config = hf.load_base(folder, None)
    model = Llama(config)
    path = factworld.FOLDER / "data" / "questions.jsonl"
    questions = load_questions(str(path), hf.load_tokenizer(folder))
    print("| format | accuracy, plain | ICQ | difference (%) | bits per fact, difference |")
    print("|---|---|---|---|---|")
    for name in ("nf4", "nf3", "nf2"):
        runs = []
        for draw in range(args.draws):
            other = permute(base, config, jax.random.key(draw))
            for calibration in ("none", "icq"):
                how = QuantConfig(format=name, calibration=calibration)
                variables = {"params": {}, "base": quantized(other, how)}
                scores = score_questions(model, variables, questions, 256)
                runs.append((100 * scores.accuracy, scores.bits_per_fact))
        plain, icq = np.array(runs).reshape(args.draws, 2, 2).transpose(1, 0, 2)
        mean = (icq - plain).mean(0)
        error = (icq - plain).std(0, ddof=1) / np.sqrt(args.draws)
        print(
            f"| {name} | {plain[:, 0].mean():.1f} | {icq[:, 0].mean():.1f} | "
            f"{mean[0]:+.2f} +- {error[0]:.2f} | {mean[1]:+.3f} +- {error[1]:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
