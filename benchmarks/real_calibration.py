"""Loss of a real model, quantized by each calibration in each format and not finetuned.

    python benchmarks/real_calibration.py MODEL TEXT --output FILE [--formats nf3] [--windows 12]

MODEL is a Hugging Face folder, TEXT a text file. The loss is in nats per token, over windows of the
first tokens of the text; the weights are dequantized to float32, so that one compiled program
serves all formats. FILE gets one line of JSON per result as soon as it is known, with the loss of
every window. A second call skips what FILE has. The table has the losses, and the paired difference
to the plain quantizer with its standard error over the windows.

Calibrations with a text get rows of TEXT from behind the evaluated part (--rows, --row_length).
Names with "r N" have a LoRA pair of this rank, whose bits are not counted in those of the format.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from testbeds import paired
from timing import line, machine, table

from irqlora_jax import hf
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.lqlora import LqloraOptions
from irqlora_jax.base.source import read_llama
from irqlora_jax.data.batches import eval_batches
from irqlora_jax.data.calibrate import CalibrationRows
from irqlora_jax.data.examples import encode_source
from irqlora_jax.evaluate.perplexity import row_nll, text_windows
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.calibrations.joint import JointOptions
from irqlora_jax.quant.config import KEPT, QuantConfig
from irqlora_jax.quant.matmul import dense_weights
from irqlora_jax.quant.trained import BlockOptions


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to make a base: fields of QuantConfig, and the initialization and rank of a pair."""

    quant: dict[str, Any]
    init: str | None = None
    rank: int = 0
    metric: Literal["inputs", "gradients"] = "inputs"
    options: Any = None
    """Options of the initialization, if they are not its default."""

    @property
    def adapter(self) -> AdapterConfig | None:
        """The adapter; None without a pair."""
        if self.init is None:
            return None
        own: dict[str, Any] = {} if self.options is None else {self.init: self.options}
        own |= {"rank": self.rank, "alpha": float(self.rank), "init": self.init}
        return AdapterConfig(method="lora", **own)


ERROR: dict[str, Any] = {"calibration": "joint", "joint": JointOptions(math.inf)}
FEEDBACK = {"rounding": "feedback"}
FORMATS = ("nf4", "nf3", "nf2", "int4", "int3", "int2", "fp4")
CALIBRATIONS: dict[str, Variant] = {
    "none": Variant({"calibration": "none"}),
    "icq": Variant({"calibration": "icq"}),
    "joint 100": Variant({"calibration": "joint"}),
    "joint inf": Variant(ERROR),
    "robust": Variant({"calibration": "robust"}),
    "importance": Variant({"calibration": "importance"}),
    "gptq": Variant({"calibration": "gptq"}),
    "icq + feedback": Variant({"calibration": "icq", **FEEDBACK}),
    "joint inf + feedback": Variant(ERROR | FEEDBACK),
    "robust + feedback": Variant({"calibration": "robust", **FEEDBACK}),
    "importance + feedback": Variant({"calibration": "importance", **FEEDBACK}),
    "oac": Variant({"calibration": "gptq"}, metric="gradients"),
}
IMPORTANCE: dict[str, Any] = {"calibration": "importance"}
TRAINED = {"training": "block", "block": BlockOptions(4, 8, weight_lr=1e-4, scale_lr=1e-3)}
PAIRS: dict[str, Variant] = {
    "loftq": Variant(ERROR, "loftq"),
    "cloq": Variant(ERROR, "cloq"),
    "importance + cloq": Variant(IMPORTANCE, "cloq"),
    "importance + feedback + cloq": Variant(IMPORTANCE | FEEDBACK, "cloq"),
    "lqlora": Variant({"calibration": "none"}, "lqlora"),
    "lqlora weighed": Variant(
        {"calibration": "none"}, "lqlora", metric="gradients", options=LqloraOptions(weights="both")
    ),
    "importance + cloq + block training": Variant(IMPORTANCE | TRAINED, "cloq"),
}
"""Initializations of a pair, for the ranks that are asked for."""
DATA_FREE = ("none", "icq", "joint 100", "joint inf", "robust")
FULL = "full precision"


def read(file: Path) -> list[dict[str, Any]]:
    """The results in a file; none if it does not exist."""
    return [json.loads(row) for row in file.read_text().splitlines()] if file.is_file() else []


def first_tokens(tokenizer: Any, file: Path, count: int) -> np.ndarray:
    """The first tokens of a text file."""
    with file.open(encoding="utf-8") as opened:
        text = opened.read(16 * count)
    return np.array(encode_source(tokenizer, [text])[0][:count], np.int32)


def cut(tokens: np.ndarray, length: int) -> list[Any]:
    """Windows of `length` tokens that share none."""
    return [text_windows(row, length)[0] for row in tokens.reshape(-1, length)]


def window_losses(model: Llama, variables: Any, windows: Sequence[Any]) -> list[float]:
    """Mean loss of a token in each window (nats)."""
    losses = []
    for batch in eval_batches(windows, 1):
        total, count = row_nll(model, variables, batch)
        losses.append(float(total.sum() / count.sum()))
    return losses


def make(
    args: argparse.Namespace, config: LlamaConfig, quant: QuantConfig, own: Variant, rows: Any
) -> tuple[Llama, dict[str, Any]]:
    """The model and its variables, with dense weights."""
    needs = quant.needs_text or (own.adapter and own.adapter.needs != "nothing")
    settings = dataclasses.replace(rows.config, metric=own.metric)
    given = CalibrationRows(rows.tokens, settings) if needs else None
    key = jax.random.key(0)
    model = Llama(config, adapter=own.adapter, matmul="xla")
    if own.adapter is None:
        base, pairs = hf.load_base(args.model, quant, calibrate=given)[0], {}
    else:
        base, fitted, _ = hf.load_fitted(args.model, quant, own.adapter, key, calibrate=given)
        pairs = model.init_adapters(key, fitted)
    return model, {"params": pairs, "base": dense_weights(base, jnp.float32)}


def summary(rows: Sequence[dict[str, Any]], same: dict[str, Any]) -> None:
    """Prints the table of the results whose fields agree with `same`."""
    rows = [row for row in rows if same.items() <= row.items()]
    losses = {(row["format"], row["calibration"]): row["losses"] for row in rows}
    names = list(dict.fromkeys(row["calibration"] for row in rows))
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
    parser.add_argument("--calibrations", nargs="*", default=DATA_FREE, choices=CALIBRATIONS)
    parser.add_argument("--pairs", nargs="*", default=[], choices=PAIRS)
    parser.add_argument("--ranks", nargs="*", type=int, default=[16])
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--rows", type=int, default=32, help="rows for the calibration")
    parser.add_argument("--row_length", type=int, default=512, help="tokens of such a row")
    args = parser.parse_args()
    print(machine())
    tokenizer, config = hf.load_tokenizer(args.model), read_llama(args.model)
    scored, drawn = args.windows * args.length, args.rows * args.row_length
    both = first_tokens(tokenizer, args.text, scored + drawn)
    rows = CalibrationRows(both[scored:].reshape(args.rows, args.row_length))
    windows = cut(both[:scored], args.length)
    same = {
        "model": args.model.name,
        "text": args.text.name,
        "windows": args.windows,
        "length": args.length,
    }
    text_of = {"rows": args.rows, "row_length": args.row_length}
    known = [{k: row[k] for k in (*same, "format", "calibration")} for row in read(args.output)]
    pairs = {
        f"{name} r {rank}": dataclasses.replace(PAIRS[name], rank=rank)
        for name in args.pairs
        for rank in args.ranks
    }
    variants = CALIBRATIONS | pairs
    names = [*args.calibrations, *pairs]
    wanted = [(FULL, "none"), *((f, c) for f in args.formats for c in names)]
    for format, name in wanted:
        key = {**same, "format": format, "calibration": name}
        if key in known:
            continue
        start = time.perf_counter()
        own = variants[name]
        quant = QuantConfig(**{"format": KEPT if format == FULL else format, **own.quant})
        model, variables = make(args, config, quant, own, rows)
        made = time.perf_counter()
        losses = window_losses(model, variables, windows)
        seconds = {"quantize": made - start, "loss": time.perf_counter() - made}
        with args.output.open("a") as file:
            result = {**key, **text_of, "losses": losses, "seconds": seconds}
            file.write(json.dumps(result) + "\n")
        print(format, name, f"{np.mean(losses):.4f}", seconds, file=sys.stderr, flush=True)
    summary(read(args.output), same)


if __name__ == "__main__":
    main()
