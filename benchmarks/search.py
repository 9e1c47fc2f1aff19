"""Weights a second of the ICQ searches, compared with the procedure of the released code.

    python benchmarks/search.py [--blocks 32768] [--peer_blocks 4096] [--growth] [--formats nf4 ..]

Weights are normal, in blocks of 64 (integers: groups of 32), with the default ranges and candidates
(201; integers 101). The peer (released.py; extra `parity`) gets fewer blocks, because it takes 5
seconds for a quarter of a million weights. It runs on the GPU if torch sees one. With fewer than 4
bits it runs a second time, with entropies over 2**bits bins and not the released 16. All run in
turns after a warm-up; ratios are per turn, with their spread. Exit code 1 if the ratio to the
released procedure is below 150, or if in any block the peer's codes have a higher entropy than
ours, both counted exactly.
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
from timing import Timing, compare, line, machine, median_seconds, table

from irqlora_jax.quant.calibrations import icq, icq_integer
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.quant.entropy import block_entropy
from irqlora_jax.quant.formats import get_format

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
    """Reshapes blocks of 64 to the block size of the format."""
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


def peer_call(name: str, blocks: Any, bins: int, found: dict[str, Any]) -> Callable[[], None]:
    """The released procedure. It stores its codes in `found`."""
    import torch

    def call() -> None:
        fmt = get_format(name)
        if fmt.integer:
            found["codes"], _ = released.search_range(blocks, fmt.bits, bins=bins)
        else:
            found["codes"], _ = released.search_shift(blocks, name, bins=bins)
        if blocks.device.type == "cuda":
            torch.cuda.synchronize()

    return call


def beside_peer(
    name: str, blocks: jax.Array, peer_blocks: int, turns: int
) -> tuple[dict[str, Timing], int, int]:
    """Times of "ours", "released" and (below 4 bits) "fewer bins".

    Also returns how many weights the peer searched, and in how many blocks ours is worse.
    """
    import torch

    levels = 2 ** get_format(name).bits
    few = shaped(name, blocks[:peer_blocks])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    theirs = torch.from_numpy(np.array(few)).to(device)
    found: dict[str, Any] = {}
    calls: dict[str, Callable[[], Any]] = {"ours": ours(name, shaped(name, blocks))}
    calls["released"] = peer_call(name, theirs, released.BINS, found)
    if levels < released.BINS:
        calls["fewer bins"] = peer_call(name, theirs, levels, found)
    times = compare(calls, repeats=turns)
    codes = jnp.asarray(found["codes"].cpu().numpy())
    lead = np.asarray(ours(name, few)()[-1] - block_entropy(codes, levels))
    return times, few.size, int((lead < -1e-6).sum())


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
    parser.add_argument("--peer_blocks", type=int, default=4096, help="blocks for the peer")
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
    columns += ("to fewer bins", "blocks worse", "quantize with ICQ", "without")
    print(table(columns))
    met = True
    for name in args.formats:
        cells = ["-"] * 4
        if missing:
            speed = blocks.size / median_seconds(ours(name, shaped(name, blocks)))
        else:
            peers = min(args.peer_blocks, args.blocks)
            times, size, worse = beside_peer(name, blocks, peers, args.turns)
            scale = blocks.size / size
            met &= scale * times["ours"].speedup(times["released"]) >= REQUIRED and worse == 0
            speed = blocks.size / times["ours"].median
            ratios = [
                times["ours"].speedups(times[peer], scale) if peer in times else ""
                for peer in ("released", "fewer bins")
            ]
            cells = [f"{size / times['released'].median:.2e}", *ratios, str(worse)]
        cells += [plain_speed(name, blocks, calibration) for calibration in ("icq", "none")]
        print(line((name, f"{speed:.2e}", *cells)), flush=True)
    if args.growth:
        columns = ("format", "weights", "block", "candidates", "seconds", "weights/s")
        print("\n" + table(columns, growth("nf4") + growth("int4")))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
