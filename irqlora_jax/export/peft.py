"""Adapters in and out: PEFT's LoRA and the released IR-QLoRA code's, as trees of this package."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Int

from irqlora_jax.adapters import METHODS
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.lora import Params
from irqlora_jax.files.small import read_json
from irqlora_jax.files.tensors import Header, check_float, read_headers, read_into, write_tensors
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import (
    ADAPTER,
    ADAPTER_CONFIG,
    Keys,
    Tree,
    adapter_name,
    insert,
    linear_path,
)
from irqlora_jax.sharding import LINEAR_NAMES
from irqlora_jax.text import first_few


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
    if file.name == ADAPTER and file.with_name(ADAPTER_CONFIG).is_file():
        _check_adapter_config(file.with_name(ADAPTER_CONFIG), adapter)
    headers = read_headers(file)
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
        raise ValueError(f"{file}: no tensor {first_few(missing)}")
    if extra:
        targets = ", ".join(adapter.targets)
        raise ValueError(
            f"{file}: tensors that do not belong to a {depth}-layer LLaMA with adapter.targets "
            f"{targets}: {first_few([names[name] for name in extra])}"
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
        insert(adapters, ("layers", *path), leaves_out)
    return adapters


def save_adapter(
    folder: Path,
    model: Llama,
    adapters: Tree,
    *,
    base_model: str | None = None,
    fold: bool = True,
    dtype: str = "float32",
) -> None:
    """Writes adapter_model.safetensors and adapter_config.json, as PEFT reads them.

    Args:
        folder: where to; it must be there.
        model: the model of the adapter.
        adapters: as `Llama.init_adapters` and `load_adapter` give them.
        base_model: what base_model_name_or_path says: folder or hub id of the weights that the
            adapter was trained on.
        fold: write IEC as the plain pair that computes the same. False keeps its scalars, as the
            released code does; PEFT ignores them without a word.
        dtype: of the tensors; the folding is done in float32.

    Raises:
        ValueError: no adapter; a number that `dtype` cannot hold.
    """
    adapter = model.adapter
    if adapter is None:
        raise ValueError("model.adapter = None: accepted is a model with an adapter")
    places = [
        (linear_path(name), layer)
        for layer in range(model.config.num_hidden_layers)
        for name in LINEAR_NAMES
        if name in adapter.targets
    ]

    def leaves(path: Keys, layer: int | Array) -> dict[str, Array]:
        params = adapters["layers"][path[0]][path[1]]
        if fold:
            return folded(params, layer, adapter.method)
        # A file keeps a scalar as [1].
        return {leaf: jnp.atleast_1d(stack[layer]) for leaf, stack in params.items()}

    shapes = {
        adapter_name(path, layer, leaf): value.shape
        for path, layer in places
        for leaf, value in jax.eval_shape(lambda path=path: leaves(path, 0)).items()
    }
    parts = (
        (adapter_name(path, layer, leaf), np.asarray(value))
        for path, layer in places
        for leaf, value in leaves(path, layer).items()
    )
    write_tensors(folder / ADAPTER, shapes, dtype, parts)
    alpha = adapter.alpha
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": adapter.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": adapter.dropout,
        # Without them PEFT takes its own choice of layers and drops the other tensors in silence.
        "target_modules": list(adapter.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


@functools.partial(jax.jit, static_argnames="method")
def folded(params: Params, layer: Int[ArrayLike, ""], method: str) -> Params:
    """The plain pair of one layer of a stacked adapter, in float32."""
    return METHODS[method].fold({k: v[layer].astype(jnp.float32) for k, v in params.items()})


def _adapter_file(source: Path) -> Path:
    if source.is_file():
        if source.suffix != ".safetensors":
            raise ValueError(f"{source}: accepted is a .safetensors file, or a folder with one")
        return source
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such adapter file or folder")
    if (source / ADAPTER).is_file():
        return source / ADAPTER
    if (source / "adapter_model.bin").is_file():
        raise ValueError(
            f"{source}: the adapter is a pickle (adapter_model.bin), which is never opened; "
            "convert it elsewhere with save_pretrained(folder, safe_serialization=True)"
        )
    raise FileNotFoundError(f"{source}: no {ADAPTER}")


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
    values = read_json(file)
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
    header: Header, key: str, shape: tuple[int, int] | None, adapter: AdapterConfig
) -> np.ndarray:
    """One tensor as float32; shape None: a scalar, which files keep as [1]."""
    check_float(header, key)
    if header.shape != (shape or (1,)):
        raise ValueError(
            f"{header.file}: {key} has shape {header.shape}: accepted is {shape or (1,)} "
            f"(adapter.rank = {adapter.rank})"
        )
    value = np.empty(header.shape, np.float32)
    read_into(value, header, key)
    return value.reshape(shape or ())
