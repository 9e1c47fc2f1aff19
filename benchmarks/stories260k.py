"""What quantization costs a real model, and what a finetune wins back.

    python benchmarks/stories260k.py MODEL TRAIN_TEXT VALID_TEXT [--out runs/stories260k-table]

MODEL is a Hugging Face folder of stories260K. Runs configs/stories260k.yaml for nf4, nf3 and nf2,
without calibration and with ICQ (QLoRA's adapter for the first, IEC for the second, as the methods
go together), and prints a Markdown table. A run that is there already is not repeated.
"""

import argparse
import json
import os
import platform
from pathlib import Path

import jax

from irqlora_jax.config import Config
from irqlora_jax.train import run

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Runs the six configurations and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="Hugging Face folder of stories260K")
    parser.add_argument("train", type=Path, help="text to finetune on")
    parser.add_argument("valid", type=Path, help="text to evaluate on")
    parser.add_argument("--out", type=Path, default=Path("runs/stories260k-table"))
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps")
    args = parser.parse_args()
    rows = {}
    for name in ("nf4", "nf3", "nf2"):
        for calibration, method in (("none", "lora"), ("icq", "iec")):
            folder = args.out / f"{name}-{calibration}"
            results = folder / "results.json"
            if not results.exists():
                overrides = {
                    "model": str(args.model),
                    "output_dir": str(folder),
                    "quant.format": name,
                    "quant.calibration": calibration,
                    "adapter.method": method,
                    "data.train": str(args.train),
                    "data.eval": str(args.valid),
                    "train.steps": args.steps,
                    "evaluate.baselines": True,
                }
                run(Config.load(ROOT / "configs" / "stories260k.yaml", overrides))
            rows[name, calibration] = json.loads(results.read_text())
    print(f"\njax {jax.__version__}, {os.cpu_count()} cores, {platform.machine()}")
    print(f"full precision: loss {rows['nf4', 'none'][0]['loss']:.4f}\n")
    print("| format | calibration, adapter | bits a weight | entropy | loss | loss, finetuned |")
    print("|---|---|---|---|---|---|")
    for (name, calibration), table in rows.items():
        before, after = table[-2:]
        how = "ICQ, IEC" if calibration == "icq" else "none, LoRA"
        print(
            f"| {name} | {how} | {before['bits']:.2f} | {before['entropy']:.3f} | "
            f"{before['loss']:.4f} | {after['loss']:.4f} |"
        )


if __name__ == "__main__":
    main()
