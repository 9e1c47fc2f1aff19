"""Makes the page about `irqlora sensitivity`: which matrices quantization hurts most."""

import dataclasses
import json
import logging
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from irqlora_jax.evaluate.sensitivity import (
    SensitivityConfig,
    measure_sensitivity,
    suggestion_sentence,
)
from irqlora_jax.files.small import write_text
from irqlora_jax.messages import shows_messages
from irqlora_jax.model.tree import linear_path, matrix_name
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.report.figure import Number, format_number, is_finite, table
from irqlora_jax.report.heat import heat_map
from irqlora_jax.report.markup import Markup, join, tag
from irqlora_jax.report.page import document
from irqlora_jax.report.quantized import entropy_plots, quant_flags

PAGE_FILE = "sensitivity.html"
_INPUTS = (("q, k, v", "q_proj"), ("o", "o_proj"), ("gate, up", "gate_proj"), ("down", "down_proj"))
"""Projections that read the same input have the same outliers."""
logger = logging.getLogger(__name__)


@shows_messages
def sensitivity(asked: SensitivityConfig) -> Path:
    """Measures, and writes the page.

    Raises:
        ValueError, OSError: as `measure_sensitivity`.
    """
    result = measure_sensitivity(asked)
    path = Path(asked.output_dir) / PAGE_FILE
    write_text(path, sensitivity_page(result))
    logger.info(f"written to {path}")
    return path


def sensitivity_page(result: Mapping[str, Any]) -> str:
    """Makes the page from the contents of sensitivity.json."""
    name = f"Sensitivity of {Path(result['settings']['model']).name}"
    sections = (
        ("Loss by matrix", _losses(result)),
        ("Rules", _suggestion(result["suggestion"])),
        ("Entropy of the codes", entropy_plots(result["survey"])),
        ("Outlier channels", _outliers(result["outliers"])),
        ("Repeat it", _repeat(result)),
    )
    shown = (tag("section", tag("h2", title), content) for title, content in sections if content)
    return document(name, [tag("h1", name), _headline(result), *shown])


def worst_matrices(costs: Mapping[str, list[Number]], count: int) -> list[tuple[str, float]]:
    """Names and costs of the matrices with the largest costs, the largest first."""
    known = [
        (matrix_name(linear_path(name), layer), value)
        for name, values in costs.items()
        for layer, value in enumerate(values)
        if is_finite(value)
    ]
    return sorted(known, key=lambda one: -one[1])[:count]


def _headline(result: Mapping[str, Any]) -> Markup:
    settings = result["settings"]
    label = QuantConfig.from_dict(settings["quant"]).label
    parts = (
        ("model", settings["model"]),
        ("quantization", label),
        ("text", f"{settings['text']}, {result['tokens']:,} tokens in {result['rows']} rows"),
        (
            "loss",
            f"{format_number(result['full_precision'])} nats a token in full precision, "
            f"{format_number(result['quantized'])} with all matrices quantized",
        ),
    )
    return tag("dl", *(join(tag("dt", name), tag("dd", text)) for name, text in parts))


def _losses(result: Mapping[str, Any]) -> Markup:
    costs = result["costs"]
    worst = worst_matrices(costs, 10)
    if not worst:
        return Markup()
    alone = result["settings"]["mode"] == "one"
    what = (
        "Each cell is the loss that is added when only this matrix is quantized"
        if alone
        else "Each cell is the loss that is saved when only this matrix stays in full precision"
    )
    note = (
        f"{what}, in thousandths of a nat per token, by layer (counted from 0) and projection. "
        f"Blue: below 0. The worst is {worst[0][0]} with {worst[0][1]:+.4f} nats."
    )
    total = sum(value for values in costs.values() for value in values if is_finite(value))
    gap = ""
    if is_finite(result["quantized"]) and is_finite(result["full_precision"]):
        together = result["quantized"] - result["full_precision"]
        gap = f"All cells add up to {total:+.4f} nats; quantizing everything adds {together:+.4f}."
    layers = list(zip(*costs.values(), strict=True))
    thousandths = [[v if v is None else 1000 * v for v in row] for row in layers]
    rows = [
        [str(i), *("-" if v is None else f"{v:+.6f}" for v in row)] for i, row in enumerate(layers)
    ]
    columns = [name.removesuffix("_proj") for name in costs]
    picture = heat_map(
        "Loss by layer and projection", columns, thousandths, "{:.1f}", ["layer", *costs], rows
    )
    ranking = table(["matrix", "nats a token"], [[name, f"{v:+.4f}"] for name, v in worst])
    return join(
        tag("p", note, class_="note"),
        tag("p", gap) if gap else None,
        tag("div", picture, ranking, class_="grid2"),
    )


def _suggestion(found: Mapping[str, Any]) -> Markup:
    text = suggestion_sentence(found["added"], found["bits_before"], found["bits_after"])
    return join(tag("p", text), tag("pre", found["rules"]) if found["added"] else None)


def _outliers(outliers: Mapping[str, Any]) -> Markup:
    inputs = [(name, outliers[key]) for name, key in _INPUTS]
    ratios = list(zip(*(one["ratio"] for _, one in inputs), strict=True))
    channels = zip(*(one["channel"] for _, one in inputs), strict=True)
    rows = [
        [str(i), *(f"{r:.1f} (channel {c})" for r, c in zip(*pair, strict=True))]
        for i, pair in enumerate(zip(ratios, channels, strict=True))
    ]
    names = [name for name, _ in inputs]
    note = (
        "Mean square of the largest input channel, divided by the mean of all channels, in full "
        "precision. 1 means that all channels are alike."
    )
    picture = heat_map(
        "Largest input channel by layer", names, ratios, "{:.1f}", ["layer", *names], rows
    )
    return join(tag("p", note, class_="note"), tag("div", picture, class_="grid2"))


def _repeat(result: Mapping[str, Any]) -> Markup:
    settings = result["settings"] | {"output_dir": "NEW_FOLDER"}
    flags = [flag for name, value in _given(settings) for flag in (f"--{name}", value)]
    lines = [
        shlex.join(["cd", result["directory"]]),
        shlex.join(["irqlora", "sensitivity", *flags]),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    text = f"It took {result['seconds']:.0f} s (of the last start) with {versions}."
    return join(tag("p", text), tag("pre", "\n".join(lines)))


def _given(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The settings that are not defaults, as flags."""
    for name, field in SensitivityConfig.__dataclass_fields__.items():
        value = settings.get(name, field.default)  # earlier versions had fewer settings
        if name == "calibrate":
            given = value if isinstance(value, dict) else {}
            defaults = dataclasses.asdict(field.default)
            for key, one in given.items():
                if one != defaults.get(key):
                    yield f"calibrate.{key}", str(one)
        elif name == "quant":
            yield from quant_flags(settings["quant"])
        elif value != field.default and not (field.default == () and not value):
            yield name, json.dumps(value) if isinstance(value, list | tuple) else str(value)
