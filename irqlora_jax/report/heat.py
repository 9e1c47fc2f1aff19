"""Draws a heat map: a cell for each row and column, with its value as text."""

from collections.abc import Sequence

from irqlora_jax.report.figure import WIDTH, Number, figure, is_finite
from irqlora_jax.report.markup import Markup, join, tag

_LEFT, _TOP, _CELL = 24.0, 20.0, 16.0
# More would make the text hard to read, on white or on black.
_DARKEST = 0.55


def heat_map(
    title: str,
    columns: Sequence[str],
    values: Sequence[Sequence[Number]],
    form: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
) -> Markup:
    """Draws values by layer (rows, counted from 0) and column.

    The color is stronger for a larger value, by the square root of its share of the largest one. It
    is blue for negative values. A missing value has an empty cell.

    Args:
        title: title of the plot.
        columns: short names of the columns.
        values: a row for each layer.
        form: format string of the text in a cell, at most 8 characters with 7 columns.
        head: column names of the table below the picture.
        rows: rows of this table.

    Returns:
        The figure; empty if there are no values.
    """
    known = [abs(value) for row in values for value in row if is_finite(value)]
    if not known:
        return Markup()
    largest, width = max(known) or 1.0, (WIDTH - _LEFT) / len(columns)
    drawn = [
        tag("text", name, x=_LEFT + (i + 0.5) * width, y=_TOP - 6, class_="t c axis")
        for i, name in enumerate(columns)
    ]
    for layer, row in enumerate(values):
        top = _TOP + layer * _CELL
        drawn.append(tag("text", layer, x=_LEFT - 6, y=top + 12, class_="t e axis"))
        for i, value in enumerate(row):
            if is_finite(value):
                opacity = _DARKEST * (abs(value) / largest) ** 0.5
                drawn.append(_cell(_LEFT + i * width, top, width, value, opacity, form))
    height = int(_TOP + len(values) * _CELL) + 4
    return figure(title, height, drawn, [], head, rows)


def _cell(left: float, top: float, width: float, value: float, opacity: float, form: str) -> Markup:
    kind = 1 if value >= 0 else 0
    return join(
        tag(
            "rect",
            class_=f"f s{kind}",
            x=left + 0.5,
            y=top + 0.5,
            width=width - 1,
            height=_CELL - 1,
            fill_opacity=opacity,
        ),
        tag("text", form.format(value), x=left + width / 2, y=top + 12, class_="t c"),
    )
