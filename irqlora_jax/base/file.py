"""base.safetensors: a frozen base in one file or in shards, with everything needed to read it."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError
from safetensors.numpy import save_file

from irqlora_jax.base.parts import Parts
from irqlora_jax.base.shards import chunks, is_spread, whole, write_shards
from irqlora_jax.base.stored import BASE_FILE as BASE_FILE
from irqlora_jax.base.stored import BASE_INDEX as BASE_INDEX
from irqlora_jax.base.stored import (
    VERSION,
    Stored,
    check_headers,
    forget_base,
    open_base,
    read_metadata,
)
from irqlora_jax.base.stored import base_files as base_files
from irqlora_jax.base.stored import base_size as base_size
from irqlora_jax.base.stored import has_base as has_base
from irqlora_jax.base.stored import is_shard as is_shard
from irqlora_jax.files.checksums import checksum, seal
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.tree import insert
from irqlora_jax.processes import first_only, is_first, together
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.quant.stats import DEFAULT, SecondLevel
from irqlora_jax.sharding import sharding

Base = dict[str, Any]
SHARD_BYTES = 4 * 2**30
"""A larger base is written in shards of about this size."""
_ARRAYS = tuple(f.name for f in dataclasses.fields(QTensor) if "Array" in str(f.type))
_STATIC = ("shape", "format", "block_size", "layout")


def save_base(
    path: Path,
    base: Base,
    config: LlamaConfig,
    quant: QuantConfig,
    source: str | None = None,
    *,
    fitted: bool = False,
    calibrate: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a base, its architecture and its quantization settings to one safetensors file, or to
    shards and an index beside it (`stored.py`). If the base is on devices of several processes, all
    take part and the first one writes.

    Each array of a QTensor becomes one tensor (`NAME.packed`, `NAME.scale_codes`, ...). The
    metadata holds its shape, format, block size and layout, its second level unless it is the
    default, and checksums. `source` is the folder or hub id of the original model. `fitted` marks a
    base that is incomplete without the adapters fitted to it. `calibrate` says which text was used,
    and what the errors of the outputs are. A base of more than `shard_bytes` is written in shards
    of about this size.

    Raises:
        OSError: a file cannot be written.
    """
    arrays: dict[str, Any] = {}
    static: dict[str, Any] = {}
    for name, leaf in _leaves(base):
        if not isinstance(leaf, QTensor):
            arrays[name] = leaf
            continue
        static[name] = {field: getattr(leaf, field) for field in _STATIC}
        if leaf.second_level != DEFAULT:  # earlier versions do not know it
            static[name]["second_level"] = dataclasses.asdict(leaf.second_level)
        for field in _ARRAYS:
            array = getattr(leaf, field)
            if array is not None:
                arrays[f"{name}.{field}"] = array
    metadata = {
        "irqlora_jax": VERSION,
        "llama": json.dumps(config.to_dict()),
        "quant": json.dumps(dataclasses.asdict(quant)),
        "quantized": json.dumps(static),
        "source": json.dumps(source),
        "loftq": json.dumps(fitted),
        "calibrate": json.dumps(calibrate),
    }
    if sum(array.nbytes for array in arrays.values()) > shard_bytes:
        write_shards(path, arrays, metadata, shard_bytes)
        return
    spread = is_spread(arrays)
    tensors: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        parts = list(chunks(array, *whole(name, array)[1:]))
        if is_first() or not spread:
            tensors[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
    write = functools.partial(_write_file, path, tensors, metadata)
    first_only(write) if spread else write()


def _write_file(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    sums = json.dumps({name: checksum(array) for name, array in tensors.items()})
    aside = path.with_name(path.name + ".part")
    try:
        save_file(dict(tensors), aside, seal({**metadata, "checksums": sums}))
        _sort_header(aside)
    except SafetensorError as error:
        aside.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({error})") from error
    os.replace(aside, path)
    forget_base(path, keep=True)


def _sort_header(path: Path) -> None:
    """Sorts the names in the header of a safetensors file: safetensors gives the metadata a random
    order, and the same base has to be the same bytes."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.dumps(
            json.loads(file.read(length)), ensure_ascii=False, separators=(",", ":"), sort_keys=True
        ).encode()
        if len(header) <= length:  # else the two write some character differently
            file.seek(8)
            file.write(header.ljust(length))


def read_base(path: Path, mesh: Mesh | None = None) -> tuple[Base, LlamaConfig]:
    """Reads a base written by `save_base`, bit for bit. All processes of the mesh.

    Every tensor is compared with its checksum. Files of earlier versions have none. Of several
    processes, each reads what its devices need, and verifies a share of the tensors.

    Args:
        path: of the base; FOLDER/base.safetensors, also if the base is in shards.
        mesh: devices to split the weights over (default: all on the first device).

    Raises:
        FileNotFoundError: no such file, or a shard is missing.
        ValueError: a file is damaged (the message names the tensor), or was not written by
            `save_base`.
        RuntimeError: a file is damaged, which another process has found.
    """
    spread = mesh is not None and len({one.process_index for one in mesh.devices.flat}) > 1
    if not spread:
        return _read(path, mesh, _read_whole)
    return together(lambda: _read(path, mesh, _read_own))


def _read(path: Path, mesh: Mesh | None, read: Callable[..., Any]) -> tuple[Base, LlamaConfig]:
    stored = open_base(path)
    check_headers(stored)
    flat: dict[str, Any] = {}
    if read is _read_own:
        _verify_share(stored)
    for name in stored.arrays:
        where = None if mesh is None else sharding(mesh, _path(name), stored.shape(name))
        flat[name] = read(stored, name, where)
    return _tree(stored, flat)


def _read_whole(stored: Stored, name: str, where: NamedSharding | None) -> jax.Array:
    """Reads an array, and checks it."""
    pieces, whole = stored.arrays[name], None
    if len(pieces) > 1:
        whole = np.empty(stored.shape(name), pieces[0].dtype)
    for piece in pieces:
        value = piece.read()
        piece.check(checksum(value))
        if whole is None:
            whole = value
        else:
            whole[piece.start : piece.start + len(value)] = value
    return jax.device_put(whole, where)


def _read_own(stored: Stored, name: str, where: NamedSharding) -> jax.Array:
    """Reads the parts of an array that the devices of this process need."""
    parts = Parts(stored.shape(name), stored.arrays[name][0].dtype, where)
    for space, place in parts.spaces():
        for entries, value in stored.parts(name, place):
            space[entries] = value
    return parts.moved()


def _verify_share(stored: Stored) -> None:
    """Checks the tensors of this process: every n-th by size, if there are n processes."""
    pieces = [piece for each in stored.arrays.values() for piece in each]
    pieces.sort(key=lambda piece: (-piece.nbytes, piece.name))
    for piece in pieces[jax.process_index() :: jax.process_count()]:
        if piece.checksum is not None:
            piece.verify()


def base_shapes(path: Path) -> tuple[Base, LlamaConfig]:
    """Reads only the header: like `read_base`, with jax.ShapeDtypeStruct for the arrays."""
    stored = open_base(path)
    return _tree(
        stored,
        {
            name: jax.ShapeDtypeStruct(stored.shape(name), np.dtype(pieces[0].dtype))
            for name, pieces in stored.arrays.items()
        },
    )


def _tree(stored: Stored, flat: dict[str, Any]) -> tuple[Base, LlamaConfig]:
    """Arranges arrays by name as a base, and reads the architecture."""
    for name, fields in json.loads(stored.metadata["quantized"]).items():
        arrays = {field: flat.pop(f"{name}.{field}", None) for field in _ARRAYS}
        fields["shape"] = tuple(fields["shape"])
        if "second_level" in fields:
            fields["second_level"] = SecondLevel(**fields["second_level"])
        flat[name] = QTensor(**arrays, **fields)
    base: Base = {}
    for name, leaf in flat.items():
        insert(base, _path(name), leaf)
    return base, LlamaConfig.from_dict(json.loads(stored.metadata["llama"]))


def read_base_config(path: Path) -> tuple[LlamaConfig, QuantConfig]:
    """Reads the architecture and the quantization settings of a base.

    Raises:
        FileNotFoundError, ValueError: as `read_base`.
    """
    metadata = read_metadata(path)
    quant = QuantConfig.from_dict(json.loads(metadata["quant"]))
    return LlamaConfig.from_dict(json.loads(metadata["llama"])), quant


def read_source(path: Path) -> str | None:
    """Reads the folder or hub id of a base's original model; None if unknown.

    Raises:
        FileNotFoundError, ValueError: as `read_base`.
    """
    return json.loads(read_metadata(path).get("source", "null"))


def read_calibrate(path: Path) -> dict[str, Any] | None:
    """Reads which text a base was calibrated with, and its errors; None without a text.

    Raises:
        FileNotFoundError, ValueError: as `read_base`.
    """
    return json.loads(read_metadata(path).get("calibrate", "null"))


def is_fitted(path: Path) -> bool:
    """Whether a base was fitted together with adapters (LoftQ), and is incomplete without them.

    Raises:
        FileNotFoundError, ValueError: as `read_base`.
    """
    return json.loads(read_metadata(path).get("loftq", "false"))


def _path(name: str) -> tuple[str, ...]:
    return tuple(name.split("."))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
