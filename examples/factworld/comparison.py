"""Results of ablation.py: paired statistics, tables and the plot."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import runs_file

REFERENCE = "qlora"
CLAIMS = (  # in the paper (figures 1 and 4, ablation) the first is better than the second
    ("icq", "qlora"),
    ("iec", "qlora"),
    ("u1", "qlora"),
    ("u2", "qlora"),
    ("ir-qlora", "qlora"),
    ("ir-qlora", "icq"),
    ("ir-qlora", "iec"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that all runs in a file share."""

    base: str
    """Recipe of pretrain.py."""
    bases: int | None
    """Number of different bases; later seeds permute them again. None: one for each seed."""
    steps: int
    """Steps of a finetune."""
    rates: tuple[float, ...]
    """Learning rates to choose from, for each method and format."""
    tuning_seeds: int
    """Number of seeds that try all rates."""
    questions: int | None
    """Test questions. None: all."""


class Run(NamedTuple):
    """One line of the results."""

    method: str
    format: str
    seed: int
    rate: float | None


Results = dict[Run, dict[str, Any]]
read = functools.partial(runs_file.read, settings=Settings, kind=Run)
resume = functools.partial(runs_file.resume, kind=Run)


# ----------------------------------------------------------------------------------- the statistics


def chosen_rate(results: Results, settings: Settings, method: str, format: str) -> float | None:
    """The rate with the best multiple choice on validation entities, or None without results.

    Takes the mean over the seeds that try all rates, and the lowest of equal rates.
    """
    tried: dict[float, list[float]] = {}
    for run, figures in results.items():
        own = run.method == method and run.format == format and run.seed < settings.tuning_seeds
        if own and run.rate is not None:
            tried.setdefault(run.rate, []).append(figures["validation"]["accuracy"])
    if not tried:
        return None
    most = max(map(len, tried.values()))
    means = {rate: np.mean(each) for rate, each in sorted(tried.items()) if len(each) == most}
    return max(means, key=lambda rate: means[rate])


def rows(results: Results, settings: Settings) -> dict[tuple[str, str], dict[int, dict[str, Any]]]:
    """(format, method) -> seed -> figures at the chosen rate, in the order of the results."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for run in results:
        key = (run.format, run.method)
        if key not in found:
            rate = chosen_rate(results, settings, run.method, run.format)
            own = {r.seed: f for r, f in results.items() if r[:2] == run[:2] and r.rate == rate}
            found[key] = dict(sorted(own.items()))
    return found


class Difference(NamedTuple):
    """Mean difference of pairs with equal seeds."""

    mean: float
    half: float
    """Half of the 95 % confidence interval."""
    wins: int
    pairs: int

    @property
    def verdict(self) -> str:
        """The conclusion that the interval allows."""
        if not self.half < abs(self.mean):
            return "undecided"
        return "better" if self.mean > 0 else "worse"


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """Paired difference over the common seeds, with Student's interval."""
    pairs = np.array([ours[seed] - theirs[seed] for seed in ours if seed in theirs])
    wins = int((pairs > 0).sum())
    if len(pairs) < 2:
        mean = float(pairs.mean()) if len(pairs) else math.nan
        return Difference(mean, math.nan, wins, len(pairs))
    half = student(len(pairs) - 1) * float(pairs.std(ddof=1)) / math.sqrt(len(pairs))
    return Difference(float(pairs.mean()), half, wins, len(pairs))


def student(freedom: int, share: float = 0.95) -> float:
    """Two-sided quantile of Student's t: |t| is below it with probability `share`.

    With t = sqrt(freedom) tan(angle) the density is cos(angle)^(freedom - 1), up to a constant.
    """
    angles = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(share, mass / mass[-1], angles)))


def values(figures: Mapping[int, Mapping[str, Any]], name: str) -> dict[int, float]:
    """Seed -> one figure of the test; shares are in percent."""
    scale = 100.0 if name in ("accuracy", "recall") else 1.0
    return {seed: scale * each["test"][name] for seed, each in figures.items()}


# --------------------------------------------------------------------------------------- the tables


def bits_of(format: str) -> int:
    """Bits of a format, from its name: nf4 has 4."""
    return int(format[-1])


def markdown(settings: Settings, results: Results) -> str:
    """All tables."""
    found = rows(results, settings)
    formats = list(dict.fromkeys(format for format, _ in found if format != "none"))
    out = [_preamble(settings)]
    for bits in sorted({bits_of(format) for format in formats}, reverse=True):
        shown = [key for key in found if key[0] != "none" and bits_of(key[0]) == bits]
        shown.sort(key=lambda key: formats.index(key[0]))
        ceiling = [key for key in found if key[0] == "none"]
        out.append(f"## {bits} bits\n\n" + _table(settings, results, found, ceiling + shown))
        out.append(_subjects(found, shown))
        for format in dict.fromkeys(key[0] for key in shown):
            out.append(f"Order, {format}: " + _order(found, format) + ".")
    claims = _claims(found, formats)
    return "\n\n".join([*out, *([claims] if claims else [])]) + "\n"


def _preamble(settings: Settings) -> str:
    rates = ", ".join(f"{rate:g}" for rate in settings.rates)
    return (
        f"Base {settings.base}, {settings.steps} steps. The learning rate is one of {rates}, "
        "chosen per method and format by multiple choice on validation entities over "
        f"{settings.tuning_seeds} seed(s). All figures are for other entities.\n"
        "Mean and standard deviation over the seeds. Differences are paired by seed, with the 95 % "
        "interval of Student's t, not corrected for the number of comparisons. A rate in brackets "
        "is at an end of the grid."
    )


def _table(settings: Settings, results: Results, found: Mapping, keys: Sequence) -> str:
    against = f"against {REFERENCE}"
    columns = ["format", "method", "seeds", "trained", "rate"]
    columns += ["multiple choice (%)", against, "wins"]
    columns += ["recall (%)", against, "bits per fact", against, "loss", "entropy", "error"]
    lines = table_head(columns)
    for format, method in keys:
        figures = found[format, method]
        rate = chosen_rate(results, settings, method, format)
        end = rate in (settings.rates[0], settings.rates[-1]) and len(settings.rates) > 1
        trained = next(iter(figures.values())).get("trained")
        cells = [format, method, str(len(figures)), f"{trained:,}" if trained else "-", "-"]
        if rate is not None:
            cells[-1] = f"({rate:g})" if end else f"{rate:g}"
        for name, digits in (("accuracy", 1), ("recall", 1), ("bits_per_fact", 3)):
            own = values(figures, name)
            cells.append(spread(list(own.values()), digits))
            pair = None
            if method != REFERENCE and (format, REFERENCE) in found:
                pair = difference(own, values(found[format, REFERENCE], name))
            cells.append("" if pair is None else interval(pair, digits + (digits == 1)))
            if name == "accuracy":
                cells.append("" if pair is None else f"{pair.wins}/{pair.pairs}")
        cells.append(spread(list(values(figures, "loss").values()), 3))
        entropies = [f["entropy"] for f in figures.values() if f["entropy"] is not None]
        cells.append(f"{np.mean(entropies):.3f}" if entropies else "-")
        cells.append(f"{np.mean([f['error'] for f in figures.values()]):.4f}")
        lines.append(line(cells))
    return "\n".join(lines)


def _subjects(found: Mapping, keys: Sequence) -> str:
    subjects = list(next(iter(found[keys[0]].values()))["test"]["by_subject"])
    lines = table_head(["format", "method", *(f"{subject} (%)" for subject in subjects)])
    for format, method in keys:
        each = [f["test"]["by_subject"] for f in found[format, method].values()]
        cells = [spread([100 * one[subject] for one in each], 1) for subject in subjects]
        lines.append(line([format, method, *cells]))
    return "\n".join(lines)


def table_head(columns: Sequence[str]) -> list[str]:
    """The first two lines of a table in Markdown."""
    return [line(columns), "|---" * len(columns) + "|"]


def line(cells: Sequence[str]) -> str:
    """A row of a table in Markdown."""
    return "| " + " | ".join(cells) + " |"


def _order(found: Mapping, format: str) -> str:
    means = {
        method: np.mean(list(values(figures, "accuracy").values()))
        for (own, method), figures in found.items()
        if own == format
    }
    ordered = sorted(means, key=lambda method: -means[method])
    return ", ".join(f"{method} {means[method]:.1f}" for method in ordered)


def _claims(found: Mapping, formats: Sequence[str]) -> str:
    """Tests the paper's order, pair by pair."""
    lines = []
    for first, second in CLAIMS:
        for format in formats:
            if (format, first) not in found or (format, second) not in found:
                continue
            cells = [format, f"{first} - {second}"]
            for name, digits in (("accuracy", 2), ("recall", 2), ("bits_per_fact", 3)):
                own, other = (values(found[format, m], name) for m in (first, second))
                pair = difference(own, other)
                cells += [interval(pair, digits), pair.verdict]
            lines.append(line(cells))
    head = "| format | pair | multiple choice (points) | | recall (points) | | bits per fact | |"
    rule = "|---" * 8 + "|"
    return "\n".join(["## The paper's order\n", head, rule, *lines]) if lines else ""


def spread(numbers: Sequence[float], digits: int) -> str:
    """Mean and standard deviation."""
    if len(numbers) < 2:
        return f"{np.mean(numbers):.{digits}f}"
    return f"{np.mean(numbers):.{digits}f} ± {np.std(numbers, ddof=1):.{digits}f}"


def interval(pair: Difference, digits: int) -> str:
    """Mean and interval of a difference; empty without pairs."""
    if pair.pairs < 2:
        return f"{pair.mean:+.{digits}f}" if pair.pairs else ""
    low, high = pair.mean - pair.half, pair.mean + pair.half
    return f"{pair.mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


# ----------------------------------------------------------------------------------------- the plot


def plot(settings: Settings, results: Results, file: Path) -> None:
    """Plots the differences to QLoRA in multiple choice: mean, interval, each seed; best on top.

    Raises:
        ImportError: matplotlib is not installed (the extra "notebook" has it).
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    tuned = {run: figures for run, figures in results.items() if run.rate is not None}
    found = rows(tuned, settings)
    formats = [f for f in dict.fromkeys(f for f, _ in found) if (f, REFERENCE) in found]
    widths = sorted({bits_of(f) for f in formats}, reverse=True)
    kinds = list(dict.fromkeys(f[:-1] for f in formats))
    if not formats:
        return
    figure = Figure(figsize=(1 + 4.5 * len(kinds), 0.6 + 2.6 * len(widths)), layout="constrained")
    grid = figure.subplots(len(widths), len(kinds), squeeze=False)
    for format in formats:
        axes = grid[widths.index(bits_of(format))][kinds.index(format[:-1])]
        reference = values(found[format, REFERENCE], "accuracy")
        pairs = {}
        for (own, method), figures in found.items():
            if own == format and method != REFERENCE and set(figures) & set(reference):
                ours = values(figures, "accuracy")
                seeds = [ours[seed] - reference[seed] for seed in ours if seed in reference]
                pairs[method] = (difference(ours, reference), seeds)
        ordered = sorted(pairs, key=lambda method: pairs[method][0].mean)
        for place, method in enumerate(ordered):
            pair, seeds = pairs[method]
            axes.scatter(seeds, [place] * len(seeds), s=14, color="0.6", zorder=2)
            half = None if math.isnan(pair.half) else pair.half
            axes.errorbar(pair.mean, place, xerr=half, fmt="o", color="C0", capsize=3, zorder=3)
        axes.axvline(0, color="0.3", linewidth=0.8)
        axes.set_yticks(range(len(ordered)), ordered)
        axes.set_title(f"{format}: {REFERENCE} {np.mean(list(reference.values())):.1f} %")
        axes.set_xlabel(f"multiple choice, points against {REFERENCE}")
        axes.grid(axis="x", color="0.9")
    for axes in grid.ravel():
        axes.set_visible(axes.has_data())
    figure.savefig(file)


def report(settings: Settings, results: Results, folder: Path) -> None:
    """Prints the tables; writes them to report.md, and the plot to report.svg."""
    write_report(markdown(settings, results), lambda file: plot(settings, results, file), folder)


def write_report(text: str, draw: Callable[[Path], None], folder: Path) -> None:
    """Prints the tables; writes them to report.md, and what `draw` draws to report.svg."""
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(text, encoding="utf-8")
    try:
        draw(folder / "report.svg")
    except ImportError:
        print(
            'no plot: matplotlib is missing; install it with `pip install "irqlora-jax[notebook]"`'
        )
    print(f"wrote {folder / 'report.md'}")
