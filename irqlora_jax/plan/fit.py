"""Sizes of bases for `quant.budget`, before the formats of the matrices are chosen."""

import dataclasses
import logging

from irqlora_jax.base.budget import planned_rules
from irqlora_jax.base.storage import abstract_base, measure_base
from irqlora_jax.config import Config
from irqlora_jax.files.hub import read_dtype
from irqlora_jax.plan.measure import (
    TIGHT,
    PlanDevice,
    device_count,
    find_plan_device,
    measure,
)
from irqlora_jax.quant.budget import FIT
from irqlora_jax.runs.load import read_architecture
from irqlora_jax.text import readable_size, refusal

logger = logging.getLogger(__name__)


def with_planned_rules(config: Config, target: PlanDevice) -> Config:
    """Replaces a budget by rules that need about as much memory (`base.budget.planned_rules`).

    Raises:
        ValueError: the budget is too small; or as `largest_base`.
    """
    quant = config.quant
    if quant.budget is None:
        return config
    llama = read_architecture(config.model, quant)
    limit = largest_base(config, target) if quant.budget == FIT else None
    planned = planned_rules(config.model, llama, quant, limit)
    return dataclasses.replace(config, quant=planned)


def largest_base(config: Config, target: PlanDevice | None = None) -> int:
    """Computes the size of the largest base with which a run fits, in bytes.

    Compiles the training step with the smallest candidates of `quant.allocation`. What else the run
    needs does not depend on them.

    Args:
        config: of the run; with `quant.budget`.
        target: the device (default: the local one).

    Raises:
        ValueError: not even the smallest candidates fit.
    """
    target = target or find_plan_device(None, device_count(config))
    llama, dtype = read_architecture(config.model, config.quant), read_dtype(config.model)
    offers = (dataclasses.replace(c, rules=config.quant.rules) for c in config.quant.candidates)
    bases = [(abstract_base(llama, quant, dtype), quant) for quant in offers]
    base, quant = min(bases, key=lambda pair: measure_base(pair[0]).total)
    need = measure(dataclasses.replace(config, quant=quant), base, llama, target)
    whole, own, spare = measure_base(base), need.base, int(TIGHT * target.memory) - need.peak
    if spare < 0:
        accepted = (
            f"{readable_size(-spare)} less on {target.title}, with the smallest candidates of "
            f"quant.allocation; --plan with quant.format {quant.format} tries settings that save "
            "memory"
        )
        raise refusal("quant.budget", FIT, accepted)
    # A device holds this share of the packed weights.
    share = (own.total - own.rest) / (whole.total - whole.rest)
    size = whole.total + int(spare / share)
    logger.info(f"quant.budget = 'fit': a base of up to {size // 10**6} MB fits {target.title}")
    return size
