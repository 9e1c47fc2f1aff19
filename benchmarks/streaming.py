"""Memory and speed of a streamed training set, beside the same set in memory.

    python benchmarks/streaming.py --rows 1000000

Writes a synthetic .jsonl file, and reads it in a process of its own for each way.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from irqlora_jax import hf
from irqlora_jax.data import make_batches
from irqlora_jax.data.config import DataConfig
from irqlora_jax.data.sources import load_data_sets

BATCH, STEPS = 16, 200
WORDS = ["question", "what", "is", "color", "of", "red", "green", "blue", "dark", "answer"]
MODEL = Path(__file__).parent.parent / "examples" / "factworld" / "base-small"


def write_rows(file: Path, rows: int) -> None:
    """Writes rows of about 600 bytes."""
    rng = np.random.default_rng(0)
    words = np.array(WORDS)
    with open(file, "w") as out:
        for number in range(rows):
            text = " ".join(words[rng.integers(0, len(words), 100)])
            out.write(json.dumps({"input": f"{number} {text}", "output": text[:40]}) + "\n")


def peak() -> float:
    """Highest memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(file: str, way: str) -> None:
    """Prints the time until the first batch is there, the time of a batch, and the memory."""
    tokenizer = hf.load_tokenizer(MODEL)
    streaming, packing = way != "memory", way == "packed"
    settings = DataConfig(file, format="input_output", streaming=streaming, packing=packing)
    before, started = peak(), time.perf_counter()
    sets = load_data_sets(settings, tokenizer, 512, 0)
    batches = make_batches(sets.train, settings, BATCH, 0, 512, sets.parts)
    batches[0]
    ready = time.perf_counter()
    for step in range(1, STEPS + 1):
        batches[step]
    each = (time.perf_counter() - ready) / STEPS
    print(f"{way:8}  {ready - started:8.1f}  {1e3 * each:8.1f}  {peak() - before:8,.0f}")


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--ways", nargs="+", default=["memory", "streamed", "packed"])
    parser.add_argument("--measure", nargs=2, metavar=("FILE", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, args.rows)
        size = file.stat().st_size / 2**20
        print(f"{args.rows:,} rows, {size:,.0f} MiB; batches of {BATCH}\n")
        print("way        start s  batch ms       MiB", flush=True)
        for way in args.ways:
            subprocess.run([sys.executable, __file__, "--measure", file, way], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
