"""Computes the DPO loss and the rewards of held-out preference pairs."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from irqlora_jax.data import Pair, eval_batches
from irqlora_jax.evaluate.perplexity import row_nll
from irqlora_jax.model.dpo import REWARDS, DpoOptions, pair_sums
from irqlora_jax.model.llama import Llama

_sums = jax.jit(pair_sums, static_argnames="options")


def preference_scores(
    model: Llama,
    variables: Any,
    pairs: Sequence[Pair],
    options: DpoOptions,
    *,
    reference: Any = None,
    batch_size: int = 8,
    chunk: int = 1024,
) -> dict[str, float]:
    """Computes means over preference pairs.

    Args:
        model: the architecture.
        variables: {"params": adapters, "base": base}.
        pairs: held-out pairs.
        options: the loss and its constants.
        reference: adapters of the reference; None: the base without adapters.
        batch_size: pairs of a forward pass.
        chunk: positions whose logits are in memory at the same time.

    Returns:
        "loss", and `REWARDS`, as `pair_sums` defines them.

    Raises:
        ValueError: no pairs.
    """
    if not pairs:
        raise ValueError("there are no pairs to evaluate")
    frozen, own = model, {"params": reference, "base": variables["base"]}
    if reference is None:
        frozen, own = model.clone(adapter=None), own | {"params": {}}
    pending = []
    for batch in eval_batches(pairs, batch_size):
        nll, counts = row_nll(model, variables, batch, chunk)
        pending.append(_sums(nll, row_nll(frozen, own, batch, chunk)[0], counts, options=options))
    sums = [{name: np.float64(value) for name, value in one.items()} for one in pending]
    count = sum(one["pairs"] for one in sums)
    return {name: float(sum(one[name] for one in sums) / count) for name in ("loss", *REWARDS)}
