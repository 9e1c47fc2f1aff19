"""The folder of a run: what lies in it, and whether a run may begin or go on there.


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

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from irqlora_jax.config import Config
from irqlora_jax.data import Example
from irqlora_jax.files.small import write_text

BASE_FILE, TOKENIZER, GENERATION = "base.safetensors", "tokenizer", "generation_config.json"
SURVEY_FILE = "quantization.json"
_DATA = "data.json"
# What may differ between the run that started a folder and the one that goes on with it.
_MAY_CHANGE = (
    "output_dir",
    "log",
    "mesh",
    "evaluate",
    "train.eval_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.early_stopping",
    "train.offload_optimizer",
    "train.attention",
    "train.matmul",
)


def check_folder(folder: Path, config: Config) -> bool:
    """Whether `folder` holds an earlier part of this very run.

    Raises:
        ValueError: it holds something else; says what differs.
        NotADirectoryError: it is a file.
        OSError: nothing can be written there.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output_dir = '{folder}': a file; accepted is a folder")
    resumed = _resumes(folder, config)
    check_writable(folder)
    return resumed


def _resumes(folder: Path, config: Config) -> bool:
    # A run writes its configuration last, so these alone are what a broken start left.
    leftover = {"tokenizer", "base.safetensors", "base.safetensors.part", "config.json.part"}
    leftover |= {_DATA, f"{_DATA}.part", "quantization.json", "quantization.json.part"}
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if "base.safetensors" in found and _holds_start(folder / "checkpoints"):
        leftover.add("checkpoints")
    if found <= leftover:
        return False
    stored_file = folder / "config.json"
    if not stored_file.is_file():
        raise ValueError(f"output_dir = '{folder}': holds other files; accepted is a new folder")
    # Fields that an earlier version did not have are at their defaults.
    stored, asked = _settings(Config.load(stored_file)), _settings(config)
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


def _holds_start(checkpoints: Path) -> bool:
    """Whether there is nothing but the checkpoint of step 0 (of LoftQ), or what became of it."""
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return all(name.partition(".")[0] == "0" for name in names)


def _settings(config: Config) -> dict[str, Any]:
    """The fields by their dotted names, as they come back from a file."""
    return _flatten(json.loads(json.dumps(dataclasses.asdict(config))))


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= (
            _flatten(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {prefix + name: value}
        )
    return flat


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def check_writable(folder: Path) -> None:
    """Refuses a folder that cannot be written to, before any work.

    Raises:
        OSError: nothing can be written there.
    """
    # Permissions do not tell: the file system may be mounted for reading only, or be full.
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise type(error)(
            f"output_dir = '{folder}': nothing can be written there ({error.strerror}); accepted "
            "is a folder that you may write to, on a disk with room"
        ) from error


def check_space(folder: Path, needed: int) -> None:
    """Refuses a disk without room.

    Args:
        folder: of the run.
        needed: bytes that the run writes at least.

    Raises:
        OSError: there are fewer.
    """
    free = shutil.disk_usage(_existing(folder)).free
    if free < needed:
        raise OSError(
            f"output_dir = '{folder}': {free / 2**30:.2f} GiB are free there, the run writes at "
            f"least {needed / 2**30:.2f} GiB; accepted is a disk with room"
        )


Fingerprint = dict[str, dict[str, Any]]
"""Of the data: for "train" and "eval", what tells one set of examples from another."""


def fingerprint(train: Sequence[Example], evaluation: Sequence[Example]) -> Fingerprint:
    """Numbers of examples and tokens, and a hash of tokens and targets."""
    return {"train": _digest(train), "eval": _digest(evaluation)}


def _digest(examples: Sequence[Example]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.tokens).to_bytes(8, "little"))
        digest.update(example.tokens.tobytes())
        digest.update(np.packbits(example.targets).tobytes())
    tokens = sum(len(example.tokens) for example in examples)
    return {"examples": len(examples), "tokens": tokens, "sha256": digest.hexdigest()}


def save_data(folder: Path, found: Fingerprint) -> None:
    """Writes data.json."""
    write_text(folder / _DATA, json.dumps(found, indent=1) + "\n")


def check_data(folder: Path, config: Config, found: Fingerprint) -> None:
    """Refuses to go on with other data than the run began with.

    Raises:
        ValueError: it differs; says which and how.
        FileNotFoundError: the folder does not say what the data was.
    """
    file = folder / _DATA
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file; the run cannot tell if its data is the same"
        )
    stored = json.loads(file.read_text(encoding="utf-8"))
    for part, source in (("train", config.data.train), ("eval", config.data.eval)):
        if stored[part] != found[part]:
            raise ValueError(
                f"data.{part} = {source!r}: gives {_say(found[part])} now, it gave "
                f"{_say(stored[part])} to the run that output_dir = '{folder}' holds; accepted is "
                "the same data, or a new folder"
            )


def _say(part: dict[str, Any]) -> str:
    return f"{part['examples']} examples of {part['tokens']} tokens (sha256 {part['sha256'][:12]})"
