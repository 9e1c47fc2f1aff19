"""Compares dequant_matmul with a product of a dense weight of the same type, and with float64.

    python benchmarks/matmul.py [--tokens 1 16 256] [--shapes 512x512 1536x512] [--dtype float32]
    python benchmarks/matmul.py --peer bitsandbytes --peer-python PYTHON

Prints three tables: how time grows with the tokens, with the size of the matrix, and with the bits.
Each has the time of y = x W^T, and of y with dX = g W; the speed relative to the dense product,
which runs in turns with it (above 1 is faster); and the relative errors of y and dX against float64
with the dequantized weight. The bound of the errors is 1e-2; exit code 1 above it.

On a GPU, each time covers several products with different weights, which together do not fit into
the L2 cache, as in a model: otherwise a small weight would be faster because it is still in the
cache. bitsandbytes (NF4, double quantization) is called from Python as PEFT does it, in a process
of its own.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer needs memory too

import jax
import numpy as np
from peer import Peer
from timing import Timing, compare, machine, relative_error, table, verdict
from train_step import quantized

from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.matmul import dequant_matmul

FORMATS = ("nf4", "nf3", "nf2", "fp4", "int4", "int3", "int2")
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "tokens": [1, 16, 256, 1024],
        "shapes": ["512x512", "1536x512", "2048x2048"],
        "dtype": "float32",
    },
    "gpu": {
        "tokens": [1, 16, 256, 2048, 8192],
        "shapes": ["1024x1024", "4096x4096", "11008x4096", "4096x11008", "8192x8192"],
        "dtype": "bfloat16",
    },
}
BEYOND_CACHE = 128e6  # bytes of weights that one timed call reads on a GPU
BOUND = 1e-2
FORWARD, BOTH = "y", "y and dX"


def copies(shape: str) -> int:
    """How many weights a timed call uses: with 4 bits, more than the L2 cache holds."""
    if jax.default_backend() == "cpu":
        return 1
    out, features = map(int, shape.split("x"))
    return max(2, min(16, int(-(-BEYOND_CACHE // (out * features / 2)))))


def rounds(tokens: int) -> int:
    """How often a timed call uses all weights before it waits for the device.

    Short products need more rounds, so that the time to start them does not count.
    """
    return 10 if tokens <= 256 else 2


@jax.jit
def forward(x: jax.Array, weights: tuple[Any, ...]) -> list[jax.Array]:
    return [dequant_matmul(x, weight) for weight in weights]


@jax.jit
def both(x: jax.Array, g: jax.Array, weights: tuple[Any, ...]) -> list[tuple[jax.Array, jax.Array]]:
    results = []
    for weight in weights:
        y, pull = jax.vjp(functools.partial(dequant_matmul, weight=weight), x)
        results.append((y, pull(g)[0]))
    return results


def repeated(call: Callable[[], Any], times: int) -> Any:
    """Calls several times and returns the last result; a device executes calls in order."""
    for _ in range(times - 1):
        call()
    return call()


class Case:
    """Products with a weight of one shape and a number of tokens."""

    def __init__(self, shape: str, tokens: int, dtype: str) -> None:
        self.shape, self.tokens, self.dtype = shape, tokens, dtype
        self.out, self.features = map(int, shape.split("x"))
        self.x = jax.random.normal(jax.random.key(1), (tokens, self.features)).astype(dtype)
        self.g = jax.random.normal(jax.random.key(2), (tokens, self.out)).astype(dtype)
        self.weight = jax.random.normal(jax.random.key(0), (self.out, self.features)) * 0.02

    def weights(self, name: str) -> tuple[Any, ...]:
        """Copies of the weight in a format, each with its own memory."""
        if name == "dense":
            weight: Any = self.weight.astype(self.dtype)
        else:
            weight = quantized(self.weight, QuantConfig(format=name, calibration="icq"))  # type: ignore[arg-type]
        return tuple(jax.tree.map(lambda x: x.copy(), weight) for _ in range(copies(self.shape)))

    def calls(self, weights: tuple[Any, ...]) -> dict[str, Callable[[], Any]]:
        """The calls to time."""
        calls = {
            FORWARD: functools.partial(forward, self.x, weights),
            BOTH: functools.partial(both, self.x, self.g, weights),
        }
        times = rounds(self.tokens)
        return {what: functools.partial(repeated, call, times) for what, call in calls.items()}

    def errors(self, weights: tuple[Any, ...]) -> tuple[float, float]:
        """Relative errors of y and dX."""
        y, dx = both(self.x, self.g, weights)[0]
        rows = np.asarray(weights[0].dequantize(), np.float64)
        return product_error(y, self.x, rows.T), product_error(dx, self.g, rows)


def product_error(ours: jax.Array, left: jax.Array, right: np.ndarray) -> float:
    """Relative error of left @ right. Uses only 8 rows, because float64 is slow."""
    return relative_error(ours[:8], np.asarray(left[:8], np.float64) @ right)


def measure(
    case: Case, formats: Sequence[str], peer: Peer | None, repeats: int
) -> tuple[list[tuple[str, ...]], float]:
    """Rows of a table, and the largest error."""
    weights = {name: case.weights(name) for name in ("dense", *formats)}
    calls = {
        (name, what): call
        for name, variant in weights.items()
        for what, call in case.calls(variant).items()
    }
    if peer is not None:
        for what in (FORWARD, BOTH):
            variant = f"{case.shape} {case.tokens} {what}"
            calls["bitsandbytes nf4", what] = functools.partial(peer.step, variant)
    times = compare(calls, repeats)
    count = copies(case.shape) * rounds(case.tokens)
    rows, worst = [], 0.0
    for name in dict.fromkeys(name for name, _ in times):
        cells = [case.shape, str(case.tokens), name]
        for what in (FORWARD, BOTH):
            time = times[name, what]
            each = Timing(tuple(seconds / count for seconds in time.seconds))
            cells += [each.milliseconds(), time.speedups(times["dense", what])]
        if name in formats:
            errors = case.errors(weights[name])
            worst = max(worst, *errors)
            cells += [f"{error:.1e}" for error in errors]
        rows.append((*cells, "", "")[:9])
    return rows, worst


def main() -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens of a product")
    parser.add_argument("--shapes", nargs="+", metavar="OUTxIN")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peer", choices=["bitsandbytes"])
    parser.add_argument("--peer-python", default=sys.executable, metavar="PYTHON")
    args = parser.parse_args()
    defaults = DEFAULTS["cpu" if jax.default_backend() == "cpu" else "gpu"]
    tokens, shapes = args.tokens or defaults["tokens"], args.shapes or defaults["shapes"]
    dtype = args.dtype or defaults["dtype"]
    middle, most = shapes[min(1, len(shapes) - 1)], max(t for t in tokens if t <= 2048)
    print(f"{machine()}, {dtype}; ms of a product, speed to the dense one", flush=True)
    plan = {
        "tokens": [((middle, count), ("nf4",)) for count in tokens],
        "matrix size": [((shape, most), ("nf4",)) for shape in shapes],
        "bits": [((middle, most), FORMATS)],
    }
    peer = None
    if args.peer:
        cases = {case for part in plan.values() for case, _ in part}
        settings = [(*case, copies(case[0]), rounds(case[1])) for case in sorted(cases)]
        peer = Peer("peer_bitsandbytes.py", {"cases": settings, "dtype": dtype}, args.peer_python)
        print(f"Peer: {peer.ready()['versions']}")
    columns = ("matrix", "tokens", "weight", "y, ms", "to dense", "y and dX, ms", "to dense")
    columns += ("error of y", "of dX")
    largest = 0.0
    for name, part in plan.items():
        rows = []
        for (shape, count), formats in part:
            asked = peer if name != "bits" else None
            new, worst = measure(Case(shape, count, dtype), formats, asked, args.repeats)
            rows += new
            largest = max(largest, worst)
        print(f"\nGrowth with the {name}\n\n{table(columns, rows)}", flush=True)
    if peer is not None:
        peer.close()
    met = largest <= BOUND
    print(f"\nlargest relative error {largest:.1e}, must be at most {BOUND}: {verdict(met)}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
