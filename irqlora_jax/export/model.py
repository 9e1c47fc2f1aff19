"""Writes a base, with or without its adapter, as a Hugging Face model folder.

One matrix at a time is dequantized, merged and written. So the host needs little more memory than
the packed model.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float32, Int

from irqlora_jax.adapters import scales
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.method import Params
from irqlora_jax.files.tensors import write_tensors
from irqlora_jax.messages import progress_bar
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import (
    INDEX,
    LAYERS,
    SINGLE,
    Keys,
    Tree,
    find_stack,
    leaf_path,
    weight_name,
    weight_shapes,
)
from irqlora_jax.quant.qtensor import QTensor


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor that is computed when it is written.

    Attributes:
        shape: of the tensor.
        dtype: name of its type in the file.
        values: computes it.
    """

    shape: tuple[int, ...]
    dtype: str
    values: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def save_model(
    folder: Path,
    model: Llama,
    variables: Mapping[str, Tree],
    *,
    dtype: str,
    shard_size: float = 5.0,
    progress: bool = False,
) -> None:
    """Writes config.json and the dequantized weights, plus the scaled update of adapted layers.

    Sums are computed in float32 and rounded once, to `dtype`.

    Args:
        folder: existing folder to write to.
        model: the architecture. Without `model.adapter`, only the base is written.
        variables: {"params": adapters, "base": base}.
        dtype: float32, bfloat16 or float16.
        shard_size: largest file of weights, in GB. A larger tensor gets its own file.
        progress: show a bar.

    Raises:
        ValueError: a value is out of the range of `dtype`.
    """
    parts = {
        name: Part(shape, dtype, functools.partial(tensor_values, model, variables, path, layer))
        for name, (shape, path, layer) in tensor_places(model.config).items()
    }
    save_parts(folder, parts, shard_size=shard_size, progress=progress)
    save_config(folder, model.config, dtype)


def save_parts(
    folder: Path, parts: Mapping[str, Part], *, shard_size: float = 5.0, progress: bool = False
) -> None:
    """Writes tensors to one file, or to several and an index.

    Args:
        folder: existing folder to write to.
        parts: the tensors by name, in the order of the files.
        shard_size: largest file, in GB. A larger tensor gets its own file.
        progress: show a bar.

    Raises:
        ValueError: a value is out of the range of its type.
    """
    # Wide types first, so that every tensor lies at a multiple of its type's size.
    shards = [
        sorted(shard, key=lambda name: -np.dtype(parts[name].dtype).itemsize)
        for shard in _split(parts, 1e9 * shard_size)
    ]
    total = sum(math.prod(part.shape) for part in parts.values())
    weight_map: dict[str, str] = {}
    with progress_bar("Exporting", total, "weights", show=progress, unit_scale=True) as bar:

        def values(names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
            for name in names:
                yield name, parts[name].values()
                bar.update(math.prod(parts[name].shape))

        for number, names in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            file = SINGLE if len(shards) == 1 else file
            shapes = {name: parts[name].shape for name in names}
            types = {name: parts[name].dtype for name in names}
            write_tensors(folder / file, shapes, types, values(names))
            weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        sizes = {"total_parameters": total, "total_size": sum(p.nbytes for p in parts.values())}
        _write_json(folder / INDEX, {"metadata": sizes, "weight_map": weight_map})


def save_config(folder: Path, config: LlamaConfig, dtype: str, **more: Any) -> None:
    """Writes config.json. `more` are further fields."""
    # transformers 5 calls it dtype, older versions torch_dtype.
    values = config.to_dict() | {"dtype": dtype, "torch_dtype": dtype} | more
    _write_json(folder / "config.json", values)


def parameters(config: LlamaConfig) -> int:
    """Number of weights of a model."""
    return sum(math.prod(shape) for shape, _, _ in tensor_places(config).values())


def tensor_places(config: LlamaConfig) -> dict[str, tuple[tuple[int, ...], Keys, int | None]]:
    """Shape, path and layer of every tensor, in the order of the files."""
    layered, single = weight_shapes(config)
    head = {path: single.pop(path) for path in [("norm",), ("lm_head",)] if path in single}
    places: dict[str, tuple[tuple[int, ...], Keys, int | None]] = {
        weight_name(path): (shape, path, None) for path, shape in single.items()
    }
    for layer in range(config.num_hidden_layers):
        for path, shape in layered.items():
            places[weight_name(path, layer)] = shape, path, layer
    return places | {weight_name(path): (shape, path, None) for path, shape in head.items()}


def _split(parts: Mapping[str, Part], limit: float) -> list[list[str]]:
    """The names of the tensors of each shard, in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, part in parts.items():
        if shards[-1] and size + part.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += part.nbytes
    return shards


def tensor_values(
    model: Llama, variables: Mapping[str, Tree], path: Keys, layer: int | None
) -> np.ndarray:
    """One tensor of the model: float32 if it belongs to a layer, else its stored type."""
    base, adapters = variables["base"], variables["params"]
    if layer is None:
        return np.asarray(base[path[0]]["weight"])
    tree, place = _stacked(base, model.config, path, layer)
    adapter = model.adapter
    if adapter is None or path[-1] not in adapter.targets:
        return np.asarray(_one_dense(tree, place))
    params = adapters[LAYERS][path[0]][path[1]]
    return np.asarray(_merged(tree, place, params, layer, adapter))


def stored_weight(base: Mapping[str, Tree], config: LlamaConfig, path: Keys, layer: int) -> Any:
    """One weight of a layer as it is stored, a QTensor or an array."""
    tree, place = _stacked(base, config, path, layer)
    return jax.tree.map(lambda x: x[place], tree)


def _stacked(
    base: Mapping[str, Tree], config: LlamaConfig, path: Keys, layer: int
) -> tuple[Any, int]:
    """The stack that holds a weight, and the place of the layer in it."""
    tree, place = find_stack(base, layer, config.num_hidden_layers)
    for name in leaf_path(path):
        tree = tree[name]
    return tree, place


@jax.jit
def _one_dense(stack: Any, place: Int[ArrayLike, ""]) -> Float32[Array, "..."]:
    return _dense(jax.tree.map(lambda x: x[place], stack))


def _dense(one: Any) -> Float32[Array, "..."]:
    return one.dequantize() if isinstance(one, QTensor) else one.astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="adapter")
def _merged(
    stack: Any,
    place: Int[ArrayLike, ""],
    params: Params,
    layer: Int[ArrayLike, ""],
    adapter: AdapterConfig,
) -> Float32[Array, "out in"]:
    weight: Any = jax.tree.map(lambda x: x[place], stack)
    moved, own = scales.split({name: leaf[layer] for name, leaf in params.items()})
    if moved:
        weight = scales.put(moved, weight)
    weight = _dense(weight)
    rows, columns = weight.shape
    scale = jnp.float32(adapter.scale_for((rows, columns)))
    return adapter.chosen.merged(own, weight, scale)


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
