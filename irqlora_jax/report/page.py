"""Makes the page: one file without scripts and downloads, for screens, phones and paper."""

from collections.abc import Callable, Sequence

from irqlora_jax.report import quantized, scored, sections
from irqlora_jax.report.markup import Markup, join, tag
from irqlora_jax.report.run_data import RunData

# Okabe and Ito's colors, which color-blind readers can distinguish: darker on white, lighter on
# black. The style must not contain characters that need escaping.
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --faint: #5c6670;
  --rule: #dfe3e8; --panel: #f6f7f9; --s0: #0072b2; --s1: #d55e00; --s2: #007a5a; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e6e9ec; --faint: #9aa5b0;
  --rule: #343a41; --panel: #1d2125; --s0: #56b4e9; --s1: #e69f00; --s2: #2fc59b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem 1rem 3rem; max-width: 74rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans",
  sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 0.6rem; padding-top: 0.75rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1rem 0 0.25rem; }
p { margin: 0.25rem 0 1rem; max-width: 46rem; }
.note { color: var(--faint); font-size: 0.9rem; }
dl { display: grid; grid-template-columns: 6.5rem 1fr; gap: 0.4rem 0.75rem; margin: 0 0 1.25rem;
  max-width: 54rem; }
dt { color: var(--faint); } dd { margin: 0; }
@media (max-width: 30rem) { dl { display: block; } dd { margin-bottom: 0.5rem; } }
.grid2 { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr));
  gap: 1.5rem 1.25rem; align-items: start; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; font-size: 0.95rem; }
svg { display: block; width: 100%; height: auto; }
.legend { list-style: none; margin: 0.1rem 0 0.2rem; padding: 0; display: flex; flex-wrap: wrap;
  gap: 0 0.9rem; font-size: 0.85rem; }
.legend li { display: flex; align-items: center; gap: 0.35rem; }
svg.key { width: 20px; flex: none; }
.t { fill: var(--ink); font-size: 10.5px; } .c { text-anchor: middle; } .e { text-anchor: end; }
.axis { fill: var(--faint); } .grid { stroke: var(--rule); stroke-width: 0.8; }
.base { stroke: var(--faint); stroke-width: 0.8; }
.level { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 4 3; }
.l { fill: none; stroke-width: 1.6; stroke-linejoin: round; } .m { stroke: none; }
.a { fill-opacity: 0.14; } .whisker { fill: none; stroke: var(--ink); stroke-width: 1; }
.halo { fill: none; stroke: var(--paper); stroke-width: 2.6; }
.l.s0 { stroke: var(--s0); } .l.s1 { stroke: var(--s1); } .l.s2 { stroke: var(--s2); }
.a.s0, .m.s0, .f.s0 { fill: var(--s0); } .a.s1, .m.s1, .f.s1 { fill: var(--s1); }
.a.s2, .m.s2, .f.s2 { fill: var(--s2); }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.7rem 0.2rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--rule); overflow-wrap: normal; }
th { color: var(--faint); font-weight: 500; } .n { text-align: right; padding: 0.2rem 0 0.2rem
  0.7rem; white-space: nowrap; } td:first-child { min-width: 6.5rem; }
.scroll { overflow-x: auto; max-width: 100%; }
.figures .scroll { max-height: 20rem; overflow-y: auto; }
summary { cursor: pointer; color: var(--faint); font-size: 0.85rem; }
@media (max-width: 30rem) { table { font-size: 0.72rem; } th.n { white-space: normal; }
  th, td { padding-right: 0.3rem; } .n { padding-left: 0.3rem; }
  td:first-child { min-width: 5rem; } }
pre { background: var(--panel); padding: 0.75rem; font-size: 0.8rem; white-space: pre-wrap;
  margin: 0.5rem 0 1rem; }
@page { size: A4; margin: 14mm; }
@media print { :root { color-scheme: light; --paper: #fff; --ink: #000; --faint: #444;
  --rule: #ccc; --panel: #fff; --s0: #0072b2; --s1: #d55e00; --s2: #007a5a; }
  body { padding: 0; max-width: none; font-size: 10.5pt; }
  .figures { display: none; } .grid2 { display: block; orphans: 1; widows: 1; }
  figure { display: inline-block; width: 48%; margin: 0 1.5% 4mm 0; vertical-align: top; }
  figure, tr, p { break-inside: avoid; } h2, h3, section > p { break-after: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; opacity: 1; }
  pre { padding: 0; font-size: 8pt; } }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_SECTIONS: tuple[tuple[str, Callable[[RunData], Markup]], ...] = (
    ("Results", sections.results),
    ("Training", sections.training),
    ("What the adapter learned", sections.learned),
    ("Evaluation", scored.evaluation),
    ("Bits by layer", quantized.bits),
    ("Entropy of the codes", quantized.entropy),
    ("Codes, shifts and errors", quantized.quantization),
    ("Errors of the outputs", quantized.output_errors),
    ("Memory", sections.memory),
    ("Repeat it", sections.repeat),
)


def page(found: RunData) -> str:
    """Makes the whole page, which is both HTML 5 and well-formed XML.

    A section without data is left out. If a section fails, the page shows the reason.
    """
    problems = list(found.problems)
    body = [tag("h1", found.name), _attempt("Headline", sections.headline, found, problems)]
    for title, section in _SECTIONS:
        content = _attempt(title, section, found, problems)
        if content:
            body.append(tag("section", tag("h2", title), content))
    if problems:
        lines = [tag("p", problem, class_="note") for problem in problems]
        body.append(tag("section", tag("h2", "Left out"), *lines))
    return document(found.name, body)


def document(name: str, body: Sequence[Markup]) -> str:
    """Makes a page with the style of the reports from its title and its body."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{name} \u2013 irqlora_jax"),
        tag("style", Markup(_STYLE)),
    )
    root = tag("html", head, tag("body", tag("main", *body)), lang="en")
    return join(Markup("<!DOCTYPE html>\n"), root, "\n")


def _attempt(
    title: str, section: Callable[[RunData], Markup], found: RunData, problems: list[str]
) -> Markup:
    try:
        return section(found)
    except Exception as error:  # files of other versions may contain anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        problems.append(f"The section \u201c{title}\u201d could not be made: {reason}")
        return Markup()
