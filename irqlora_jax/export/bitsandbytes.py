"""NF4 and FP4 as bitsandbytes stores them, for transformers and PEFT.

Two codes share a byte, the first one in its high bits. Scales ("absmax") are float32, or double
quantized: 8-bit codes of a table, float32 maxima of 256 blocks, and the mean of the matrix. Our
default second level is the same, so it is copied. Scales that are stored in another way or trained
are written as float32.
Source: bitsandbytes/functional.py (QuantState.as_dict, quantize_4bit).
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from irqlora_jax.export.model import Part
from irqlora_jax.export.packed import ELSE, Layout, Parts, shared
from irqlora_jax.quant import stats
from irqlora_jax.quant.formats import get_format
from irqlora_jax.quant.qtensor import QTensor

_FORMATS = ("nf4", "fp4")
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclasses.dataclass(frozen=True)
class _Facts:
    """Describes a quantized matrix.

    Attributes:
        shape: (out, in).
        format: name of the code book.
        block_size: weights that share a scale.
        nested: whether the scales are double quantized.
        groups: number of maxima of scales.
        offset: mean of the scales.
    """

    shape: tuple[int, int]
    format: str
    block_size: int
    nested: bool
    groups: int
    offset: float


def _facts(start: str, weight: QTensor, dtype: str) -> _Facts:
    size = weight.block_size
    if weight.format not in _FORMATS:
        raise ValueError(
            f"{start} format {weight.format}; expected {' or '.join(_FORMATS)}, {ELSE}"
        )
    if weight.shift_codes is not None or weight.shift_update is not None:
        raise ValueError(
            f"{start} shifts, for which bitsandbytes has no place; expected a base with "
            f"quant.calibration none or gptq, or with quant.symmetric true, and no trained shifts, "
            f"{ELSE}"
        )
    if size not in _BLOCKS:
        accepted = ", ".join(map(str, _BLOCKS))
        raise ValueError(f"{start} blocks of {size}; expected {accepted}, {ELSE}")
    if weight.shape[1] % size:
        raise ValueError(
            f"{start} rows of {weight.shape[1]} in blocks of {size}; expected whole blocks, {ELSE}"
        )
    nested = weight.second_level == stats.DEFAULT and weight.scale_update is None
    groups, offset = weight.scale_max.size, float(weight.scale_offset)
    return _Facts(weight.shape, weight.format, size, nested, groups, offset)


def _describe(facts: Mapping[str, _Facts], dense: list[str], dtype: str) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": shared("bitsandbytes", facts, "format"),
        "bnb_4bit_use_double_quant": all(own.nested for own in facts.values()),
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head", *dense],
    }


def _parts(
    read: Callable[[], QTensor], facts: _Facts, described: dict[str, Any], dtype: str
) -> Parts:
    count = facts.shape[0] * facts.shape[1]
    blocks = (count // facts.block_size,)
    state: dict[str, Any] = {
        "quant_type": facts.format,
        "blocksize": facts.block_size,
        "dtype": dtype,
        "shape": list(facts.shape),
    }
    tensors: Parts = {}
    if facts.nested:
        state |= {"nested_blocksize": stats.GROUP, "nested_dtype": "float32"}
        state["nested_offset"] = facts.offset
        tensors["absmax"] = Part(blocks, "uint8", lambda: _flat(read().scale_codes))
        tensors["nested_absmax"] = Part((facts.groups,), "float32", lambda: _flat(read().scale_max))
        tensors["nested_quant_map"] = _constant(stats.DYNAMIC_MAP)
    else:
        tensors["absmax"] = Part(blocks, "float32", lambda: _flat(read().scale()))
    tensors["quant_map"] = _constant(get_format(facts.format).table)
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors[f"quant_state.bitsandbytes__{facts.format}"] = _constant(text)

    def codes() -> np.ndarray:
        pairs = np.asarray(jax.jit(QTensor.codes)(read())).reshape(-1, 2)
        return (pairs[:, :1] << 4) | pairs[:, 1:]

    packed = {"weight": Part((count // 2, 1), "uint8", codes)}
    return packed | {f"weight.{end}": part for end, part in tensors.items()}


def _constant(values: np.ndarray) -> Part:
    return Part(values.shape, str(values.dtype), lambda: values)


def _flat(values: Any) -> np.ndarray:
    return np.asarray(values).reshape(-1)


BITSANDBYTES = Layout(_facts, _describe, _parts)
