"""What a run leaves on disk.

    RUN/config.json        the configuration
    RUN/data.json          number and hash of the examples
    RUN/base.safetensors   the quantized base, stored once; its metadata says how to read it
    RUN/quantization.json  what that did to the weights, beside the plain quantizer
    RUN/tokenizer/         as Hugging Face writes it
    RUN/checkpoints/STEP/  orbax: adapters, optimizer state, step, random key, evaluation loss
    RUN/metrics.jsonl      a line every few steps (tensorboard/ and wandb/: the same, when asked)
    RUN/environment.json   device and versions, of the newest part of the training
    RUN/results.json       the scores
    RUN/report.html        all of it to look at

Nothing is ever written in place: a file is written aside and moved when it is complete.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from irqlora_jax.config import QuantConfig
from irqlora_jax.llama_config import LlamaConfig
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.sharding import sharding

Base = dict[str, Any]
_VERSION = "2"
_ARRAYS = tuple(f.name for f in dataclasses.fields(QTensor) if "Array" in str(f.type))
_TYPES = {"U8": "uint8", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_STATIC = ("shape", "format", "block_size", "layout")


def write_text(path: Path, text: str) -> None:
    """Writes a small file completely or not at all."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def save_base(
    path: Path,
    base: Base,
    config: LlamaConfig,
    quant: QuantConfig,
    source: str | None = None,
    *,
    loftq: bool = False,
) -> None:
    """Writes base, architecture and how it was quantized into one safetensors file.

    A QTensor becomes one tensor an array (`NAME.packed`, `NAME.scale_codes`, ...) and an entry of
    the metadata that holds its shape, format, block size and layout. `source` is the folder or the
    id of the model that it was made from; `loftq` marks a base that is incomplete without the
    adapters fitted to it.
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
        "quant": json.dumps(dataclasses.asdict(quant)),
        "quantized": json.dumps(static),
        "source": json.dumps(source),
        "loftq": json.dumps(loftq),
    }
    aside = path.with_name(path.name + ".part")
    try:
        save_file(tensors, aside, metadata)
    except SafetensorError as error:
        aside.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({error})") from error
    os.replace(aside, path)


def load_base(path: Path, mesh: Mesh | None = None) -> tuple[Base, LlamaConfig]:
    """Reads what `save_base` wrote, bit by bit.

    Args:
        path: the file.
        mesh: devices to split the weights over (default: all on the first device).

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or not written by `save_base`.
    """

    def read(file: Any, name: str) -> jax.Array:
        array = file.get_tensor(name)
        where = None if mesh is None else sharding(mesh, _path(name), array.shape)
        return jax.device_put(array, where)

    return _read_base(path, read)


def base_shapes(path: Path) -> tuple[Base, LlamaConfig]:
    """As `load_base`, with jax.ShapeDtypeStruct for the arrays: only the header is read."""

    def read(file: Any, name: str) -> jax.ShapeDtypeStruct:
        part = file.get_slice(name)
        return jax.ShapeDtypeStruct(part.get_shape(), _TYPES[part.get_dtype()])

    return _read_base(path, read)


def _read_base(path: Path, read: Callable[[Any, str], Any]) -> tuple[Base, LlamaConfig]:
    metadata = _read_metadata(path)
    flat: dict[str, Any] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118
                flat[name] = read(file, name)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged safetensors file ({error})") from error
    for name, fields in json.loads(metadata["quantized"]).items():
        arrays = {field: flat.pop(f"{name}.{field}", None) for field in _ARRAYS}
        fields["shape"] = tuple(fields["shape"])
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
    """The architecture of a base, and how it was quantized.

    Raises:
        FileNotFoundError, ValueError: as `load_base`.
    """
    metadata = _read_metadata(path)
    quant = QuantConfig(**json.loads(metadata["quant"]))
    return LlamaConfig.from_dict(json.loads(metadata["llama"])), quant


def read_source(path: Path) -> str | None:
    """The model that a base was made from; None where that is not known.

    Raises:
        FileNotFoundError, ValueError: as `load_base`.
    """
    return json.loads(_read_metadata(path).get("source", "null"))


def is_loftq(path: Path) -> bool:
    """Whether a base is incomplete without the adapters that LoftQ fitted to it.

    Raises:
        FileNotFoundError, ValueError: as `load_base`.
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
        raise ValueError(f"{path}: version {found!r} of a base: accepted is {_VERSION!r}")
    return metadata


def _path(name: str) -> tuple[str, ...]:
    return tuple(name.split("."))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@dataclasses.dataclass(frozen=True)
class _Kept:
    """Which checkpoints orbax leaves: the newest, the best, and what LoftQ started from (step 0):
    the finetune is measured against it."""

    newest: int
    losses: Mapping[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {0, *steps[-self.newest :], _best(self.losses)}
        return [step in kept for step in steps]


def _is_news(record: logging.LogRecord) -> bool:
    # Each of orbax's threads logs the whole traceback of an error that is raised in the end.
    return not (record.exc_info and "orbax" in record.pathname)


def _best(losses: Mapping[int, float]) -> int | None:
    return min(sorted(losses), key=losses.__getitem__, default=None)


class Checkpoints:
    """The training states of a run by step, each with its evaluation loss if it was evaluated.

    Use as a context: leaving it waits for the writes.
    """

    def __init__(self, run: Path, keep: int | None = None) -> None:
        """Finds what is there.

        Args:
            run: folder of the run.
            keep: newest checkpoints to keep beside the best one; what a broken save left is
                cleared away then. None keeps all, for reading.
        """
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._folder = (run / "checkpoints").absolute()
        self._losses: dict[int, float] = {}
        self._writing: int | None = None
        self._manager = ocp.CheckpointManager(
            self._folder,
            item_handlers=ocp.StandardCheckpointHandler(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=None if keep is None else _Kept(keep, self._losses),
                cleanup_tmp_directories=keep is not None,
            ),
        )
        for step in self._manager.all_steps():
            stored = self._manager.metadata(step).custom_metadata or {}
            if "eval_loss" in stored:
                self._losses[step] = stored["eval_loss"]

    def __enter__(self) -> "Checkpoints":
        logging.getLogger("absl").addFilter(_is_news)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            with self._explained(self._writing):
                self._manager.close()
        except OSError:
            if kind is None or not issubclass(kind, OSError):  # else that one says it
                raise
        finally:
            logging.getLogger("absl").removeFilter(_is_news)

    def latest(self) -> int | None:
        """The newest complete step."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step with the lowest evaluation loss; None if none was evaluated."""
        return _best(self._losses)

    def loss(self, step: int) -> float | None:
        """The evaluation loss of a checkpoint; None if it was not evaluated."""
        return self._losses.get(step)

    def find(self, which: Literal["last", "best"] | int) -> int:
        """The step of a checkpoint.

        Raises:
            FileNotFoundError: there is none, none of this step, or none with an evaluation loss.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise FileNotFoundError(f"{self._folder}: no checkpoint yet; use --baseline")
        if which == "last":
            return steps[-1]
        there = ", ".join(map(str, steps))
        if which == "best":
            best = self.best()
            if best is None:
                raise FileNotFoundError(
                    f"checkpoint = best: none in {self._folder} has an evaluation loss (data.eval "
                    f"or data.eval_fraction); accepted is last or one of {there}"
                )
            return best
        if which not in steps:
            raise FileNotFoundError(
                f"checkpoint = {which}: not in {self._folder}; there are {there}"
            )
        return which

    def save(self, step: int, state: Any, loss: float | None = None) -> None:
        """Writes a pytree of arrays, in the background, and then deletes those not kept.

        Args:
            step: of the state.
            state: the arrays.
            loss: its evaluation loss.

        Raises:
            OSError: this or the one before could not be written.
        """
        self.wait()
        if loss is not None:
            self._losses[step] = loss
        metadata = None if loss is None else {"eval_loss": loss}
        with self._explained(step):
            self._manager.save(
                step, args=self._ocp.args.StandardSave(state), custom_metadata=metadata
            )
        self._writing = step

    def wait(self) -> None:
        """Returns when nothing is being written any more.

        Raises:
            OSError: the last checkpoint could not be written; those before are as they were.
        """
        with self._explained(self._writing):
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _explained(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of many types
            code = re.search(r"os_error_code='(\d+)'", str(error))
            known = os.strerror(int(code[1])) if code else getattr(error, "strerror", None)
            reason = known or " ".join(str(error).split())
            if step is not None:
                self._losses.pop(step, None)
            self._manager.reload()  # it takes the new one for saved, and the old ones for deleted
            last = self.latest()
            kept = "there is none before it" if last is None else f"that of step {last} is whole"
            raise OSError(
                f"{self._folder}: the checkpoint of step {step} could not be written ({reason}); "
                f"{kept}"
            ) from error

    def restore(self, step: int, like: Any) -> Any:
        """Reads a state into the structure of `like` (arrays or their shapes).

        Raises:
            ValueError: the stored state has another structure or other shapes.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
            like,
        )
        return self._manager.restore(step, args=self._ocp.args.StandardRestore(abstract))
