"""Reads GGUF files of LLaMAs: metadata, and tensors row by row with the names of Hugging Face.

The header is read here, because the reader of the library `gguf` makes an array for every token.
The library dequantizes.
Source: the GGUF specification (github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import dataclasses
import math
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from irqlora_jax.files.tensors import FLOATS, Header
from irqlora_jax.model.attention import rope_frequencies
from irqlora_jax.model.config import LlamaConfig, RopeScaling
from irqlora_jax.model.tree import Keys, linear_path, weight_name
from irqlora_jax.text import first_few, require, shorten

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0")
TYPES += ("Q4_K", "Q4_1", "Q4_0", "Q3_K", "Q2_K")
"""Types of tensors that are read."""
_NUMBERS = dict(enumerate(("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?")))
_NUMBERS |= {10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
LAYER_NAMES = {
    "attn_norm": ("input_layernorm",),
    "ffn_norm": ("post_attention_layernorm",),
    "attn_q": linear_path("q_proj"),
    "attn_k": linear_path("k_proj"),
    "attn_v": linear_path("v_proj"),
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


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor as it is stored.

    Attributes:
        type: one of `TYPES`.
        shape: rows first, as in numpy.
        offset: of the first byte in the file.
        row: size of a row in bytes; of an element, if there is only one dimension.
    """

    type: str
    shape: tuple[int, ...]
    offset: int
    row: int


@dataclasses.dataclass(frozen=True)
class Gguf:
    """The header of a file: metadata by key, and tensors by their name in the file."""

    file: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


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
        values = _dequantize(self.file, self.stored, _row_order(self, first, stop))
        with np.errstate(over="ignore"):  # the caller refuses values that are not finite
            whole = values.reshape(-1, *self.shape[1:]).astype(FLOATS[self.dtype], copy=False)
        return whole if columns is None else whole[:, columns]


def _row_order(header: GgufHeader, first: int, stop: int) -> slice | np.ndarray:
    """Places in the file of consecutive rows.

    A rotation turns pairs of values: values i and i + half in Hugging Face's order, and neighbors
    in the order of the file.
    """
    if not header.heads:
        return slice(first, stop)
    head = header.shape[0] // header.heads
    start, row = np.divmod(np.arange(first, stop), head)
    half, place = np.divmod(row, head // 2)
    return start * head + 2 * place + half


def _dequantize(file: Path, tensor: Tensor, places: slice | np.ndarray) -> np.ndarray:
    """Reads rows as float32. The file is mapped only meanwhile: mapped pages count as memory."""
    import gguf

    try:
        shape = (tensor.shape[0], tensor.row)
        data = np.array(np.memmap(file, np.uint8, "r", tensor.offset, shape)[places])
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error
    return gguf.dequantize(data, gguf.GGMLQuantizationType[tensor.type])


def is_gguf(source: str | Path) -> bool:
    """Whether a path names a GGUF file, which need not exist."""
    return Path(source).suffix.lower() == ".gguf" and not Path(source).expanduser().is_dir()


def read_gguf(source: str | Path) -> Gguf:
    """Reads the header of a GGUF file, and checks that the file holds a whole LLaMA.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a GGUF file, damaged or truncated, a part of several files, another
            architecture, or a type of tensors that is not read.
    """
    file = Path(source).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"model = '{file}': no such file")
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            if size < 4 or opened.read(4) != b"GGUF":
                raise ValueError(f"{file}: not a GGUF file")
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                found = _parse(file, _Cursor(data, 4))
    except EOFError:
        raise ValueError(f"{file}: truncated in its header ({size:,} bytes)") from None
    for name, tensor in found.tensors.items():
        end = tensor.offset + tensor.row * tensor.shape[0]
        if end > size:
            raise ValueError(
                f"{file}: truncated: {name} ends at byte {end:,}, the file has {size:,}"
            )
    return found


class _Cursor:
    """Reads values one after the other."""

    def __init__(self, data: mmap.mmap, place: int) -> None:
        self.data, self.place = data, place

    def take(self, size: int) -> bytes:
        start, self.place = self.place, self.place + size
        if self.place > len(self.data):
            raise EOFError
        return self.data[start : self.place]

    def integer(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def string(self) -> str:
        return self.take(self.integer(8)).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.integer(4), self.integer(8)
            if inner == _STRING:
                return [self.string() for _ in range(count)]
            return self.numbers(inner, count).tolist()
        (number,) = self.numbers(kind, 1)
        # The shortest number with the same float32: 1e-05, not 9.999999747378752e-06.
        return float(str(number)) if number.dtype == np.float32 else number.item()

    def numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in _NUMBERS:
            raise ValueError(f"unknown type {kind} of a value")
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)


def _parse(file: Path, cursor: _Cursor) -> Gguf:
    version = cursor.integer(4)
    # Of a file for computers with another order of bytes, the version is at least 2**16.
    require(version in (2, 3), f"{file}: version of GGUF", version, "2 or 3, little-endian")
    tensor_count, field_count = cursor.integer(8), cursor.integer(8)
    try:
        fields = {cursor.string(): cursor.value(cursor.integer(4)) for _ in range(field_count)}
        described = [_describe(cursor) for _ in range(tensor_count)]
    except ValueError as error:
        raise ValueError(f"{file}: damaged: {error}") from None
    _check_kind(file, fields)
    alignment = fields.get("general.alignment", 32)
    ok = isinstance(alignment, int) and alignment > 0
    require(ok, f"{file}: general.alignment", alignment, "a whole number of at least 1")
    start = -(-cursor.place // alignment) * alignment
    tensors = {each[0]: _tensor(file, start, *each) for each in described}
    return Gguf(file, fields, tensors)


def _describe(cursor: _Cursor) -> tuple[str, list[int], int, int]:
    """Reads name, dimensions (columns first), number of the type, and offset of a tensor."""
    name, dimensions = cursor.string(), cursor.integer(4)
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise ValueError(f"{shorten(name, quoted=False)} has {dimensions} dimensions")
    sizes = [cursor.integer(8) for _ in range(dimensions)]
    return name, sizes, cursor.integer(4), cursor.integer(8)


def _tensor(
    file: Path, start: int, name: str, dimensions: Sequence[int], number: int, offset: int
) -> Tensor:
    import gguf

    known = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    type = known.get(number, f"number {number}")
    if type not in TYPES:
        raise ValueError(f"{file}: {name} has type {type}: expected one of {', '.join(TYPES)}")
    per_block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]
    columns, rest = (dimensions[0], dimensions[1:]) if len(dimensions) > 1 else (1, dimensions)
    if columns % per_block or min(dimensions) < 1:
        raise ValueError(
            f"{file}: {name} has dimensions {dimensions}: expected rows of whole blocks of "
            f"{per_block} ({type})"
        )
    row = columns // per_block * size
    return Tensor(type, tuple(reversed(dimensions)), start + offset, row * math.prod(rest[1:]))


def _check_kind(file: Path, fields: Mapping[str, Any]) -> None:
    parts = fields.get("split.count", 0)
    if parts not in (0, 1):
        number = fields.get("split.no", 0)
        raise ValueError(
            f"{file}: part {number + 1 if isinstance(number, int) else shorten(number)} of "
            f"{shorten(parts)}; expected one file, as llama-gguf-split --merge writes it"
        )
    expected = {"general.architecture": "llama", "general.type": "model", "llama.expert_count": 0}
    for name, wanted in expected.items():
        value = fields.get(name, None if name == "general.architecture" else wanted)
        require(value == wanted, f"{file}: {name}", value, repr(wanted))


def config_values(found: Gguf) -> dict[str, Any]:
    """Describes the model in a GGUF file as config.json would.

    Raises:
        ValueError: something is missing, or the rotary settings are not supported.
    """
    fields, tensors = found.fields, found.tensors
    llama = {key.removeprefix("llama."): value for key, value in fields.items()}
    missing = [f"llama.{key}" for key in _NEEDED if key not in llama]
    missing += [name for name in (_TABLE,) if name not in tensors]
    if missing:
        raise ValueError(f"{found.file}: has no {first_few(missing)}")
    tokens = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in _TOKENS}
    ends = [tokens[name] for name in ENDS]
    ends = [end for place, end in enumerate(ends) if end is not None and end not in ends[:place]]
    values = {
        "model_type": "llama",
        "num_hidden_layers": llama["block_count"],
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_attention_heads": llama["attention.head_count"],
        "num_key_value_heads": llama.get("attention.head_count_kv"),
        "head_dim": llama.get("attention.key_length", llama.get("rope.dimension_count")),
        "rms_norm_eps": llama["attention.layer_norm_rms_epsilon"],
        "rope_theta": llama.get("rope.freq_base"),
        "max_position_embeddings": llama["context_length"],
        "vocab_size": tensors[_TABLE].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": tokens["bos"],
        "eos_token_id": ends or None,
        "pad_token_id": tokens["padding"],
        "dtype": FLOATS[_dtype(tensors[_TABLE].type)],
    }
    size = read_llama(found.file, values).head_dim
    for key in ("attention.value_length", "rope.dimension_count"):
        given = llama.get(key, size)
        require(given == size, f"{found.file}: llama.{key}", given, f"{size}, the size of a head")
    return values | {"rope_scaling": _rope_scaling(found, values)}


def _rope_scaling(found: Gguf, values: dict[str, Any]) -> dict[str, Any] | None:
    """The scaling of the rotary frequencies. LLaMA 3 has no settings in the file, but factors."""
    prefix = "llama.rope.scaling."
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
    factors = _dequantize(found.file, found.tensors[ROPE_FACTORS], slice(None)).reshape(-1)
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
        ValueError: the file has tensors that are not read, such as biases.
    """
    places = {name: _hugging_face(name) for name in found.tensors if name != ROPE_FACTORS}
    spare = [name for name, place in places.items() if place is None]
    if spare:
        raise ValueError(
            f"{found.file}: cannot read these tensors: {first_few(spare)}; "
            "expected the matrices and norms of a LLaMA"
        )
    named = {name: place for name, place in places.items() if place is not None}
    types: dict[Keys, set[str]] = {}
    for name, (path, _) in named.items():
        types.setdefault(path, set()).add(_dtype(found.tensors[name].type))
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    headers: dict[str, Header] = {}
    for name, (path, layer) in named.items():
        tensor = found.tensors[name]
        dtype = _dtype(tensor.type) if len(types[path]) == 1 else "F32"
        header = GgufHeader(found.file, tensor.shape, dtype, tensor, heads.get(path[-1], 0))
        headers[weight_name(path, layer)] = header
    return headers


def _hugging_face(name: str) -> tuple[Keys, int | None] | None:
    """Path and layer of a tensor (`model.tree`), or None for tensors that are not read.

    Examples:
        >>> _hugging_face("blk.3.attn_q.weight"), _hugging_face("blk.3.attn_q.bias")
        ((('self_attn', 'q_proj'), 3), None)
    """
    match name.split("."):
        case [kind, "weight"] if kind in SINGLE_NAMES:
            return SINGLE_NAMES[kind], None
        case ["blk", layer, kind, "weight"] if layer.isdecimal() and kind in LAYER_NAMES:
            return LAYER_NAMES[kind], int(layer)
    return None


def _dtype(type: str) -> str:
    return type if type in FLOATS else "F16"
