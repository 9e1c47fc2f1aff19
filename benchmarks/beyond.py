"""Two experiments with calibrations over draws of blocks.

    python benchmarks/beyond.py outliers feedback [--stories MODEL VALID_TEXT TRAIN_TEXT]

outliers: is joint still better than ICQ if one channel of each matrix is 8 times as large? In every
layer, one channel grows in the inputs of each matrix, and the weights or norms that produce this
input shrink, so that the model computes the same function.
feedback: GPTQ's rounding (`quantize` with `gram`), with the scales and shifts that a calibration
stores for the original weights. The inputs come from a few documents.

The models are Factworld's small base for all formats, its large base for 2 bits, and stories260K,
each in several draws (testbeds.py). Tables show means (standard deviations), and paired differences
with their standard errors.
"""

import argparse
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from testbeds import (
    Base,
    Testbed,
    channels,
    facts,
    paired,
    rescale,
    spread,
    stored,
    stories,
)
from timing import line, machine, table

from irqlora_jax.model.attention import rope_rotations
from irqlora_jax.model.layer import AdaptedLinear, Context, Layer, Settings
from irqlora_jax.quant.calibrations.joint import JointOptions
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize

HOWS: dict[str, Mapping[str, Any]] = {
    "none": {"calibration": "none"},
    "ICQ": {"calibration": "icq"},
    "joint 100": {"calibration": "joint"},
    "joint inf": {"calibration": "joint", "joint": JointOptions(float("inf"))},
}
OUTLIER = 8.0
Runs = dict[str, list[tuple[float, ...]]]  # figures of each draw, by method


def report(testbed: Testbed, label: str, runs: Runs, pairs: Mapping[str, str]) -> None:
    """Prints a row for each figure and method. `pairs` says with which method to compare."""
    for place, figure in enumerate(testbed.figures):
        for name, values in runs.items():
            own = [value[place] for value in values]
            difference = ""
            if name in pairs:
                other = [value[place] for value in runs[pairs[name]]]
                difference = f"{paired(own, other)} ({pairs[name]})"
            cells = (testbed.name, label, figure, name, spread(own), difference)
            print(line(cells), flush=True)


def head(title: str, label: str) -> None:
    """Prints the head of a table."""
    columns = ("model", label, "figure", "method", "mean (sd)", "difference, standard error (to)")
    print(f"\n## {title}\n\n{table(columns)}")


# --------------------------------------------------------------------------------------- outliers


def planted(base: Base, testbed: Testbed, factor: float, key: jax.Array) -> Base:
    """The same function, with one channel of each kind and layer `factor` times as large."""
    factors = {}
    for place, (name, (layers, size)) in enumerate(channels(testbed.config).items()):
        chosen = jax.random.randint(jax.random.fold_in(key, place), (layers,), 0, size)
        factors[name] = jnp.ones((layers, size)).at[jnp.arange(layers), chosen].set(factor)
    return rescale(base, testbed.config, factors)


@functools.cache
def figures(
    testbed: Testbed, format: str, how: str, number: int, factor: float = 1.0
) -> tuple[float, ...]:
    """The figures of one quantized draw, which is not finetuned."""
    base = planted(testbed.draw(number), testbed, factor, jax.random.key(100 + number))
    return testbed.measure(stored(base, QuantConfig(format=format, **HOWS[how])))  # type: ignore[arg-type]


def outliers(testbed: Testbed, formats: Sequence[str], draws: int) -> None:
    """Prints the rows of one testbed."""
    for name in formats:
        for factor in (1.0, OUTLIER):
            runs = {
                how: [figures(testbed, name, how, number, factor) for number in range(draws)]
                for how in HOWS
            }
            pairs = {"ICQ": "none", "joint 100": "ICQ", "joint inf": "ICQ"}
            report(testbed, f"{name}, x {factor:g}", runs, pairs)


# --------------------------------------------------------------------------------------- feedback


@functools.partial(jax.jit, static_argnames="config")
def layer_inputs(weights: Any, x: jax.Array, count: jax.Array, config: Any) -> tuple[Any, Any]:
    """Output of one layer, and X^T X over the counted tokens for each linear layer in it."""
    seen: dict[str, jax.Array] = {}

    def note(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, AdaptedLinear) and context.method_name == "__call__":
            rows = jnp.where(count[..., None], args[0], 0).reshape(-1, args[0].shape[-1])
            seen[str(context.module.name)] = rows.T @ rows
        return call(*args, **kwargs)

    positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
    context = Context(rope_rotations(config, positions), None, None)
    with nn.intercept_methods(note):
        layer = Layer(Settings(config, None, None, "xla", True))
        own = jnp.int32(0), {}
        (after, _), _ = layer.apply({"base": weights}, (x, None), own, context)  # type: ignore[misc]
    return after, seen


def with_feedback(base: Base, testbed: Testbed, quant: QuantConfig) -> Base:
    """Rounds all linear layers with feedback.

    The inputs of a layer come from the documents, through the rounded layers before it.
    """
    tokens = jnp.asarray(testbed.documents)
    x, count = base["embed_tokens"]["weight"][tokens], tokens != 0  # 0 is padding in both models
    done = []
    for number in range(testbed.config.num_hidden_layers):
        weights = jax.tree.map(lambda leaf, n=number: leaf[n], base["layers"])
        squares = layer_inputs(weights, x, count, testbed.config)[1]
        new = dict(weights)
        for group in ("self_attn", "mlp"):
            new[group] = {}
            for name, linear in weights[group].items():
                packed = quantize(linear["weight"], quant, gram=squares[name])
                new[group][name] = {"weight": packed.dequantize()}
        x = layer_inputs(new, x, count, testbed.config)[0]
        done.append(new)
    return base | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *done)}


def feedback(testbed: Testbed, formats: Sequence[str], draws: int) -> None:
    """Prints the rows of one testbed."""
    for name in formats:
        runs: Runs = {}
        for how in ("ICQ", "joint inf"):
            quant = QuantConfig(format=name, **HOWS[how])  # type: ignore[arg-type]
            runs[how] = [figures(testbed, name, how, number) for number in range(draws)]
            runs[f"{how}, feedback"] = [
                testbed.measure(with_feedback(testbed.draw(number), testbed, quant))
                for number in range(draws)
            ]
        pairs = {f"{how}, feedback": how for how in ("ICQ", "joint inf")}
        report(testbed, name, runs, pairs)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("outliers", "feedback")
    parser.add_argument("parts", nargs="+", choices=parts)
    parser.add_argument("--small", nargs="*", default=("nf4", "nf3"), help="formats")
    parser.add_argument("--large", nargs="*", default=("nf2",), help="formats")
    parser.add_argument(
        "--formats", nargs="*", default=("nf4", "nf3", "nf2"), help="formats of stories260K"
    )
    parser.add_argument(
        "--stories", nargs=3, type=Path, help="model, text to evaluate on, text for the inputs"
    )
    parser.add_argument("--bases", type=Path, help="folder with more bases (of ablation.py)")
    parser.add_argument("--draws", type=int, default=5, help="at least 2")
    parser.add_argument("--questions", type=int, default=2048)
    parser.add_argument(
        "--tokens", type=int, default=20_480, help="tokens to evaluate stories260K on"
    )
    args = parser.parse_args()
    print(machine())
    worlds = [("small", args.small), ("large", args.large)]
    testbeds = {
        facts(name, args.questions, args.bases): formats for name, formats in worlds if formats
    }
    if args.stories:
        model, text, documents = args.stories
        testbeds[stories(model, text, args.tokens, documents)] = args.formats
    if "outliers" in args.parts:
        head("Outliers", "format, largest channel")
        for testbed, formats in testbeds.items():
            outliers(testbed, formats, args.draws)
    if "feedback" in args.parts:
        head("Error feedback", "format")
        for testbed, formats in testbeds.items():
            feedback(testbed, formats, args.draws)


if __name__ == "__main__":
    main()
