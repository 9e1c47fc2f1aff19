"""Integers as compressed-tensors packs them ("pack-quantized"), for transformers and vLLM.

weight_packed packs the codes of each output over the inputs, [out, in * bits / 32]. A symmetric
matrix has no zero points; others are packed over the outputs, [out * bits / 32, groups]. Codes and
zero points are signed numbers there, to which half of the range is added before packing. So the
packed numbers are ours.
Source: compressed_tensors/compressors/pack_quantized.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from irqlora_jax.export.integers import (
    IntegerFacts,
    integer_facts,
    pack_words,
    packed_words,
    zero_points,
)
from irqlora_jax.export.model import Part
from irqlora_jax.export.packed import Layout, Parts
from irqlora_jax.quant.qtensor import QTensor


def _describe(facts: Mapping[str, IntegerFacts], dense: list[str], dtype: str) -> dict[str, Any]:
    alike: dict[tuple[int, int, bool], list[str]] = {}
    for name, own in facts.items():
        alike.setdefault((own.bits, own.block_size, own.symmetric), []).append(name)
    one = len(alike) == 1
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if one else [f"re:^{re.escape(name)}$" for name in names],
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "group",
                "group_size": size,
                "dynamic": False,
            },
        }
        for i, ((bits, size, symmetric), names) in enumerate(alike.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *dense],
    }


def _parts(
    read: Callable[[], QTensor], facts: IntegerFacts, described: dict[str, Any], dtype: str
) -> Parts:
    (rows, columns), (_, groups), bits = facts.shape, facts.grid, facts.bits

    def codes() -> np.ndarray:
        return pack_words(np.asarray(jax.jit(QTensor.codes)(read())), bits)

    def zeros() -> np.ndarray:
        return pack_words(np.ascontiguousarray(zero_points(read()).T), bits).T

    parts = {
        "weight_packed": Part((rows, packed_words(columns, bits)), "int32", codes),
        "weight_scale": Part((rows, groups), dtype, lambda: np.asarray(read().scale())),
        "weight_shape": Part((2,), "int64", lambda: np.array(facts.shape, np.int64)),
    }
    if not facts.symmetric:
        shape = packed_words(rows, bits), groups
        parts["weight_zero_point"] = Part(shape, "int32", zeros)
    return parts


COMPRESSED = Layout(integer_facts, _describe, _parts)
