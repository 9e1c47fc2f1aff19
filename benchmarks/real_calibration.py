"""Loss of a real model, quantized by each calibration in each format and not finetuned.

    python benchmarks/real_calibration.py MODEL TEXT --output FILE [--formats nf3] [--windows 12]

MODEL is a Hugging Face folder, TEXT a text file. The loss is in nats per token, over windows of the
first tokens of the text; the weights are dequantized to float32, so that one compiled program
serves all formats. FILE gets one line of JSON per result as soon as it is known, with the loss of
every window. A second call skips what FILE has. The table has the losses, and the paired difference
to the plain quantizer with its standard error over the windows.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from testbeds import paired
from timing import line, machine, table

from irqlora_jax import hf
from irqlora_jax.base.source import read_llama
from irqlora_jax.data.batches import eval_batches
from irqlora_jax.data.examples import encode_source
from irqlora_jax.evaluate.perplexity import row_nll, text_windows
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.calibrations.joint import JointOptions
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.matmul import dense_weights

FORMATS = ("nf4", "nf3", "nf2", "int4", "int3", "int2", "fp4")
CALIBRATIONS: dict[str, dict[str, Any]] = {
    "none": {"calibration": "none"},
    "icq": {"calibration": "icq"},
    "joint 100": {"calibration": "joint"},
    "joint inf": {"calibration": "joint", "joint": JointOptions(math.inf)},
    "robust": {"calibration": "robust"},
}
FULL = "full precision"


def read(file: Path) -> list[dict[str, Any]]:
    """The results in a file; none if it does not exist."""
    return [json.loads(row) for row in file.read_text().splitlines()] if file.is_file() else []


def window_losses(model: Llama, base: Any, windows: Sequence[Any]) -> list[float]:
    """Mean loss of a token in each window (nats)."""
    losses = []
    for batch in eval_batches(windows, 1):
        total, count = row_nll(model, {"params": {}, "base": base}, batch)
        losses.append(float(total.sum() / count.sum()))
    return losses


def summary(rows: Sequence[dict[str, Any]], same: dict[str, Any]) -> None:
    """Prints the table of the results whose fields agree with `same`."""
    rows = [row for row in rows if same.items() <= row.items()]
    losses = {(row["format"], row["calibration"]): row["losses"] for row in rows}
    names = [name for name in CALIBRATIONS if any(name == key[1] for key in losses)]
    print(f"\nfull precision: {np.mean(losses[FULL, 'none']):.4f}\n")
    print(table(("format", *names)))
    for format in FORMATS:
        cells = [format]
        for name in names:
            own, plain = losses.get((format, name)), losses.get((format, "none"))
            cell = "" if own is None else f"{np.mean(own):.3f}"
            if own and plain and name != "none" and len(own) > 1:
                cell += f" ({paired(own, plain)})"
            cells.append(cell)
        print(line(cells))


def main() -> None:
    """Measures what the file does not have, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("text", type=Path, help="text to evaluate on")
    parser.add_argument("--output", type=Path, required=True, help="file of results")
    parser.add_argument("--formats", nargs="*", default=FORMATS, choices=FORMATS)
    parser.add_argument("--calibrations", nargs="+", default=[*CALIBRATIONS], choices=CALIBRATIONS)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    args = parser.parse_args()
    print(machine())
    tokenizer, config = hf.load_tokenizer(args.model), read_llama(args.model)
    with args.text.open(encoding="utf-8") as file:
        text = file.read(16 * args.windows * args.length)
    tokens = np.array(encode_source(tokenizer, [text])[0][: args.windows * args.length], np.int32)
    windows = [text_windows(row, args.length)[0] for row in tokens.reshape(-1, args.length)]
    same = {
        "model": args.model.name,
        "text": args.text.name,
        "windows": args.windows,
        "length": args.length,
    }
    known = [{k: row[k] for k in (*same, "format", "calibration")} for row in read(args.output)]
    wanted = [(FULL, "none"), *((f, c) for f in args.formats for c in args.calibrations)]
    model = Llama(config, matmul="xla")
    for format, name in wanted:
        key = {**same, "format": format, "calibration": name}
        if key in known:
            continue
        start = time.perf_counter()
        quant = None if format == FULL else QuantConfig(format=format, **CALIBRATIONS[name])
        base = dense_weights(hf.load_base(args.model, quant)[0], jnp.float32)
        made = time.perf_counter()
        losses = window_losses(model, base, windows)
        seconds = {"quantize": made - start, "loss": time.perf_counter() - made}
        with args.output.open("a") as file:
            file.write(json.dumps({**key, "losses": losses, "seconds": seconds}) + "\n")
        print(format, name, f"{np.mean(losses):.4f}", seconds, file=sys.stderr, flush=True)
    summary(read(args.output), same)


if __name__ == "__main__":
    main()
