"""Hugging Face files: LLaMA folders and PEFT adapters in, as trees of this package.

Weights are read one tensor at a time and quantized before the next one is read, so that a model
needs little more host memory than its packed form. Only safetensors are opened, never pickles.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from irqlora_jax.config import LINEAR_NAMES, AdapterConfig, QuantConfig
from irqlora_jax.llama import Llama, LlamaConfig
from irqlora_jax.quant.qtensor import quantize

Tree = dict[str, Any]
Keys = tuple[str, ...]

_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PART = 2**19  # numbers that are read from a file at a time
_ADAPTER, _ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# "consolidated.safetensors" and "original/" repeat the weights under other names: not fetched.
_FETCHED = ("model*.safetensors", "*.json", "tokenizer*", "*.jinja")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")

ADAPTER_LEAVES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "beta1": "lora_A_scale",
    "beta2": "lora_B_scale",
}
"""Our name and the file's. The two scalars are those of released IR-QLoRA adapters."""


@dataclasses.dataclass(frozen=True)
class _Header:
    """What a safetensors file says of a tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def linear_path(name: str) -> Keys:
    """Where a linear layer stands in a decoder layer: q_proj -> (self_attn, q_proj)."""
    block = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return block, name


def weight_name(path: Keys, layer: int | None = None) -> str:
    """Name of a weight in a LLaMA file: (self_attn, q_proj), 3 ->
    model.layers.3.self_attn.q_proj.weight."""
    prefix = "" if path == ("lm_head",) else "model."
    middle = "" if layer is None else f"layers.{layer}."
    return f"{prefix}{middle}{'.'.join(path)}.weight"


def adapter_name(path: Keys, layer: int, leaf: str) -> str:
    """Name of a part of an adapter in a PEFT file, `leaf` one of `ADAPTER_LEAVES`."""
    return f"base_model.model.model.layers.{layer}.{'.'.join(path)}.{ADAPTER_LEAVES[leaf]}"


def snapshot(source: str | Path) -> Path:
    """The local folder of a model; one that is not here is fetched from the Hugging Face hub.

    Raises:
        FileNotFoundError: no such folder, and nothing that the hub can or will give.
        NotADirectoryError: the path is a file.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"model = '{source}': a file; accepted is the folder it lies in")
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source):
        raise FileNotFoundError(f"model = '{source}': no such folder")
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    way_out = "or give a local folder"
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=list(_FETCHED)))
    except GatedRepoError:
        reason = "the hub asks you to accept the model's license and to log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = (
            "neither a local folder nor a model that the hub shows you; check the name, log in "
            "with `hf auth login` if it is private"
        )
    except Exception as error:
        # Of many types. Their text may quote the headers of the request, and with them the token.
        reason = f"no such folder, and the hub could not be reached ({type(error).__name__})"
        way_out = "connect to the network, or give a local folder"
    raise FileNotFoundError(f"model = '{source}': {reason}, {way_out}")


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a folder or of a model on the hub (a transformers tokenizer).

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: its files cannot be read.
    """
    folder = snapshot(source)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise FileNotFoundError(f"{folder}: no tokenizer (tokenizer.json or tokenizer.model)")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        hint = ""
        if not (folder / "tokenizer.json").is_file():
            hint = " (a tokenizer.model needs the package sentencepiece)"
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder}: the tokenizer cannot be read{hint}: {reason}") from error


def load_base(
    source: str | Path, quant: QuantConfig | None, *, progress: bool = False
) -> tuple[Tree, LlamaConfig]:
    """Reads a LLaMA and quantizes its linear layers; the head and the embeddings stay as they are.

    Args:
        source: local folder, or id on the hub.
        quant: how; None or format "none" keeps the weights in the type of the file.
        progress: show a bar.

    Returns:
        The frozen weights, stacked over the layers, and the architecture.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: what is wrong with which file.
    """
    from tqdm import tqdm

    folder = snapshot(source)
    config = read_config(folder)
    found = _find_weights(folder)
    _check_weights(folder, found, config)
    layered, single = _shapes(config)
    total = sum(map(math.prod, single.values()))
    total += config.num_hidden_layers * sum(map(math.prod, layered.values()))
    with tqdm(
        total=total, desc="Loading", unit=" weights", unit_scale=True, disable=not progress
    ) as bar:
        base: Tree = {"layers": _load_layers(found, config, quant, bar)}
        for path, shape in single.items():
            name = weight_name(path)
            weight = _empty(shape, _FLOATS[found[name].dtype])
            _read_into(weight, found[name], name)
            _insert(base, path, {"weight": _to_device([weight])})
            bar.update(math.prod(shape))
    return base, config


def load_adapter(source: str | Path, model: Llama) -> Tree:
    """Reads a LoRA adapter of PEFT or an adapter of the released IR-QLoRA code.

    A plain LoRA pair serves an IEC model too, with both scalars 0.

    Args:
        source: a .safetensors file, or a folder with adapter_model.safetensors.
        model: the model that it is for.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: not an adapter of this model; the message says what differs.
    """
    adapter = model.adapter
    if adapter is None:
        raise ValueError("model.adapter = None: accepted is the AdapterConfig of what is loaded")
    file = _adapter_file(Path(source).expanduser())
    if file.name == _ADAPTER and file.with_name(_ADAPTER_CONFIG).is_file():
        _check_adapter_config(file.with_name(_ADAPTER_CONFIG), adapter)
    headers = _headers(file)
    # PEFT's layers carry the name of the adapter, its files leave it out; the released IR-QLoRA
    # code has it in the scalars (lora_default_A_scale).
    names = {
        name.replace(".default", "").replace("lora_default_", "lora_"): name for name in headers
    }
    if len(names) < len(headers):
        raise ValueError(f"{file}: tensors of several adapters; accepted is one")
    leaves = ["lora_A", "lora_B"]
    if any(name.endswith("_scale") for name in names):
        leaves += ["beta1", "beta2"]
    depth = model.config.num_hidden_layers
    paths = [linear_path(name) for name in LINEAR_NAMES if name in adapter.targets]
    wanted = {adapter_name(p, i, leaf) for p in paths for i in range(depth) for leaf in leaves}
    missing, extra = sorted(wanted - set(names)), sorted(set(names) - wanted)
    if missing:
        raise ValueError(f"{file}: no tensor {_some(missing)}")
    if extra:
        targets = ", ".join(adapter.targets)
        raise ValueError(
            f"{file}: tensors that do not belong to a {depth}-layer LLaMA with adapter.targets "
            f"{targets}: {_some([names[name] for name in extra])}"
        )
    adapters: Tree = {}
    for path in paths:
        out_features, in_features = model.config.linear_shapes[path[-1]]
        shapes = {"lora_A": (adapter.rank, in_features), "lora_B": (out_features, adapter.rank)}
        parts = {}
        for leaf in leaves:
            keys = [names[adapter_name(path, layer, leaf)] for layer in range(depth)]
            shape = shapes.get(leaf)
            parts[leaf] = np.stack([_read_adapter(headers[k], k, shape, adapter) for k in keys])
            if leaf not in shapes and adapter.method == "lora" and parts[leaf].any():
                key = keys[int(np.flatnonzero(parts[leaf])[0])]
                raise ValueError(
                    f"{file}: {key} is not 0, so this adapter needs adapter.method iec, not lora"
                )
        if adapter.method == "lora":
            parts = {leaf: parts[leaf] for leaf in shapes}
        else:
            zero = np.zeros(depth, np.float32)
            parts = {"beta1": zero, "beta2": zero} | parts
        dtype = jnp.dtype(adapter.dtype)
        leaves_out = {leaf: jnp.asarray(value, dtype) for leaf, value in parts.items()}
        _insert(adapters, ("layers", *path), leaves_out)
    return adapters


def _load_layers(
    found: Mapping[str, _Header], config: LlamaConfig, quant: QuantConfig | None, bar: Any
) -> Tree:
    """Fills arrays on the host, stacked over the layers, and moves them to the device."""
    depth, shapes = config.num_hidden_layers, _shapes(config)[0]
    if quant is not None and quant.format == "none":
        quant = None
    # Every matrix passes through this one buffer: the allocator may keep what is freed.
    largest = 0 if quant is None else max(map(math.prod, shapes.values()))
    buffer = _empty((largest,), np.float32)
    stacks: dict[Keys, list[np.ndarray]] = {}  # the leaves of a QTensor, or one float array
    structures: dict[Keys, Any] = {}
    for layer in range(depth):
        for path, shape in shapes.items():
            name = weight_name(path, layer)
            if quant is None or path[-1] not in LINEAR_NAMES:
                if path not in stacks:
                    stacks[path] = [_empty((depth, *shape), _FLOATS[found[name].dtype])]
                    structures[path] = jax.tree.structure(0)
                _read_into(stacks[path][0][layer], found[name], name)
            else:
                weight = buffer[: math.prod(shape)].reshape(shape)
                _read_into(weight, found[name], name)
                packed = quantize(jax.device_put(weight, may_alias=True), quant)
                leaves, structures[path] = jax.tree.flatten(packed)
                if path not in stacks:
                    stacks[path] = [_empty((depth, *leaf.shape), leaf.dtype) for leaf in leaves]
                for stack, leaf in zip(stacks[path], leaves, strict=True):
                    stack[layer] = leaf  # waits for the result, so that the buffer is free again
            bar.update(math.prod(shape))
    layers: Tree = {}
    for path in shapes:
        moved = [_to_device(stacks[path]) for _ in range(len(stacks[path]))]
        _insert(layers, path, {"weight": jax.tree.unflatten(structures[path], moved)})
    return layers


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array on a 64-byte boundary, which a CPU device takes over without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _to_device(arrays: list[np.ndarray]) -> jax.Array:
    """Moves the first array out of the list; unless the device takes it over, it is freed."""
    return jax.block_until_ready(jax.device_put(arrays.pop(0), may_alias=True))


def _headers(file: Path) -> dict[str, _Header]:
    """The headers of all tensors of a file."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {
                name: _Header(file, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole safetensors file: {error}") from error


def _check_float(header: _Header, name: str) -> None:
    if header.dtype not in _FLOATS:
        accepted = ", ".join(_FLOATS.values())
        raise ValueError(f"{header.file}: {name} has type {header.dtype}: accepted is {accepted}")


def _read_into(out: np.ndarray, header: _Header, name: str) -> None:
    """Copies a tensor of the shape of `out`, part by part, and refuses NaN and infinity."""
    rows = max(1, _PART * header.shape[0] // max(1, math.prod(header.shape)))
    for start in range(0, header.shape[0], rows):
        stop = min(start + rows, header.shape[0])
        # Opened for each part: what was read of a mapped file counts as memory until it is closed.
        try:
            with safe_open(header.file, framework="numpy") as tensors:
                part = tensors.get_slice(name)[start:stop]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{header.file}: {name} cannot be read: {error}") from error
        if not np.isfinite(part).all():
            raise ValueError(f"{header.file}: {name} has NaN or infinite values")
        out[start:stop] = part


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file.parent}: no {file.name}") from None
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: a JSON {type(values).__name__}; accepted is an object")
    return values


def read_config(source: str | Path) -> LlamaConfig:
    """The architecture of a folder or of a model on the hub.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ValueError: not a float LLaMA.
    """
    folder = snapshot(source)
    values = _read_json(folder / "config.json")
    if values.get("quantization_config"):
        raise ValueError(f"{folder}: quantized already; accepted are float weights")
    try:
        return LlamaConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}: {error}") from error


def _find_weights(folder: Path) -> dict[str, _Header]:
    """The headers of all weights, from one file or from the shards that the index names."""
    if (folder / _SINGLE).is_file():
        return _headers(folder / _SINGLE)
    if not (folder / _INDEX).is_file():
        suffixes = (".bin", ".pt", ".pth")
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in suffixes)
        if pickles:
            raise ValueError(
                f"{folder}: its weights are pickles ({_some(pickles)}), which are never opened; "
                "convert them elsewhere with save_pretrained(folder, safe_serialization=True)"
            )
        raise FileNotFoundError(f"{folder}: no weights ({_SINGLE} or {_INDEX})")
    shards = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(v, str) for v in shards.values()):
        raise ValueError(f"{folder / _INDEX}: no weight_map from tensors to files")
    found: dict[str, _Header] = {}
    for shard in sorted(set(shards.values())):
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{folder / _INDEX}: names {shard}, which is not there")
        found |= _headers(folder / shard)
    return found


def _shapes(config: LlamaConfig) -> tuple[dict[Keys, tuple[int, ...]], dict[Keys, tuple]]:
    """Shapes of the weights of a layer, and of those outside the layers."""
    norm, table = (config.hidden_size,), (config.vocab_size, config.hidden_size)
    layered = {linear_path(name): config.linear_shapes[name] for name in LINEAR_NAMES}
    layered |= {("input_layernorm",): norm, ("post_attention_layernorm",): norm}
    single = {("embed_tokens",): table, ("norm",): norm}
    if not config.tie_word_embeddings:
        single[("lm_head",)] = table
    return layered, single


def _check_weights(folder: Path, found: Mapping[str, _Header], config: LlamaConfig) -> None:
    """Refuses a folder before anything of it is read, if its weights are not those of `config`."""
    layered, single = _shapes(config)
    expected: dict[str, tuple[tuple[int, ...], str]] = {}
    for path, shape in single.items():
        expected[weight_name(path)] = shape, weight_name(path)
    for path, shape in layered.items():
        for layer in range(config.num_hidden_layers):
            expected[weight_name(path, layer)] = shape, weight_name(path, 0)
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(f"{folder}: no tensor {_some(missing)}")
    for name, (shape, first) in expected.items():
        header = found[name]
        _check_float(header, name)
        if header.shape != shape:
            raise ValueError(
                f"{header.file}: {name} has shape {header.shape}: config.json says {shape}"
            )
        if header.dtype != found[first].dtype:
            raise ValueError(
                f"{header.file}: {name} has type {_FLOATS[header.dtype]}, but {first} has "
                f"{_FLOATS[found[first].dtype]}: accepted is one type for all layers"
            )
    # Old files carry the rotary frequencies, tied ones may repeat the embeddings.
    spare = [name for name in found if name not in expected]
    spare = [name for name in spare if not name.endswith("rotary_emb.inv_freq")]
    spare = [name for name in spare if name != "lm_head.weight"]
    if spare:
        raise ValueError(
            f"{found[spare[0]].file}: tensors that config.json does not account for: {_some(spare)}"
        )


def _adapter_file(source: Path) -> Path:
    if source.is_file():
        if source.suffix != ".safetensors":
            raise ValueError(f"{source}: accepted is a .safetensors file, or a folder with one")
        return source
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such adapter file or folder")
    if (source / _ADAPTER).is_file():
        return source / _ADAPTER
    if (source / "adapter_model.bin").is_file():
        raise ValueError(
            f"{source}: the adapter is a pickle (adapter_model.bin), which is never opened; "
            "convert it elsewhere with save_pretrained(folder, safe_serialization=True)"
        )
    raise FileNotFoundError(f"{source}: no {_ADAPTER}")


# Fields of adapter_config.json that change the function, with the values that do not (default
# first). The initializations left out here (PiSSA and the like) also change the base.
_PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (False,),
    "use_dora": (False,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


def _check_adapter_config(file: Path, adapter: AdapterConfig) -> None:
    values = _read_json(file)
    for name, accepted in _PLAIN_LORA.items():
        value = values.get(name, accepted[0])
        if value not in accepted:
            raise ValueError(f"{file}: {name} = {value!r}: accepted is {accepted[0]!r}")
    for theirs, ours in (("r", "rank"), ("lora_alpha", "alpha")):
        value, wanted = values.get(theirs, 8), getattr(adapter, ours)  # 8: the default of PEFT
        if value != wanted:
            raise ValueError(f"{file}: {theirs} = {value!r}, but adapter.{ours} = {wanted!r}")
    targets = values.get("target_modules")
    if targets == "all-linear":
        targets = list(LINEAR_NAMES)
    if isinstance(targets, list):  # a regular expression is left to the names of the tensors
        names = {str(name).rpartition(".")[2] for name in targets}
        if names != set(adapter.targets):
            raise ValueError(
                f"{file}: target_modules = {', '.join(sorted(names))}, but adapter.targets = "
                + ", ".join(sorted(adapter.targets))
            )


def _read_adapter(
    header: _Header, key: str, shape: tuple[int, int] | None, adapter: AdapterConfig
) -> np.ndarray:
    """One tensor as float32; shape None: a scalar, which files keep as [1]."""
    _check_float(header, key)
    if header.shape != (shape or (1,)):
        raise ValueError(
            f"{header.file}: {key} has shape {header.shape}: accepted is {shape or (1,)} "
            f"(adapter.rank = {adapter.rank})"
        )
    value = np.empty(header.shape, np.float32)
    _read_into(value, header, key)
    return value.reshape(shape or ())


def _insert(tree: Tree, path: Keys, value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def _some(names: list[str]) -> str:
    """The first names of a list, and how many there are besides."""
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")
