"""What a calibration does to the outputs of every linear layer of a real model.

    python benchmarks/output_error.py MODEL TEXT [--formats int3 nf3] [--layers 0 11]

The error of a matrix is tr(D M D^T) / tr(W M W^T): D is what quantization changes, M the second
moments of the inputs over some tokens of TEXT. Scales and shifts are exact, as a search returns
them. Tables show the errors divided by the plain quantizer's: the geometric mean over all matrices,
and per projection the mean and the worst layer. "inputs" is the joint search with the diagonal of M
as factors. M judges; of the calibrations, only "inputs" sees it.

To save time, a matrix is judged by some of its rows: the 16 with the largest outputs, and 24 others
that stand for the rest.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from calibration import FORMATS, Found, levels_of, ranks
from timing import line, machine, table

from irqlora_jax import hf
from irqlora_jax.base.source import read_llama
from irqlora_jax.data.examples import encode_source
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import LINEAR_NAMES
from irqlora_jax.quant.calibrations import icq, icq_integer, joint, robust
from irqlora_jax.quant.formats import get_format

TOP, OTHERS, BLOCK = 16, 24, 64
Search = Callable[[jax.Array, str, jax.Array], tuple[jax.Array, jax.Array]]


def _none(w: jax.Array, name: str, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    if get_format(name).integer:
        return icq_integer.plain_range(w, get_format(name).bits, False)
    return jnp.abs(w).max(1), jnp.zeros(len(w))


def _icq(w: jax.Array, name: str, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    if get_format(name).integer:
        return icq_integer.search_range(w, get_format(name).bits, False)[:2]
    shift = icq.search_shift(w, name)[0]
    return jnp.abs(w - shift[:, None]).max(1), shift


SEARCHES: dict[str, Search] = {
    "none": _none,
    "icq": _icq,
    "joint 100": lambda w, name, inputs: joint.search(w, name),
    "joint inf": lambda w, name, inputs: joint.search(w, name, error_weight=np.inf),
    "robust": lambda w, name, inputs: joint.search(
        w, name, error_weight=np.inf, weigh=robust.weigh
    ),
    "inputs": lambda w, name, inputs: joint.search(w, name, error_weight=np.inf, inputs=inputs),
}


class Sample(NamedTuple):
    """Some rows of a matrix [rows, in], their share in the whole, and the moments [in, in]."""

    weight: np.ndarray
    share: np.ndarray
    moments: np.ndarray


def samples(
    model: Path, text: Path, skip: int, count: int, layers: Sequence[int]
) -> dict[tuple[str, int], Sample]:
    """Runs the model over tokens of the text, and keeps rows and moments of some layers."""
    tokenizer, config = hf.load_tokenizer(model), read_llama(model)
    with text.open(encoding="utf-8") as file:
        ids = encode_source(tokenizer, [file.read(16 * (skip + count))])[0][skip : skip + count]
    base = jax.tree.map(lambda x: x.astype(jnp.float32), hf.load_base(model, None)[0])
    llama = Llama(config, matmul="xla")

    @jax.jit
    def run(base: dict, tokens: jax.Array) -> Any:
        variables = {"params": {}, "base": base}
        return llama.apply(variables, tokens, mutable=["stats"], method="features")[1]

    stats = run(base, jnp.asarray(ids, jnp.int32)[None])["stats"]["layers"]
    rng, found = np.random.default_rng(0), {}
    for name in LINEAR_NAMES:
        group = "mlp" if name in stats["mlp"] else "self_attn"
        for layer in layers:
            weight = np.asarray(base["layers"][group][name]["weight"][layer])
            moments = np.asarray(stats[group][name]["gram"][layer])
            order = np.argsort(-((weight @ moments) * weight).sum(1))
            top, rest = order[:TOP], np.sort(order[TOP:])
            some = rng.choice(rest, OTHERS, replace=False)
            share = np.concatenate([np.ones(TOP), np.full(OTHERS, len(rest) / OTHERS)])
            found[name, layer] = Sample(weight[np.concatenate([top, some])], share, moments)
    return found


def output_errors(
    taken: dict[tuple[str, int], Sample], name: str, search: Search
) -> dict[tuple[str, int], float]:
    """The error of every matrix. All of them are searched at once, to compile once."""
    cut = [one.weight.reshape(-1, BLOCK) for one in taken.values()]
    moments = [
        np.tile(np.diagonal(one.moments).reshape(-1, BLOCK), (len(one.weight), 1))
        for one in taken.values()
    ]
    blocks = np.concatenate(cut)
    found = search(jnp.asarray(blocks), name, jnp.asarray(np.concatenate(moments)))
    scale, shift = (np.asarray(x, np.float64) for x in found)
    exact: Found = scale, -shift * scale if get_format(name).integer else shift
    back = levels_of(name)[ranks(blocks, name, *exact)] * exact[0][:, None] + exact[1][:, None]
    ends = np.cumsum([len(one) for one in cut])[:-1]
    errors = {}
    for (key, one), rows in zip(taken.items(), np.split(back, ends), strict=True):
        change = rows.reshape(one.weight.shape) - one.weight
        lost = one.share @ ((change @ one.moments) * change).sum(1)
        errors[key] = lost / (one.share @ ((one.weight @ one.moments) * one.weight).sum(1))
    return errors


def main() -> None:
    """Prints a table per format."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="Hugging Face folder; inputs a multiple of 64")
    parser.add_argument("text", type=Path, help="text for the second moments")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--calibrations", nargs="+", default=[*SEARCHES], choices=SEARCHES)
    parser.add_argument("--layers", nargs="+", type=int, default=(0, 1, 7, 11, 16, 20, 28))
    parser.add_argument("--skip", type=int, default=12 * 1024, help="tokens before the used ones")
    parser.add_argument("--tokens", type=int, default=1024)
    args = parser.parse_args()
    print(machine())
    taken = samples(args.model, args.text, args.skip, args.tokens, args.layers)
    for name in args.formats:
        print(f"\n## {name}\n\n{table(('calibration', 'all', *LINEAR_NAMES))}", flush=True)
        plain = output_errors(taken, name, SEARCHES["none"])
        for how in args.calibrations:
            ours = output_errors(taken, name, SEARCHES[how])
            ratios = {key: ours[key] / plain[key] for key in plain}
            cells = [how, f"{np.exp(np.mean(np.log([*ratios.values()]))):.3f}"]
            for linear in LINEAR_NAMES:
                own = {layer: ratios[linear, layer] for layer in args.layers}
                worst = max(own, key=own.__getitem__)
                mean = np.exp(np.mean(np.log([*own.values()])))
                cells.append(f"{mean:.2f} ({own[worst]:.2f} in {worst})")
            print(line(cells), flush=True)


if __name__ == "__main__":
    main()
