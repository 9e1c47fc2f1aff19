"""dequant_matmul against a plain product with a dense weight of the same type, and against float64.

    python benchmarks/matmul.py [--tokens 512 2048] [--shapes 4096x4096 11008x4096 4096x11008]

For every format: time of forward and of forward with dX, the ratio to the dense product measured in
the same run (above 1 is faster), and the relative error of both results against float64 of the
dequantized weight. A relative error of 1e-2 in bfloat16 is the bound; exit code 1 beyond it.
"""

import argparse
import functools
import sys

import jax
import numpy as np
from timing import machine, median_seconds

from irqlora_jax.config import QuantConfig
from irqlora_jax.quant.matmul import dequant_matmul
from irqlora_jax.quant.qtensor import quantize


def both(x: jax.Array, g: jax.Array, weight) -> tuple[jax.Array, jax.Array]:
    """y = x W^T and dX = g W."""
    y, pull = jax.vjp(lambda x: dequant_matmul(x, weight), x)
    return y, pull(g)[0]


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096", "4096x11008"])
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    args = parser.parse_args()
    worst = 0.0
    print(f"{machine()}, {args.dtype}\n")
    columns = ["shape", "tokens", "format", "y, ms", "to dense", "y and dX, ms", "to dense"]
    columns += ["error y", "error dX"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    forward, backward = jax.jit(dequant_matmul), jax.jit(both)
    for shape in args.shapes:
        out, features = map(int, shape.split("x"))
        weight = jax.random.normal(jax.random.key(0), (out, features)) * 0.02
        for tokens in args.tokens:
            x = jax.random.normal(jax.random.key(1), (tokens, features)).astype(args.dtype)
            g = jax.random.normal(jax.random.key(2), (tokens, out)).astype(args.dtype)
            dense = weight.astype(args.dtype)
            base = median_seconds(functools.partial(forward, x, dense))
            base_both = median_seconds(functools.partial(backward, x, g, dense))
            for name in ("nf4", "nf3", "nf2", "fp4", "int4", "int3", "int2"):
                q = quantize(weight, QuantConfig(format=name, calibration="none"))  # type: ignore[arg-type]
                time_y = median_seconds(functools.partial(forward, x, q))
                time_both = median_seconds(functools.partial(backward, x, g, q))
                y, dx = backward(x, g, q)
                # A few rows are enough for the error, and float64 is slow.
                rows = np.asarray(q.dequantize(), np.float64)
                errors = []
                for ours, left, right in ((y, x, rows.T), (dx, g, rows)):
                    expected = np.asarray(left[:8], np.float64) @ right
                    difference = np.asarray(ours[:8], np.float64) - expected
                    errors.append(np.linalg.norm(difference) / np.linalg.norm(expected))
                worst = max(worst, *errors)
                print(
                    f"| {shape} | {tokens} | {name} | {time_y * 1e3:.2f} | {base / time_y:.2f} | "
                    f"{time_both * 1e3:.2f} | {base_both / time_both:.2f} | {errors[0]:.1e} | "
                    f"{errors[1]:.1e} |",
                    flush=True,
                )
    print(f"\nlargest relative error {worst:.1e}")
    return int(worst > 1e-2)


if __name__ == "__main__":
    sys.exit(main())
