"""Builds HTML that is also well-formed XML, and escapes all text."""

import html
import re

# Characters that XML 1.0 does not allow, not even escaped.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Markup(str):
    """Markup that is already escaped. Make it with `tag` and `join`, or from constants."""

    __slots__ = ()


def escape(value: object) -> Markup:
    """Escapes a value as text; markup stays unchanged."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(_FORBIDDEN.sub("\ufffd", str(value))))


def join(*children: object) -> Markup:
    """Concatenates children; None is left out."""
    return Markup("".join(escape(child) for child in children if child is not None))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """Makes an element.

    Args:
        name: name of the element.
        children: text or markup; None is left out.
        attributes: a trailing _ of a name is removed, an inner _ becomes a hyphen (aria_label).
            Floats are rounded to 2 digits; None is left out.
    """
    written = ""
    for key, value in attributes.items():
        if value is not None:
            text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
            written += (
                f' {key.rstrip("_").replace("_", "-")}="{html.escape(replace_forbidden(text))}"'
            )
    if not children and name not in ("td", "th", "div", "span", "p", "pre"):
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def replace_forbidden(value: object) -> str:
    """Replaces characters that XML does not allow. The text is not escaped."""
    return _FORBIDDEN.sub("\ufffd", str(value))
