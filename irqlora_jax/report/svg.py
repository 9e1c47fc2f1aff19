"""Draws plots as inline SVG, 360 units wide (the width of a phone).

Colors come from the classes s0, s1, ... of the page's style, which has a light and a dark mode.
Series also differ in dash pattern and marker. A plot is a <figure> with a title, a legend and a
table of its values.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from irqlora_jax.report.figure import WIDTH, Number, dash, figure, format_number, is_finite, marker
from irqlora_jax.report.markup import Markup, join, tag

HEIGHT = 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 24, 38


@dataclasses.dataclass(frozen=True)
class Series:
    """Values with a name for the legend. `kind` chooses color, dash pattern and marker."""

    name: str
    y: Sequence[Number]
    kind: int = 0


@dataclasses.dataclass(frozen=True)
class Line(Series):
    """A series with an ascending x for each value. `marks` draws markers at its points."""

    x: Sequence[float] = ()
    marks: bool = True


@dataclasses.dataclass(frozen=True)
class Axis:
    """Label with unit, and limits (None: from the data). `whole`: integer ticks only."""

    label: str
    low: float | None = None
    high: float | None = None
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Bar:
    """A value, its confidence interval if there is one, and its kind."""

    value: float
    low: float | None = None
    high: float | None = None
    kind: int = 0


def ticks(low: float, high: float, max_ticks: int = 5, whole: bool = False) -> list[float]:
    """Returns round numbers from `low` to `high`, in steps of 1, 2 or 5 times a power of 10."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, max_ticks - 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(i * step) for i in range(first, last + 1)]


def nice_limits(low: float, high: float) -> tuple[float, float]:
    """Extends an interval to round limits, so that `ticks` has marks at both ends."""
    if not high > low:
        return low, high
    marks = ticks(low, high)
    step = marks[1] - marks[0] if len(marks) > 1 else high - low
    # Tolerate the float32 rounding of a round number.
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return first * step, last * step


def tick_labels(values: Sequence[float]) -> list[str]:
    """Formats numbers with as few digits as distinguish them: 12k, 3.5M, 1.5e-4."""
    largest = max(map(abs, values), default=0)
    units = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"), (1e-2, 1.0, ""))
    unit, name = next(((u, n) for least, u, n in units if largest >= least), (1.0, ""))
    if 0 < largest < units[-1][0]:
        power = math.floor(math.log10(largest) + 1e-9)
        unit, name = 10.0**power, f"e{power}"
    step = min((abs(b - a) for a, b in pairwise(values)), default=1.0) / unit
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    return [f"{v / unit:.{digits}f}{name}" if v or not name else "0" for v in values]


def line_plot(
    title: str,
    x_axis: Axis,
    y_axis: Axis,
    lines: Sequence[Line],
) -> Markup:
    """Draws lines, interrupted at missing values. A single point always has a marker.

    Returns:
        The figure; empty if there are no values.
    """
    known = [y for one in lines for y in one.y if is_finite(y)]
    x = sorted({at for one in lines for at in one.x})
    if not known:
        return Markup()
    frame = _Frame.around(x_axis, y_axis, (min(x), max(x)), (min(known), max(known)))
    drawn = [frame.axes()]
    for one in lines:
        for piece in _pieces(one, frame):
            if len(piece) > 1:
                path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in piece)
                drawn.append(
                    tag("path", class_=f"l s{one.kind}", d=path, stroke_dasharray=dash(one.kind))
                )
            if one.marks or len(piece) == 1:
                drawn += [marker(a, b, one.kind) for a, b in piece]
    head = [x_axis.label, *(one.name for one in lines)]
    values = [dict(zip(one.x, one.y, strict=True)) for one in lines]
    rows = [
        [format_number(at), *(format_number(v[at]) if at in v else "" for v in values)] for at in x
    ]
    return figure(title, HEIGHT, drawn, [(one.name, one.kind) for one in lines], head, rows)


def _pieces(line: Line, frame: "_Frame") -> list[list[tuple[float, float]]]:
    """Converts a line to picture coordinates, and splits it at missing values."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for at, y in zip(line.x, line.y, strict=True):
        if is_finite(y):
            pieces[-1].append((frame.x(at), frame.y(y)))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def histogram(
    title: str, x_axis: Axis, y_axis: Axis, edges: Sequence[float], series: Sequence[Series]
) -> Markup:
    """Draws a histogram over a numeric axis. Several series overlap as outlines.

    Args:
        title: title of the plot.
        x_axis: label and limits.
        y_axis: label; the axis starts at 0.
        edges: edges of the bins, one more than values.
        series: one value for each bin.
    """
    known = [y for one in series for y in one.y if is_finite(y)]
    if not known:
        return Markup()
    y_axis = dataclasses.replace(y_axis, low=0.0)
    frame = _Frame.around(x_axis, y_axis, (edges[0], edges[-1]), (0.0, max(known)))
    drawn = [frame.axes()]
    for one in series:
        d = f"M{frame.x(edges[0]):.1f} {frame.y(0.0):.1f}"
        for (left, right), y in zip(pairwise(edges), one.y, strict=True):
            top = frame.y(y if is_finite(y) else 0.0)
            d += f"L{frame.x(left):.1f} {top:.1f}L{frame.x(right):.1f} {top:.1f}"
        d += f"L{frame.x(edges[-1]):.1f} {frame.y(0.0):.1f}Z"
        drawn.append(tag("path", class_=f"l a s{one.kind}", d=d, stroke_dasharray=dash(one.kind)))
    head = ["from", "to", *(one.name for one in series)]
    rows = [
        [format_number(left), format_number(right), *(format_number(one.y[i]) for one in series)]
        for i, (left, right) in enumerate(pairwise(edges))
    ]
    return figure(title, HEIGHT, drawn, [(s.name, s.kind) for s in series], head, rows)


def grouped_columns(
    title: str,
    x_axis: Axis,
    y_axis: Axis,
    labels: Sequence[str],
    series: Sequence[Series],
    level: tuple[str, float] | None = None,
) -> Markup:
    """Draws groups of columns, one group a label. `level`: name and height of a dashed line."""
    known = [y for one in series for y in one.y if is_finite(y)]
    if not known:
        return Markup()
    highest = max(known + ([level[1]] if level else []))
    y_axis = dataclasses.replace(y_axis, low=0.0)
    frame = _Frame.around(x_axis, y_axis, (0.0, float(len(labels))), (0.0, highest))
    drawn = [frame.axes(x_ticks=False)]
    group = frame.x(1.0) - frame.x(0.0)
    width = 0.82 * group / len(series)
    for place, one in enumerate(series):
        for i, y in enumerate(one.y):
            if is_finite(y):
                left, top = frame.x(float(i)) + 0.09 * group + place * width, frame.y(y)
                text = tag("title", f"{labels[i]}, {one.name}: {format_number(y)}")
                drawn.append(
                    tag(
                        "rect",
                        text,
                        class_=f"f s{one.kind}",
                        x=left,
                        y=top,
                        width=width,
                        height=frame.y(0.0) - top,
                    )
                )
    # Leave out labels that would overlap.
    every = math.ceil(max(map(len, labels)) * 6 / group) if labels else 1
    for i, label in enumerate(labels):
        if i % every == 0:
            drawn.append(
                tag("text", label, x=frame.x(i + 0.5), y=HEIGHT - _BOTTOM + 13.0, class_="t c")
            )
    if level:
        drawn.append(
            tag(
                "line",
                tag("title", f"{level[0]}: {format_number(level[1])}"),
                class_="level",
                x1=_LEFT,
                x2=WIDTH - _RIGHT,
                y1=frame.y(level[1]),
                y2=frame.y(level[1]),
            )
        )
    head = [x_axis.label, *(one.name for one in series)]
    rows = [[name, *(format_number(one.y[i]) for one in series)] for i, name in enumerate(labels)]
    legend = [(one.name, one.kind) for one in series] + ([(level[0], -1)] if level else [])
    return figure(title, HEIGHT, drawn, legend, head, rows, filled=True)


def horizontal_bars(
    title: str,
    axis: Axis,
    rows: Sequence[tuple[str, Sequence[Bar]]],
    names: Sequence[tuple[str, int]],
    form: str = "{:.1%}",
) -> Markup:
    """Draws horizontal bars below the label of each row, with whiskers for the intervals.

    Args:
        title: title of the plot.
        axis: axis of the values; it starts at 0 by default.
        rows: label and bars of each row.
        names: names and kinds of the bars, for the legend.
        form: format string of a value.
    """
    if not rows:
        return Markup()
    most = [end for _, row in rows for b in row for end in (b.value, b.high) if end is not None]
    low, high = axis.low or 0.0, axis.high or (max(most) or 1.0)
    left, right, thick, gap = 2.0, WIDTH - 14.0, 8.0, 24.0

    def at(value: float) -> float:
        return left + (right - left) * (min(max(value, low), high) - low) / (high - low)

    marks, y, body = ticks(low, high, 6), 6.0, []
    for label, row in rows:
        values = " / ".join(form.format(bar.value) for bar in row)
        room = max(8, 58 - len(values))
        short = label if len(label) <= room else f"{label[: room - 1]}\u2026"
        body.append(tag("text", tag("title", label), short, x=left, y=y + 11, class_="t"))
        body.append(tag("text", values, x=right, y=y + 11, class_="t e"))
        y += 15
        for bar in row:
            body.append(_bar(bar, at, y, thick, label, form))
            y += thick + 2
        y += gap - 15 - 2
    bottom = y - 2
    height = int(bottom + 34)
    grid = []
    for value, text in zip(marks, tick_labels(marks), strict=True):
        grid.append(tag("line", class_="grid", x1=at(value), x2=at(value), y1=4, y2=bottom))
        anchor = "t c" if value > low else "t"
        grid.append(tag("text", text, x=at(value), y=bottom + 12, class_=anchor))
    grid.append(tag("text", axis.label, x=(left + right) / 2, y=bottom + 27, class_="t c axis"))
    head, table = ["", *(name for name, _ in names)], []
    for label, row in rows:
        table.append([label, *(_interval(bar, form) for bar in row)])
    return figure(title, height, grid + body, names, head, table, filled=True)


def _interval(bar: Bar, form: str) -> str:
    value = form.format(bar.value)
    if bar.low is None or bar.high is None:
        return value
    return f"{value} ({form.format(bar.low)} to {form.format(bar.high)})"


def _bar(
    bar: Bar, at: Callable[[float], float], y: float, thick: float, label: str, form: str
) -> Markup:
    text = tag("title", f"{label}: {_interval(bar, form)}")
    start = at(0.0)
    parts = [
        tag(
            "rect",
            text,
            class_=f"f s{bar.kind}",
            x=start,
            y=y,
            width=max(0.5, at(bar.value) - start),
            height=thick,
        )
    ]
    if bar.low is not None and bar.high is not None:
        a, b, middle = at(bar.low), at(bar.high), y + thick / 2
        d = f"M{a:.1f} {middle - 2.5:.1f}v5m0 -2.5H{b:.1f}m0 -2.5v5"
        parts += [tag("path", class_="halo", d=d), tag("path", class_="whisker", d=d)]
    return join(*parts)


@dataclasses.dataclass(frozen=True)
class _Frame:
    """Maps values to picture coordinates."""

    x_axis: Axis
    y_axis: Axis
    x_ends: tuple[float, float]
    y_ends: tuple[float, float]

    @classmethod
    def around(
        cls, x_axis: Axis, y_axis: Axis, x: tuple[float, float], y: tuple[float, float]
    ) -> "_Frame":
        """Makes a frame for data ranges x and y. Limits of y from the data become round numbers."""
        low = y[0] if y_axis.low is None else y_axis.low
        return cls(x_axis, y_axis, _limits(x_axis, *x), _limits(y_axis, *nice_limits(low, y[1])))

    def x(self, value: float) -> float:
        low, high = self.x_ends
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.y_ends
        return HEIGHT - _BOTTOM - (HEIGHT - _BOTTOM - _TOP) * (value - low) / (high - low)

    def axes(self, x_ticks: bool = True) -> Markup:
        parts = []
        values = ticks(*self.y_ends, 5, self.y_axis.whole)
        for value, text in zip(values, tick_labels(values), strict=True):
            y = self.y(value)
            parts.append(tag("line", class_="grid", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y))
            parts.append(tag("text", text, x=_LEFT - 5, y=y + 3.5, class_="t e"))
        bottom = HEIGHT - _BOTTOM
        parts.append(tag("line", class_="base", x1=_LEFT, x2=WIDTH - _RIGHT, y1=bottom, y2=bottom))
        values = ticks(*self.x_ends, 6, self.x_axis.whole) if x_ticks else []
        for value, text in zip(values, tick_labels(values), strict=True):
            x = self.x(value)
            parts.append(tag("line", class_="base", x1=x, x2=x, y1=bottom, y2=bottom + 3))
            parts.append(tag("text", text, x=x, y=bottom + 14, class_="t c"))
        middle = (_LEFT + WIDTH - _RIGHT) / 2
        parts.append(tag("text", self.x_axis.label, x=middle, y=HEIGHT - 6, class_="t c axis"))
        parts.append(tag("text", self.y_axis.label, x=4, y=12, class_="t axis"))
        return join(*parts)


def _limits(axis: Axis, low: float, high: float) -> tuple[float, float]:
    low = low if axis.low is None else axis.low
    high = high if axis.high is None else axis.high
    if high > low:
        return low, high
    extra = abs(low) * 0.1 or 1.0
    return low - (extra if axis.low is None else 0.0), low + extra
