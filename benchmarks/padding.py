"""The share of padding in a batch: random order, batching by length, packing.

python benchmarks/padding.py MODEL ALPACA.json     # MODEL: folder with a tokenizer
"""

import argparse
import dataclasses

import numpy as np
from timing import line, table

from irqlora_jax import hf
from irqlora_jax.data import load_examples, make_batches
from irqlora_jax.data.config import DataConfig

BATCH_SIZE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    args = parser.parse_args()
    plain = DataConfig()
    examples = load_examples(args.data, plain, hf.load_tokenizer(args.model))
    tokens = sum(len(example.tokens) for example in examples)
    print(f"{len(examples):,} examples, {tokens:,} tokens, batches of {BATCH_SIZE} rows\n")
    print(table(("order", "padding", "shapes", "steps an epoch")))
    for name, config in (
        ("random", plain),
        ("by length", dataclasses.replace(plain, group_by_length=True)),
        ("packed", dataclasses.replace(plain, packing=True)),
    ):
        batches = make_batches(examples, config, BATCH_SIZE, seed=0)
        sizes, shapes, seen, step = 0, set(), 0, 0
        while seen < len(examples):  # one epoch, with the whole last batch
            shape = batches[step]["tokens"].shape
            sizes += np.prod(shape)
            shapes.add(shape)
            indices = batches.indices(step)
            seen, step = seen + len(indices), step + 1
        used = sum(len(examples[i].tokens) for n in range(step) for i in batches.indices(n))
        print(line((name, f"{1 - used / sizes:.1%}", str(len(shapes)), str(step))))


if __name__ == "__main__":
    main()
