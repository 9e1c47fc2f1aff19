"""base.safetensors: a frozen base in one file, with everything needed to read it."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from irqlora_jax.files.checksums import check_seal, checksum, seal
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.quant.stats import DEFAULT, SecondLevel
from irqlora_jax.sharding import sharding
from irqlora_jax.text import first_few

Base = dict[str, Any]
BASE_FILE = "base.safetensors"
"""Name of the file in the folder of a run or of `irqlora quantize`."""
_VERSION = "2"
_ARRAYS = tuple(f.name for f in dataclasses.fields(QTensor) if "Array" in str(f.type))
_TYPES = {"U8": "uint8", "U16": "uint16", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_ADVICE = "copy the file again, or quantize the model again"
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
) -> None:
    """Writes a base, its architecture and its quantization settings to one safetensors file.

    Each array of a QTensor becomes one tensor (`NAME.packed`, `NAME.scale_codes`, ...). The
    metadata holds its shape, format, block size and layout, its second level unless it is the
    default, and checksums. `source` is the folder or hub id of the original model. `fitted` marks a
    base that is incomplete without the adapters fitted to it. `calibrate` says which text was used,
    and what the errors of the outputs are.
    """
    tensors: dict[str, np.ndarray] = {}
    static: dict[str, Any] = {}
    for name, leaf in _leaves(base):
        if not isinstance(leaf, QTensor):
            tensors[name] = np.asarray(leaf)
            continue
        static[name] = {field: getattr(leaf, field) for field in _STATIC}
        if leaf.second_level != DEFAULT:  # earlier versions do not know it
            static[name]["second_level"] = dataclasses.asdict(leaf.second_level)
        for field in _ARRAYS:
            array = getattr(leaf, field)
            if array is not None:
                tensors[f"{name}.{field}"] = np.asarray(array)
    metadata = {
        "irqlora_jax": _VERSION,
        "llama": json.dumps(config.to_dict()),
        "quant": json.dumps(dataclasses.asdict(quant)),
        "quantized": json.dumps(static),
        "source": json.dumps(source),
        "loftq": json.dumps(fitted),
        "calibrate": json.dumps(calibrate),
        "checksums": json.dumps({name: checksum(array) for name, array in tensors.items()}),
    }
    metadata = seal(metadata)
    aside = path.with_name(path.name + ".part")
    try:
        save_file(tensors, aside, metadata)
        _sort_header(aside)
    except SafetensorError as error:
        aside.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({error})") from error
    os.replace(aside, path)


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
    """Reads a base written by `save_base`, bit for bit.

    Every tensor is compared with its checksum. Files of earlier versions have none.

    Args:
        path: path of the file.
        mesh: devices to split the weights over (default: all on the first device).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged (the message names the tensor), or was not written by
            `save_base`.
    """
    checksums = _read_checksums(_read_metadata(path))

    def read(file: Any, name: str) -> jax.Array:
        array = file.get_tensor(name)
        if checksums:
            _check(path, name, checksum(array), checksums[name])
        where = None if mesh is None else sharding(mesh, _path(name), array.shape)
        return jax.device_put(array, where)

    return _read(path, read)


def base_shapes(path: Path) -> tuple[Base, LlamaConfig]:
    """Reads only the header: like `read_base`, with jax.ShapeDtypeStruct for the arrays."""

    def read(file: Any, name: str) -> jax.ShapeDtypeStruct:
        part = file.get_slice(name)
        return jax.ShapeDtypeStruct(part.get_shape(), _TYPES[part.get_dtype()])

    return _read(path, read)


def _read(path: Path, read: Callable[[Any, str], Any]) -> tuple[Base, LlamaConfig]:
    metadata = _read_metadata(path)
    checksums = _read_checksums(metadata)
    flat: dict[str, Any] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            wrong = [name for name in names if file.get_slice(name).get_dtype() not in _TYPES]
            wrong += sorted(checksums.keys() ^ names) if checksums else []
            if wrong:
                raise ValueError(f"{path}: the header of {first_few(wrong)} is damaged; {_ADVICE}")
            for name in names:
                flat[name] = read(file, name)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged safetensors file ({error})") from error
    for name, fields in json.loads(metadata["quantized"]).items():
        arrays = {field: flat.pop(f"{name}.{field}", None) for field in _ARRAYS}
        fields["shape"] = tuple(fields["shape"])
        if "second_level" in fields:
            fields["second_level"] = SecondLevel(**fields["second_level"])
        flat[name] = QTensor(**arrays, **fields)
    base: Base = {}
    for name, leaf in flat.items():
        *parents, last = _path(name)
        node = base
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return base, LlamaConfig.from_dict(json.loads(metadata["llama"]))


def read_base_config(path: Path) -> tuple[LlamaConfig, QuantConfig]:
    """Reads the architecture and the quantization settings of a base.

    Raises:
        FileNotFoundError, ValueError: as `read_base`.
    """
    metadata = _read_metadata(path)
    quant = QuantConfig.from_dict(json.loads(metadata["quant"]))
    return LlamaConfig.from_dict(json.loads(metadata["llama"])), quant


def read_source(path: Path) -> str | None:
    """Reads the folder or hub id of a base's original model; None if unknown.

    Raises:
        FileNotFoundError, ValueError: as `read_base`.
    """
    return json.loads(_read_metadata(path).get("source", "null"))


def read_calibrate(path: Path) -> dict[str, Any] | None:
    """Reads which text a base was calibrated with, and its errors; None without a text.

    Raises:
        FileNotFoundError, ValueError: as `read_base`.
    """
    return json.loads(_read_metadata(path).get("calibrate", "null"))


def is_fitted(path: Path) -> bool:
    """Whether a base was fitted together with adapters (LoftQ), and is incomplete without them.

    Raises:
        FileNotFoundError, ValueError: as `read_base`.
    """
    return json.loads(_read_metadata(path).get("loftq", "false"))


def _read_metadata(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; is this the folder of a finished run?")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged safetensors file ({error})") from error
    if metadata.get("irqlora_jax") != _VERSION:
        found = metadata.get("irqlora_jax")
        raise ValueError(f"{path}: base file version {found!r}: expected {_VERSION!r}")
    try:
        return check_seal(metadata, "checksums")
    except ValueError as error:
        raise ValueError(f"{path}: the metadata is damaged ({error}); {_ADVICE}") from error


def _read_checksums(metadata: Mapping[str, str]) -> dict[str, str]:
    """The checksum of every tensor by name; empty for files of earlier versions."""
    return json.loads(metadata.get("checksums", "{}"))


def _check(path: Path, name: str, found: str, stored: str) -> None:
    if found != stored:
        raise ValueError(
            f"{path}: {name} is damaged (checksum {found}, expected {stored}); {_ADVICE}"
        )


def _path(name: str) -> tuple[str, ...]:
    return tuple(name.split("."))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
