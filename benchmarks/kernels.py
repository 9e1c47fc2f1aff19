"""Compares the kernels in kernels/ with XLA's path and a dense product, on a GPU.

    python benchmarks/kernels.py [--rows 1 16 2048 4096 8192] [--record kernels/measured.json]

Times y = x W^T and dX = g W in turns, for every implementation that can serve, on random data. The
weights together are larger than the L2 cache (see `matmul.py`). Each time has its relative error
against float64. "floor" is the time to read the packed weight, the scales and the shifts from
memory at `--bandwidth` (default: the device's data sheet). Then the script times the ICQ search of
many blocks. `MUST` has the goals for the fastest implementation. Exit code 1 if an error is above
1e-2 or a search differs from XLA's. The script names kernels that are slower than XLA's path.

--tune times other tiles first, besides those of each kernel's rule, and uses the fastest.

--record adds to the file the kernels that were faster at two neighboring numbers of rows, with
device, version and date. Only such kernels are ever a default (kernels/measured.py).

On a CPU no kernel can serve, and XLA's path runs alone, which tests the script.
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
from matmul import BOUND, FORMATS, Case, copies, product_error, repeated, rounds
from timing import Timing, compare, machine, table, verdict

from irqlora_jax.kernels import (
    matmul_mosaic_tiles,
    matmul_triton_tiles,
    search_integer_triton,
    search_triton,
)
from irqlora_jax.kernels.measured import Measurement
from irqlora_jax.quant.calibrations import icq, icq_integer
from irqlora_jax.quant.formats import get_format
from irqlora_jax.quant.matmul import MOSAIC, TRITON, XLA, Implementation

SHAPES = ("4096x4096", "11008x4096", "4096x11008")
SEARCHES = ("nf4", "nf3", "nf2", "fp4", "int4", "int3", "int2")
IMPLEMENTATIONS = (XLA, TRITON, MOSAIC)
# Bytes a second from memory, by a part of the device's name, from NVIDIA's data sheets.
BANDWIDTHS = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.04e12, "L4": 0.3e12}
DENSE, FORWARD, TRANSPOSED = "dense", "matmul", "matmul_transposed"
# Speed relative to the dense product, by product and rows: must, and aim.
MUST = {
    FORWARD: {
        1: (2.0, 3.2),
        16: (2.0, 2.8),
        2048: (0.88, 0.95),
        4096: (0.93, 0.95),
        8192: (0.96, 0.95),
    },
    TRANSPOSED: {2048: (0.85, 0.93), 4096: (0.92, 0.93), 8192: (0.95, 0.93)},
}


@dataclasses.dataclass(frozen=True)
class Found:
    """One implementation compared with XLA's path."""

    operation: str
    implementation: str
    format: str
    shape: tuple[int, int]
    rows: int
    speedup: float  # over XLA's path
    to_dense: float
    tiles: dict[str, Any]  # fields that differ from the rule


def weights_for(one: Implementation, case: Case, weights: tuple[Any, ...]) -> tuple[Any, ...]:
    """The weights in the layout of an implementation, or none if it cannot serve."""
    layout = "fragments" if one.name == "mosaic" else "planes"
    if one is not XLA and weights[0].block_size == 64:
        weights = tuple(weight.with_layout(layout) for weight in weights)
    reason = one.refusal(case.x, weights[0])
    if reason is not None:
        print(f"{one.name}, {case.shape}, {case.tokens} rows: {reason}")
        return ()
    return weights


def alternatives(one: Implementation, what: str, case: Case, weight: Any) -> list[Any]:
    """Tiles to time. The rule's come first."""
    bits, transposed = get_format(weight.format).bits, what == TRANSPOSED
    if one is MOSAIC:
        rule = matmul_mosaic_tiles.default_tiles(case.tokens, *weight.shape, bits, transposed)
        return [rule, *matmul_mosaic_tiles.neighbors(rule, bits, transposed)]
    rule = matmul_triton_tiles.default_tiles(case.tokens, *weight.shape, bits, transposed)
    return [rule, *matmul_triton_tiles.neighbors(rule)]


def tune(one: Implementation, what: str, case: Case, weights: tuple[Any, ...]) -> dict[str, Any]:
    """The fields of the fastest tiles that differ from the rule."""
    given = case.x if what == FORWARD else case.g
    product = one.forward if what == FORWARD else one.backward
    calls: dict[Any, Callable[[], Any]] = {}
    rule, *others = alternatives(one, what, case, weights[0])
    for tiles in (rule, *others):

        @jax.jit
        def several(given: jax.Array, weights: Any, tiles: Any = tiles) -> list[jax.Array]:
            return [product(given, weight, tiles) for weight in weights]  # type: ignore[call-arg]

        call = functools.partial(several, given, weights)
        try:
            jax.block_until_ready(call())
        except Exception as error:  # the compiler refuses tiles that are too large
            print(f"{one.name}, {tiles}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        calls[tiles] = functools.partial(repeated, call, rounds(case.tokens))
    times = compare(calls, 3)
    best = min(times, key=lambda tiles: times[tiles].median)
    fields = dataclasses.asdict(best)
    return {k: v for k, v in fields.items() if v != getattr(rule, k)}


def measure(
    case: Case,
    name: str,
    repeats: int,
    bandwidth: float,
    tuned: bool,
    implementations: Sequence[Implementation],
) -> tuple[list[tuple[str, ...]], list[Found], float]:
    """Rows of the table, the results, and the largest error."""
    packed, dense = case.weights(name), case.weights(DENSE)
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    errors: dict[tuple[str, str], float] = {}
    exact = np.asarray(packed[0].dequantize(), np.float64)

    def add(who: str, what: str, product: Callable, given: jax.Array, weights: Any) -> None:
        @jax.jit
        def several(given: jax.Array, weights: Any) -> list[jax.Array]:
            return [product(given, weight) for weight in weights]

        call = functools.partial(several, given, weights)
        calls[who, what] = functools.partial(repeated, call, rounds(case.tokens))
        if who != DENSE:
            factor = exact.T if what == FORWARD else exact
            errors[who, what] = product_error(several(given, weights)[0], given, factor)

    add(DENSE, FORWARD, lambda x, w: x @ w.T, case.x, dense)
    add(DENSE, TRANSPOSED, lambda g, w: g @ w, case.g, dense)
    tiles: dict[tuple[str, str], dict[str, Any]] = {}
    for one in implementations:
        if not (weights := weights_for(one, case, packed)):
            continue
        for what, product, given in (
            (FORWARD, one.forward, case.x),
            (TRANSPOSED, one.backward, case.g),
        ):
            try:
                if tuned and one is not XLA:
                    changes = tiles[one.name, what] = tune(one, what, case, weights)
                    rule = alternatives(one, what, case, weights[0])[0]
                    best = dataclasses.replace(rule, **changes)
                    product = functools.partial(product, tiles=best)
                add(one.name, what, product, given, weights)
            except Exception as error:  # go on with the others
                calls.pop((one.name, what), None)
                errors[one.name, what] = float("inf")
                place = f"{one.name}, {what}, {case.shape}, {case.tokens}, {name}"
                print(f"FAILED {place}: {error!s:.600}")
    times = compare(calls, repeats)
    count = copies(case.shape) * rounds(case.tokens)
    floor = packed[0].nbytes / bandwidth
    rows, found = [], []
    for (who, what), time in times.items():
        each = Timing(tuple(seconds / count for seconds in time.seconds))
        cells = [case.shape, str(case.tokens), name, what, who, each.milliseconds()]
        cells += [time.speedups(times[DENSE, what]), time.speedups(times[XLA.name, what])]
        cells += [f"{each.median / floor:.2f}" if who != DENSE else ""]
        cells += [f"{errors[who, what]:.1e}" if who != DENSE else ""]
        rows.append(tuple(cells))
        if who != DENSE:
            speeds = (time.speedup(times[other, what]) for other in (XLA.name, DENSE))
            size = (case.out, case.features)
            changes = tiles.get((who, what), {})
            found.append(Found(what, who, name, size, case.tokens, *speeds, changes))
    return rows, found, max(errors.values())


def search(names: Sequence[str], blocks: int, repeats: int) -> tuple[bool, list[Found]]:
    """Times the ICQ search by its kernel and by XLA; returns equality and results."""
    normal = jax.random.normal(jax.random.key(0), (blocks, 64), "bfloat16") * 0.02
    equal, found, rows = True, [], []
    for name in names:
        fmt = get_format(name)
        if fmt.integer:
            w = normal.reshape(-1, 32)
            call = functools.partial(icq_integer.search_range, w, fmt.bits, False)
            reason = search_integer_triton.refusal(w, fmt.bits)
        else:
            w = normal
            call = functools.partial(icq.search_shift, w, name)
            reason = search_triton.refusal(w, name)
        calls = {"xla": functools.partial(call, implementation="xla")}
        if reason is None:
            calls["triton"] = functools.partial(call, implementation="triton")
            try:
                jax.block_until_ready(calls["triton"]())
            except Exception as error:  # go on with the others
                del calls["triton"]
                equal = False
                print(f"FAILED search, {name}: {error!s:.600}")
        else:
            print(f"search, {name}: {reason}")
        times = compare(calls, repeats)
        results = {who: [np.asarray(part) for part in call()] for who, call in calls.items()}
        for who, time in times.items():
            same = all(map(np.array_equal, results[who], results["xla"]))
            equal &= same
            whole = time.median * 6.48e9 / w.size
            cells = (name, who, f"{w.size / time.median:.2e}", f"{whole:.2f}")
            rows.append((*cells, time.speedups(times["xla"]), str(same)))
            if who != "xla":
                speed = time.speedup(times["xla"])
                found.append(Found("search", who, name, (0, w.shape[1]), 0, speed, 0.0, {}))
    columns = ("format", "search", "weights/s", "LLaMA-7B, s", "to xla", "equal")
    title = f"ICQ, {blocks:,} blocks of 64 (integers: twice as many of 32) in bfloat16"
    if rows:
        print(f"\n{title}\n\n{table(columns, rows)}", flush=True)
    return equal, found


def to_record(found: Sequence[Found]) -> list[Measurement]:
    """Kernels that were faster at both of two neighboring numbers of rows, and faster searches."""
    kind, today = jax.devices()[0].device_kind, datetime.date.today().isoformat()
    groups: dict[tuple[Any, ...], list[Found]] = {}
    for one in (one for one in found if one.implementation != XLA.name):
        key = one.operation, one.implementation, one.format, one.shape
        groups.setdefault(key, []).append(one)
    faster = []
    for (operation, implementation, fmt, shape), ones in groups.items():
        ones = sorted(ones, key=lambda one: one.rows)
        # Every measured number of rows is a range of its own too.
        pairs = [*itertools.pairwise(ones), *((one, one) for one in ones)]
        for low, high in pairs:
            least = min(low.speedup, high.speedup)
            if least > 1:
                place = operation, implementation, kind, fmt, shape, (low.rows, high.rows)
                tiles = low.tiles if low.tiles == high.tiles else {}
                faster.append(Measurement(*place, round(least, 3), jax.__version__, today, tiles))
    return faster


def record(file: Path | None, known: Sequence[Any], found: Sequence[Found]) -> None:
    """Writes the known and the new measurements.

    Called after each case, because a run may reach a time limit: compiling is slow.
    """
    if file is not None:
        new = [dataclasses.asdict(one) for one in to_record(found)]
        file.write_text(json.dumps([*known, *new], indent=1) + "\n")


def main() -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 2048, 4096, 8192])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="OUTxIN")
    parser.add_argument("--formats", nargs="+", default=["nf4"], choices=FORMATS)
    parser.add_argument("--more-formats", nargs="*", default=["nf3", "nf2", "int4"])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--blocks", type=int, default=2**22, help="blocks for the search")
    parser.add_argument("--search-formats", nargs="*", default=SEARCHES)
    parser.add_argument("--repeats", type=int, default=5)
    kind = jax.devices()[0].device_kind
    usual = next((rate for name, rate in BANDWIDTHS.items() if name in kind), 4.8e12)
    parser.add_argument("--bandwidth", type=float, default=usual, help="bytes/s from memory")
    names = [one.name for one in IMPLEMENTATIONS]
    parser.add_argument("--implementations", nargs="*", default=names[1:], choices=names[1:])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--record", metavar="FILE")
    args = parser.parse_args()
    print(f"{machine()}, {args.dtype}", flush=True)
    columns = ("matrix", "rows", "format", "product", "by", "ms", "to dense", "to xla")
    columns += ("to the floor", "error")
    chosen = [one for one in IMPLEMENTATIONS if one.name in ("xla", *args.implementations)]
    plan = [(s, r, f) for s in args.shapes for r in args.rows for f in args.formats]
    plan += [(args.shapes[0], r, f) for r in args.rows[:3] for f in args.more_formats]
    found: list[Found] = []
    file = Path(args.record) if args.record else None
    known = json.loads(file.read_text()) if file and file.exists() else []
    largest, lines = 0.0, []
    for shape, rows, name in plan:
        case = Case(shape, rows, args.dtype)
        new, more, worst = measure(case, name, args.repeats, args.bandwidth, args.tune, chosen)
        found, lines, largest = found + more, lines + new, max(largest, worst)
        print("\n".join(map(" | ".join, new)), file=sys.stderr, flush=True)
        record(file, known, found)
    equal, searched = search(args.search_formats, args.blocks, args.repeats)
    found += searched
    record(file, known, found)
    print(f"\n{table(columns, lines)}\n")
    best: dict[tuple[Any, ...], float] = {}
    for one in found:
        key = one.operation, one.shape, one.rows
        if one.format == "nf4" and one.operation in MUST:
            best[key] = max(best.get(key, 0.0), one.to_dense)
    for (operation, shape, rows), speed in best.items():
        if rows in MUST[operation]:
            must, aim = MUST[operation][rows]
            goal = f"{speed:.3f} (must {must}, aim {aim}) {verdict(speed >= must)}"
            print(f"{operation} {shape}, {rows} rows: {goal}")
    for one in found:
        if one.speedup <= 1 and one.implementation != XLA.name:
            print(f"slower than XLA's path: {dataclasses.asdict(one)}")
    print(f"largest relative error {largest:.1e}, must be at most {BOUND}; searches equal: {equal}")
    return 0 if largest <= BOUND and equal else 1


if __name__ == "__main__":
    sys.exit(main())
