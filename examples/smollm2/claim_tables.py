"""Results of claim.py: their rows, tables and the plot."""

import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.append(str(Path(__file__).parent.parent / "factworld"))
from comparison import difference, interval, line, spread, table_head, write_report

REFERENCE = "qlora"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that all runs in a file share."""

    model: str
    steps: int
    """Steps of a finetune."""
    rates: tuple[float, ...]
    """Learning rates to choose from."""
    questions: int
    """Questions of each commonsense task."""
    mmlu: int
    """Questions of each MMLU subject."""
    batch: int = 8
    """Rows of a step."""
    length: int = 128
    """Longest row in tokens."""
    validation: int = 100
    """Held-out rows that choose the rate."""
    answers: int = 200
    """Held-out rows for the results."""
    text_tokens: int = 12 * 1024
    """Tokens of the text."""
    calibrate_tokens: int = 128 * 128
    """Tokens of the training set that calibrate."""
    alpha: float = 16.0


class Run(NamedTuple):
    """One line of the results."""

    format: str
    """"none" without quantization."""
    method: str
    rank: int | None
    """None: not finetuned."""
    seed: int
    rate: float | None

    @property
    def name(self) -> str:
        """For the progress bar."""
        rank = "" if self.rank is None else f", rank {self.rank}, rate {self.rate:g}"
        return f"{self.format} {self.method}{rank}, seed {self.seed}"


Results = dict[Run, dict[str, Any]]


# --------------------------------------------------------------------------------------- the rows


def chosen_rate(results: Results, method: str, format: str, rank: int | None) -> float | None:
    """The rate with the lowest validation loss of the first seed; None without a finetune."""
    key = (format, method, rank, 0)
    tried = {run.rate: own["validation"] for run, own in results.items() if run[:4] == key}
    return min(tried, key=lambda rate: tried[rate]) if tried else None


Row = tuple[str, str, int | None]
"""Format, method, rank."""


def chosen(results: Results) -> dict[Row, dict[int, dict[str, Any]]]:
    """Row -> seed -> figures at the chosen rate, in the order of the results."""
    found: dict[Row, dict[int, dict[str, Any]]] = {}
    for run, figures in results.items():
        if run.rate == chosen_rate(results, run.method, run.format, run.rank):
            found.setdefault((run.format, run.method, run.rank), {})[run.seed] = figures
    return found


def share(figures: Iterable[Mapping[str, Any]], tasks: Sequence[str]) -> tuple[float, float]:
    """Right answers in percent, and the standard error.

    Each task counts equally. The error is that of a sample of the questions, which are the same for
    all seeds; so seeds do not make it smaller.
    """
    means, variances = [], []
    for task in tasks:
        right, count = np.sum([own["right"][task] for own in figures], axis=0)
        asked = next(iter(figures))["right"][task][1]
        means.append(right / count)
        variances.append(means[-1] * (1 - means[-1]) / asked)
    return 100 * float(np.mean(means)), 100 * math.sqrt(sum(variances)) / len(tasks)


# --------------------------------------------------------------------------------------- the tables


def markdown(settings: Settings, results: Results) -> str:
    """All tables."""
    found = chosen(results)
    rates = ", ".join(f"{rate:g}" for rate in settings.rates)
    out = [
        f"{settings.model}, {settings.steps} steps of {settings.batch} rows of at most "
        f"{settings.length} tokens, alpha {settings.alpha:g}. The learning rate is one of {rates}, "
        f"the best of the first seed on {settings.validation} held-out rows. Answers: loss per "
        f"token (nats) on {settings.answers} other held-out rows. Text: loss per token on the "
        f"first {settings.text_tokens} tokens of the text. Right: mean over the tasks with the "
        "standard error of the sample of questions. Differences to QLoRA of the same format and "
        "rank are paired by seed, with the 95 % interval of Student's t. A rate in brackets is at "
        "an end of the grid. Tokens/s: of a training step, padding included, on the "
        "machine of the run.",
        _losses(settings, results, found),
    ]
    tasks = list(next(iter(found.values()))[0]["right"]) if found else []
    if tasks:
        out.append(_tasks(found, tasks))
    return "\n\n".join(out) + "\n"


def _losses(settings: Settings, results: Results, found: Mapping[Row, Mapping]) -> str:
    head = ["format", "rank", "method", "seeds", "trained", "rate"]
    head += ["answers", f"against {REFERENCE}", "text", f"against {REFERENCE}"]
    lines = table_head([*head, "right (%)", "entropy", "tokens/s"])
    for row in sorted(found, key=lambda row: _order(row, found)):
        format, method, rank = row
        figures = found[row]
        rate = chosen_rate(results, method, format, rank)
        end = len(settings.rates) > 1 and rate in (settings.rates[0], settings.rates[-1])
        shown = "-" if rate is None else f"({rate:g})" if end else f"{rate:g}"
        first = figures[min(figures)]
        trained = f"{first['trained']:,}" if "trained" in first else "-"
        cells = [format, "-" if rank is None else str(rank), method, str(len(figures))]
        cells += [trained, shown]
        reference = found.get((format, REFERENCE, rank), {})
        for name in ("answers", "text"):
            own = {seed: each[name] for seed, each in figures.items() if name in each}
            cells.append(spread(list(own.values()), 4) if own else "-")
            cells.append(_against(own, {s: each.get(name) for s, each in reference.items()}))
            if row == (format, REFERENCE, rank):
                cells[-1] = ""
        tasks = list(first["right"])
        cells.append("{:.1f} ± {:.1f}".format(*share(figures.values(), tasks)) if tasks else "-")
        cells.append("-" if first["entropy"] is None else f"{first['entropy']:.3f}")
        speeds = [own["tokens/s"] for own in figures.values() if "tokens/s" in own]
        cells.append(f"{max(speeds):.0f}" if speeds else "-")
        lines.append(line(cells))
    return "\n".join(lines)


def _order(row: Row, found: Mapping[Row, Any]) -> tuple[bool, int, int]:
    """Full precision first, then by format and rank, in the order of the results."""
    formats = list(dict.fromkeys(format for format, _, _ in found))
    return row[0] != "none", formats.index(row[0]), row[2] or 0


def _tasks(found: Mapping[Row, Mapping], tasks: Sequence[str]) -> str:
    lines = table_head(["format", "rank", "method", *(f"{task} (%)" for task in tasks)])
    for row in sorted(found, key=lambda row: _order(row, found)):
        format, method, rank = row
        cells = [format, "-" if rank is None else str(rank), method]
        for task in tasks:
            cells.append("{:.1f} ± {:.1f}".format(*share(found[row].values(), [task])))
        lines.append(line(cells))
    return "\n".join(lines)


def _against(ours: Mapping[int, float], theirs: Mapping[int, Any]) -> str:
    known = {seed: value for seed, value in theirs.items() if value is not None}
    return interval(difference(ours, known), 4)


# ----------------------------------------------------------------------------------------- the plot


def plot(results: Results, file: Path) -> None:
    """Plots what each method loses on the answers against full precision with LoRA.

    Raises:
        ImportError: matplotlib is not installed (the extra "notebook" has it).
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    found = chosen(results)
    panels = list(
        dict.fromkeys(
            (format, rank) for format, _, rank in found if format != "none" and rank is not None
        )
    )
    if not panels:
        return
    figure = Figure(figsize=(1 + 3.2 * len(panels), 3), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (format, rank) in zip(grid, panels, strict=True):
        ceiling = found.get(("none", "full+lora", rank))
        methods = [method for own, method, r in found if (own, r) == (format, rank)][::-1]
        for place, method in enumerate(methods):
            losses = [each["answers"] for each in found[format, method, rank].values()]
            axes.barh(place, np.mean(losses), color="C1" if method == REFERENCE else "C0")
            axes.scatter(losses, [place] * len(losses), s=10, color="0.2", zorder=3)
        lowest = min(each["answers"] for own in found.values() for each in own.values())
        axes.set_xlim(left=0.98 * lowest)
        if ceiling is not None:
            mean = np.mean([each["answers"] for each in ceiling.values()])
            axes.axvline(float(mean), color="0.3", linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(methods)), methods)
        axes.set_title(f"{format}, rank {rank}")
        axes.set_xlabel("loss of held-out answers (nats)")
    figure.savefig(file)


def report(settings: Settings, results: Results, folder: Path) -> None:
    """Prints the tables; writes them to report.md, and the plot to report.svg."""
    write_report(markdown(settings, results), lambda file: plot(results, file), folder)
