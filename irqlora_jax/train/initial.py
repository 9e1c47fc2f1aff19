"""Reads the trained adapter that a run starts from (`adapter.init_from`)."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from irqlora_jax.config import Config
from irqlora_jax.export.peft import load_adapter
from irqlora_jax.model.llama import Llama
from irqlora_jax.runs.checkpoints import Checkpoints
from irqlora_jax.runs.folder import BASE_FILE, read_config_file
from irqlora_jax.runs.load import is_base
from irqlora_jax.text import shorten

# What decides the shapes of an adapter and what it computes.
_SAME = ("method", "rank", "alpha", "scaling", "scales", "targets")


def check_start(config: Config) -> None:
    """Checks that a run can start from `config.adapter.init_from`, before anything is computed.

    The base of a PEFT adapter is not known, so only the base of a run is compared.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the adapter was trained on another base, or is of another kind.
    """
    if config.adapter.source is None:
        return
    folder = Path(config.adapter.source)
    if not folder.exists():
        raise FileNotFoundError(
            f"adapter.init_from = '{folder}': not found; expected the folder of a run or of a PEFT "
            "adapter"
        )
    if not is_base(folder):
        return
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(
            f"adapter.init_from = '{folder}': a quantized base without an adapter; expected the "
            "folder of a run or of a PEFT adapter"
        )
    if not is_base(config.model) or not _equal(Path(config.model) / BASE_FILE, folder / BASE_FILE):
        raise ValueError(
            f"model = '{config.model}': not the base on which the adapter in '{folder}' was "
            f"trained; expected '{folder}' (adapter.init_from)"
        )
    theirs = read_config_file(folder).adapter
    for name in (*_SAME, theirs.method):
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
    folder = Path(config.adapter.source or "")
    if not is_base(folder):
        return jax.tree.map(np.asarray, load_adapter(folder, model))
    like = jax.eval_shape(lambda: model.init_adapters(jax.random.key(0)))
    with Checkpoints(folder) as checkpoints:
        adapters = checkpoints.restore_adapters(checkpoints.find("last"), like)
    return jax.tree.map(lambda x: np.asarray(x.astype(config.adapter.dtype)), adapters)


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
