"""Speed and quality of calibrations, compared with ICQ and the plain quantizer.

    python benchmarks/calibration.py MODEL TEXT [--parts speed quality loss facts] [--draws 5]

MODEL is a Hugging Face folder of stories260K, TEXT a text of TinyStories.

speed: joint's search and ICQ's search (search.py), in turns, in the block size of each format. Exit
code 1 if joint takes more than 5 times as long.
quality: squared error over variance, and entropy of the codes, as means over blocks of 64. The
blocks are normal, of Student's t with 4 degrees of freedom, normal with every thousandth weight 8
times as large, or from stories260K. Scales and shifts are exact, as a search returns them. "grid"
is a slow reference in NumPy and float64: the best of 21 shifts x 25 scales by the error, followed
by 4 least-squares steps.
loss: loss per token of stories260K, quantized as the library stores it, in several draws
(testbeds.py), with the paired differences and their standard errors.
facts: the same for factworld's small base; the figure is the accuracy on held-out questions (%).
"""

import argparse
import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from search import FORMATS, ours, shaped
from testbeds import Testbed, facts, paired, spread, stored, stories
from timing import compare, line, machine, table, verdict

from irqlora_jax.quant.calibrations import icq, icq_integer, joint
from irqlora_jax.quant.calibrations.joint import JointOptions
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.entropy import block_entropy
from irqlora_jax.quant.formats import get_format

BOUND = 5.0
WEIGHTS = (0.0, 10.0, 30.0, 100.0, 300.0, math.inf)
SIX = ("nf4", "nf3", "nf2", "int4", "int3", "int2")
Found = tuple[np.ndarray, np.ndarray]  # scale and shift of every block


def speed(count: int, turns: int) -> bool:
    """Prints the table and returns whether joint is fast enough."""
    blocks = jax.random.normal(jax.random.key(0), (count, 64), jnp.float32) * 0.02
    print(f"\n## Speed, {blocks.size:,} normal weights\n")
    columns = ("format", "ICQ, weights/s", "joint 100", "time / ICQ", "joint inf", "time / ICQ")
    print(table(columns))
    fast = True
    for name in FORMATS:
        own = shaped(name, blocks)
        calls = {"icq": ours(name, own)} | {
            f"{weight:g}": functools.partial(joint.search, own, name, error_weight=weight)
            for weight in (100.0, math.inf)
        }
        times = compare(calls, repeats=turns)
        cells = [name, f"{blocks.size / times['icq'].median:.2e}"]
        for weight in ("100", "inf"):
            cells.append(f"{blocks.size / times[weight].median:.2e}")
            cells.append(times["icq"].speedups(times[weight]))
            fast &= times["icq"].speedup(times[weight]) <= BOUND
        print(line(cells), flush=True)
    return fast


def searched(blocks: np.ndarray, name: str, how: str) -> Found:
    """What a calibration finds: none, icq, grid, or joint with this weight of the error."""
    fmt, w = get_format(name), jnp.asarray(blocks)
    if how == "grid":
        return grid(blocks, name)
    if how not in ("none", "icq"):
        found = joint.search(w, fmt, error_weight=float(how))
    elif fmt.integer:
        search = icq_integer.plain_range if how == "none" else icq_integer.search_range
        found = search(w, fmt.bits, False)[:2]
    else:
        shift = jnp.zeros(len(w)) if how == "none" else icq.search_shift(w, fmt)[0]
        found = jnp.abs(w - shift[:, None]).max(1), shift
    scale, shift = (np.asarray(x, np.float64) for x in found)
    return scale, -shift * scale if fmt.integer else shift


def ranks(blocks: np.ndarray, name: str, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Ranks of the nearest levels."""
    points = get_format(name).midpoints.astype(np.float64)
    unit = (blocks - shift[:, None]) / np.where(scale == 0, 1, scale)[:, None]
    return np.searchsorted(points, unit, side="left")


def levels_of(name: str) -> np.ndarray:
    """The levels of a format by rank."""
    return np.sort(get_format(name).table).astype(np.float64)


def errors(blocks: np.ndarray, name: str, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Squared error of every block."""
    back = levels_of(name)[ranks(blocks, name, scale, shift)] * scale[:, None] + shift[:, None]
    return ((back - blocks) ** 2).sum(1)


def grid(blocks: np.ndarray, name: str) -> Found:
    """The smallest error of 21 shifts x 25 scales, then 4 least-squares steps where they help."""
    levels = levels_of(name)
    middle, half = (levels[0] + levels[-1]) / 2, (levels[-1] - levels[0]) / 2
    median = np.sort(blocks, 1)[:, blocks.shape[1] // 2 - 1]
    reach = np.abs(blocks - median[:, None]).max(1)
    best = [np.full(len(blocks), np.inf), np.zeros(len(blocks)), np.zeros(len(blocks))]

    def keep(scale: np.ndarray, shift: np.ndarray) -> None:
        new = errors(blocks, name, scale, shift), scale, shift
        better = new[0] < best[0]
        best[:] = (np.where(better, a, b) for a, b in zip(new, best, strict=True))

    for move in np.linspace(-0.3, 0.3, 21) * icq.SIGMA:
        center = median + move * reach
        for width in np.linspace(0.4, 1, 25):
            scale = width * np.abs(blocks - center[:, None]).max(1) / half
            keep(scale, center - middle * scale)
    for _ in range(4):
        level = levels[ranks(blocks, name, *best[1:])]
        off = level - level.mean(1, keepdims=True)
        scale = (off * blocks).sum(1) / np.maximum((off * off).sum(1), 1e-12)
        keep(scale, blocks.mean(1) - scale * level.mean(1))
    return best[1], best[2]


def quality(testbed: Testbed, count: int) -> None:
    """Prints the table."""
    rng = np.random.default_rng(0)
    layers = testbed.bases[0]["layers"]
    real = [
        np.asarray(linear["weight"])[..., : linear["weight"].shape[-1] // 64 * 64].reshape(-1, 64)
        for group in ("self_attn", "mlp")
        for linear in layers[group].values()
    ]
    outliers = np.where(rng.random((count, 64)) < 0.001, 8, 1)
    kinds = {
        "normal": rng.standard_normal((count, 64)),
        "Student's t, 4": rng.standard_t(4, (count, 64)),
        "normal, 0.1 % x 8": rng.standard_normal((count, 64)) * outliers,
        testbed.name: rng.permutation(np.concatenate(real))[:count],
    }
    print(f"\n## Error / variance, and entropy in bits; means over {count} blocks of 64\n")
    methods = ("none", "icq", "100", "inf", "grid")
    heads = ("none", "ICQ", "joint 100", "joint inf", "grid")
    print(table(("weights", "format", *heads, "joint inf / grid, errors"), []))
    for kind, drawn in kinds.items():
        blocks = drawn.astype(np.float32)
        squares = ((blocks - blocks.mean(1, keepdims=True)) ** 2).sum(1)
        for name in FORMATS:
            cells, lost = [], {}
            for how in methods:
                found = searched(blocks, name, how)
                lost[how] = (errors(blocks, name, *found) / squares).mean()
                codes = jnp.asarray(ranks(blocks, name, *found))
                bits = float(block_entropy(codes, 2 ** get_format(name).bits).mean())
                cells.append(f"{lost[how]:.5f}, {bits:.3f}")
            cells.append(f"{lost['inf'] / lost['grid']:.4f}")
            print(line((kind, name, *cells)), flush=True)


def losses(
    testbed: Testbed,
    draws: int,
    formats: Sequence[str],
    weights: Sequence[float],
    calibrations: Sequence[str],
) -> None:
    """Prints the table of the first figure of a testbed."""
    full, figure = testbed.measure(testbed.bases[0])[0], next(iter(testbed.figures))
    print(f"\n## {testbed.name}: {figure}, {draws} draws; full precision {full:.4f}\n")
    hows = {"none": {"calibration": "none"}, "ICQ": {"calibration": "icq"}} | {
        f"joint {weight:g}": {"calibration": "joint", "joint": JointOptions(weight)}
        for weight in weights
    }
    hows["robust"] = {"calibration": "robust"}
    hows = {how: fields for how, fields in hows.items() if fields["calibration"] in calibrations}
    columns = ("format", "calibration", "mean (sd)", "against none", "against ICQ")
    print(table((*columns, "against joint inf")))
    bases = [testbed.draw(number) for number in range(draws)]
    for name in formats:
        found = {
            how: [
                testbed.measure(stored(base, QuantConfig(format=name, **fields)))[0]  # type: ignore[arg-type]
                for base in bases
            ]
            for how, fields in hows.items()
        }
        for how, values in found.items():
            others = (
                paired(values, found[other]) if other in found and other != how else ""
                for other in ("none", "ICQ", "joint inf")
            )
            print(line((name, how, spread(values), *others)), flush=True)


def main() -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="Hugging Face folder of stories260K")
    parser.add_argument("text", type=Path, help="text to evaluate on")
    parts, known = ("speed", "quality", "loss", "facts"), ("none", "icq", "joint", "robust")
    parser.add_argument("--parts", nargs="+", default=parts[:3], choices=parts)
    parser.add_argument("--blocks", type=int, default=16384, help="blocks for the speed")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--few", type=int, default=1000, help="blocks for the quality")
    parser.add_argument("--draws", type=int, default=5, help="at least 2")
    parser.add_argument("--tokens", type=int, default=51_200, help="used for the loss")
    parser.add_argument(
        "--formats", nargs="+", default=SIX, choices=FORMATS, help="used for the loss"
    )
    parser.add_argument(
        "--weights", nargs="+", type=float, default=WEIGHTS, help="used for the loss"
    )
    parser.add_argument(
        "--calibrations", nargs="+", default=known, choices=known, help="used for the loss"
    )
    args = parser.parse_args()
    print(machine())
    fast = speed(args.blocks, args.turns) if "speed" in args.parts else True
    testbed = stories(args.model, args.text, args.tokens)
    if "quality" in args.parts:
        quality(testbed, args.few)
    for part in [part for part in ("loss", "facts") if part in args.parts]:
        weights = sorted({*args.weights, math.inf})
        measured = testbed if part == "loss" else facts("small")
        losses(measured, args.draws, args.formats, weights, args.calibrations)
    if "speed" in args.parts:
        print(f"\njoint takes at most {BOUND:g} times as long as ICQ: {verdict(fast)}")
    return 0 if fast else 1


if __name__ == "__main__":
    sys.exit(main())
