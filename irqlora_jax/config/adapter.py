"""Settings of the adapter that a run takes from the trained adapter in `adapter.init_from`."""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from irqlora_jax.adapters import METHODS
from irqlora_jax.adapters.config import NEW, AdapterConfig
from irqlora_jax.adapters.lora import LORA
from irqlora_jax.base.file import has_base
from irqlora_jax.config.parse import Convert
from irqlora_jax.files.hub import adapter_folder
from irqlora_jax.files.small import read_json
from irqlora_jax.files.tensors import read_headers, read_metadata
from irqlora_jax.model.tree import ADAPTER, ADAPTER_CONFIG
from irqlora_jax.sharding import LINEAR_NAMES
from irqlora_jax.text import shorten

SAME = ("method", "rank", "alpha", "scaling", "scales", "targets")
"""Fields that decide the shapes of an adapter and what it computes, besides the options of the
method."""
CONFIG_FILE = "config.json"


def fill_from_adapter(
    given: dict[str, Any], convert: Convert, read_run: Callable[[Path], AdapterConfig]
) -> dict[str, Any]:
    """Adds the settings of the adapter in `adapter.init_from` that are not given.

    A run that is resumed has them itself, so its adapter need not be there any more.

    Args:
        given: values by dotted name, as they are written.
        convert: gives the value of a field from its name and what is written.
        read_run: reads the section `adapter` from the config.json of a run.

    Raises:
        FileNotFoundError: the hub does not provide the adapter.
        ValueError: its files are damaged, or have values that no field accepts.
    """
    written = given.get("adapter.init_from")
    source = None if written is None else convert("adapter.init_from", written)
    complete = all(f"adapter.{name}" in given for name in SAME)  # as in the config.json of a run
    if source is None or source == NEW or not source.strip() or complete:  # "" is refused later
        return given
    stored = os.path.join(str(given.get("output_dir", "")), CONFIG_FILE)
    if os.path.isfile(stored):  # unlike Path.is_file, false for names that no file can have
        own = read_run(Path(stored))
        if own.init_from != source:
            return given  # another run, which is refused later
        settings = _settings(own)
    else:
        folder = adapter_folder(source)
        of_run, of_peft = folder / CONFIG_FILE, folder / ADAPTER_CONFIG
        if is_run(folder):
            settings = _settings(read_run(of_run))
            _check_given(given, settings, convert, folder)
        elif os.path.isfile(of_peft):
            settings = read_peft_settings(folder, convert)
        else:
            return given  # refused later, if there is no adapter
    method = convert("adapter.method", given.get("adapter.method", settings["adapter.method"]))
    if method != settings["adapter.method"]:  # its options belong to another method
        settings = {name: value for name, value in settings.items() if name.count(".") == 1}
    return settings | given


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return has_base(folder) and os.path.isfile(folder / CONFIG_FILE)


def _check_given(
    given: Mapping[str, Any], settings: Mapping[str, Any], convert: Convert, folder: Path
) -> None:
    """Checks that given settings equal the settings of the adapter of a run.

    `train.initial.check_start` cannot tell given defaults from settings that are not given.

    Raises:
        ValueError: they differ.
    """
    for name in (f"adapter.{one}" for one in SAME):
        found = convert(name, given.get(name, settings[name]))
        if found != settings[name]:
            raise ValueError(
                f"{name} = {shorten(found)}: the adapter in '{folder}' has "
                f"{shorten(settings[name])} (adapter.init_from)"
            )


def _settings(adapter: AdapterConfig) -> dict[str, Any]:
    found = {f"adapter.{name}": getattr(adapter, name) for name in SAME}
    if adapter.options is not None:
        for field in dataclasses.fields(adapter.options):
            name = f"adapter.{adapter.method}.{field.name}"
            found[name] = getattr(adapter.options, field.name)
    return found


def read_peft_settings(folder: Path, convert: Convert) -> dict[str, Any]:
    """Reads fields of `adapter` by dotted name from a folder of PEFT.

    Args:
        folder: with adapter_config.json.
        convert: as for `fill_from_adapter`.

    Raises:
        ValueError: a file is damaged, or a value has another type.
    """
    file = folder / ADAPTER_CONFIG
    values = read_json(file)
    found = {"method": _method(folder, values), "rank": values.get("r", 8)}
    found["alpha"] = values.get("alpha" if found["method"] == "lokr" else "lora_alpha", 8)
    found["scaling"] = "sqrt_rank" if values.get("use_rslora") else "rank"
    if found["method"] == "lokr":
        for theirs, default in (("decompose_both", False), ("decompose_factor", -1)):
            found[f"lokr.{theirs}"] = values.get(theirs, default)
    elif values.get("use_qalora"):
        found |= {"qalora.group": values.get("qalora_group_size", 16), "qalora.pooling": "peft"}
    found["targets"] = _targets(folder, values.get("target_modules"))
    settings = {f"adapter.{name}": value for name, value in found.items()}
    try:
        return {name: convert(name, value) for name, value in settings.items()}
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _method(folder: Path, values: Mapping[str, Any]) -> str:
    """The method of an adapter. Our files name it; else PEFT's fields and the leaves show it."""
    named = read_metadata(folder / ADAPTER).get("method") if (folder / ADAPTER).is_file() else None
    if named in METHODS:
        return named
    kind = values.get("peft_type", "LORA")
    if kind == "LOKR":
        return "lokr"
    if kind != "LORA":
        accepted = "LORA or LOKR"
        raise ValueError(
            f"{folder / ADAPTER_CONFIG}: peft_type = {shorten(kind)}: expected {accepted}"
        )
    if values.get("use_qalora"):
        return "qalora"
    names = _names(folder)
    for method in METHODS.values():
        parts = [part for leaf, part in method.files.items() if leaf not in LORA.files]
        if method.has_pair and any(name.endswith(f".{part}") for part in parts for name in names):
            return method.name
    return "dora" if values.get("use_dora") else "lora"


def _targets(folder: Path, targets: Any) -> list[str]:
    """Names of the adapted linear layers. If `targets` is a regular expression or names whole parts
    of the model, the names of the tensors show them."""
    listed = targets if isinstance(targets, list) else []
    named = {str(name).rpartition(".")[2] for name in listed}
    if not named or not named <= set(LINEAR_NAMES):
        pattern = rf"\.({'|'.join(LINEAR_NAMES)})\."
        found = (re.search(pattern, name) for name in _names(folder))
        named = {match[1] for match in found if match}
    return [name for name in LINEAR_NAMES if name in named] or list(LINEAR_NAMES)


def _names(folder: Path) -> list[str]:
    """Names of the tensors, as PEFT and the released IR-QLoRA code write them."""
    if not (folder / ADAPTER).is_file():
        return []
    names = read_headers(folder / ADAPTER)
    return [name.replace(".default", "").replace("lora_default_", "lora_") for name in names]
