"""Settings of quantization that a run takes from the base in its `model`."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from irqlora_jax.base.budget import read_budget
from irqlora_jax.base.file import BASE_FILE, has_base, read_base_config, read_source
from irqlora_jax.config.parse import Convert
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.text import shorten


def check_settings(asked: Mapping[str, Any], stored: QuantConfig, source: str | Path) -> None:
    """Checks that settings of the quantization are those of a base.

    Args:
        asked: dotted names of fields of `quant`, and their values.
        stored: of the base.
        source: folder of the base, for the error message.

    Raises:
        ValueError: they differ; the message names all that do.
    """
    there = quant_settings(stored)
    wrong = [name for name in there if name in asked and asked[name] != there[name]]
    if wrong:
        ours = ", ".join(f"{name} = {shorten(asked[name])}" for name in wrong)
        theirs = ", ".join(f"{name} = {shorten(there[name])}" for name in wrong)
        raise ValueError(
            f"{ours}: the base in '{source}' is quantized with {theirs}; expected the same, or "
            "nothing, because unset fields of quant come from the base"
        )


def quant_settings(config: QuantConfig) -> dict[str, Any]:
    """Returns the fields of `quant` by dotted name (`quant.icq.steps`)."""
    return dict(_leaves(config, "quant."))


def _leaves(section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def find_base(model: str, output_dir: str) -> Path | None:
    """Returns the file of the base that a run with this model continues to use, if there is one."""
    run, file = (Path(folder) / BASE_FILE for folder in (output_dir, model))
    # A run continues with its base, even if the folder that the base came from is gone. If the run
    # made the base itself, its settings are those of the configuration.
    is_run = has_base(output_dir) and os.path.isfile(os.path.join(output_dir, "config.json"))
    if is_run and read_source(run) != model:
        return run
    return file if has_base(model) else None


def fill_from_base(given: dict[str, Any], convert: Convert) -> dict[str, Any]:
    """Adds the settings of the base in `model` that are not given.

    Args:
        given: values by dotted name, as they are written.
        convert: gives the value of a field from its name and what is written.

    Raises:
        ValueError: given settings differ from the base, or the base is damaged.
    """
    model, output_dir = given.get("model"), given.get("output_dir")
    if not isinstance(model, str) or not isinstance(output_dir, str):
        return given  # refused later
    base = find_base(model, output_dir)
    if base is None:
        return given
    stored = read_base_config(base)[1]
    settings = quant_settings(stored)
    asked = {name: convert(name, given[name]) for name in settings if name in given}
    chosen = None if asked.get("quant.budget") is None else read_budget(base.parent)
    if chosen is not None and chosen[1] == stored:
        check_settings(asked, chosen[0], base.parent)
        return given | settings  # the rules that were chosen for the same budget
    check_settings(asked, stored, base.parent)
    return settings | given
