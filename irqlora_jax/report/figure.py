"""Makes a figure of the page: title, legend, picture, and a table of its values."""

import math
from collections.abc import Sequence
from typing import TypeGuard

from irqlora_jax.report.markup import Markup, tag

WIDTH = 360
"""Width of all pictures: the width of a phone, in units of about a pixel."""
KINDS = 3
"""Number of kinds of series. Each kind has its own color, dash pattern and marker."""
_NAMESPACE = "http://www.w3.org/2000/svg"
_DASHES = (None, "5 3", "1.5 2.5")

Number = float | None
"""A value of a plot. None, NaN and infinity are gaps."""


def format_number(value: object) -> str:
    """Formats a number for people, with five digits; "-" if there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.5g}" if isinstance(value, float) and abs(value) < 1e5 else f"{value:,.0f}"


def is_finite(value: Number) -> TypeGuard[float]:
    """Whether a value can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


def dash(kind: int) -> str | None:
    """Dash pattern of the lines of a kind, for SVG."""
    return _DASHES[kind % KINDS]


def marker(x: float, y: float, kind: int) -> Markup:
    """Draws a dot, a square or a triangle, depending on the kind."""
    shape = f"m s{kind}"
    if kind % KINDS == 1:
        return tag("rect", class_=shape, x=x - 2.4, y=y - 2.4, width=4.8, height=4.8)
    if kind % KINDS == 2:
        return tag("path", class_=shape, d=f"M{x:.1f} {y - 3.2:.1f}l3 5.4h-6Z")
    return tag("circle", class_=shape, cx=x, cy=y, r=2.6)


def figure(
    title: str,
    height: int,
    drawn: Sequence[Markup],
    legend: Sequence[tuple[str, int]],
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    filled: bool = False,
) -> Markup:
    """Assembles a figure.

    Args:
        title: text above the picture.
        height: height of the picture.
        drawn: contents of the picture.
        legend: names and kinds. A legend with a single entry is not shown.
        head: column names of the table.
        rows: rows of the table.
        filled: the picture has bars instead of lines, and the first column of the table has names.
    """
    picture = tag(
        "svg",
        *drawn,
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
        aria_label=title,
        xmlns=_NAMESPACE,
    )
    keys = [tag("li", _key(kind, filled), name) for name, kind in legend]
    return tag(
        "figure",
        tag("figcaption", title),
        tag("ul", *keys, class_="legend") if len(keys) > 1 else None,
        picture,
        tag("details", tag("summary", "figures"), table(head, rows, not filled), class_="figures"),
    )


def _key(kind: int, filled: bool) -> Markup:
    """Draws the legend symbol of a kind: line and marker, or a bar. Kind -1 is a reference line."""
    if kind < 0:
        parts = [tag("line", class_="level", x1=0, x2=20, y1=5, y2=5)]
    elif filled:
        parts = [tag("rect", class_=f"f s{kind}", x=4, y=0, width=12, height=10)]
    else:
        line = tag("path", class_=f"l s{kind}", d="M0 5H20", stroke_dasharray=dash(kind))
        parts = [line, marker(10.0, 5.0, kind)]
    return tag(
        "svg", *parts, viewBox="0 0 20 10", class_="key", aria_hidden="true", xmlns=_NAMESPACE
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numeric: bool = False) -> Markup:
    """Makes a table, empty without rows.

    Columns are aligned to the right; the first column only if it is `numeric`.
    """
    if not rows:
        return Markup()

    def cells(name: str, row: Sequence[str]) -> list[Markup]:
        return [
            tag(name, cell, class_="n" if numeric or place else None)
            for place, cell in enumerate(row)
        ]

    body = [tag("tr", *cells("td", row)) for row in rows]
    inner = tag("table", tag("thead", tag("tr", *cells("th", head))), tag("tbody", *body))
    return tag("div", inner, class_="scroll")
