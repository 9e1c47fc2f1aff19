"""What a calibration with a text needs for models that need not be there, as `--plan` computes it.

    python benchmarks/calibration_plan.py [--models 7b 70b]

128 rows of 2,048 tokens in batches of one row, activations in bfloat16, nf3, pairs of rank 64.
Nothing is run: the program of a layer is compiled from shapes. "device" is the peak in GiB of one
GPU, "host" the hidden states in GiB. The minutes are those of the products at the float32 rate of
the data sheet, so they are no measured time.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.config import Config
from irqlora_jax.data.calibrate import CalibrateConfig
from irqlora_jax.plan.calibration import measure_calibration
from irqlora_jax.plan.measure import find_plan_device
from irqlora_jax.quant.config import QuantConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.architectures import MODELS

TEXT = CalibrateConfig("text", rows=128, length=2048, batch_size=1, activations="bfloat16")
IMPORTANCE: dict[str, Any] = {"format": "nf3", "calibration": "importance"}
METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "importance": ({}, "default"),
    "importance + feedback": ({"rounding": "feedback"}, "default"),
    "importance, CLoQ": ({}, "cloq"),
    "importance + block training": ({"training": "block"}, "default"),
    "importance + ApiQ, trained pairs": ({"training": "apiq"}, "trained"),
}
FORMATTER = argparse.RawDescriptionHelpFormatter
PLACES = {"7b": "4090", "70b": "a100-80"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FORMATTER)
    parser.add_argument("--models", nargs="+", default=PLACES, choices=PLACES)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    asked = parser.parse_args()
    print("| model | GPU | method | device | of | host | TFLOP | minutes |")
    print("|---|---|---|---|---|---|---|---|")
    for model in asked.models:
        target = find_plan_device(PLACES[model], 1)
        assert target.flops is not None
        for name in asked.methods:
            changes, init = METHODS[name]
            quant = QuantConfig(**(IMPORTANCE | changes))
            adapter = AdapterConfig(method="lora", rank=64, init=init)  # type: ignore[arg-type]
            config = Config(model, "folder", quant=quant, calibrate=TEXT, adapter=adapter)
            need = measure_calibration(config, MODELS[model], target)
            sizes = (f"{size / 2**30:.1f}" for size in (need.device, target.memory, need.host))
            work = f"{need.work / 1e12:,.0f}", f"{need.work / target.flops / 60:,.0f}"
            print("|", " | ".join((model, target.title, name, *sizes, *work)), "|", flush=True)


if __name__ == "__main__":
    main()
