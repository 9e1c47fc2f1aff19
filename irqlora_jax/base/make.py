"""LLaMA folders of Hugging Face as trees of this package.

Weights are quantized one tensor at a time while a thread reads the next one, so that a model needs
little more host memory than its packed form. Only safetensors are opened, never pickles.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.loftq import loftq
from irqlora_jax.adapters.lora import Params
from irqlora_jax.files.hub import read_config, snapshot
from irqlora_jax.files.small import read_json
from irqlora_jax.files.tensors import (
    FLOATS,
    Header,
    aligned,
    check_float,
    read_ahead,
    read_headers,
    read_into,
)
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.tree import INDEX, SINGLE, Keys, Tree, insert, weight_name, weight_shapes
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.quant.formats import get_format
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.sharding import LINEAR_NAMES, sharding
from irqlora_jax.text import first_few

Watch = Callable[[int, str, jax.Array, QTensor], None]
"""Told of every quantized matrix: layer, projection, the float32 weights, and what became of them.
The weights are overwritten when it returns."""
Maker = Callable[[Keys, int, jax.Array], tuple[QTensor, Params]]
"""What becomes of a linear weight, from its path and its layer, and the pair that belongs to it."""


def load_base(
    source: str | Path,
    quant: QuantConfig | None,
    *,
    mesh: Mesh | None = None,
    progress: bool = False,
    watch: Watch | None = None,
) -> tuple[Tree, LlamaConfig]:
    """Reads a LLaMA and quantizes its linear layers; the head and the embeddings stay as they are.

    Args:
        source: local folder, or id on the hub.
        quant: how; None or format "none" keeps the weights in the type of the file.
        mesh: devices to split the weights over (default: all on the first device).
        progress: show a bar.
        watch: called with every matrix that was quantized.

    Returns:
        The frozen weights, stacked over the layers, and the architecture.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: what is wrong with which file.
    """

    def make(path: Keys, layer: int, weight: jax.Array) -> tuple[QTensor, Params]:
        assert quant is not None
        packed = quantize(weight, quant)
        if watch is not None:
            watch(layer, path[-1], weight, packed)
        return packed, {}

    kept = quant is None or quant.format == "none"
    base, _, config = _load(source, None if kept else make, np.float32, mesh, progress)
    return base, config


def load_loftq(
    source: str | Path,
    quant: QuantConfig,
    adapter: AdapterConfig,
    key: PRNGKeyArray,
    *,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> tuple[Tree, Tree, LlamaConfig]:
    """As `load_base`, with the targets of an adapter quantized by LoftQ (`adapters/loftq.py`).

    Args:
        source: local folder, or id on the hub.
        quant: how the linear layers are stored.
        adapter: targets, rank, alpha, type and turns of the pairs.
        key: of the random directions that the singular values of large layers are found with.
        mesh: devices to split weights and pairs over (default: all on the first device).
        progress: show a bar.

    Returns:
        The frozen weights, the pairs lora_A and lora_B for `Llama.init_adapters`, both stacked over
        the layers, and the architecture.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: as `load_base`; format "none".
    """
    get_format(quant.format)
    rank, turns = adapter.rank, adapter.loftq_iterations

    def make(path: Keys, layer: int, weight: jax.Array) -> tuple[QTensor, Params]:
        if path[-1] not in adapter.targets:
            return quantize(weight, quant), {}
        place = jax.random.fold_in(key, LINEAR_NAMES.index(path[-1]))
        own = jax.random.fold_in(place, layer)
        packed, a, b = loftq(weight, quant, rank, adapter.alpha / rank, turns, own, adapter.dtype)
        return packed, {"lora_A": a, "lora_B": b}

    # In their own type: LoftQ needs the matrix again in every turn, and widens a slab at a time.
    return _load(source, make, None, mesh, progress)


def _load(
    source: str | Path, make: Maker | None, dtype: Any, mesh: Mesh | None, progress: bool
) -> tuple[Tree, Tree, LlamaConfig]:
    """The base, the pairs that `make` gave, and the architecture. `make` is given matrices of
    `dtype`, or, if it is None, of the type they have in the file."""
    from tqdm import tqdm

    folder = snapshot(source)
    config = read_config(folder)
    found = _find_weights(folder)
    _check_weights(folder, found, config)
    layered, single = weight_shapes(config)
    total = sum(map(math.prod, single.values()))
    total += config.num_hidden_layers * sum(map(math.prod, layered.values()))
    with tqdm(
        total=total, desc="Loading", unit=" weights", unit_scale=True, disable=not progress
    ) as bar:
        layers, pairs = _load_layers(found, config, make, dtype, mesh, bar)
        base: Tree = {"layers": layers}
        for path, shape in single.items():
            name = weight_name(path)
            weight = aligned(shape, FLOATS[found[name].dtype])
            read_into(weight, found[name], name)
            insert(base, path, {"weight": _to_device([weight], mesh, path)})
            bar.update(math.prod(shape))
    return base, {"layers": pairs}, config


def _load_layers(
    found: Mapping[str, Header],
    config: LlamaConfig,
    make: Maker | None,
    dtype: Any,
    mesh: Mesh | None,
    bar: Any,
) -> tuple[Tree, Tree]:
    """The layers and their pairs. Fills arrays on the host, stacked over the layers, and moves them
    to the device."""
    depth, shapes = config.num_hidden_layers, weight_shapes(config)[0]
    stacks: dict[Keys, list[np.ndarray]] = {}  # the leaves of a QTensor, or one float array
    structures: dict[Keys, Any] = {}
    linear: list[tuple[int, Keys]] = []
    for layer in range(depth):
        for path, shape in shapes.items():
            if make is not None and path[-1] in LINEAR_NAMES:
                linear.append((layer, path))
                continue
            name = weight_name(path, layer)
            if path not in stacks:
                stacks[path] = [aligned((depth, *shape), FLOATS[found[name].dtype])]
                structures[path] = jax.tree.structure(0)
            read_into(stacks[path][0][layer], found[name], name)
            bar.update(math.prod(shape))
    names = [weight_name(path, layer) for layer, path in linear]

    def store(layer: int, path: Keys, packed: QTensor, pair: Params) -> None:
        """A function, so that nothing of a matrix is left when the next one is quantized."""
        parts = {path: packed} | {(*path, name): x for name, x in pair.items()}
        for place, part in parts.items():
            leaves, structures[place] = jax.tree.flatten(part)
            if place not in stacks:
                stacks[place] = [aligned((depth, *leaf.shape), leaf.dtype) for leaf in leaves]
            for stack, leaf in zip(stacks[place], leaves, strict=True):
                stack[layer] = leaf  # waits for the result, so that the buffer is free again

    with contextlib.closing(read_ahead(found, names, dtype)) as weights:
        for (layer, path), weight in zip(linear, weights, strict=True):
            assert make is not None
            store(layer, path, *make(path, layer, jax.device_put(weight, may_alias=True)))
            bar.update(weight.size)

    def moved(place: Keys) -> Any:
        arrays = [_to_device(stacks[place], mesh, place) for _ in range(len(stacks[place]))]
        return jax.tree.unflatten(structures[place], arrays)

    layers: Tree = {}
    pairs: Tree = {}
    for path in shapes:
        insert(layers, path, {"weight": moved(path)})
    for place in stacks:
        if place not in shapes:
            insert(pairs, place, moved(place))
    return layers, pairs


def _to_device(arrays: list[np.ndarray], mesh: Mesh | None, path: Keys) -> jax.Array:
    """Moves the first array out of the list; unless the device takes it over, it is freed."""
    array = arrays.pop(0)
    where = None if mesh is None else sharding(mesh, path, array.shape)
    return jax.block_until_ready(jax.device_put(array, where, may_alias=True))


def _find_weights(folder: Path) -> dict[str, Header]:
    """The headers of all weights, from one file or from the shards that the index names."""
    if (folder / SINGLE).is_file():
        return read_headers(folder / SINGLE)
    if not (folder / INDEX).is_file():
        suffixes = (".bin", ".pt", ".pth")
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in suffixes)
        if pickles:
            raise ValueError(
                f"{folder}: its weights are pickles ({first_few(pickles)}), never opened here; "
                "convert them elsewhere with save_pretrained(folder, safe_serialization=True)"
            )
        raise FileNotFoundError(f"{folder}: no weights ({SINGLE} or {INDEX})")
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(v, str) for v in shards.values()):
        raise ValueError(f"{folder / INDEX}: no weight_map from tensors to files")
    found: dict[str, Header] = {}
    for shard in sorted(set(shards.values())):
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{folder / INDEX}: names {shard}, which is not there")
        found |= read_headers(folder / shard)
    return found


def _check_weights(folder: Path, found: Mapping[str, Header], config: LlamaConfig) -> None:
    """Refuses a folder before anything of it is read, if its weights are not those of `config`."""
    layered, single = weight_shapes(config)
    expected: dict[str, tuple[tuple[int, ...], str]] = {}
    for path, shape in single.items():
        expected[weight_name(path)] = shape, weight_name(path)
    for path, shape in layered.items():
        for layer in range(config.num_hidden_layers):
            expected[weight_name(path, layer)] = shape, weight_name(path, 0)
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(f"{folder}: no tensor {first_few(missing)}")
    for name, (shape, first) in expected.items():
        header = found[name]
        check_float(header, name)
        if header.shape != shape:
            raise ValueError(
                f"{header.file}: {name} has shape {header.shape}: config.json says {shape}"
            )
        if header.dtype != found[first].dtype:
            raise ValueError(
                f"{header.file}: {name} has type {FLOATS[header.dtype]}, but {first} has "
                f"{FLOATS[found[first].dtype]}: accepted is one type for all layers"
            )
    # Old files carry the rotary frequencies, tied ones may repeat the embeddings.
    spare = [name for name in found if name not in expected]
    spare = [name for name in spare if not name.endswith("rotary_emb.inv_freq")]
    spare = [name for name in spare if name != "lm_head.weight"]
    if spare:
        raise ValueError(
            f"{found[spare[0]].file}: tensors that config.json does not account for: "
            f"{first_few(spare)}"
        )
