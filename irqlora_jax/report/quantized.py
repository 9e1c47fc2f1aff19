"""Makes the sections about the quantization: entropy, codes, shifts, errors."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from irqlora_jax.base.survey import bin_edges
from irqlora_jax.config.base import quant_settings
from irqlora_jax.quant.calibrations import CALIBRATIONS, PLAIN
from irqlora_jax.quant.config import TITLES, QuantConfig
from irqlora_jax.quant.formats import FORMATS, Format
from irqlora_jax.report.heat import heat_map
from irqlora_jax.report.markup import Markup, join, tag
from irqlora_jax.report.run_data import RunData
from irqlora_jax.report.svg import (
    Axis,
    Line,
    Series,
    grouped_columns,
    histogram,
    line_plot,
    nice_limits,
)


def calibration_name(settings: Mapping[str, Any]) -> str:
    """Calibration, rounding and training of a survey or of `quant`; "no calibration" without them.

    A name that this version does not know is its own title.
    """
    name, training = (str(settings.get(key, "none")) for key in ("calibration", "training"))
    known = CALIBRATIONS.get(name)
    parts = [name if known is None else known.title]
    if settings.get("rounding") == "feedback" and not (known and known.feedback):
        parts.append("error feedback")
    parts.append(TITLES.get(training, training))
    return " + ".join(part for part in parts if part) or PLAIN.description


def quant_flags(quant: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The settings of the quantizer that are not defaults, as names and values of flags.

    Args:
        quant: output of `dataclasses.asdict`, also of an earlier version.
    """
    config, defaults = QuantConfig.from_dict(quant), quant_settings(QuantConfig())
    for name, value in quant_settings(config).items():
        if name == "quant.rules" and value:
            rules = [{"match": rule.match} | rule.overrides for rule in config.rules]
            yield name, json.dumps(rules)
        elif value != defaults[name]:
            yield name, json.dumps(value) if isinstance(value, tuple | bool) else str(value)


def bits(found: RunData) -> Markup:
    """Draws the bits of every matrix, if they differ."""
    if found.bits is None or len({bits for own in found.bits.values() for bits in own}) < 2:
        return Markup()
    layers = list(zip(*found.bits.values(), strict=True))
    columns = [name.removesuffix("_proj") for name in found.bits]
    rows = [[str(i), *(f"{value:.4f}" for value in row)] for i, row in enumerate(layers)]
    head = ["layer", *found.bits]
    picture = heat_map("Bits by layer and projection", columns, layers, "{:.2f}", head, rows)
    note = "Stored bits a weight, with scales and shifts, by layer (counted from 0) and projection."
    return join(tag("p", note, class_="note"), tag("div", picture, class_="grid2"))


def entropy(found: RunData) -> Markup:
    """Plots the entropy of the codes by layer, before and after the calibration."""
    return entropy_plots(found.survey or {})


def entropy_plots(survey: Mapping[str, Any]) -> Markup:
    """As `entropy`, from a survey (`base.survey.summarize`)."""
    kinds = _kinds(survey)
    if not kinds:
        return Markup()
    by_kind = {name: survey[key]["entropy"] for name, key in kinds}
    names = list(next(iter(by_kind.values())))
    axis = _shared_axis("entropy (bits)", by_kind)
    plots = [
        _by_layer(
            "Mean of all projections",
            axis,
            {
                name: [_mean(column) for column in zip(*values.values(), strict=True)]
                for name, values in by_kind.items()
            },
        )
    ]
    for name in names:
        plots.append(_by_layer(name, axis, {kind: v[name] for kind, v in by_kind.items()}))
    note = (
        f"Mean entropy of the codes in a block (at most {most_bits(survey)} bits) by layer, "
        f"counted from 0. {_sampled(survey)} All plots have the same scale."
    )
    return join(tag("p", note, class_="note"), tag("div", *plots, class_="grid2"))


def quantization(found: RunData) -> Markup:
    """Plots codes, shifts and errors."""
    survey = found.survey or {}
    kinds = _kinds(survey)
    if not kinds:
        return Markup()
    fmt = FORMATS[survey["format"]]
    plots = [_codes_plot(survey, kinds, fmt), _shifts_plot(survey, kinds, fmt)]
    by_kind = {
        name: {
            part: [None if v is None else 100 * v for v in values]
            for part, values in survey[key]["error"].items()
        }
        for name, key in kinds
    }
    axis = _shared_axis("relative error (%)", by_kind)
    for part in next(iter(by_kind.values())):
        values = {kind: errors[part] for kind, errors in by_kind.items()}
        plots.append(_by_layer(f"Error of {part}", axis, values))
    note = (
        "Relative error: norm of the quantization error, divided by the norm of the weights. "
        "All error plots have the same scale."
    )
    return join(tag("p", note, class_="note"), tag("div", *plots, class_="grid2"))


def output_errors(found: RunData) -> Markup:
    """Plots the errors of the outputs by layer, if the base was calibrated with a text."""
    used = (found.survey or {}).get("calibrate")
    if used is None:
        return Markup()
    by_kind = {
        name: {
            part: [None if v is None else 100 * v for v in values]
            for part, values in used["output_error"][key].items()
        }
        for name, key in (("plain", "plain"), ("this base", "own"))
    }
    axis = _shared_axis("relative squared error (%)", by_kind)
    plots = [
        _by_layer(part, axis, {kind: errors[part] for kind, errors in by_kind.items()})
        for part in by_kind["plain"]
    ]
    what = "Squared error of the outputs of each matrix, divided by the squared outputs, for"
    if used.get("metric") == "gradients":
        what = "Squared error of each matrix, weighed by the gradients of the loss, for"
    note = (
        f"{what} {used['rows']} rows of {used['length']} tokens of {Path(str(used['data'])).name}. "
        "A fitted adapter is included. All plots have the same scale."
    )
    return join(tag("p", note, class_="note"), tag("div", *plots, class_="grid2"))


def most_bits(survey: Mapping[str, Any]) -> int:
    """Bits of the largest format, which limit all entropies."""
    return max(FORMATS[name].bits for name in survey.get("formats") or [survey["format"]])


def _mean(column: Sequence[float | None]) -> float | None:
    """Mean of the projections of a layer that are quantized; None if none is."""
    found = [value for value in column if value is not None]
    return sum(found) / len(found) if found else None


def _shared_axis(label: str, by_kind: Mapping[str, Mapping[str, Sequence[float | None]]]) -> Axis:
    """One scale for many plots, so that they can be compared."""
    parts = [values for kind in by_kind.values() for values in kind.values()]
    found = [value for values in parts for value in values if value is not None]
    return Axis(label, *nice_limits(min(found), max(found)))


def _kinds(survey: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names of the quantizers in the survey, and their keys."""
    names = (("plain", "plain"), (calibration_name(survey), "calibrated"))
    return [(label, key) for label, key in names if key in survey]


def _sampled(survey: Mapping[str, Any]) -> str:
    share = survey["sampled"] / survey["weights"]
    if share == 1:
        return "Computed from all weights."
    return f"Computed from {share:.1%} of the weights: evenly spaced whole rows."


def _by_layer(title: str, axis: Axis, values: Mapping[str, Sequence[float | None]]) -> Markup:
    depth = len(next(iter(values.values())))
    layers, marks = list(map(float, range(depth))), depth <= 40
    lines = [Line(one.name, one.y, one.kind, layers, marks) for one in _series(values)]
    return line_plot(title, Axis("layer", whole=True), axis, lines)


def _series(values: Mapping[str, Sequence[float | None]]) -> list[Series]:
    """Makes the series: kind 1 for the plain quantizer, kind 0 for the calibrated one."""
    return [Series(name, y, 1 if name == "plain" else 0) for name, y in values.items()]


def _codes_plot(survey: Mapping[str, Any], kinds: Sequence[tuple[str, str]], fmt: Format) -> Markup:
    shares = {}
    for name, key in kinds:
        counts = [survey[key]["codes"][code] for code in fmt.order]
        shares[name] = [100 * count / sum(counts) for count in counts]
    digits = 0 if fmt.integer else 2
    labels = [f"{fmt.levels[code]:.{digits}f}" for code in fmt.order]
    return grouped_columns(
        f"How often each level of {fmt.name} is used",
        Axis("level" if fmt.integer else "level (units of the scale)"),
        Axis("weights (%)"),
        labels,
        _series(shares),
        ("uniform", 100 / len(labels)),
    )


def _shifts_plot(
    survey: Mapping[str, Any], kinds: Sequence[tuple[str, str]], fmt: Format
) -> Markup:
    found = {name: survey[key]["shifts"] for name, key in kinds if "shifts" in survey[key]}
    if not found:
        return Markup()
    edges = bin_edges(fmt.name)
    used = [i for counts in found.values() for i, count in enumerate(counts) if count]
    first, last = min(used), max(used)
    if not fmt.integer:  # symmetric around the bin that contains 0
        middle = len(edges) // 2 - 1
        reach = min(middle, max(middle - first, last - middle) + 1)
        first, last = middle - reach, middle + reach
    size = max(1, (last + 1 - first) // 48)
    last += 1
    starts = list(range(first, last, size))
    shares = {
        name: [100 * sum(counts[s : min(s + size, last)]) / sum(counts) for s in starts]
        for name, counts in found.items()
    }
    limits = [float(edges[s]) for s in starts] + [float(edges[last])]
    if fmt.integer:
        title, label = "Zero points of the blocks", "zero point (codes)"
    else:
        title, label = "Shifts of the blocks", "shift (units of the scale)"
    return histogram(title, Axis(label), Axis("blocks (%)"), limits, _series(shares))
