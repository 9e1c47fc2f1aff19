"""Markup in which text cannot become anything but text: HTML that is well-formed XML as well."""

import html
import re

# What XML 1.0 has no way to write, not even escaped.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Markup(str):
    """Markup that is escaped already. Only `tag` and `join` should make it, or constants."""

    __slots__ = ()


def escape(value: object) -> Markup:
    """A value as text; markup stays as it is."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(_FORBIDDEN.sub("\ufffd", str(value))))


def join(*children: object) -> Markup:
    """One after the other, None left out."""
    return Markup("".join(escape(child) for child in children if child is not None))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element.

    Args:
        name: of the element.
        children: text or markup; None is left out.
        attributes: a trailing _ is dropped, an inner one becomes a hyphen (aria_label).
            Floats are rounded to 2 digits, None is left out.
    """
    written = ""
    for key, value in attributes.items():
        if value is not None:
            text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
            written += f' {key.rstrip("_").replace("_", "-")}="{html.escape(escape_plain(text))}"'
    if not children and name not in ("td", "th", "div", "span", "p", "pre"):
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def escape_plain(value: object) -> str:
    """Text without what XML cannot hold, not escaped."""
    return _FORBIDDEN.sub("\ufffd", str(value))
