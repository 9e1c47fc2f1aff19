"""The folder of a run: its files, and the checks before a run starts or resumes there.

    RUN/config.json        the configuration
    RUN/data.json          number and hash of the examples
    RUN/base.safetensors   the quantized base, stored once; its metadata says how to read it;
                           in shards with an index if it is large (`base.stored`)
    RUN/quantization.json  entropy, error, codes and shifts, compared with the plain quantizer
    RUN/errors.jsonl       with quant.budget: the error of every matrix with every candidate
    RUN/budget.json        with quant.budget: what was asked for, and the rules that were chosen
    RUN/tokenizer/         in the format of Hugging Face
    RUN/checkpoints/STEP/  orbax: adapters, optimizer state, step, random key, evaluation loss
    RUN/metrics.jsonl      a line every few steps (if requested, also in tensorboard/ and wandb/)
    RUN/environment.json   device and versions of the most recent start or resume
    RUN/results.json       the scores
    RUN/checksums.json     checksums of the small files (`runs.recorded`)
    RUN/report.html        a page that shows all of this
    RUN/calibration/       finished layers, only while a base is calibrated with a text
    RUN/train.lock         only while a process writes there

Files are written under a temporary name and renamed when complete; metrics.jsonl is appended to.
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

from irqlora_jax.base.budget import BUDGET_FILE
from irqlora_jax.base.error_table import ERRORS_FILE
from irqlora_jax.base.file import BASE_FILE as BASE_FILE
from irqlora_jax.base.file import BASE_INDEX, has_base, is_shard
from irqlora_jax.config import Config, read_stored_config
from irqlora_jax.data import Example, Pair
from irqlora_jax.data.config import DataSource
from irqlora_jax.data.order import Part
from irqlora_jax.data.streaming import StreamedExamples
from irqlora_jax.files.small import read_json, refuse_folder
from irqlora_jax.runs.checkpoint_files import check_path
from irqlora_jax.runs.lock import LOCK_FILE
from irqlora_jax.runs.recorded import RECORD_FILE, check_recorded, write_recorded
from irqlora_jax.text import shorten

TOKENIZER, GENERATION = "tokenizer", "generation_config.json"
SURVEY_FILE = "quantization.json"
ENVIRONMENT_FILE, RESULTS_FILE = "environment.json", "results.json"
_CONFIG, _DATA = "config.json", "data.json"
KEPT_LAYERS = "calibration"
"""Folder for finished layers, while a base is calibrated with a text."""
BASE_START = {TOKENIZER, KEPT_LAYERS, f"{BASE_FILE}.part", LOCK_FILE}
_SMALL = SURVEY_FILE, RECORD_FILE, ERRORS_FILE, BUDGET_FILE
BASE_START |= {f"{name}{end}" for name in _SMALL for end in ("", ".part")}
"""Only these, and incomplete bases (`is_start`), are there after an interrupted `irqlora quantize`,
which writes the base last."""
# Fields and sections that may change when a run is resumed. Its base and data.json tell whether
# files under another path are the same.
_MAY_CHANGE = (
    "model",
    "data.train",
    "data.eval",
    "data.chat_template",
    "calibrate.data",
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


def is_start(name: str) -> bool:
    """Whether a file or folder may be left by an interrupted `irqlora quantize`."""
    return name in BASE_START or is_shard(name)


def check_folder(folder: Path, config: Config) -> Config | None:
    """Returns the stored configuration if `folder` holds an earlier part of this run.

    Raises:
        ValueError: it holds something else, or has a name that cannot be used; the message says
            what differs.
        NotADirectoryError: it is a file.
        OSError: the folder, or a file that the run will write there, is not writable.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output_dir = '{folder}': a file; expected a folder")
    check_path(folder)
    stored = _stored_config(folder, config)
    check_writable(folder)
    for name in (ENVIRONMENT_FILE, RESULTS_FILE):
        refuse_folder(folder / name)
    return stored


def _stored_config(folder: Path, config: Config) -> Config | None:
    # A run writes config.json last, so a folder with only these is from an interrupted start.
    leftover = {BASE_FILE, BASE_INDEX, f"{_CONFIG}.part", _DATA, f"{_DATA}.part"}
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if has_base(folder) and _holds_start(folder / "checkpoints"):
        leftover.add("checkpoints")
    if all(name in leftover or is_start(name) for name in found):
        return None
    if not (folder / _CONFIG).is_file():
        raise ValueError(
            f"output_dir = '{folder}': holds other files and no {_CONFIG}; expected a new folder"
        )
    # Fields that an earlier version did not have get their defaults.
    stored_config = read_config_file(folder)
    stored, asked = settings_by_name(stored_config), settings_by_name(config)
    may_change = _MAY_CHANGE
    if config.train.schedule == "constant":
        may_change += ("train.steps", "train.epochs")
    for name in sorted(stored.keys() | asked.keys()):
        if stored.get(name) != asked.get(name) and not _is_in(name, may_change):
            there, here = shorten(stored.get(name)), shorten(asked.get(name))
            raise ValueError(
                f"output_dir = '{folder}': holds another run ({name} = {there} there, {here} "
                "here); expected a new folder, or the same configuration"
            )
    return stored_config


def read_config_file(folder: Path) -> Config:
    """Reads config.json of a run.

    Raises:
        FileNotFoundError, ValueError: no such file, or it is damaged; the message names it.
    """
    read_json(folder / _CONFIG)
    check_recorded(folder, _CONFIG)
    try:
        return read_stored_config(folder / _CONFIG)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / _CONFIG}: not the configuration of a run: {error}") from error


def save_config(folder: Path, config: Config) -> None:
    """Writes config.json."""
    write_recorded(folder, _CONFIG, json.dumps(dataclasses.asdict(config), indent=1) + "\n")


def _is_in(name: str, fields: Sequence[str]) -> bool:
    """Whether a dotted name is one of the fields, or in one of the sections."""
    return any(name == field or name.startswith(f"{field}.") for field in fields)


def _holds_start(checkpoints: Path) -> bool:
    """Whether there is at most the checkpoint of step 0 (of LoftQ), complete or not."""
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return all(name.partition(".")[0] == "0" for name in names)


def settings_by_name(config: Config) -> dict[str, Any]:
    """Returns the fields by dotted name, with values as they are read from a file."""
    found = _flatten(json.loads(json.dumps(dataclasses.asdict(config))))
    # data.train may change, e.g. if the files have moved, but not the shares of its entries.
    weights = config.data.weights or ()
    shares = [round(weight / min(weights), 9) for weight in weights]
    return found | {"relative weights of data.train": shares or None}


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
    """Returns the folder, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def check_writable(folder: Path) -> None:
    """Checks, before any work, that a folder is writable.

    Raises:
        OSError: the folder is not writable.
    """
    # Permissions are not enough: the file system may be read-only or full.
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise type(error)(
            f"output_dir = '{folder}': not writable ({error.strerror}); expected a writable "
            "folder on a disk with free space"
        ) from error


def check_space(folder: Path, needed: int) -> None:
    """Checks that the disk has enough free space.

    Args:
        folder: of the run.
        needed: minimum number of bytes that the run writes.

    Raises:
        OSError: less space is free.
    """
    free = shutil.disk_usage(_existing(folder)).free
    if free < needed:
        raise OSError(
            f"output_dir = '{folder}': needs at least {needed / 2**30:.2f} GiB, "
            f"{free / 2**30:.2f} GiB are free; expected a disk with enough space"
        )


Fingerprint = dict[str, dict[str, Any]]
"""Of the data: for "train" and "eval", sizes and a hash that identify the examples."""


def fingerprint(
    train: Sequence[Example | Pair],
    evaluation: Sequence[Example | Pair],
    parts: Sequence[Part] = (),
) -> Fingerprint:
    """Counts the examples and tokens, and hashes tokens and targets.

    Of a stream, it counts the examples and hashes the files.

    Args:
        train: the training examples.
        evaluation: the evaluation examples.
        parts: the sources of `train`; with weights, a change of their sizes is a change.
    """
    sizes = [part.count for part in parts if part.weight is not None]
    return {"train": _digest(train, sizes), "eval": _digest(evaluation)}


def _digest(examples: Sequence[Example | Pair], sizes: Sequence[int] = ()) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(sizes).encode() if sizes else b"")
    if isinstance(examples, StreamedExamples):
        digest.update(examples.digest.encode())
        return {"examples": len(examples), "sha256": digest.hexdigest()}
    for example in examples:
        digest.update(len(example.tokens).to_bytes(8, "little"))
        digest.update(example.tokens.tobytes())
        digest.update(np.packbits(example.targets).tobytes())
    tokens = sum(len(example.tokens) for example in examples)
    return {"examples": len(examples), "tokens": tokens, "sha256": digest.hexdigest()}


def save_data(folder: Path, found: Fingerprint) -> None:
    """Writes data.json."""
    write_recorded(folder, _DATA, json.dumps(found, indent=1) + "\n")


def check_data(folder: Path, config: Config, found: Fingerprint) -> None:
    """Checks that a resumed run uses the data that it started with.

    Raises:
        ValueError: the data differs, or data.json is damaged; the message says how.
        FileNotFoundError: the folder has no data.json.
    """
    file = folder / _DATA
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; cannot check that the data is the same")
    stored = read_json(file)
    check_recorded(folder, _DATA)
    for part in found:
        known = stored.get(part)
        types = {name: type(value) for name, value in found[part].items()}
        if not isinstance(known, dict) or {n: type(v) for n, v in known.items()} != types:
            raise ValueError(
                f"{file}: no size and hash of the {part} data; expected the whole file"
            )
    for part, source in (("train", config.data.train), ("eval", config.data.eval)):
        if stored[part] != found[part]:
            raise ValueError(
                f"data.{part} = {_name(source)}: now {_say(found[part])}, but the run in "
                f"output_dir = '{folder}' started with {_say(stored[part])}; expected the same "
                "data, or a new folder"
            )


def _name(source: str | tuple[DataSource, ...] | None) -> str:
    """The sources of data, for a message."""
    return shorten([each.path for each in source] if isinstance(source, tuple) else source)


def _say(part: dict[str, Any]) -> str:
    tokens = f", {part['tokens']} tokens" if "tokens" in part else ""
    return f"{part['examples']} examples{tokens} (sha256 {part['sha256'][:12]})"
