"""Compares plain quantization and dequantization with bitsandbytes' CPU code.

    python benchmarks/quantize.py [--rows 2048] [--columns 2048] [--growth]

Both take the same normal float32 matrix in blocks of 64, without calibration. bitsandbytes does not
quantize its scales, and ours takes codes from the exact scales. Both run in turns after a warm-up;
ratios are per turn, with their spread. Exit code 1 if the codes differ, or if ours is less than 4
times (quantize) or 2 times (dequantize) as fast. --growth shows time against matrix size and bits.
For results of 32 MiB or more the system allocates page by page, which then takes most of the time;
the default matrix is smaller. Without bitsandbytes (extra `parity`), the script times ours alone.
"""

import argparse
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import released
from timing import compare, machine, median_seconds, table

from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.quant.formats import FORMATS, get_format
from irqlora_jax.quant.qtensor import QTensor

REQUIRED = {"quantize": 4, "dequantize": 2}
to_float32 = jax.jit(QTensor.dequantize)


def config(name: str) -> QuantConfig:
    """No calibration; codes as bitsandbytes computes them."""
    return QuantConfig(format=name, calibration="none", codes_from="exact")  # type: ignore[arg-type]


def beside_bitsandbytes(name: str, weight: jax.Array, turns: int) -> list[tuple[Any, ...]]:
    """Rows of format, operation, weights a second of both, ratio, and whether it is met."""
    torch, functional = released.import_peer()
    theirs = torch.from_numpy(np.array(weight))
    packed, state = functional.quantize_4bit(theirs, blocksize=64, quant_type=name)
    ours = quantize(weight, config(name))
    pairs = np.asarray(ours.codes()).reshape(-1, 2)
    levels = get_format(name).table  # compares levels: FP4 has two zeros, their CPU code one
    flat = packed.numpy().reshape(-1)
    equal = all(
        np.array_equal(levels[pairs[:, i]], levels[flat >> shift & 15])
        for i, shift in enumerate((4, 0))
    )
    calls = {
        "quantize": (
            functools.partial(quantize, weight, config(name)),
            functools.partial(functional.quantize_4bit, theirs, blocksize=64, quant_type=name),
        ),
        "dequantize": (
            functools.partial(to_float32, ours),
            functools.partial(functional.dequantize_4bit, packed, state),
        ),
    }
    rows = []
    for what, (mine, peer) in calls.items():
        times = compare(
            {"ours": mine, "peer": peer}, turns, 2
        )  # torch on a CPU is not asynchronous
        speeds = (f"{weight.size / times[who].median:.2e}" for who in ("ours", "peer"))
        met = equal and times["ours"].speedup(times["peer"]) >= REQUIRED[what]
        rows.append((name, what, *speeds, times["ours"].speedups(times["peer"]), met))
    if not equal:
        print(f"{name}: the codes differ")
    return rows


def growth() -> list[tuple[str, ...]]:
    """Rows of format, bits, matrix, weights a second."""
    rows = []
    cases = [("nf4", size) for size in (256, 512, 1024, 2048, 4096)]
    for name, size in cases + [(name, 2048) for name in FORMATS if name != "nf4"]:
        weight = jax.random.normal(jax.random.key(0), (size, size)) * 0.02
        packed = quantize(weight, config(name))
        calls = functools.partial(quantize, weight, config(name)), lambda: to_float32(packed)  # noqa: B023
        speeds = (f"{weight.size / median_seconds(call):.2e}" for call in calls)
        rows.append((name, str(get_format(name).bits), f"{size} x {size}", *speeds))
    return rows


def main() -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--growth", action="store_true")
    args = parser.parse_args()
    weight = jax.random.normal(jax.random.key(0), (args.rows, args.columns), jnp.float32) * 0.02
    print(f"{machine()}; {args.rows} x {args.columns}\n")
    missing = released.peer_missing()
    met = True
    if missing:
        print(f"The peer is missing: {missing}\n")
    else:
        rows = [
            row for name in ("nf4", "fp4") for row in beside_bitsandbytes(name, weight, args.turns)
        ]
        met = all(row[-1] for row in rows)
        columns = ("format", "what", "ours, weights/s", "bitsandbytes, weights/s")
        print(table((*columns, "ratio (min-max)"), [row[:-1] for row in rows]))
    if args.growth or missing:
        columns = ("format", "bits", "matrix", "quantize, weights/s", "dequantize, weights/s")
        print("\n" + table(columns, growth()))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
