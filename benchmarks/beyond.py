"""What else could be done with scales and shifts: three experiments beside the library.

    python benchmarks/beyond.py outliers feedback trained [--stories MODEL VALID_TEXT TRAIN_TEXT]

outliers: does joint's lead over ICQ last where a channel in each matrix is 8 times as large? One
channel of each norm and of the values and gates of every layer grows, and what it reads shrinks, so
the model computes the same.
feedback: GPTQ (Frantar et al. 2022), with the scales and shifts that a calibration stores for the
original weights: columns are rounded in order, and what one loses is made up for by those behind
it, as the inputs of some documents ask.
trained: scales and shifts that learn together with LoRA (as in PEQA, Kim et al. 2023) on
factworld's finetune, codes fixed; against frozen ones at equal steps. Their rate is chosen on the
validation entities of the first draw. The trained ones are not quantized again.

Factworld's small base for all formats, the large one for 2 bits, and stories260K, each in draws
(testbeds.py): mean (standard deviation), and paired differences with their standard error.
"""

import argparse
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from testbeds import (
    Base,
    Testbed,
    channels,
    facts,
    factworld,
    is_packed,
    paired,
    quantized,
    rescale,
    spread,
    stored,
    stories,
)
from timing import machine, table

from irqlora_jax import hf
from irqlora_jax.attention import rope_frequencies
from irqlora_jax.config import AdapterConfig, QuantConfig
from irqlora_jax.data import Batches
from irqlora_jax.evaluate import score_questions
from irqlora_jax.llama import AdaptedLinear, Layer, Llama
from irqlora_jax.quant.formats import get_format
from irqlora_jax.quant.qtensor import QTensor, quantize
from irqlora_jax.step import loss_sum

HOWS: dict[str, Mapping[str, Any]] = {
    "none": {"calibration": "none"},
    "ICQ": {"calibration": "icq"},
    "joint 100": {"calibration": "joint"},
    "joint inf": {"calibration": "joint", "error_weight": float("inf")},
}
OUTLIER = 8.0
Runs = dict[str, list[tuple[float, ...]]]  # figures of the draws, by method


def report(testbed: Testbed, label: str, runs: Runs, pairs: Mapping[str, str]) -> None:
    """Prints a row for each method and figure, with the difference to another method."""
    for place, figure in enumerate(testbed.figures):
        for name, values in runs.items():
            own = [value[place] for value in values]
            difference = ""
            if name in pairs:
                other = [value[place] for value in runs[pairs[name]]]
                difference = f"{paired(own, other)} ({pairs[name]})"
            cells = (testbed.name, label, figure, name, spread(own), difference)
            print(f"| {' | '.join(cells)} |", flush=True)


def head(title: str, label: str) -> None:
    """Begins a table."""
    columns = ("model", label, "figure", "method", "mean (sd)", "difference, standard error (to)")
    print(f"\n## {title}\n\n{table(columns, [])}")


# --------------------------------------------------------------------------------------- outliers


def planted(base: Base, testbed: Testbed, factor: float, key: jax.Array) -> Base:
    """The same function with one channel of each kind and layer `factor` times as large."""
    factors = {}
    for place, (name, (layers, size)) in enumerate(channels(testbed.config).items()):
        chosen = jax.random.randint(jax.random.fold_in(key, place), (layers,), 0, size)
        factors[name] = jnp.ones((layers, size)).at[jnp.arange(layers), chosen].set(factor)
    return rescale(base, testbed.config, factors)


@functools.cache
def figures(
    testbed: Testbed, format: str, how: str, number: int, factor: float = 1.0
) -> tuple[float, ...]:
    """Of one draw, quantized and not finetuned."""
    base = planted(testbed.draw(number), testbed, factor, jax.random.key(100 + number))
    return testbed.measure(stored(base, QuantConfig(format=format, **HOWS[how])))  # type: ignore[arg-type]


def outliers(testbed: Testbed, formats: Sequence[str], draws: int) -> None:
    """Prints the rows of a testbed."""
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
    """One layer: what follows it, and of each linear layer in it X^T X over the counted tokens."""
    seen: dict[str, jax.Array] = {}

    def note(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, AdaptedLinear) and context.method_name == "__call__":
            rows = jnp.where(count[..., None], args[0], 0).reshape(-1, args[0].shape[-1])
            seen[str(context.module.name)] = rows.T @ rows
        return call(*args, **kwargs)

    positions = jnp.arange(x.shape[1], dtype=jnp.float32)
    angles = jnp.broadcast_to(
        positions[None, :, None] * rope_frequencies(config)[None, None, :],
        (*x.shape[:2], config.head_dim // 2),
    )
    rope = jnp.cos(angles), jnp.sin(angles)
    with nn.intercept_methods(note):
        layer = Layer(config, None, None, "xla", True)
        (after, _), _ = layer.apply(  # type: ignore[misc]
            {"base": weights}, (x, None), jnp.int32(0), rope, None, None
        )
    return after, seen


@functools.partial(jax.jit, static_argnames="format")
def fed_back(
    weight: jax.Array,
    squares: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    format: str,
    damping: float = 0.01,
) -> jax.Array:
    """The rounded weights [out, in], where each column makes up for those in front of it.

    Args:
        weight: [out, in].
        squares: X^T X of the inputs, [in, in].
        scale: of every weight, [out, in].
        shift: as well.
        format: code book.
        damping: part of the mean of the diagonal that is added to it.
    """
    levels = jnp.asarray(np.sort(get_format(format).table))
    size = weight.shape[1]
    damped = squares + damping * jnp.trace(squares) / size * jnp.eye(size)
    upper = jnp.linalg.cholesky(jnp.linalg.inv(damped)).T

    def column(j: jax.Array, w: jax.Array) -> jax.Array:
        unit = (w[:, j] - shift[:, j]) / jnp.where(scale[:, j] == 0, 1, scale[:, j])
        nearest = jnp.abs(unit[:, None] - levels[None]).argmin(1)
        rounded = levels[nearest] * scale[:, j] + shift[:, j]
        behind = jnp.where(jnp.arange(size) > j, upper[j], 0) / upper[j, j]
        return (w - (w[:, j] - rounded)[:, None] * behind[None]).at[:, j].set(rounded)

    return jax.lax.fori_loop(0, size, column, weight)


def of_each_weight(values: jax.Array, packed: QTensor) -> jax.Array:
    """Scales or shifts of blocks, repeated: [..., out, in]."""
    return jnp.repeat(values, packed.block_size, axis=-1)[..., : packed.shape[1]]


def with_feedback(base: Base, testbed: Testbed, quant: QuantConfig) -> Base:
    """All linear layers, each from what the rounded ones in front of its layer make of the
    documents."""
    tokens = jnp.asarray(testbed.documents)
    x, count = base["embed_tokens"]["weight"][tokens], tokens != 0  # 0 pads, in both vocabularies
    done = []
    for number in range(testbed.config.num_hidden_layers):
        weights = jax.tree.map(lambda leaf, n=number: leaf[n], base["layers"])
        squares = layer_inputs(weights, x, count, testbed.config)[1]
        new = dict(weights)
        for group in ("self_attn", "mlp"):
            new[group] = {}
            for name, linear in weights[group].items():
                packed = quantize(linear["weight"], quant)
                scale, shift = packed.scale(), packed.shift()
                grid = (
                    of_each_weight(scale, packed),
                    of_each_weight(jnp.zeros_like(scale) if shift is None else shift, packed),
                )
                rounded = fed_back(linear["weight"], squares[name], *grid, quant.format)
                new[group][name] = {"weight": rounded}
        x = layer_inputs(new, x, count, testbed.config)[0]
        done.append(new)
    return base | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *done)}


def feedback(testbed: Testbed, formats: Sequence[str], draws: int) -> None:
    """Prints the rows of a testbed."""
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


# ---------------------------------------------------------------------------------------- trained


@functools.partial(jax.jit, static_argnames="model")
def finetune(
    packed: Base, adapters: Any, batches: Any, rate: float, grid_rate: float, model: Llama
) -> tuple[Any, Base]:
    """LoRA by AdamW; with a positive `grid_rate`, relative changes of scales and shifts by Adam.

    Returns:
        The adapters, and the float32 base that codes, scales and shifts now stand for.
    """
    leaves, structure = jax.tree.flatten(packed, is_leaf=is_packed)
    tensors = [leaf for leaf in leaves if is_packed(leaf)]
    levels = jnp.asarray(get_format(tensors[0].format).table)
    codes = [levels[tensor.codes()] for tensor in tensors]

    def float_base(grid: Any) -> Base:
        made = []
        for tensor, level, (growth, move) in zip(tensors, codes, grid, strict=True):
            scale, shift = tensor.scale(), tensor.shift()
            shift = scale * move + (0 if shift is None else shift)
            scale = scale * (1 + growth)
            each = of_each_weight(scale, tensor), of_each_weight(shift, tensor)
            made.append(level * each[0] + each[1])
        weights = iter(made)
        return structure.unflatten(next(weights) if is_packed(leaf) else leaf for leaf in leaves)

    def loss(trained: Any, batch: Any) -> jax.Array:
        adapters, grid = trained
        key = jax.random.key(0)  # there is no dropout
        total, count = loss_sum(adapters, float_base(grid), batch, key, model=model, chunk=1024)
        return total / count

    def rule(rate: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(0.3), optax.adamw(rate, 0.9, 0.999, weight_decay=0.0)
        )

    rules = {"adapters": rule(rate), "grid": rule(grid_rate)}
    optimizer = optax.multi_transform(rules, ("adapters", "grid"))
    grid = [(jnp.zeros(t.scale_codes.shape), jnp.zeros(t.scale_codes.shape)) for t in tensors]

    def step(carry: Any, batch: Any) -> tuple[Any, None]:
        trained, state = carry
        updates, state = optimizer.update(jax.grad(loss)(trained, batch), state, trained)
        return (optax.apply_updates(trained, updates), state), None

    start = adapters, grid
    (trained, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), batches)
    return trained[0], float_base(trained[1])


def trained(testbed: Testbed, formats: Sequence[str], draws: int, steps: int) -> None:
    """Prints the rows of a factworld."""
    from ablation import load_data  # beside world.py

    data = load_data(hf.load_tokenizer(factworld.FOLDER / "base-small"))  # the large one has it too
    layers = testbed.config.num_hidden_layers
    model = Llama(
        testbed.config,
        AdapterConfig(method="lora", rank=8, alpha=16.0),
        unroll=layers,
        matmul="xla",
    )

    def run(number: int, packed: Base, grid_rate: float, questions: Any) -> tuple[float, ...]:
        drawn = Batches(data.train, 64, number, multiple=4)
        parts = [drawn[step] for step in range(steps)]
        batches = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
        adapters = model.init_adapters(jax.random.key(number))
        adapters, base = finetune(packed, adapters, batches, 1e-3, grid_rate, model)
        scores = score_questions(model, {"params": adapters, "base": base}, questions, 512)
        return 100 * scores.accuracy, scores.bits_per_fact

    for name in formats:
        runs: Runs = {}
        for how in ("ICQ", "joint inf"):
            quant = QuantConfig(format=name, **HOWS[how])  # type: ignore[arg-type]
            packed = [quantized(testbed.draw(number), quant) for number in range(draws)]
            tried = {
                rate: run(0, packed[0], rate, data.validation)[1] for rate in (3e-4, 1e-3, 3e-3)
            }
            rate = max(tried, key=lambda rate: tried[rate])
            runs[how] = [run(n, packed[n], 0.0, data.test) for n in range(draws)]
            runs[f"{how}, trained"] = [run(n, packed[n], rate, data.test) for n in range(draws)]
            print(f"<!-- {name}, {how}: bits per fact by rate {tried} -->")
        pairs = {f"{how}, trained": how for how in ("ICQ", "joint inf")} | {"joint inf": "ICQ"}
        report(testbed, name, runs, pairs)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("outliers", "feedback", "trained")
    parser.add_argument("parts", nargs="+", choices=parts)
    parser.add_argument("--small", nargs="*", default=("nf4", "nf3"), help="formats")
    parser.add_argument("--large", nargs="*", default=("nf2",), help="formats")
    parser.add_argument("--formats", nargs="*", default=("nf4", "nf3", "nf2"), help="of stories")
    parser.add_argument("--stories", nargs=3, type=Path, help="model, text to evaluate, for inputs")
    parser.add_argument("--bases", type=Path, help="folder with more bases (of ablation.py)")
    parser.add_argument("--draws", type=int, default=5, help="at least 2")
    parser.add_argument("--questions", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=20_480, help="to evaluate stories on")
    parser.add_argument("--steps", type=int, default=300, help="of the finetune of `trained`")
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
    if "trained" in args.parts:
        head(f"Trained scales and shifts, after {args.steps} steps", "format")
        for testbed, formats in testbeds.items():
            if testbed.name != "stories260K":
                trained(testbed, formats, args.draws, args.steps)


if __name__ == "__main__":
    main()
