"""Weights per second of the ICQ searches, beside the procedure of the released code.

    python benchmarks/search.py [--blocks 32768] [--peer_blocks 8192] [--growth] [--formats nf4 ..]

Normal random weights in blocks of 64 (integers: groups of 32), default ranges and candidates (201;
integers 101). The peer (released.py; extra `parity`) has fewer blocks, since it takes 10 seconds
for half a million weights, and runs on the GPU if torch sees one. Both run in turns, after a
warm-up; ratios are those of each turn, with their spread. Exit code 1 if a ratio is below 150, or
if the codes of the peer have a higher entropy than ours in any block, both counted exactly.
--growth shows time against number of weights, block size and number of candidates.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import released
from timing import compare, machine, median_seconds, table

from irqlora_jax.config import QuantConfig
from irqlora_jax.quant import icq, icq_integer
from irqlora_jax.quant.entropy import block_entropy
from irqlora_jax.quant.formats import get_format
from irqlora_jax.quant.qtensor import quantize

FORMATS = ("nf4", "nf3", "nf2", "fp4", "int4", "int3", "int2")
REQUIRED = 150


def ours(name: str, blocks: jax.Array, steps: int | None = None) -> Callable[[], Any]:
    """The search of one format. Blocks: [n, block]."""
    fmt = get_format(name)
    if fmt.integer:
        search = functools.partial(icq_integer.search_range, steps=steps or 50)
        return functools.partial(search, blocks, fmt.bits, False)
    return functools.partial(icq.search_shift, blocks, name, steps=steps or 100)


def shaped(name: str, blocks: jax.Array) -> jax.Array:
    """In the block size of the format."""
    return blocks.reshape(-1, 32) if get_format(name).integer else blocks


def plain_speed(name: str, blocks: jax.Array, calibration: str) -> str:
    """Weights a second of `quantize`."""
    config = QuantConfig(
        format=name,  # type: ignore[arg-type]
        block_size=32 if get_format(name).integer else 64,
        calibration=calibration,  # type: ignore[arg-type]
    )
    call = functools.partial(quantize, blocks.reshape(-1, 2048), config)
    return f"{blocks.size / median_seconds(call):.2e}"


def beside_peer(name: str, blocks: jax.Array, peer_blocks: int, turns: int) -> tuple[Any, ...]:
    """Ratios of each turn, the peer's weights a second, and blocks in which ours is worse."""
    import torch

    fmt = get_format(name)
    call = ours(name, shaped(name, blocks))
    few = shaped(name, blocks[:peer_blocks])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    theirs = torch.from_numpy(np.array(few)).to(device)
    found: dict[str, Any] = {}

    def peer() -> None:
        if fmt.integer:
            found["codes"], _ = released.search_range(theirs, fmt.bits)
        else:
            found["codes"], _ = released.search_shift(theirs, name)
        if device == "cuda":
            torch.cuda.synchronize()

    times = compare({"ours": call, "peer": peer}, repeats=turns)
    scale = blocks.size / few.size
    pairs = zip(times["ours"].seconds, times["peer"].seconds, strict=True)
    ratios = [scale * slow / fast for fast, slow in pairs]
    codes = jnp.asarray(found["codes"].cpu().numpy())
    lead = np.asarray(ours(name, few)()[-1] - block_entropy(codes, 2**fmt.bits))
    worse = int((lead < -1e-6).sum())
    return ratios, few.size / times["peer"].median, worse, times["ours"]


def growth(name: str) -> list[tuple[str, ...]]:
    """Rows: weights, block, candidates, seconds, weights a second."""
    rows = []
    cases = [(2**n, 64, None) for n in (16, 18, 20, 22)]
    cases += [(2**20, block, None) for block in (16, 32, 128, 256, 512)]
    cases += [(2**20, 64, steps) for steps in (25, 50, 200)]
    for size, block, steps in cases:
        blocks = jax.random.normal(jax.random.key(0), (size // block, block)) * 0.02
        seconds = median_seconds(ours(name, blocks, steps), 3)
        candidates = 2 * (steps or (50 if get_format(name).integer else 100)) + 1
        cells = (f"{size:,}", str(block), str(candidates), f"{seconds:.4f}")
        rows.append((name, *cells, f"{size / seconds:.2e}"))
    return rows


def main() -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=32768, help="blocks of 64 weights")
    parser.add_argument("--peer_blocks", type=int, default=8192, help="of them for the peer")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--growth", action="store_true")
    args = parser.parse_args()
    blocks = jax.random.normal(jax.random.key(0), (args.blocks, 64), jnp.float32) * 0.02
    print(f"{machine()}; {blocks.size:,} weights, peer {args.peer_blocks * 64:,}\n")
    missing = released.peer_missing()
    if missing:
        print(f"The peer is missing: {missing}\n")
    columns = ("format", "search, weights/s", "released, weights/s", "ratio (min-max)")
    columns += ("blocks worse", "quantize with ICQ", "without")
    print(table(columns, []))
    accepted = True
    for name in args.formats:
        theirs, ratio, worse = "-", "-", "-"
        if missing:
            speed = blocks.size / median_seconds(ours(name, shaped(name, blocks)))
        else:
            peers = min(args.peer_blocks, args.blocks)
            ratios, rate, n_worse, time = beside_peer(name, blocks, peers, args.turns)
            middle = float(np.median(ratios))
            accepted &= middle >= REQUIRED and n_worse == 0
            speed = blocks.size / time.median
            theirs, worse = f"{rate:.2e}", str(n_worse)
            ratio = f"{middle:.0f} ({min(ratios):.0f}-{max(ratios):.0f})"
        plain = (plain_speed(name, blocks, calibration) for calibration in ("icq", "none"))
        print(f"| {' | '.join((name, f'{speed:.2e}', theirs, ratio, worse, *plain))} |", flush=True)
    if args.growth:
        columns = ("format", "weights", "block", "candidates", "seconds", "weights/s")
        print("\n" + table(columns, growth("nf4") + growth("int4")))
    return 0 if accepted else 1


if __name__ == "__main__":
    sys.exit(main())
