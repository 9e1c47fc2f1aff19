"""Makes the sections of the page from the data of a run; empty if there is no data."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from irqlora_jax.adapters import METHODS
from irqlora_jax.adapters.method import LEARNED
from irqlora_jax.model.dpo import ACCURACY, MARGIN
from irqlora_jax.quant.formats import FORMATS
from irqlora_jax.report.figure import table
from irqlora_jax.report.markup import Markup, join, tag
from irqlora_jax.report.quantized import calibration_name, most_bits, quant_flags
from irqlora_jax.report.run_data import RunData, metric_curve
from irqlora_jax.report.svg import Axis, Bar, Line, horizontal_bars, line_plot
from irqlora_jax.text import readable_size

_PATHS = ("mmlu", "questions", "text", "task_folder", "prompts")
"""Settings of an evaluation that name a file or a folder."""
"""Start of the names of metrics that a method learned (`train.loop.learned`)."""


def headline(found: RunData) -> Markup:
    """Writes one sentence each about model, format, calibration, adapter and result."""
    parts = [
        ("model", _model_sentence(found)),
        ("format", _format_sentence(found)),
        ("calibration", _calibration_sentence(found)),
        ("adapter", _adapter_sentence(found)),
        ("result", _result_sentence(found)),
    ]
    cells = [tag("dt", name) + tag("dd", text) for name, text in parts if text]
    return tag("dl", *map(Markup, cells)) if cells else Markup()


def _model_sentence(found: RunData) -> str:
    llama = found.llama
    size = ""
    if llama is not None:
        size = (
            f"a {llama.family.title} with {llama.num_hidden_layers} layers of {llama.hidden_size}"
            f", a vocabulary of {llama.vocab_size:,}"
        )
    if found.storage is not None:
        size += f" and {_readable_count(found.storage.weights)} weights in its linear layers"
    return ": ".join(part for part in (found.source, size) if part) + "."


def _format_sentence(found: RunData) -> str:
    quant = found.quant
    if quant is None:
        return ""
    rules = quant.get("rules") or ()
    if quant["format"] == "none":
        text = "Not quantized"
        if not rules:
            return f"{text}."
    else:
        levels = 2 ** FORMATS[quant["format"]].bits
        text = f"{quant['format']}, {levels} levels, in blocks of {quant['block_size']} weights"
    if found.storage is not None:
        text += f": {found.storage.bits:.2f} bits a weight with scales and shifts"
    for rule in rules:
        changes = (f"{k} {v}" for k, v in rule.items() if k != "match" and v is not None)
        text += f"; {rule['match']}: {', '.join(changes)}"
    return f"{text}."


def _calibration_sentence(found: RunData) -> str:
    if found.quant is None or (found.quant["format"] == "none" and not found.quant.get("rules")):
        return ""
    name = calibration_name(found.quant)
    survey = found.survey or {}
    if "plain" not in survey:
        return _sentence(name)
    bits = most_bits(survey)
    plain = survey["plain"]["mean_entropy"]
    if "calibrated" not in survey:
        return f"{_sentence(name)[:-1]}; mean entropy of the codes {plain:.3f} of {bits} bits."
    after = survey["calibrated"]["mean_entropy"]
    return _sentence(
        f"{name}: mean entropy of the codes {plain:.3f} before and {after:.3f} after, "
        f"of {bits} bits"
    )


def _adapter_sentence(found: RunData) -> str:
    settings = found.settings
    if settings is None:
        return ""
    adapter = settings["adapter"]
    known = METHODS.get(adapter["method"])
    method = adapter["method"] if known is None else known.title
    places = f"{len(adapter['targets'])} projections of every layer"
    scaled = " (rsLoRA)" if adapter.get("scaling") == "sqrt_rank" else ""
    text = f"{method}, rank {adapter['rank']}, alpha {adapter['alpha']:g}{scaled}, on {places}"
    if found.trained is not None:
        text += f": {_readable_count(found.trained.weights)} trained weights"
    return f"{text}."


def _result_sentence(found: RunData) -> str:
    before, after = before_and_after(found.results)
    if after is None:
        return ""
    parts = []
    loss = "training_loss" if after.get("loss") is None else "loss"
    nats = "" if _has_pairs(found) else " nats a token"
    for name, form in ((loss, f"{{:.4f}}{nats}"), ("accuracy", "{:.1%}")):
        value = after.get(name)
        if value is None:
            continue
        label = "evaluation loss" if name == "loss" else name.replace("_", " ")
        old = None if before is None else before.get(name)
        text = f"{label} {form.format(value)}"
        if old is not None:
            plain = form.split(" ")[0].format(old)
            text = f"{label} from {plain} to {form.format(value)}"
        parts.append(text)
    steps = [row["step"] for row in found.metrics]
    ending = f" after {steps[-1]:,} steps" if steps else ""
    return _sentence(" and ".join(parts) + ending) if parts else ""


def before_and_after(
    rows: Sequence[Mapping[str, Any]],
) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """Returns the rows of results.json before and after the finetuning."""
    before = [row for row in rows if "finetuned" not in row["model"]]
    after = [row for row in rows if "finetuned" in row["model"]]
    return (before[-1] if before else None), (after[0] if after else None)


def results(found: RunData) -> Markup:
    """Makes the table of results.json."""
    forms = {
        "model": "{}",
        "entropy": "{:.3f}",
        "loss": "{:.4f}",
        "accuracy": "{:.1%}",
        "bits": "{:.2f}",
        "seconds": "{:.1f}",
    }
    unit = "DPO" if _has_pairs(found) else "nats/token"
    heads = {
        "entropy": "entropy (bits)",
        "loss": f"loss ({unit})",
        "training_loss": f"training loss ({unit})",
        "bits": "bits a weight",
        "seconds": "time (s)",
    }
    if all(row.get("loss") is None for row in found.results):  # there were no data for it
        forms = {"training_loss" if k == "loss" else k: form for k, form in forms.items()}
    rows = [
        ["-" if row.get(name) is None else form.format(row[name]) for name, form in forms.items()]
        for row in found.results
    ]
    return table([heads.get(name, name) for name in forms], rows)


def training(found: RunData) -> Markup:
    """Plots loss, learning rate, gradient, speed and memory over the steps."""
    metrics, steps = found.metrics, Axis("step", low=0.0, whole=True)
    plots = [
        _plot("Loss", "DPO" if _has_pairs(found) else "nats a token", metrics, steps, "loss"),
        _plot("Margin of the rewards", "margin", metrics, steps, MARGIN),
        _plot("Accuracy of the rewards", "share", metrics, steps, ACCURACY),
    ]
    courses = (
        ("Learning rate", "learning_rate", "learning rate", 1.0),
        ("Norm of the gradient before clipping", "grad_norm", "norm", 1.0),
        ("Speed", "tokens_per_second", "tokens/s", 1.0),
        ("Share of time with a busy device", "device_share", "share (%)", 0.01),
        ("Peak memory", "peak_memory", "memory (GiB)", 2.0**30),
        ("Loss scale of float16", "loss_scale", "scale", 1.0),
    )
    # On a CPU, the program that feeds the device runs on the same cores.
    on_cpu = (found.environment or {}).get("platform") == "cpu"
    for title, name, label, unit in courses:
        if name == "device_share" and on_cpu:
            continue
        x, values = metric_curve(metrics, name)
        y = [None if value is None else value / unit for value in values]
        plots.append(line_plot(title, steps, Axis(label, 0.0), [_course(label, x, y, 0)]))
    plots = [plot for plot in plots if plot]
    return tag("div", *plots, class_="grid2") if plots else Markup()


def learned(found: RunData) -> Markup:
    """Shows what a method learned by layer besides its update, such as ranks and bits."""
    rows = (row for row in reversed(found.metrics) if any(name.startswith(LEARNED) for name in row))
    newest = next(rows, {})
    by_row: dict[str, dict[int, str]] = {}
    for name, value in newest.items():
        parts = name.split("/")
        if name.startswith(LEARNED) and len(parts) == 4 and parts[3].isdecimal():
            row = by_row.setdefault(f"{parts[2]}: {parts[1]}", {})
            row[int(parts[3])] = f"{value:g}" if isinstance(value, int | float) else "-"
    if not by_row:
        return Markup()
    depth = 1 + max(layer for row in by_row.values() for layer in row)
    body = [
        (name, *(row.get(layer, "-") for layer in range(depth))) for name, row in by_row.items()
    ]
    note = f"By layer, after step {newest['step']}."
    return join(tag("p", note), table(("", *map(str, range(depth))), body))


def _has_pairs(found: RunData) -> bool:
    """Whether the run was trained on preference pairs, with DPO's loss."""
    return (found.settings or {}).get("data", {}).get("format") == "preference"


def _plot(
    title: str, unit: str, metrics: Sequence[Mapping[str, Any]], steps: Axis, metric: str
) -> Markup:
    """The course of a metric in training and evaluation."""
    names = (("training", metric), ("evaluation", f"eval_{metric}"))
    curves = [(name, *metric_curve(metrics, metric)) for name, metric in names]
    lines = [_course(name, x, y, kind) for kind, (name, x, y) in enumerate(curves) if x]
    return line_plot(title, steps, Axis(unit), lines)


def _course(name: str, x: Sequence[float], y: Sequence[float | None], kind: int) -> Line:
    """A line over the steps, with markers if its points are few."""
    return Line(name, y, kind, x, len(x) <= 40)


def memory(found: RunData) -> Markup:
    """Shows the stored memory during training, and the measured peak."""
    parts: list[tuple[str, int]] = []
    if found.storage is not None:
        stored = found.storage
        parts += [
            ("base: codes", stored.codes),
            ("base: scales", stored.scales),
            ("base: shifts", stored.shifts),
            ("base: outliers", stored.outliers),
            ("base: embeddings, head and norms", stored.rest),
        ]
    if found.trained is not None:
        offloaded = (found.settings or {}).get("train", {}).get("offload_optimizer")
        parts.append(("adapters", found.trained.adapters))
        parts.append((f"optimizer{' (on the host)' if offloaded else ''}", found.trained.optimizer))
    parts = [(name, size) for name, size in parts if size]
    if not parts:
        return Markup()
    total = sum(size for _, size in parts)
    largest = max(size for _, size in parts)
    units = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
    unit, name = next((one for one in units if largest >= one[0]), units[-1])
    rows = [(part, [Bar(size / unit)]) for part, size in parts]
    plot = horizontal_bars("What is stored", Axis(f"memory ({name})"), rows, [(name, 0)], "{:,.3g}")
    text = f"{readable_size(total)} in all, before gradients and activations."
    peaks = [v for v in metric_curve(found.metrics, "peak_memory")[1] if v is not None]
    if peaks:
        where = (found.environment or {}).get("platform")
        whose = "The process took" if where == "cpu" else "The device held"
        text += f" {whose} {readable_size(int(max(peaks)))} at most while training."
    return join(tag("p", text), tag("div", plot, class_="grid2"))


def repeat(found: RunData) -> Markup:
    """Shows the commands to repeat the run, with device, versions and configuration."""
    parts, commands = [_environment(found)], []
    if found.settings is not None:
        started = (found.environment or {}).get("directory")
        if started:  # paths of the configuration may be relative to it
            commands.append(shlex.join(["cd", started]))
        config = shlex.quote(str(found.folder / "config.json"))
        commands.append(f"irqlora train --config {config} --output_dir NEW_FOLDER")
        commands += [
            _eval_command(one)
            for one in found.evaluations.values()
            if isinstance(one.get("settings"), dict)
        ]
        parts += [tag("pre", "\n".join(commands))]
        written = json.dumps(found.settings, indent=1, ensure_ascii=False)
        parts.append(tag("details", tag("summary", "configuration"), tag("pre", written)))
    elif found.quant is not None and found.source:
        flags = " ".join(f"--{k}={shlex.quote(v)}" for k, v in quant_flags(found.quant))
        source = shlex.quote(found.source)  # as given to irqlora quantize
        command = f"irqlora quantize --model {source} --output_dir NEW_FOLDER {flags}"
        parts.append(tag("pre", command))
    return join(*parts)


def _environment(found: RunData) -> Markup:
    known = found.environment
    if known is None:
        return Markup()
    device = known["device"]
    if known.get("devices", 1) > 1:
        device = f"{known['devices']} times {device}"
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    parts = [
        ("device", device),
        ("system", known.get("system")),
        ("started", known.get("started")),
        ("versions", versions),
    ]
    return tag("dl", *(join(tag("dt", name), tag("dd", text)) for name, text in parts if text))


def _eval_command(one: Mapping[str, Any]) -> str:
    """The command of an evaluation, on the new folder, with all settings that are not defaults."""
    from irqlora_jax.evaluate.tasks import EvalConfig

    flags = ["--run", "NEW_FOLDER", "--task", str(one["settings"]["task"])]
    defaults = {
        name: field.default
        for name, field in EvalConfig.__dataclass_fields__.items()
        if name not in ("run", "task", "output", "progress")
    }
    for name, default in defaults.items():
        value = one["settings"].get(name, default)
        if value == default or (default == () and not value):
            continue
        if isinstance(value, str) and name in _PATHS:
            value = str(Path(one.get("directory", "")) / value)
        if value is True:
            flags.append(f"--{name}")
        else:
            flags += [f"--{name}", json.dumps(value) if isinstance(value, list) else str(value)]
    return shlex.join(["irqlora", "eval", *flags])


def _readable_count(count: int) -> str:
    for size, name in ((10**9, "billion"), (10**6, "million")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count:,}"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
