"""Suggests `quant.rules`: a larger format for the matrices that quantization hurts most."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike

from irqlora_jax.base.storage import abstract_base, matrix_bits, measure_base
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.tree import linear_path, matrix_name
from irqlora_jax.quant.config import KEPT, QuantConfig, QuantRule
from irqlora_jax.quant.formats import FORMATS


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """Rules, and bits per weight of the linear layers, with scales and shifts.

    Attributes:
        rules: the new rules, the most useful first, and then the rules that there were before.
        added: number of new rules.
        before: bits per weight without the new rules.
        after: bits per weight with them.
    """

    rules: tuple[QuantRule, ...]
    added: int
    before: float
    after: float

    @property
    def text(self) -> str:
        """The rules as YAML, for a file that `--config` takes."""
        return rules_text(self.rules)


def suggest(
    costs: Mapping[tuple[int, str], float],
    quant: QuantConfig,
    llama: LlamaConfig,
    extra_bits: float,
    dtype: DTypeLike = jnp.bfloat16,
) -> Suggestion:
    """Chooses the matrices with the largest cost per additional bit, while the budget lasts.

    Quantization does not improve a model, so negative costs are noise. A cost that is no larger
    than the most negative one may be noise too, and is ignored.

    Args:
        costs: loss that the quantization of a matrix adds, by layer and projection.
        quant: the settings that were measured.
        llama: the architecture.
        extra_bits: the budget in bits per weight of all linear layers.
        dtype: type of the weights that are not quantized.
    """
    weights = llama.num_hidden_layers * sum(map(math.prod, llama.linear_shapes.values()))
    budget, before = extra_bits * weights, _bits(quant, llama, dtype)
    noise, offers = -min((cost for cost in costs.values() if cost < 0), default=0.0), []
    for (layer, name), cost in costs.items():
        matrix, shape = matrix_name(linear_path(name), layer), llama.linear_shapes[name]
        own = quant.for_matrix(matrix)
        rule = QuantRule(matrix, format=larger_format(own.format))
        better = dataclasses.replace(own, format=rule.format)
        extra = matrix_bits(shape, better, dtype) - matrix_bits(shape, own, dtype)
        if cost > noise:
            offers.append((cost / extra, extra, rule))
    chosen: list[QuantRule] = []
    for _, extra, rule in sorted(offers, key=lambda offer: -offer[0]):
        if extra <= budget:
            budget -= extra
            chosen.append(rule)
    rules = (*chosen, *quant.rules)
    after = _bits(dataclasses.replace(quant, rules=rules), llama, dtype)
    return Suggestion(rules, len(chosen), before, after)


def larger_format(name: str) -> str:
    """The format of the same family with one more bit; "none" if there is none.

    Examples:
        >>> larger_format("nf3"), larger_format("int2"), larger_format("nf4")
        ('nf4', 'int3', 'none')
    """
    bits = FORMATS[name].bits
    larger = name.replace(str(bits), str(bits + 1))
    return larger if larger != name and larger in FORMATS else KEPT


def rules_text(rules: Sequence[QuantRule]) -> str:
    """Writes rules as YAML.

    Examples:
        >>> print(rules_text([QuantRule("layers.0.*", format="nf4")]))
        quant:
          rules:
            - {match: "layers.0.*", format: "nf4"}
    """
    lines = []
    for rule in rules:
        fields = {"match": rule.match} | rule.overrides
        written = ", ".join(f"{name}: {json.dumps(value)}" for name, value in fields.items())
        lines.append(f"    - {{{written}}}")
    return "\n".join(["quant:", "  rules:", *lines])


def _bits(quant: QuantConfig, llama: LlamaConfig, dtype: DTypeLike) -> float:
    return measure_base(abstract_base(llama, quant, dtype)).bits
