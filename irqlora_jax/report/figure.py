"""A figure of the page: title, legend, picture and a table of what the picture shows."""

import math
from collections.abc import Sequence
from typing import TypeGuard

from irqlora_jax.report.markup import Markup, tag

WIDTH = 360
"""Of all pictures, in units of about a pixel: the width of a phone."""
KINDS = 3
"""Of series, each with a color, a dash and a marker of its own."""
_NAMESPACE = "http://www.w3.org/2000/svg"
_DASHES = (None, "5 3", "1.5 2.5")

Number = float | None
"""None, like what is not finite, is a gap."""


def number(value: object) -> str:
    """A figure as people write it, with five digits."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.5g}" if isinstance(value, float) and abs(value) < 1e5 else f"{value:,.0f}"


def is_known(value: Number) -> TypeGuard[float]:
    """Whether it can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


def dash(kind: int) -> str | None:
    """How the line of a kind is broken."""
    return _DASHES[kind % KINDS]


def marker(x: float, y: float, kind: int) -> Markup:
    """A dot, a square or a triangle."""
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
    """Puts a figure together.

    Args:
        title: above it.
        height: of the picture.
        drawn: the picture.
        legend: names and kinds; of a single one nothing is shown.
        head: of the table.
        rows: of the table.
        filled: the picture has bars, with names in the first column of the table, not lines.
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
    """The line and the marker of a kind, or its bar, as in the plot. Below 0: a mere level."""
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
    """A table; columns of figures lie to the right, the first only if it is `numeric`.
    Nothing without rows."""
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
