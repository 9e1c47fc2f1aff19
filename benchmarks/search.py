"""Weights per second of the ICQ searches and of the quantizer around them.

    python benchmarks/search.py [--blocks 32768]

Normal random weights in blocks of 64 (integers: groups of 32), default ranges and candidates
(201; integers 101). Prints a Markdown table with the ratio of each search to plain quantization.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
from timing import machine, median_seconds

from irqlora_jax.config import QuantConfig
from irqlora_jax.quant import icq, icq_integer
from irqlora_jax.quant.qtensor import quantize


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=32768, help="blocks of 64 weights")
    args = parser.parse_args()
    blocks = jax.random.normal(jax.random.key(0), (args.blocks, 64), jnp.float32) * 0.02
    matrix, groups = blocks.reshape(-1, 2048), blocks.reshape(-1, 32)
    size = blocks.size
    print(f"{machine()}; {size:,} weights\n")
    print("| format | search, weights/s | quantize with ICQ | without | search / without |")
    print("|---|---|---|---|---|")
    for name in ("nf4", "nf3", "nf2", "fp4", "int4", "int3", "int2"):
        integer = name.startswith("int")
        if integer:
            call = functools.partial(icq_integer.search_range, groups, int(name[3]), False)
        else:
            call = functools.partial(icq.search_shift, blocks, name)
        search = size / median_seconds(call)
        speeds = []
        for calibration in ("icq", "none"):
            config = QuantConfig(
                format=name,  # type: ignore[arg-type]
                block_size=32 if integer else 64,
                calibration=calibration,  # type: ignore[arg-type]
            )
            speeds.append(size / median_seconds(functools.partial(quantize, matrix, config)))
        figures = " | ".join(f"{speed:.2e}" for speed in (search, *speeds))
        print(f"| {name} | {figures} | {search / speeds[1]:.3f} |")


if __name__ == "__main__":
    main()
