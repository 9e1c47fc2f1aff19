"""What a run leaves on disk.

    RUN/config.json        the configuration
    RUN/base.safetensors   the quantized base, stored once; its metadata says how to read it
    RUN/tokenizer/         as Hugging Face writes it
    RUN/checkpoints/STEP/  orbax: adapters, optimizer state, step and random key
    RUN/metrics.jsonl      a line every few steps
    RUN/results.json       the scores

Nothing is ever written in place: a file is written aside and moved when it is complete.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from irqlora_jax.config import Config
from irqlora_jax.llama_config import LlamaConfig
from irqlora_jax.quant.qtensor import QTensor

Base = dict[str, Any]
_VERSION = "1"
_ARRAYS = tuple(f.name for f in dataclasses.fields(QTensor) if "Array" in str(f.type))
_STATIC = ("shape", "format", "block_size", "layout")


def write_text(path: Path, text: str) -> None:
    """Writes a small file completely or not at all."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def save_base(path: Path, base: Base, config: LlamaConfig) -> None:
    """Writes base and architecture into one safetensors file.

    A QTensor becomes one tensor an array (`NAME.packed`, `NAME.scale_codes`, ...) and an entry of
    the metadata that holds its shape, format, block size and layout.
    """
    tensors: dict[str, np.ndarray] = {}
    static: dict[str, Any] = {}
    for name, leaf in _leaves(base):
        if not isinstance(leaf, QTensor):
            tensors[name] = np.asarray(leaf)
            continue
        static[name] = {field: getattr(leaf, field) for field in _STATIC}
        for field in _ARRAYS:
            array = getattr(leaf, field)
            if array is not None:
                tensors[f"{name}.{field}"] = np.asarray(array)
    metadata = {
        "irqlora_jax": _VERSION,
        "llama": json.dumps(config.to_dict()),
        "quantized": json.dumps(static),
    }
    aside = path.with_name(path.name + ".part")
    save_file(tensors, aside, metadata)
    os.replace(aside, path)


def load_base(path: Path) -> tuple[Base, LlamaConfig]:
    """Reads what `save_base` wrote, bit by bit.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or not written by `save_base`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; is this the folder of a finished run?")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("irqlora_jax") != _VERSION:
                found = metadata.get("irqlora_jax")
                raise ValueError(f"{path}: version {found!r} of a base: accepted is {_VERSION!r}")
            flat: dict[str, Any] = {}
            flat |= {name: jnp.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged safetensors file ({error})") from error
    for name, fields in json.loads(metadata["quantized"]).items():
        arrays = {field: flat.pop(f"{name}.{field}", None) for field in _ARRAYS}
        fields["shape"] = tuple(fields["shape"])
        flat[name] = QTensor(**arrays, **fields)
    base: Base = {}
    for name, leaf in flat.items():
        *parents, last = name.split(".")
        node = base
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return base, LlamaConfig.from_dict(json.loads(metadata["llama"]))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


class Checkpoints:
    """The training states of a run, by step. Use as a context: leaving it waits for the writes."""

    def __init__(self, run: Path, keep: int | None = None) -> None:
        import orbax.checkpoint as ocp

        self._ocp = ocp
        folder = (run / "checkpoints").absolute()
        self._manager = ocp.CheckpointManager(
            folder, options=ocp.CheckpointManagerOptions(max_to_keep=keep)
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The newest complete step."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Writes a pytree of arrays, in the background."""
        self._manager.save(step, args=self._ocp.args.StandardSave(state))

    def restore(self, step: int, like: Any) -> Any:
        """Reads a state into the structure of `like` (arrays or their shapes).

        Raises:
            ValueError: the stored state has another structure or other shapes.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
        return self._manager.restore(step, args=self._ocp.args.StandardRestore(abstract))


class MetricsLog:
    """One JSON object a line. Lines of steps that are done again are dropped first."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [
                line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step
            ]
            write_text(path, "".join(kept))

    def write(self, values: Mapping[str, float | int]) -> None:
        """Appends a line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(values)) + "\n")


# What may differ between the run that started a folder and the one that goes on with it.
_MAY_CHANGE = (
    "output_dir",
    "log",
    "evaluate",
    "train.eval_every",
    "train.save_every",
    "train.keep_checkpoints",
)


def check_folder(folder: Path, config: Config) -> bool:
    """Whether `folder` holds an earlier part of this very run.

    Raises:
        ValueError: it holds something else; says what differs.
        NotADirectoryError: it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output_dir = '{folder}': a file; accepted is a folder")
    # A run writes its configuration last, so these alone are what a broken start left.
    leftover = {"tokenizer", "base.safetensors", "base.safetensors.part", "config.json.part"}
    if not folder.exists() or {path.name for path in folder.iterdir()} <= leftover:
        return False
    stored_file = folder / "config.json"
    if not stored_file.is_file():
        raise ValueError(f"output_dir = '{folder}': holds other files; accepted is a new folder")
    stored = _flatten(json.loads(stored_file.read_text(encoding="utf-8")))
    asked = _flatten(json.loads(json.dumps(dataclasses.asdict(config))))
    may_change = _MAY_CHANGE
    if config.train.schedule == "constant":
        may_change += ("train.steps",)
    for name in sorted(stored.keys() | asked.keys()):
        if stored.get(name) != asked.get(name) and not name.startswith(may_change):
            raise ValueError(
                f"output_dir = '{folder}': holds another run ({name} = {stored.get(name)!r} there, "
                f"{asked.get(name)!r} here); accepted is a new folder, or the same configuration"
            )
    return True


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= (
            _flatten(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {prefix + name: value}
        )
    return flat
