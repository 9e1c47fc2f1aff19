"""Finds the weights of a model in its files, and checks them before any weight is read."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path, PurePath

from irqlora_jax.files.gguf import is_gguf, read_gguf
from irqlora_jax.files.gguf_model import tensor_headers
from irqlora_jax.files.hub import read_config
from irqlora_jax.files.small import read_json
from irqlora_jax.files.tensors import FLOATS, Header, check_float, equal_values, read_headers
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.tree import INDEX, SINGLE, weight_name, weight_shapes
from irqlora_jax.text import first_few, shorten


def open_weights(folder: Path) -> tuple[dict[str, Header], LlamaConfig]:
    """Reads the headers of the weights of a Hugging Face folder or a GGUF file.

    Returns:
        The headers by name, which match the architecture, and the architecture.

    Raises:
        FileNotFoundError, ValueError: as `base.make.load_base`.
    """
    config = read_config(folder)
    found = tensor_headers(read_gguf(folder), config) if is_gguf(folder) else _find_weights(folder)
    config = _untie(config, found)
    _check_weights(folder, found, config)
    return found, config


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
