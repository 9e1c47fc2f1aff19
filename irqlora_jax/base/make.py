"""Reads and quantizes the weights of a LLaMA, from a Hugging Face folder or a GGUF file.

Weights are quantized one tensor at a time while a thread reads the next one. So the host needs
little more memory than the packed model. Only safetensors and GGUF are opened, never pickles.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.lora import LORA
from irqlora_jax.adapters.method import Params
from irqlora_jax.base.storage import plan_stacks
from irqlora_jax.files.gguf import is_gguf, read_gguf, tensor_headers
from irqlora_jax.files.hub import read_config, snapshot
from irqlora_jax.files.small import read_json
from irqlora_jax.files.tensors import (
    FLOATS,
    Header,
    aligned,
    check_float,
    equal_values,
    read_ahead,
    read_headers,
    read_into,
)
from irqlora_jax.messages import progress_bar
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.tree import (
    INDEX,
    LAYERS,
    SINGLE,
    Keys,
    Tree,
    insert,
    matrix_name,
    weight_name,
    weight_shapes,
)
from irqlora_jax.quant.config import KEPT, QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.quant.formats import FORMATS
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.sharding import LINEAR_NAMES, sharding
from irqlora_jax.text import first_few, require, shorten

Watch = Callable[[int, str, jax.Array, QTensor, QuantConfig], None]
"""Called for each quantized matrix with layer, projection, float32 weights, the QTensor and its
configuration. The weights are overwritten after the call."""
Maker = Callable[[Keys, int, jax.Array, QuantConfig], tuple[Any, Params]]
"""Maps path, layer, weight and configuration of a matrix to the stored weight and its LoRA pair."""


def load_base(
    source: str | Path,
    quant: QuantConfig | None,
    *,
    mesh: Mesh | None = None,
    progress: bool = False,
    watch: Watch | None = None,
) -> tuple[Tree, LlamaConfig]:
    """Reads a LLaMA and quantizes its linear layers, but not the head and the embeddings.

    Args:
        source: local folder, GGUF file or hub id.
        quant: quantization settings. None or format "none" keeps the type of the file.
        mesh: devices to split the weights over (default: all on the first device).
        progress: show a bar.
        watch: called for each quantized matrix.

    Returns:
        The frozen weights, stacked over the layers (`model/tree.py`), and the architecture.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: a file is missing or invalid (the message
            names it), or a rule matches no matrix.
    """

    def make(
        path: Keys, layer: int, weight: jax.Array, config: QuantConfig
    ) -> tuple[QTensor, Params]:
        packed = quantize(weight, config)
        if watch is not None:
            watch(layer, path[-1], weight, packed, config)
        return packed, {}

    quant = QuantConfig(format=KEPT) if quant is None else quant
    base, _, config = _load(source, quant, make, np.float32, mesh, progress)
    return base, config


def load_fitted(
    source: str | Path,
    quant: QuantConfig,
    adapter: AdapterConfig,
    key: PRNGKeyArray,
    *,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> tuple[Tree, Tree, LlamaConfig]:
    """Like `load_base`, but fits the targets of an adapter together with their LoRA pairs.

    Args:
        source: local folder, GGUF file or hub id.
        quant: quantization settings.
        adapter: initialization, targets, rank, alpha and type of the pairs.
        key: random key, e.g. for a randomized SVD.
        mesh: devices to split weights and pairs over (default: all on the first device).
        progress: show a bar.

    Returns:
        The frozen weights, the pairs lora_A and lora_B for `Llama.init_adapters`, both stacked over
        the layers, and the architecture.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: as `load_base`; also if nothing is
            quantized, or if the initialization is not fitted to the weights.
    """
    require(quant.quantizes, "quant.format", quant.format, ", ".join(FORMATS))
    start, fit = adapter.start, adapter.start.fit
    if fit is None:
        raise ValueError(f"adapter.init = {start.name!r}: expected one fitted to the weights")
    options = getattr(adapter, start.name, start.options)

    def make(path: Keys, layer: int, weight: jax.Array, config: QuantConfig) -> tuple[Any, Params]:
        if path[-1] not in adapter.targets:
            return quantize(weight, config), {}
        own = jax.random.fold_in(key, LINEAR_NAMES.index(path[-1]))
        own = jax.random.fold_in(own, layer)
        if config.format == KEPT:
            # There is no quantization error to correct, so initialize the pair as in LoRA.
            rows, columns = weight.shape
            return None, LORA.init(own, (rows, columns), adapter.rank, None, adapter.dtype)
        dtype = adapter.dtype
        packed, a, b = fit(weight, config, adapter.rank, adapter.scale, options, own, dtype)
        return packed, {"lora_A": a, "lora_B": b}

    # Keep the type of the file: each iteration reads the matrix again and widens it slab by slab.
    return _load(source, quant, make, None, mesh, progress, adapter.targets)


def load_loftq(
    source: str | Path,
    quant: QuantConfig,
    adapter: AdapterConfig,
    key: PRNGKeyArray,
    **options: Any,
) -> tuple[Tree, Tree, LlamaConfig]:
    """Calls `load_fitted` with LoftQ (`adapters/loftq.py`) and ignores `adapter.init`."""
    return load_fitted(source, quant, dataclasses.replace(adapter, init="loftq"), key, **options)


def _load(
    source: str | Path,
    quant: QuantConfig,
    make: Maker,
    dtype: Any,
    mesh: Mesh | None,
    progress: bool,
    fitted: Sequence[str] = (),
) -> tuple[Tree, Tree, LlamaConfig]:
    """Returns the base, the pairs from `make`, and the architecture.

    `make` gets each matrix that is quantized or belongs to a projection in `fitted`. The type of
    the matrix is `dtype` (None: the type in the file).
    """
    folder = snapshot(source)
    config = read_config(folder)
    found = tensor_headers(read_gguf(folder), config) if is_gguf(folder) else _find_weights(folder)
    config = _untie(config, found)
    _check_weights(folder, found, config)
    layered, single = weight_shapes(config)
    total = sum(map(math.prod, single.values()))
    total += config.num_hidden_layers * sum(map(math.prod, layered.values()))
    with progress_bar("Loading", total, "weights", show=progress, unit_scale=True) as bar:
        base, pairs = _load_layers(found, config, quant, make, dtype, mesh, bar, fitted)
        for path, shape in single.items():
            name = weight_name(path)
            weight = aligned(shape, FLOATS[found[name].dtype])
            read_into(weight, found[name], name)
            insert(base, path, {"weight": _to_device([weight], mesh, path)})
            bar.update(math.prod(shape))
    return base, pairs, config


def _load_layers(
    found: Mapping[str, Header],
    config: LlamaConfig,
    quant: QuantConfig,
    make: Maker,
    dtype: Any,
    mesh: Mesh | None,
    bar: Any,
    fitted: Sequence[str],
) -> tuple[Tree, Tree]:
    """Fills stacked arrays of layers and pairs on the host, then moves them to the devices."""
    depth, shapes = config.num_hidden_layers, weight_shapes(config)[0]
    stacks: dict[Keys, list[np.ndarray]] = {}  # the leaves of a QTensor, or one float array
    structures: dict[Keys, Any] = {}
    made: list[tuple[Keys, int, range, QuantConfig]] = []

    def put(place: Keys, tree: Any, index: int, count: int) -> None:
        leaves, structures[place] = jax.tree.flatten(tree)
        if place not in stacks:
            stacks[place] = [aligned((count, *leaf.shape), leaf.dtype) for leaf in leaves]
        for stack, leaf in zip(stacks[place], leaves, strict=True):
            stack[index] = leaf  # waits for the result, so that the buffer can be reused

    for name, layers in plan_stacks(config, quant).items():
        for layer in layers:
            for path, shape in shapes.items():
                linear, place = path[-1] in LINEAR_NAMES, (name, *path)
                own = quant.for_matrix(matrix_name(path, layer))
                kept = not linear or own.format == KEPT
                if linear and (not kept or path[-1] in fitted):
                    made.append((place, layer, layers, own))
                if not kept:
                    continue
                tensor = weight_name(path, layer)
                if place not in stacks:
                    stacks[place] = [aligned((len(layers), *shape), FLOATS[found[tensor].dtype])]
                    structures[place] = jax.tree.structure(0)
                read_into(stacks[place][0][layer - layers.start], found[tensor], tensor)
                bar.update(math.prod(shape))
    names = [weight_name(place[1:], layer) for place, layer, *_ in made]
    with contextlib.closing(read_ahead(found, names, dtype)) as weights:
        for (place, layer, layers, own), weight in zip(made, weights, strict=True):

            def step(weight: np.ndarray, place: Keys = place, layer: int = layer) -> None:
                """A function, so that its local arrays are freed before the next matrix is read."""
                array = jax.device_put(weight, may_alias=True)
                packed, pair = make(place[1:], layer, array, own)  # noqa: B023
                if packed is not None:
                    put(place, packed, layer - layers.start, len(layers))  # noqa: B023
                    bar.update(weight.size)
                for leaf, value in pair.items():
                    put((LAYERS, *place[1:], leaf), value, layer, depth)

            step(weight)

    pair_leaves = ("lora_A", "lora_B")

    def moved(place: Keys) -> Any:
        path = place if place[-1] in pair_leaves else (*place, "weight")
        arrays = [_to_device(stacks[place], mesh, path) for _ in range(len(stacks[place]))]
        return jax.tree.unflatten(structures[place], arrays)

    base: Tree = {}
    pairs: Tree = {LAYERS: {}}
    for place in list(stacks):
        if place[-1] in pair_leaves:
            insert(pairs, place, moved(place))
        else:
            insert(base, place, {"weight": moved(place)})
    return base, pairs


def _to_device(arrays: list[np.ndarray], mesh: Mesh | None, path: Keys) -> jax.Array:
    """Pops the first array and puts it on the device. Frees the host copy unless it is aliased."""
    array = arrays.pop(0)
    where = None if mesh is None else sharding(mesh, path, array.shape)
    return jax.block_until_ready(jax.device_put(array, where, may_alias=True))


def _find_weights(folder: Path) -> dict[str, Header]:
    """Reads the headers of all weights, from one file or from the shards listed in the index."""
    if (folder / SINGLE).is_file():
        return read_headers(folder / SINGLE)
    if not (folder / INDEX).is_file():
        suffixes = (".bin", ".pt", ".pth")
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in suffixes)
        if pickles:
            raise ValueError(
                f"{folder}: pickles are never opened ({first_few(pickles)}); "
                "convert them elsewhere with save_pretrained(folder, safe_serialization=True)"
            )
        raise FileNotFoundError(f"{folder}: no weights ({SINGLE} or {INDEX})")
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(v, str) for v in shards.values()):
        raise ValueError(f"{folder / INDEX}: no weight_map from tensors to files")
    files = sorted(set(shards.values()))
    for file in files:
        if PurePath(file).is_absolute() or ".." in PurePath(file).parts:
            raise ValueError(
                f"{folder / INDEX}: lists {shorten(file)}: expected a file in its folder"
            )
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / INDEX}: lists {file}, which does not exist")
    found: dict[str, Header] = {}
    for file in files:
        for name, header in read_headers(folder / file).items():
            if shards.get(name, file) != file:  # left over from another version of the model
                continue
            if name in found:
                raise ValueError(
                    f"{folder / INDEX}: {name} is in {found[name].file.name} and in {file}: "
                    "expected weight_map to name one of them"
                )
            found[name] = header
    return found


def read_llama(folder: Path) -> LlamaConfig:
    """Reads the architecture of a Hugging Face folder, from config.json and the weights, or of a
    GGUF file.

    A model that ties its head to the embeddings may still have a head in its files. If the two
    differ, the head is used, and `tie_word_embeddings` is false. Apart from this comparison no
    weights are read, and they may be missing.

    Raises:
        FileNotFoundError, ValueError: as `load_base`.
    """
    config = read_config(folder)
    if not config.tie_word_embeddings or not any((folder / f).is_file() for f in (SINGLE, INDEX)):
        return config
    return _untie(config, _find_weights(folder))


def _untie(config: LlamaConfig, found: Mapping[str, Header]) -> LlamaConfig:
    """Unties the head from the embeddings if the files hold a head that differs from them."""
    table, head = weight_name(("embed_tokens",)), weight_name(("lm_head",))
    if not config.tie_word_embeddings or head not in found or table not in found:
        return config
    for name in (table, head):
        check_float(found[name], name)
    same = found[table].shape == found[head].shape and equal_values(found, table, head)
    return config if same else dataclasses.replace(config, tie_word_embeddings=False)


def _check_weights(folder: Path, found: Mapping[str, Header], config: LlamaConfig) -> None:
    """Checks, before any weight is read, that the weights of a folder match `config`."""
    layered, single = weight_shapes(config)
    expected: dict[str, tuple[tuple[int, ...], str]] = {}
    for path, shape in single.items():
        expected[weight_name(path)] = shape, weight_name(path)
    for path, shape in layered.items():
        for layer in range(config.num_hidden_layers):
            expected[weight_name(path, layer)] = shape, weight_name(path, 0)
    described = "its header" if is_gguf(folder) else "config.json"
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(f"{folder}: no tensor {first_few(missing)}")
    for name, (shape, first) in expected.items():
        header = found[name]
        check_float(header, name)
        if header.shape != shape:
            raise ValueError(
                f"{header.file}: {name} has shape {header.shape}: {described} says {shape}"
            )
        if header.dtype != found[first].dtype:
            raise ValueError(
                f"{header.file}: {name} has type {FLOATS[header.dtype]}, but {first} has "
                f"{FLOATS[found[first].dtype]}: expected one type for all layers"
            )
    # Old files contain the rotary frequencies. A head equal to tied embeddings is not read.
    spare = [name for name in found if name not in expected]
    spare = [name for name in spare if not name.endswith("rotary_emb.inv_freq")]
    spare = [name for name in spare if name != "lm_head.weight"]
    if spare:
        raise ValueError(
            f"{found[spare[0]].file}: tensors that config.json does not account for: "
            f"{first_few(spare)}"
        )
