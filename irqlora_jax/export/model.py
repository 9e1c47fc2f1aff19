"""Writes a base, with or without its adapter, as a Hugging Face model folder.

One matrix at a time is dequantized, merged and written. So the host needs little more memory than
the packed model.
"""

import functools
import json
import math
from collections.abc import Iterator, Mapping
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

Shapes = dict[str, tuple[int, ...]]


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
    config = model.config
    places = _places(config)
    shapes = {name: shape for name, (shape, _, _) in places.items()}
    shards = _split(shapes, np.dtype(dtype).itemsize, 1e9 * shard_size)
    total = sum(map(math.prod, shapes.values()))
    weight_map: dict[str, str] = {}
    with progress_bar("Exporting", total, "weights", show=progress, unit_scale=True) as bar:

        def parts(names: Shapes) -> Iterator[tuple[str, np.ndarray]]:
            for name, shape in names.items():
                yield name, _weight(model, variables, *places[name][1:])
                bar.update(math.prod(shape))

        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            file = SINGLE if len(shards) == 1 else file
            write_tensors(folder / file, shard, dtype, parts(shard))
            weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        sizes = {"total_parameters": total, "total_size": total * np.dtype(dtype).itemsize}
        _write_json(folder / INDEX, {"metadata": sizes, "weight_map": weight_map})
    # transformers 5 calls it dtype, older versions torch_dtype.
    _write_json(folder / "config.json", config.to_dict() | {"dtype": dtype, "torch_dtype": dtype})


def parameters(config: LlamaConfig) -> int:
    """Number of weights of a model."""
    return sum(math.prod(shape) for shape, _, _ in _places(config).values())


def _places(config: LlamaConfig) -> dict[str, tuple[tuple[int, ...], Keys, int | None]]:
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


def _split(shapes: Shapes, itemsize: int, limit: float) -> list[Shapes]:
    """The tensors of each shard, in order."""
    shards: list[Shapes] = [{}]
    size = 0
    for name, shape in shapes.items():
        more = math.prod(shape) * itemsize
        if shards[-1] and size + more > limit:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += more
    return shards


def _weight(
    model: Llama, variables: Mapping[str, Tree], path: Keys, layer: int | None
) -> np.ndarray:
    """One tensor of the model: float32 if it belongs to a layer, else its stored type."""
    base, adapters = variables["base"], variables["params"]
    if layer is None:
        return np.asarray(base[path[0]]["weight"])
    tree, place = find_stack(base, layer, model.config.num_hidden_layers)
    for name in leaf_path(path):
        tree = tree[name]
    adapter = model.adapter
    if adapter is None or path[-1] not in adapter.targets:
        return np.asarray(_one_dense(tree, place))
    params = adapters[LAYERS][path[0]][path[1]]
    return np.asarray(_merged(tree, place, params, layer, adapter))


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
