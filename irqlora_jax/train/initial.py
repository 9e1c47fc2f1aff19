"""Reads the trained adapter that a run starts from (`adapter.init_from`)."""

import hashlib
import logging
import operator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from irqlora_jax.base.file import base_files, read_source
from irqlora_jax.config import Config
from irqlora_jax.config.adapter import SAME
from irqlora_jax.export.peft import load_adapter
from irqlora_jax.files.hub import adapter_folder
from irqlora_jax.files.small import read_json
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import ADAPTER_CONFIG
from irqlora_jax.runs.checkpoints import Checkpoints
from irqlora_jax.runs.folder import BASE_FILE, read_config_file
from irqlora_jax.runs.load import is_base
from irqlora_jax.text import shorten

logger = logging.getLogger(__name__)


def check_start(config: Config) -> None:
    """Checks that a run can start from `config.adapter.init_from`, before anything is computed.

    The base of a run is compared. A PEFT adapter only names its base, so another name is a note.

    Raises:
        FileNotFoundError: no such folder, and the hub does not provide the adapter.
        ValueError: the adapter was trained on another base, or is of another kind.
    """
    if config.adapter.source is None:
        return
    folder = adapter_folder(config.adapter.source)
    if not folder.exists():
        raise FileNotFoundError(
            f"adapter.init_from = '{folder}': not found; expected the folder of a run or of a PEFT "
            "adapter"
        )
    if not is_base(folder):
        _note_base(config, folder)
        return
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(
            f"adapter.init_from = '{folder}': a quantized base without an adapter; expected the "
            "folder of a run or of a PEFT adapter"
        )
    if not is_base(config.model) or not _same_base(Path(config.model), folder):
        raise ValueError(
            f"model = '{config.model}': not the base on which the adapter in '{folder}' was "
            f"trained; expected '{folder}' (adapter.init_from)"
        )
    theirs = read_config_file(folder).adapter
    for name in (*SAME, theirs.method):
        found, wanted = getattr(config.adapter, name, None), getattr(theirs, name, None)
        if found != wanted:
            raise ValueError(
                f"adapter.{name} = {shorten(found)}: the adapter in '{folder}' has "
                f"{shorten(wanted)} (adapter.init_from)"
            )


def read_start(config: Config, model: Llama) -> dict[str, Any]:
    """Reads the adapters in `config.adapter.init_from` onto the host, in `config.adapter.dtype`.

    Raises:
        FileNotFoundError: the run has no checkpoint.
        ValueError: damaged, or not an adapter of `model`.
    """
    folder = adapter_folder(config.adapter.source or "")
    if not is_base(folder):
        return jax.tree.map(np.asarray, load_adapter(folder, model))
    like = jax.eval_shape(lambda: model.init_adapters(jax.random.key(0)))
    with Checkpoints(folder) as checkpoints:
        adapters = checkpoints.restore_adapters(checkpoints.find("last"), like)
    return jax.tree.map(lambda x: np.asarray(x.astype(config.adapter.dtype)), adapters)


def _note_base(config: Config, folder: Path) -> None:
    """Says if a PEFT adapter names another base than the model of the run. Only the last part of a
    name counts, so that a copy on the disk is the same."""
    file = folder / ADAPTER_CONFIG
    named = read_json(file).get("base_model_name_or_path") if file.is_file() else None
    ours = [config.model]
    if is_base(config.model):
        ours.append(read_source(Path(config.model) / BASE_FILE) or config.model)
    if isinstance(named, str) and Path(named).name not in [Path(one).name for one in ours]:
        logger.info(
            f"Note: the adapter in '{config.adapter.source}' names the base '{named}'; this run "
            f"has model = '{config.model}', which must have the same weights"
        )


def _same_base(one: Path, other: Path) -> bool:
    """Whether two folders have the same base."""
    files = base_files(one), base_files(other)
    names = ([file.name for file in each] for each in files)
    return operator.eq(*names) and all(map(_equal, *files))


def _equal(one: Path, other: Path) -> bool:
    """Whether two files have the same bytes."""
    if one.samefile(other):
        return True
    if one.stat().st_size != other.stat().st_size:
        return False
    digests = []
    for path in (one, other):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").digest())
    return digests[0] == digests[1]
