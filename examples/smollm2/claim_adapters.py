"""Compares the adapters on SmolLM2 at about equal numbers of trained parameters.

    python examples/smollm2/claim_adapters.py --quick --alpaca FILE --text FILE --questions FOLDER

Everything but the adapter is as in claim.py, with importance calibration and feedback on rows that
are trained on. The counts are within 10 % of the 4,884,480 parameters of LoRA with rank 16 and all
linear layers. QA-HiRA that can be merged (named "g64") has a third of it, the most that it can
have. Methods with "g64" pool 64 inputs, so they can be merged into the quantized base without loss.
"""

from collections.abc import Sequence

import claim
from claim import FEEDBACK, Method

from irqlora_jax.adapters.lokr import LokrOptions
from irqlora_jax.adapters.qahira import QahiraOptions
from irqlora_jax.adapters.qalora import QaloraOptions
from irqlora_jax.adapters.qalora_iec import QaloraIecOptions
from irqlora_jax.adapters.qbara import QbaraOptions

RANK = 16


def _method(method: str, rank: int = RANK, options: object = None) -> Method:
    """An adapter whose update is multiplied by 1."""
    own = {} if options is None else {method: options}
    return Method(FEEDBACK, {"method": method, "rank": rank, "alpha": float(rank), **own})


METHODS = {
    "qlora": _method("lora"),
    "iec": _method("iec"),
    "dora": _method("dora", 15),
    "lokr": _method("lokr", 64, LokrOptions(decompose_factor=4)),
    "bayesian": _method("bayesian"),
    "binary": _method("binary"),
    "qalora g64": _method("qalora", 31, QaloraOptions(group=64)),
    "qalora_iec g64": _method("qalora_iec", 31, QaloraIecOptions(group=64)),
    "qbara": _method("qbara", options=QbaraOptions(k_in=2, k_out=2)),
    "qbara g64": _method("qbara", options=QbaraOptions(k_in=64, k_out=1)),
    "qahira": _method("qahira", options=QahiraOptions(k_in=3, k_out=8)),
    "qahira g64": _method("qahira", options=QahiraOptions(k_in=64, k_out=1)),
}


def main(words: Sequence[str] | None = None) -> None:
    """Does the missing runs, then prints and writes the tables and the plot."""
    claim.main([*(words or ()), "--ranks", str(RANK)], METHODS, __doc__)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
