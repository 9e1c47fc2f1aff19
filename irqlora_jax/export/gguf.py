"""Writes a model as one GGUF file for llama.cpp and its relatives.

One tensor at a time is computed, quantized and written.
Source: the GGUF specification (github.com/ggml-org/ggml/blob/master/docs/gguf.md), and
convert_hf_to_gguf.py of llama.cpp for the names and the order of rows.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from irqlora_jax.export.gguf_blocks import exact_blocks, exact_type
from irqlora_jax.export.model import stored_weight, tensor_places, tensor_values
from irqlora_jax.files.gguf_model import LAYER_NAMES, PAIRED, ROPE_FACTORS, SINGLE_NAMES
from irqlora_jax.messages import progress_bar
from irqlora_jax.model.attention import rope_frequencies
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import BIAS, Keys, Tree
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.text import require

GGUF_FILE = "model.gguf"
EXACT = "exact"
BYTES = {"f16": 2, "bf16": 2, "q8_0": 34 / 32, "q4_0": 18 / 32, "q4_1": 20 / 32}
"""Types in which matrices are written, with their bytes a weight. `EXACT` is one more choice."""
_BLOCK = 32
"""Weights of a block, in all types that are written with blocks."""
_PART = 2**22
"""Weights that are quantized at a time."""
_ARCHITECTURES = {name: name for name in ("llama", "qwen2", "qwen3", "smollm3")}
_ARCHITECTURES["mistral"] = "llama"
_BIASED = {"llama": True, "qwen2": True}
_FILE_TYPES = {"f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "bf16": 32, EXACT: 3}
"""general.file_type, which describes the file and decides nothing."""
_NO_ROPE_STEP = 4
"""llama.cpp leaves out the rotations of every fourth layer of a SmolLM3."""
_NAMES = {path: name for name, path in (LAYER_NAMES | SINGLE_NAMES).items()}


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A tensor of the file.

    Attributes:
        name: in the file.
        type: of GGML.
        shape: rows first.
        data: computes its bytes [rows, bytes of a row], and the largest difference of a weight
            from ours relative to the largest weight, where the type is to be exact.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    data: Callable[[], tuple[np.ndarray, float]]

    @property
    def byte_shape(self) -> tuple[int, ...]:
        import gguf

        kind = gguf.GGMLQuantizationType[self.type]
        return tuple(gguf.quant_shape_to_byte_shape(self.shape, kind))


def save_gguf(
    file: Path,
    model: Llama,
    variables: Mapping[str, Tree],
    described: Mapping[str, Any],
    *,
    type: str,
    progress: bool = False,
) -> float:
    """Writes the dequantized weights, plus the scaled update of adapted layers.

    Norms and biases are float32. With q4_0 and q4_1, the token tables are Q8_0. A matrix whose rows
    are no whole blocks of 32 is F16.

    Args:
        file: path of the file.
        model: the architecture. Without `model.adapter`, only the base is written.
        variables: {"params": adapters, "base": base}.
        described: further metadata: name of the model, tokenizer.
        type: one of `BYTES`, or "exact": the codes of the base as they are, so without an adapter.
        progress: show a bar.

    Returns:
        With "exact", the largest difference of a quantized weight from ours, relative to the
        largest weight of its matrix. Else 0.

    Raises:
        ValueError: the file format cannot hold this model; the message says what would do.
    """
    import gguf

    config = model.config
    fields = {**described, **architecture_fields(config), "general.file_type": _FILE_TYPES[type]}
    entries = list(_entries(model, variables, type))
    writer = gguf.GGUFWriter(file, str(fields.pop("general.architecture")))
    try:
        _add_fields(writer, fields)
        for entry in entries:
            shape = entry.byte_shape
            kind = gguf.GGMLQuantizationType[entry.type]
            if entry.type in ("F16", "F32"):  # the library counts their elements, not their bytes
                dtype = np.dtype(np.float16 if entry.type == "F16" else np.float32)
                args = entry.shape, dtype, math.prod(shape)
            else:
                args = shape, np.dtype(np.uint8), math.prod(shape)
            writer.add_tensor_info(entry.name, *args, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        total, off = sum(math.prod(entry.shape) for entry in entries), 0.0
        with progress_bar("Exporting", total, "weights", show=progress, unit_scale=True) as bar:
            for entry in entries:
                data, own = entry.data()
                writer.write_tensor_data(data)
                del data  # before the next one is computed
                off = max(off, own)
                bar.update(math.prod(entry.shape))
    finally:
        writer.close()
    return off


def _add_fields(writer: Any, fields: Mapping[str, Any]) -> None:
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
    add |= {float: writer.add_float32, list: writer.add_array}
    for key, value in fields.items():
        if value is not None and value != []:
            add[type(value)](key, value)


def architecture_fields(config: LlamaConfig) -> dict[str, Any]:
    """The metadata that describe the architecture.

    These files have no sliding window, so the context must not be longer than the window.

    Raises:
        ValueError: llama.cpp does not compute this model.
    """
    name = _ARCHITECTURES[config.model_type]
    ok = _BIASED.get(name, False) or not config.attention_bias
    require(ok, "attention_bias", config.attention_bias, f"false for a {config.model_type} in GGUF")
    if name == "qwen2":
        width = config.num_attention_heads * config.head_dim
        accepted = f"num_attention_heads * head_dim = {width} for a qwen2 in GGUF"
        require(config.hidden_size == width, "hidden_size", config.hidden_size, accepted)
    if name == "smollm3":
        every = tuple(range(_NO_ROPE_STEP - 1, config.num_hidden_layers, _NO_ROPE_STEP))
        accepted = f"{every}, as llama.cpp computes a SmolLM3"
        require(
            config.unrotated_layers == every, "no_rope_layers", config.unrotated_layers, accepted
        )
    window = config.sliding_window or config.max_position_embeddings
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": min(window, config.max_position_embeddings),
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "vocab_size": config.vocab_size,
        **_rope_fields(config),
    }
    fields: dict[str, Any] = {"general.architecture": name, "general.type": "model"}
    fields["general.quantization_version"] = 2
    return fields | {f"{name}.{key}": value for key, value in values.items()}


def _rope_fields(config: LlamaConfig) -> dict[str, Any]:
    """The scaling of the rotary frequencies. LLaMA 3's is a tensor (`ROPE_FACTORS`)."""
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type == "llama3":
        return {}
    kind = scaling.rope_type
    require(kind != "dynamic", "rope_scaling.rope_type", kind, "linear, yarn or llama3 for GGUF")
    fields = {"type": kind, "factor": float(scaling.factor)}
    if kind == "yarn":
        for name, value in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
            own = getattr(scaling, name)
            require(own == value, f"rope_scaling.{name}", own, f"{value}, which llama.cpp uses")
        fields["original_context_length"] = scaling.original_max_position_embeddings
        if scaling.attention_factor is not None:
            # llama.cpp multiplies this with the factor of the paper.
            usual = dataclasses.replace(scaling, attention_factor=None).scale
            fields["attn_factor"] = scaling.scale / usual
    return {f"rope.scaling.{key}": value for key, value in fields.items()}


def _entries(model: Llama, variables: Mapping[str, Tree], type: str) -> Iterator[_Entry]:
    config = model.config
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "llama3":
        slow = np.asarray(rope_frequencies(config), np.float64)
        plain = np.asarray(rope_frequencies(dataclasses.replace(config, rope_scaling=None)))
        factors = (plain.astype(np.float64) / slow).astype(np.float32)
        yield _Entry(ROPE_FACTORS, "F32", factors.shape, lambda: (factors, 0.0))
    for shape, path, layer in tensor_places(config).values():
        name = gguf_name(path, layer)
        yield _entry(name, shape, model, variables, path, layer, type)


def gguf_name(path: Keys, layer: int | None) -> str:
    """Name of a tensor in the file; the path is one of `model.tree.weight_shapes`.

    Examples:
        >>> gguf_name(("self_attn", "q_proj"), 3), gguf_name(("self_attn", "q_proj", "bias"), 0)
        ('blk.3.attn_q.weight', 'blk.0.attn_q.bias')
        >>> gguf_name(("lm_head",), None)
        'output.weight'
    """
    leaf = BIAS if path[-1] == BIAS else "weight"
    name = _NAMES[path[:-1] if leaf == BIAS else path]
    return f"{name}.{leaf}" if layer is None else f"blk.{layer}.{name}.{leaf}"


def _entry(
    name: str,
    shape: tuple[int, ...],
    model: Llama,
    variables: Mapping[str, Tree],
    path: Keys,
    layer: int | None,
    type: str,
) -> _Entry:
    config = model.config
    order = row_order(config, path, shape[0])
    weight = None
    if type == EXACT and layer is not None:
        weight = stored_weight(variables["base"], config, path, layer)
    if isinstance(weight, QTensor):
        kind = exact_type(name, weight)

        def codes() -> tuple[np.ndarray, float]:
            packed = stored_weight(variables["base"], config, path, layer or 0)
            data, off = exact_blocks(packed, kind)
            return data[order], off

        return _Entry(name, kind, shape, codes)
    kind = _type(shape, path, type, variables["base"]["embed_tokens"]["weight"].dtype)

    def values() -> tuple[np.ndarray, float]:
        found = tensor_values(model, variables, path, layer)
        return _quantized(name, found, kind, type)[order], 0.0

    return _Entry(name, kind, shape, values)


def _type(shape: tuple[int, ...], path: Keys, type: str, stored: np.dtype) -> str:
    """The type of a tensor that is not written exactly as codes."""
    if len(shape) == 1:
        return "F32"
    if type == EXACT:
        return {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[str(stored)]
    if type in ("f16", "bf16"):
        return type.upper()
    if shape[1] % _BLOCK:
        return "F16"
    is_table = path in (("embed_tokens",), ("lm_head",))
    return "Q8_0" if is_table else type.upper()


def row_order(config: LlamaConfig, path: Keys, rows: int) -> slice | np.ndarray:
    """The rows of a tensor in the order of the file: the inverse of `files.gguf_model`.

    Hugging Face rotates values i and i + half of a head together. llama.cpp rotates neighbors in
    some models (`PAIRED`).
    """
    name = path[-2] if path[-1] == BIAS else path[-1]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if name not in heads or _ARCHITECTURES[config.model_type] not in PAIRED:
        return slice(None)
    return np.arange(rows).reshape(heads[name], 2, -1).swapaxes(1, 2).ravel()


def _quantized(name: str, values: np.ndarray, kind: str, type: str) -> np.ndarray:
    """The values of a tensor in its type: bytes, or floats for the float types."""
    import gguf

    target = gguf.GGMLQuantizationType[kind]
    step = max(1, _PART // math.prod(values.shape[1:]))
    out = np.empty(0)
    for start in range(0, len(values), step):
        part = values[start : start + step].astype(np.float32)
        # Scales and minima of blocks are float16 too.
        if kind not in ("F32", "BF16") and np.abs(part).max() > np.finfo(np.float16).max:
            raise ValueError(
                f"type = {type!r}: {kind} cannot hold all values of {name}; expected bf16"
            )
        found = gguf.quantize(part, target)
        if start == 0:
            out = np.empty((len(values), *found.shape[1:]), found.dtype)
        out[start : start + len(found)] = found
    return out
