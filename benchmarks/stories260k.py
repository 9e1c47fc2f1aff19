"""The loss of a quantized real model, and the effect of a finetune, method by method.

    python benchmarks/stories260k.py MODEL TRAIN_TEXT VALID_TEXT [--out runs/stories260k-table]

MODEL is a Hugging Face folder of stories260K. Runs configs/stories260k.yaml for every format,
method and seed (of the adapters and of the order of the text), and prints a Markdown table: the
loss before and after the finetune, and its paired difference to QLoRA with a 95 % interval over the
seeds. Existing runs are not repeated.
"""

import argparse
import json
import os
import platform
from pathlib import Path

import jax
import numpy as np
from scipy import stats
from testbeds import spread
from timing import line, table

from irqlora_jax.config import Config
from irqlora_jax.train.finetune import run

ROOT = Path(__file__).parent.parent
METHODS = {
    "QLoRA": {"quant.calibration": "none", "adapter.method": "lora"},
    "ICQ": {"quant.calibration": "icq", "adapter.method": "lora"},
    "IEC": {"quant.calibration": "none", "adapter.method": "iec"},
    "IR-QLoRA": {"quant.calibration": "icq", "adapter.method": "iec"},
    "joint": {"quant.calibration": "joint", "adapter.method": "lora"},
    "joint, LoftQ": {
        "quant.calibration": "joint",
        "adapter.method": "lora",
        "adapter.init": "loftq",
    },
}


def results(args: argparse.Namespace, name: str, method: str, seed: int) -> list[dict]:
    """The results of one run. Runs it if they do not exist."""
    folder = args.out / f"{name}-{method.lower().replace(', ', '-')}-{seed}"
    file = folder / "results.json"
    if not file.exists():
        overrides = {
            "model": str(args.model),
            "output_dir": str(folder),
            "seed": seed,
            "quant.format": name,
            "data.train": str(args.train),
            "data.eval": str(args.valid),
            "train.steps": args.steps,
            "evaluate.baselines": seed == 0,  # equal for all seeds
            **METHODS[method],
        }
        run(Config.load(ROOT / "configs" / "stories260k.yaml", overrides))
    return json.loads(file.read_text())


def interval(differences: np.ndarray) -> str:
    """Mean of paired differences, and half their 95 % interval."""
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    half = stats.t.ppf(0.975, len(differences) - 1) * error
    return f"{differences.mean():+.4f} +- {half:.4f}"


def main() -> None:
    """Does the missing runs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="Hugging Face folder of stories260K")
    parser.add_argument("train", type=Path, help="text to finetune on")
    parser.add_argument("valid", type=Path, help="text to evaluate on")
    parser.add_argument("--out", type=Path, default=Path("runs/stories260k-table"))
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    parser.add_argument("--formats", nargs="+", default=["nf4", "nf3", "nf2"])
    args = parser.parse_args()
    found = {
        (name, method): [results(args, name, method, seed) for seed in range(args.seeds)]
        for name in args.formats
        for method in METHODS
    }
    full = next(iter(found.values()))[0][0]["loss"]
    print(f"\njax {jax.__version__}, {os.cpu_count()} cores, {platform.machine()}")
    print(f"full precision: loss {full:.4f}; {args.steps} steps, {args.seeds} seeds\n")
    columns = ("format", "method", "bits a weight", "entropy", "loss", "finetuned (sd)")
    print(table((*columns, "to QLoRA (95 %)")))
    for (name, method), runs in found.items():
        before, after = runs[0][-2], np.array([run[-1]["loss"] for run in runs])
        qlora = np.array([run[-1]["loss"] for run in found[name, "QLoRA"]])
        paired = "" if method == "QLoRA" else interval(after - qlora)
        cells = [name, method, f"{before['bits']:.2f}", f"{before['entropy']:.3f}"]
        cells += [f"{before['loss']:.4f}", spread(after, 4), paired]
        print(line(cells))


if __name__ == "__main__":
    main()
