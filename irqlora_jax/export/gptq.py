"""Integers in the layout of GPTQ, for vLLM and GPTQModel.

qweight packs the codes of each output over the inputs, [in * bits / 32, out]. qzeros packs the zero
points of each group over the outputs, [groups, out * bits / 32]. The first version of the format
stores zero points minus one, so it cannot hold 0. Bases with a zero point of 0 get the second
version, which stores them as they are (checkpoint_format "gptq_v2").
Source: GPTQModel (gptqmodel/nn_modules/qlinear), vLLM (model_executor/layers/quantization/gptq.py).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import irqlora_jax
from irqlora_jax.export.integers import (
    WORD,
    IntegerFacts,
    integer_facts,
    pack_words,
    packed_words,
    zero_points,
)
from irqlora_jax.export.model import Part
from irqlora_jax.export.packed import ELSE, Layout, Parts, shared
from irqlora_jax.quant.qtensor import QTensor

_SCALES = "float16"
_GROUPS = (32, 64, 128)


def _facts(start: str, weight: QTensor, dtype: str) -> IntegerFacts:
    facts = integer_facts(start, weight, _SCALES)
    if facts.block_size not in _GROUPS:
        accepted = ", ".join(map(str, _GROUPS))
        raise ValueError(f"{start} blocks of {facts.block_size}; expected {accepted}, {ELSE}")
    rows, columns = facts.shape
    if rows % WORD or columns % WORD:
        raise ValueError(
            f"{start} {rows} outputs and {columns} inputs; expected multiples of {WORD}, {ELSE}"
        )
    return facts


def _describe(facts: Mapping[str, IntegerFacts], dense: list[str], dtype: str) -> dict[str, Any]:
    if dense:
        raise ValueError(
            f"kind = 'gptq': {dense[0]} is not quantized; expected all linear layers with one "
            f"quant.format, {ELSE} or compressed-tensors"
        )
    symmetric = all(own.symmetric for own in facts.values())
    minus_one = all(own.lowest > 0 for own in facts.values())
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if minus_one else "gptq_v2",
        "bits": shared("gptq", facts, "bits"),
        "group_size": shared("gptq", facts, "block_size"),
        "sym": symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"irqlora_jax:{irqlora_jax.__version__}"]},
    }


def _parts(
    read: Callable[[], QTensor], facts: IntegerFacts, described: dict[str, Any], dtype: str
) -> Parts:
    (rows, columns), (_, groups), bits = facts.shape, facts.grid, facts.bits
    less = np.uint8(described["checkpoint_format"] == "gptq")

    def qweight() -> np.ndarray:
        return pack_words(np.asarray(jax.jit(QTensor.codes)(read())), bits).T

    def qzeros() -> np.ndarray:
        return pack_words(np.ascontiguousarray(zero_points(read()).T - less), bits)

    def scales() -> np.ndarray:
        return np.asarray(read().scale()).T

    def g_idx() -> np.ndarray:
        return np.arange(columns, dtype=np.int32) // np.int32(facts.block_size)

    return {
        "qweight": Part((packed_words(columns, bits), rows), "int32", qweight),
        "qzeros": Part((groups, packed_words(rows, bits)), "int32", qzeros),
        "scales": Part((groups, rows), _SCALES, scales),
        "g_idx": Part((columns,), "int32", g_idx),
    }


GPTQ = Layout(_facts, _describe, _parts, "quantize_config.json")
