"""Reads the model of a GGUF file: its architecture, and its tensors as Hugging Face has them.

llama.cpp knows some settings by the architecture alone: which one has biases or norms of the heads,
and that a SmolLM3 leaves out the rotations of every fourth layer.
Source: the GGUF specification (github.com/ggml-org/ggml/blob/master/docs/gguf.md), and
convert_hf_to_gguf.py of llama.cpp for the names and the order of rows.
"""

import dataclasses
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from irqlora_jax.files.gguf import Gguf, Tensor, dequantize
from irqlora_jax.files.tensors import FLOATS, Header
from irqlora_jax.model.attention import rope_frequencies
from irqlora_jax.model.config import LlamaConfig, RopeScaling
from irqlora_jax.model.tree import BIAS, Keys, linear_path, weight_name, weight_shapes
from irqlora_jax.text import first_few, require

LAYER_NAMES = {
    "attn_norm": ("input_layernorm",),
    "ffn_norm": ("post_attention_layernorm",),
    "attn_q": linear_path("q_proj"),
    "attn_k": linear_path("k_proj"),
    "attn_v": linear_path("v_proj"),
    "attn_q_norm": ("self_attn", "q_norm"),
    "attn_k_norm": ("self_attn", "k_norm"),
    "attn_output": linear_path("o_proj"),
    "ffn_gate": linear_path("gate_proj"),
    "ffn_up": linear_path("up_proj"),
    "ffn_down": linear_path("down_proj"),
}
SINGLE_NAMES = {"token_embd": ("embed_tokens",), "output_norm": ("norm",), "output": ("lm_head",)}
_NEEDED = ("block_count", "context_length", "embedding_length", "feed_forward_length")
_NEEDED += ("attention.head_count", "attention.layer_norm_rms_epsilon")
_TABLE, ROPE_FACTORS = "token_embd.weight", "rope_freqs.weight"
ENDS = ("eos", "eot", "eom")  # end of a text, of a turn, of a call of a tool
_TOKENS = ("bos", "padding", *ENDS)
PAIRED = ("llama", "smollm3")
"""Architectures whose rotations turn neighbors, so the rows of queries and keys are reordered."""


@dataclasses.dataclass(frozen=True)
class GgufHeader(Header):
    """A tensor with the name, the type and the order of rows that it has in a Hugging Face file.

    Attributes:
        stored: the tensor in the file.
        heads: number of heads whose rows are interleaved; 0 if the rows are in order.
    """

    stored: Tensor
    heads: int = 0

    def rows(self, name: str, first: int, stop: int, columns: slice | None = None) -> np.ndarray:
        """Reads and dequantizes rows `first` to `stop`, as `dtype`. Whole rows are read also for
        some columns."""
        values = dequantize(self.file, self.stored, _row_order(self, first, stop))
        with np.errstate(over="ignore"):  # the caller refuses values that are not finite
            whole = values.reshape(-1, *self.shape[1:]).astype(FLOATS[self.dtype], copy=False)
        return whole if columns is None else whole[:, columns]


def _row_order(header: GgufHeader, first: int, stop: int) -> slice | np.ndarray:
    """Places in the file of consecutive rows.

    A rotation turns pairs of values: values i and i + half in Hugging Face's order, and neighbors
    in the order of the file (`PAIRED`).
    """
    if not header.heads:
        return slice(first, stop)
    head = header.shape[0] // header.heads
    start, row = np.divmod(np.arange(first, stop), head)
    half, place = np.divmod(row, head // 2)
    return start * head + 2 * place + half


def config_values(found: Gguf) -> dict[str, Any]:
    """Describes the model in a GGUF file as config.json would.

    Raises:
        ValueError: something is missing, or the rotary settings are not supported.
    """
    fields, tensors, kind = found.fields, found.tensors, found.architecture
    own = {key.removeprefix(f"{kind}."): value for key, value in fields.items()}
    needed = (*_NEEDED, "attention.key_length") if kind == "qwen3" else _NEEDED
    missing = [f"{kind}.{key}" for key in needed if key not in own]
    missing += [name for name in (_TABLE,) if name not in tensors]
    if missing:
        raise ValueError(f"{found.file}: has no {first_few(missing)}")
    tokens = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in _TOKENS}
    ends = [tokens[name] for name in ENDS]
    ends = [end for place, end in enumerate(ends) if end is not None and end not in ends[:place]]
    values = {
        "model_type": kind,
        "num_hidden_layers": own["block_count"],
        "hidden_size": own["embedding_length"],
        "intermediate_size": own["feed_forward_length"],
        "num_attention_heads": own["attention.head_count"],
        "num_key_value_heads": own.get("attention.head_count_kv"),
        "head_dim": own.get("attention.key_length", own.get("rope.dimension_count")),
        "rms_norm_eps": own["attention.layer_norm_rms_epsilon"],
        "rope_theta": own.get("rope.freq_base", 10000.0),
        "max_position_embeddings": own["context_length"],
        "vocab_size": tensors[_TABLE].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": tokens["bos"],
        "eos_token_id": ends or None,
        "pad_token_id": tokens["padding"],
        "attention_bias": kind == "llama" and "blk.0.attn_q.bias" in tensors,
        "dtype": FLOATS[_dtype(tensors[_TABLE].type)],
    }
    size = read_llama(found.file, values).head_dim
    for key in ("attention.value_length", "rope.dimension_count"):
        given = own.get(key, size)
        require(given == size, f"{found.file}: {kind}.{key}", given, f"{size}, the size of a head")
    return values | {"rope_scaling": _rope_scaling(found, values)}


def _rope_scaling(found: Gguf, values: dict[str, Any]) -> dict[str, Any] | None:
    """The scaling of the rotary frequencies. LLaMA 3 has no settings in the file, but factors."""
    prefix = f"{found.architecture}.rope.scaling."
    given = {
        key.removeprefix(prefix): value
        for key, value in found.fields.items()
        if key.startswith(prefix)
    }
    kind = given.get("type", "none")
    accepted = "'none', 'linear' or 'yarn'"
    require(kind in ("none", "linear", "yarn"), f"{found.file}: {prefix}type", kind, accepted)
    if kind == "linear":
        return {"rope_type": "linear", "factor": given.get("factor", 1.0)}
    if kind == "yarn":
        return _yarn(given, values["max_position_embeddings"])
    if ROPE_FACTORS not in found.tensors:
        return None
    factors = dequantize(found.file, found.tensors[ROPE_FACTORS], slice(None)).reshape(-1)
    if (factors == 1).all():
        return None
    scaling = RopeScaling("llama3", float(factors.max()))
    scaled = {"rope_scaling": scaling.to_dict()}
    plain, slow = (rope_frequencies(read_llama(found.file, values | more)) for more in ({}, scaled))
    expected = np.asarray(plain) / np.asarray(slow)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise ValueError(
            f"{found.file}: {ROPE_FACTORS} does not hold the factors of LLaMA 3 (low_freq_factor "
            f"{scaling.low_freq_factor:g}, high_freq_factor {scaling.high_freq_factor:g}, "
            f"original_max_position_embeddings {scaling.original_max_position_embeddings}); "
            "expected these"
        )
    return scaling.to_dict()


def _yarn(given: Mapping[str, Any], context: int) -> dict[str, Any]:
    """The settings of yarn. llama.cpp multiplies attn_factor with the factor of the paper."""
    factor, more = given.get("factor", 1.0), given.get("attn_factor", 1.0)
    original = given.get("original_context_length", context)
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    usual = RopeScaling("yarn", factor).scale
    return scaling if more == 1 else scaling | {"attention_factor": more * usual}


def read_llama(source: str | Path, values: Mapping[str, Any]) -> LlamaConfig:
    """Makes the architecture of a file from its `config_values`.

    Raises:
        ValueError: an invalid value.
    """
    try:
        return LlamaConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{source}: {str(error).removeprefix('config.json: ')}") from error


def tensor_headers(found: Gguf, config: LlamaConfig) -> dict[str, Header]:
    """Describes all tensors of a GGUF file by their names in a Hugging Face file.

    Quantized weights are given as float16. Their scales are float16 in the file, and float16
    rounds them far less than their quantization did. Where the layers of a projection differ in
    type, they are given as float32.

    Raises:
        ValueError: the file has tensors that the architecture does not have.
    """
    known = {*chain.from_iterable(weight_shapes(config))}
    places = {name: _hugging_face(name) for name in found.tensors if name != ROPE_FACTORS}
    spare = [name for name, place in places.items() if place is None or place[0] not in known]
    if spare:
        raise ValueError(
            f"{found.file}: cannot read these tensors: {first_few(spare)}; "
            f"expected the weights of a {config.family.title} alone"
        )
    named = {name: place for name, place in places.items() if place is not None}
    types: dict[Keys, set[str]] = {}
    for name, (path, _) in named.items():
        types.setdefault(path, set()).add(_dtype(found.tensors[name].type))
    heads: dict[str, int] = {}
    if found.architecture in PAIRED:
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    headers: dict[str, Header] = {}
    for name, (path, layer) in named.items():
        tensor = found.tensors[name]
        dtype = _dtype(tensor.type) if len(types[path]) == 1 else "F32"
        header = GgufHeader(found.file, tensor.shape, dtype, tensor, heads.get(_linear(path), 0))
        headers[weight_name(path, layer)] = header
    return headers


def _hugging_face(name: str) -> tuple[Keys, int | None] | None:
    """Path and layer of a tensor (`model.tree`), or None for tensors that are not read.

    Examples:
        >>> _hugging_face("blk.3.attn_q.weight"), _hugging_face("blk.3.attn_q.bias")
        ((('self_attn', 'q_proj'), 3), (('self_attn', 'q_proj', 'bias'), 3))
        >>> _hugging_face("blk.3.attn_q.scale") is None
        True
    """
    match name.split("."):
        case [kind, "weight"] if kind in SINGLE_NAMES:
            return SINGLE_NAMES[kind], None
        case ["blk", layer, kind, "weight"] if layer.isdecimal() and kind in LAYER_NAMES:
            return LAYER_NAMES[kind], int(layer)
        case ["blk", layer, kind, "bias"] if layer.isdecimal() and kind in LAYER_NAMES:
            return (*LAYER_NAMES[kind], BIAS), int(layer)
    return None


def _linear(path: Keys) -> str:
    """Name of the layer of a weight or a bias."""
    return path[-2] if path[-1] == BIAS else path[-1]


def _dtype(type: str) -> str:
    return type if type in FLOATS else "F16"
