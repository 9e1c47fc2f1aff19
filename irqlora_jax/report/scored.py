"""Makes the section about evaluations: scores, confidence intervals, scores by subject."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from irqlora_jax.evaluate.mmlu_files import CATEGORIES, SUBCATEGORIES
from irqlora_jax.report.figure import table
from irqlora_jax.report.markup import Markup, join, tag
from irqlora_jax.report.run_data import RunData
from irqlora_jax.report.svg import Axis, Bar, horizontal_bars

_MEASURES = {
    "accuracy": "accuracy",
    "accuracy_norm": "accuracy by length",
    "recall": "recall",
    "bits_per_fact": "bits per fact",
    "perplexity": "perplexity",
    "nll": "nats per token",
    "bits_per_byte": "bits per byte",
}
_SHARES = ("accuracy", "accuracy_norm", "recall")


def evaluation(found: RunData) -> Markup:
    """Shows the scores of every evaluation, in total and by subject."""
    scored = [one for one in found.evaluations.items() if one[1].get("task") != "generate"]
    parts = []
    for task in dict.fromkeys(one.get("task") for _, one in scored):
        models = [(_variant(one), one) for _, one in scored if one.get("task") == task]
        models.sort(key=lambda pair: not pair[1].get("baseline"))
        parts += [tag("h3", str(task)), _measures(models)]
        parts.append(_subjects(str(task), [m for m in models if m[1].get("by_subject")][:3]))
    return join(*parts)


def _measures(models: Sequence[tuple[str, Mapping[str, Any]]]) -> Markup:
    """Makes a table with a row for each measure and a column for each model."""
    rows = []
    for measure, label in _MEASURES.items():
        values = [one.get(measure) for _, one in models]
        if any(isinstance(value, int | float) for value in values):
            cells = [
                _cell(measure, value, one) for value, (_, one) in zip(values, models, strict=True)
            ]
            rows.append([label, *cells])
    return table(["", *(name for name, _ in models)], rows)


def _cell(measure: str, value: Any, one: Mapping[str, Any]) -> str:
    if not isinstance(value, int | float):
        return "-"
    if measure not in _SHARES:
        return f"{value:.4f}"
    low, high = wilson(value, one.get("count"))
    interval = "" if low is None or high is None else f" ({100 * low:.1f} to {100 * high:.1f})"
    return f"{value:.1%}{interval}"


def _variant(one: Mapping[str, Any]) -> str:
    """Describes the evaluated weights."""
    if one.get("baseline"):
        return "before finetuning"
    step, which = one.get("step"), one.get("checkpoint")
    text = "finetuned" if step is None else f"finetuned, step {step}"
    return f"{text} (best)" if which == "best" else text


def _subjects(task: str, models: Sequence[tuple[str, Mapping[str, Any]]]) -> Markup:
    if not models:
        return Markup()
    names = list(dict.fromkeys(s for _, one in models for s in one["by_subject"]))
    finetuned = iter((0, 2, 1))
    kinds = [1 if one.get("baseline") else next(finetuned) for _, one in models]
    plots = []
    for title, group in _groups(task, names):
        rows = []
        for subject in group:
            row = []
            for (_, one), kind in zip(models, kinds, strict=True):
                value = one["by_subject"].get(subject)
                if value is not None:
                    low, high = wilson(value, (one.get("counts") or {}).get(subject))
                    row.append(Bar(value, low, high, kind))
            rows.append((subject.replace("_", " "), row))
        legend = [(name, kind) for (name, _), kind in zip(models, kinds, strict=True)]
        plots.append(horizontal_bars(title, Axis("accuracy", 0.0, 1.0), rows, legend))
    counted = any(one.get("counts") for _, one in models)
    note = "Numbers in brackets and whiskers: 95 % confidence interval (Wilson)."
    return join(
        tag("p", note, class_="note") if counted else None, tag("div", *plots, class_="grid2")
    )


def _groups(task: str, names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Groups the subjects of MMLU by category; other subjects in plots of at most 16."""
    if task == "mmlu":
        groups = []
        for category, parts in CATEGORIES.items():
            own = [name for part in parts for name in SUBCATEGORIES[part] if name in names]
            groups += [(f"MMLU, {category}", own)] if own else []
        return groups
    pieces = [list(names[i : i + 16]) for i in range(0, len(names), 16)]
    if len(pieces) == 1:
        return [("Accuracy by subject", pieces[0])]
    return [(f"Accuracy by subject ({i} of {len(pieces)})", p) for i, p in enumerate(pieces, 1)]


def wilson(share: float, count: int | None) -> tuple[float | None, float | None]:
    """Computes the 95 % confidence interval of a fraction of `count` questions (Wilson 1927)."""
    if not count:
        return None, None
    z = 1.959964
    middle = share + z * z / (2 * count)
    width = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - width) / (1 + z * z / count), (middle + width) / (1 + z * z / count)
