"""Reads and writes adapters of PEFT and of the released IR-QLoRA code."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Int

from irqlora_jax.adapters import METHODS
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.lora import LORA, peft_fields
from irqlora_jax.adapters.method import Method, Params, Shape
from irqlora_jax.adapters.scales import split
from irqlora_jax.export.ranks import ALPHAS, RANKS, has_patterns, rank_fields, read_ranks
from irqlora_jax.files.small import read_json
from irqlora_jax.files.tensors import Header, check_float, read_headers, read_into, write_tensors
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import (
    ADAPTER,
    ADAPTER_CONFIG,
    LAYERS,
    Keys,
    Tree,
    adapter_name,
    insert,
    linear_path,
)
from irqlora_jax.sharding import LINEAR_NAMES
from irqlora_jax.text import first_few, shorten


def load_adapter(source: str | Path, model: Llama) -> Tree:
    """Reads a LoRA, DoRA or LoKr adapter of PEFT, or an adapter of the released IR-QLoRA code.

    A plain LoRA pair can be loaded for any method that equals LoRA when its other leaves have their
    initial values (IEC with both scalars 0). If ranks differ between layers (`rank_pattern`), zeros
    fill the smaller pairs up to `adapter.rank`. An added component stays 0 in a training.

    Args:
        source: a .safetensors file, or a folder with adapter_model.safetensors.
        model: the model that it belongs to.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: not an adapter of this model; the message says what differs.
    """
    adapter = model.adapter
    if adapter is None:
        raise ValueError("model.adapter = None: expected the AdapterConfig of the adapter")
    file = _adapter_file(Path(source).expanduser())
    method, depth = adapter.chosen, model.config.num_hidden_layers
    paths = [linear_path(name) for name in LINEAR_NAMES if name in adapter.targets]
    as_peft, ranks = False, {}
    described = file.with_name(ADAPTER_CONFIG)
    if file.name == ADAPTER and described.is_file():
        values = read_json(described)
        as_peft = _check_adapter_config(described, values, adapter)
        if has_patterns(values):
            places = [(path, layer) for path in paths for layer in range(depth)]
            ranks = read_ranks(described, values, adapter, places)
    headers = read_headers(file)
    # PEFT has the name of the adapter in its layers, but not in its files. The released IR-QLoRA
    # code has it in the names of the scalars (lora_default_A_scale).
    names = {
        name.replace(".default", "").replace("lora_default_", "lora_"): name for name in headers
    }
    if len(names) < len(headers):
        raise ValueError(f"{file}: tensors of several adapters; expected one")
    fresh = {
        path: _fresh(method.name, model.config.linear_shapes[path[-1]], adapter) for path in paths
    }

    def keys(part: str, leaf: str | None = None) -> set[str]:
        """Names of a part in all layers, or only where a layer has this leaf."""
        having = [path for path in paths if leaf is None or leaf in fresh[path]]
        return {adapter_name(path, layer, part) for path in having for layer in range(depth)}

    # Besides a pair, the file may have leaves of this method or of other ones.
    pair = {leaf: part for leaf, part in method.files.items() if leaf in LORA.files}
    whole = not pair or method.pack is not None
    own = {leaf: part for leaf, part in method.files.items() if whole or keys(part) & set(names)}
    others = {
        part: (other, leaf)
        for other in METHODS.values()
        if other.has_pair and pair
        for leaf, part in other.files.items()
        if part not in method.files.values() and keys(part) & set(names)
    }
    needed = [keys(part, leaf) for leaf, part in {**pair, **own}.items()]
    wanted = set().union(*needed, *map(keys, others))
    missing, extra = sorted(wanted - set(names)), sorted(set(names) - wanted)
    if missing:
        raise ValueError(f"{file}: no tensor {first_few(missing)}")
    if extra:
        targets = ", ".join(adapter.targets)
        raise ValueError(
            f"{file}: tensors that do not belong to a {depth}-layer model with adapter.targets "
            f"{targets}: {first_few([names[name] for name in extra])}"
        )

    if ranks and method.peft is None and own.keys() - pair.keys():
        raise ValueError(
            f"{described}: {RANKS}: expected a LoRA pair alone, or {method.title} of one rank"
        )

    def read(path: Keys, part: str, like: Any) -> np.ndarray:
        leaf = next((leaf for leaf, name in pair.items() if name == part), "")

        def one(layer: int) -> np.ndarray:
            key, rank = names[adapter_name(path, layer, part)], ranks.get((path, layer))
            if rank is None or not leaf:
                return _read_adapter(headers[key], key, like, f"adapter.rank = {adapter.rank}")
            shape = (rank.rank, like.shape[1]) if leaf == "lora_A" else (like.shape[0], rank.rank)
            smaller = jax.ShapeDtypeStruct(shape, like.dtype)
            value = _read_adapter(headers[key], key, smaller, f"{RANKS}: {rank.rank}")
            return rank.padded(leaf, value, adapter.rank)

        return np.stack([one(layer) for layer in range(depth)])

    adapters: Tree = {}
    for path in paths:
        shape = model.config.linear_shapes[path[-1]]
        stored = fresh[path]
        if method.pack is not None:
            stored = jax.eval_shape(method.pack, fresh[path])
        parts: dict[str, Any] = {
            leaf: read(path, own[leaf], stored[leaf])
            if leaf in own
            else np.broadcast_to(value, (depth, *value.shape))
            for leaf, value in fresh[path].items()
        }
        if method.unpack is not None:
            packed, start = (jax.tree.map(jnp.asarray, tree) for tree in (parts, fresh[path]))
            parts = jax.vmap(method.unpack, (0, None))(packed, start)
        for part, (other, leaf) in others.items():
            neutral = _fresh(other.name, shape, adapter)[leaf]
            if (read(path, part, neutral) != neutral).any():
                raise ValueError(
                    f"{file}: {'.'.join((*path, part))} changes the update, so this adapter needs "
                    f"adapter.method {other.name}, not {method.name}"
                )
        if as_peft and method.file_factor is not None:
            factor = method.file_factor(adapter.options, shape)
            parts["lora_B"] = parts["lora_B"] / np.float32(factor)
        dtype = jnp.dtype(adapter.dtype)
        insert(adapters, (LAYERS, *path), {k: jnp.asarray(v, dtype) for k, v in parts.items()})
        if fresh[path].keys() - own.keys():
            one = {leaf: np.asarray(value[0]) for leaf, value in parts.items()}
            _check_neutral(file, method, one, shape)
    return adapters


def _fresh(method: str, shape: Shape, adapter: AdapterConfig) -> dict[str, np.ndarray]:
    """The initial leaves of one layer for a method, in float32."""
    chosen = METHODS[method]
    options = getattr(adapter, method, chosen.options)
    made = chosen.init(jax.random.key(0), shape, adapter.rank, options, jnp.float32)
    return {leaf: np.asarray(value) for leaf, value in made.items()}


def _check_neutral(file: Path, method: Method, params: dict[str, np.ndarray], shape: Shape) -> None:
    """Checks that leaves missing in a file, at their initial values, do not change the update.

    A method may round: the gated quantizer of Bayesian-LoRA at 32 bits does.
    """
    pair = {leaf: params[leaf] for leaf in LORA.files}
    folded = method.fold and method.fold(jax.tree.map(jnp.asarray, params), shape)

    def differs(leaf: str, value: np.ndarray) -> bool:
        assert folded is not None
        return bool((np.abs(folded[leaf] - value) > 1e-6 * np.abs(value).max()).any())

    if folded is None or any(differs(leaf, value) for leaf, value in pair.items()):
        raise ValueError(
            f"{file}: holds only a LoRA pair; adapter.method {method.name} cannot start from it"
        )


def save_adapter(
    folder: Path,
    model: Llama,
    adapters: Tree,
    *,
    base_model: str | None = None,
    fold: bool = True,
    dtype: str = "float32",
) -> None:
    """Writes adapter_model.safetensors and adapter_config.json for PEFT.

    Args:
        folder: existing folder to write to.
        model: the model of the adapter.
        adapters: from `Llama.init_adapters` or `load_adapter`.
        base_model: base_model_name_or_path, i.e. folder or hub id of the weights that the adapter
            was trained on.
        fold: write what PEFT can compute: the plain LoRA pair with the same update if there is one,
            else the leaves of a method that PEFT knows. False keeps the leaves of the method, such
            as IEC's scalars in the released code. PEFT ignores unknown leaves.
        dtype: type of the tensors. Folding is done in float32.

    Raises:
        ValueError: no adapter, no LoRA pair with its update, or a value out of range of `dtype`.
    """
    adapter = model.adapter
    if adapter is None:
        raise ValueError("model.adapter = None: expected a model with an adapter")
    places = [
        (linear_path(name), layer)
        for layer in range(model.config.num_hidden_layers)
        for name in LINEAR_NAMES
        if name in adapter.targets
    ]

    if adapter.scales:  # they belong to the base
        adapters = jax.tree.map(
            lambda own: split(own)[1], adapters, is_leaf=lambda x: "block_scale" in x
        )
    method = adapter.chosen
    if fold and method.fold is None and method.peft is None:
        raise ValueError(f"fold = True: no LoRA pair computes the update of {method.title}")
    folds = fold and method.fold is not None
    files = LORA.files if folds else method.files

    ranks: dict[tuple[Keys, int], int] = {}
    if folds and method.rank is not None:
        of_layers = jax.jit(jax.vmap(method.rank))
        for path in {path for path, _ in places}:
            found = of_layers(adapters[LAYERS][path[0]][path[1]])
            ranks |= {(path, layer): int(rank) for layer, rank in enumerate(found)}

    def leaves(path: Keys, layer: int) -> dict[str, Array]:
        params = adapters[LAYERS][path[0]][path[1]]
        if folds:
            pair = folded(params, layer, adapter, model.config.linear_shapes[path[-1]])
            kept = ranks.get((path, layer))
            params = {"lora_A": pair["lora_A"][:kept], "lora_B": pair["lora_B"][:, :kept]}
        else:
            params = {leaf: jnp.asarray(stack[layer]) for leaf, stack in params.items()}
            params = params if method.pack is None else method.pack(params)
            # Files store a scalar with shape [1].
            params = {leaf: jnp.atleast_1d(value) for leaf, value in params.items()}
            if method.file_factor is not None:
                shape = model.config.linear_shapes[path[-1]]
                factor = method.file_factor(adapter.options, shape)
                params["lora_B"] = params["lora_B"].astype(jnp.float32) * factor
        return {files[leaf]: value for leaf, value in params.items()}

    arrays = {
        adapter_name(path, layer, part): value
        for path, layer in places
        for part, value in jax.eval_shape(functools.partial(leaves, path, layer)).items()
    }
    shapes = {name: value.shape for name, value in arrays.items()}
    packed = {name for name, value in arrays.items() if value.dtype == np.uint8}
    parts = (
        (adapter_name(path, layer, part), np.asarray(value))
        for path, layer in places
        for part, value in sorted(leaves(path, layer).items())  # the order of `shapes`
    )
    metadata = None if folds else {"method": method.name}
    write_tensors(folder / ADAPTER, shapes, dtype, parts, packed=packed, metadata=metadata)
    fields = dict(peft_fields(adapter) if folds or method.peft is None else method.peft(adapter))
    if folds:  # the pairs may have other ranks
        part = LORA.files["lora_A"]
        found = {place: shapes[adapter_name(*place, part)][0] for place in places}
        fields |= rank_fields(adapter, found)
    values = {
        # PEFT declares alpha as a whole number.
        **{k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in fields.items()},
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        # Without this list PEFT chooses the layers itself and silently drops the other tensors.
        "target_modules": list(adapter.targets),
        "inference_mode": True,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


@functools.partial(jax.jit, static_argnames=("adapter", "shape"))
def folded(
    params: Params, layer: Int[ArrayLike, ""], adapter: AdapterConfig, shape: Shape
) -> Params:
    """Folds one layer of a stacked adapter into a plain LoRA pair with the scale of
    the adapter, in float32."""
    fold = adapter.chosen.fold
    assert fold is not None
    pair = fold({leaf: stack[layer].astype(jnp.float32) for leaf, stack in params.items()}, shape)
    factor = adapter.chosen.factor(adapter.options, shape)
    return pair if factor == 1 else pair | {"lora_B": pair["lora_B"] * factor}


def _adapter_file(source: Path) -> Path:
    if source.is_file():
        if source.suffix != ".safetensors":
            raise ValueError(f"{source}: expected a .safetensors file, or a folder with one")
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


# Fields of adapter_config.json that can change what an adapter computes, with the values that do
# not (default first). Initializations that are not listed, e.g. PiSSA, also change the base.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    RANKS: ({}, None),
    ALPHAS: ({}, None),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
# Fields of a method with their defaults in PEFT. Others matter only in the training.
_DEFAULTS = {
    "peft_type": "LORA",
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "use_qalora": False,
    "qalora_group_size": 16,
    "r": 8,
    "lora_alpha": 8,
    "alpha": 8,
    "decompose_both": False,
    "decompose_factor": -1,
}
_OURS = {"r": "rank", "lora_alpha": "alpha", "alpha": "alpha"}


def _check_adapter_config(file: Path, values: Mapping[str, Any], adapter: AdapterConfig) -> bool:
    """Checks that the file describes `adapter`, apart from ranks and alphas with a pattern.

    Returns:
        Whether it has the fields of PEFT for the method (`Method.peft`). Files of the authors'
        codes do not.
    """
    plain, own = peft_fields(adapter), (adapter.chosen.peft or peft_fields)(adapter)
    as_peft = adapter.chosen.file_factor is None or any(
        values.get(name) for name in own.keys() - plain.keys()
    )
    fields = own if as_peft else plain
    accepted = {name: (value,) for name, value in fields.items() if name in _DEFAULTS} | _ACCEPTED
    if fields["peft_type"] == "LORA" and has_patterns(values):  # for `read_ranks`
        for name in ("r", "lora_alpha", RANKS, ALPHAS):
            del accepted[name]
    for name, known in accepted.items():
        value, wanted = values.get(name, _DEFAULTS.get(name, known[0])), known[0]
        if value not in known and name in _OURS:
            raise ValueError(
                f"{file}: {name} = {shorten(value)}, but adapter.{_OURS[name]} = {shorten(wanted)}"
            )
        if value not in known:
            chosen = f" with adapter.method {adapter.method}" if name in fields else ""
            raise ValueError(
                f"{file}: {name} = {shorten(value)}: expected {shorten(wanted)}{chosen}"
            )
    targets = values.get("target_modules")
    if targets == "all-linear":
        targets = list(LINEAR_NAMES)
    if isinstance(targets, list):  # with a regular expression, only tensor names are checked
        names = {str(name).rpartition(".")[2] for name in targets}
        if names != set(adapter.targets):
            raise ValueError(
                f"{file}: target_modules = {', '.join(sorted(names))}, but adapter.targets = "
                + ", ".join(sorted(adapter.targets))
            )
    return as_peft


def _read_adapter(header: Header, key: str, like: Any, why: str) -> np.ndarray:
    """Reads one tensor as float32, or as bytes where `like` has bytes. Files store a scalar with
    shape [1]. `why` says where the shape comes from, for messages."""
    shape, packed = like.shape, like.dtype == np.uint8
    if not packed:
        check_float(header, key)
    elif header.dtype != "U8":
        raise ValueError(f"{header.file}: {key} has type {header.dtype}: expected U8")
    if header.shape != (shape or (1,)):
        raise ValueError(
            f"{header.file}: {key} has shape {header.shape}: expected {shape or (1,)} ({why})"
        )
    value = np.empty(header.shape, np.uint8 if packed else np.float32)
    read_into(value, header, key)
    return value.reshape(shape)
