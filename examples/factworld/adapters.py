"""Compares the adapters at about equal numbers of trained parameters, over several seeds, in pairs.

    python examples/factworld/adapters.py --formats nf3 --seeds 3 --tuning_seeds 1 --one_base \
        --rates 5e-4 1e-3 2e-3 4e-3 --output runs/adapters
    python examples/factworld/adapters.py --report --output runs/adapters

Everything but the adapter is as in ablation.py, with plain quantization: data, permutations, choice
of the rate, resuming, tables and plot. The counts are within 8 % of the 40,960 parameters of LoRA
with rank 8 and all linear layers. Only QA-HiRA has 30 % more: its sizes go in powers of two. The
table has the counts.

The layers of these bases have 64 or 192 inputs, so blocks of 64 leave QA-LoRA 1 or 3 groups in a
layer. Rows named "g16" therefore pool 16 inputs. They could be merged without loss into a base with
blocks of 16 weights only.
"""

from collections.abc import Sequence

import ablation
from methods import Method

from irqlora_jax.adapters.lokr import LokrOptions
from irqlora_jax.adapters.qahira import QahiraOptions
from irqlora_jax.adapters.qalora import QaloraOptions
from irqlora_jax.adapters.qalora_iec import QaloraIecOptions
from irqlora_jax.adapters.qbara import QbaraOptions

PLAIN = {"calibration": "none"}
QALORA, QALORA_16 = QaloraOptions(group=64), QaloraOptions(group=16)
METHODS = {
    "full+lora": Method({"format": "none"}, {"method": "lora"}),
    "plain": Method(PLAIN, None),
    "qlora": Method(PLAIN, {"method": "lora"}),
    "lora+": Method(PLAIN, {"method": "lora"}, lora_plus_ratio=4.0),
    "rslora": Method(PLAIN, {"method": "lora", "scaling": "sqrt_rank"}),
    "iec": Method(PLAIN, {"method": "iec"}),
    "dora": Method(PLAIN, {"method": "dora"}, rank=7),
    "lokr": Method(PLAIN, {"method": "lokr", "lokr": LokrOptions(decompose_factor=2)}, rank=16),
    "bayesian": Method(PLAIN, {"method": "bayesian"}),
    "binary": Method(PLAIN, {"method": "binary"}),
    "qalora": Method(PLAIN, {"method": "qalora", "qalora": QALORA}, rank=14),
    "qalora g16": Method(PLAIN, {"method": "qalora", "qalora": QALORA_16}, rank=13),
    "qalora_iec g16": Method(
        PLAIN, {"method": "qalora_iec", "qalora_iec": QaloraIecOptions(group=16)}, rank=13
    ),
    "qbara": Method(PLAIN, {"method": "qbara", "qbara": QbaraOptions(k_in=2, k_out=2)}),
    "qbara g64": Method(PLAIN, {"method": "qbara", "qbara": QbaraOptions(k_in=64, k_out=1)}),
    "qahira": Method(PLAIN, {"method": "qahira", "qahira": QahiraOptions(k_in=4, k_out=1)}),
}


def main(words: Sequence[str] | None = None) -> None:
    """Does the missing runs, then prints and writes the tables and the plot."""
    ablation.main(words, METHODS, tuple(METHODS))


if __name__ == "__main__":
    main()
