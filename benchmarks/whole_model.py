"""Seconds of ICQ for a whole model whose weights are already on the device.

    python benchmarks/whole_model.py [--size 7b] [--format nf4]

Quantizes random bfloat16 weights layer after layer, as for a checkpoint but without reading. With
--size 7b, which has 6.5e9 weights, a GPU must take at most 10 s; exit code 1 otherwise.
"""

import argparse
import math
import sys
import time

import jax
import jax.numpy as jnp
from timing import machine, verdict
from train_step import add_size, fill_size, llama

from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize

MOST = 10.0  # seconds for 6.5e9 weights on a GPU


def main() -> int:
    """Prints the seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_size(parser)
    parser.add_argument("--format", default="nf4")
    args = fill_size(parser.parse_args())
    config = QuantConfig(format=args.format, calibration="icq")
    shapes = llama(args).linear_shapes.values()
    key = jax.random.key(0)
    weights = [
        jax.random.normal(jax.random.fold_in(key, layer), shape, jnp.bfloat16) * 0.02
        for layer in range(args.layers)
        for shape in shapes
    ]
    # Compiles one program for each shape.
    jax.block_until_ready([quantize(weight, config) for weight in weights[: len(shapes)]])
    start = time.perf_counter()
    jax.block_until_ready([quantize(weight, config) for weight in weights])
    seconds = time.perf_counter() - start
    count = sum(math.prod(shape) for shape in shapes) * args.layers
    print(f"{machine()}\n\n{args.format}, ICQ: {count:.3g} weights in {seconds:.2f} s, ", end="")
    print(f"{count / seconds:.3g} weights/s")
    if args.size != "7b" or jax.default_backend() == "cpu":
        return 0
    print(f"must be at most {MOST} s: {verdict(seconds <= MOST)}")
    return 0 if seconds <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())
