"""What the documentation says is there, and what it shows runs: doctests, pages, links, names."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

from irqlora_jax.config import Config
from irqlora_jax.config.parse import named_fields
from tests.test_rooms import FLOORS

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
LINKED = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md")),
    *(ROOT / name for name in ("benchmarks/README.md", "tests/golden/README.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
    *PAGES,
]
# Every function or class of the maths that has to show an example, by module.
SHOWN = {
    "quant.formats": ("get_format",),
    "quant.packing": ("pack", "unpack"),
    "quant.stats": ("encode_groups", "decode_groups", "encode_zero", "decode_zero"),
    "quant.entropy": ("block_entropy",),
    "quant.calibrations.icq": ("search_shift",),
    "quant.calibrations.icq_integer": ("plain_range", "search_range", "search_zero_point"),
    "quant.calibrations.joint": ("search",),
    "quant.calibrations.robust": ("weigh",),
    "quant.qtensor": ("QTensor",),
    "quant.encode": ("quantize", "encode_with"),
    "quant.straight_through": (
        *("straight_through", "round_to_levels", "round_to_integers"),
        *("clipped_integers", "clipped_levels"),
    ),
    "quant.matmul": ("dequant_matmul",),
    "adapters.lora": ("init", "apply", "fold"),
    "adapters.iec": ("init", "spread", "apply", "fold"),
    "adapters.loftq": ("loftq",),
    "adapters.cloq": ("cloq",),
    "model.dpo": ("pair_losses",),
    "config.settings": ("Config.load",),
    "runs.moments": ("grid", "encode", "decode"),
    "train.noise": ("example_lengths",),
    "evaluate.suggested": ("larger_format", "rules_text"),
}
_FENCE = re.compile(r"^(```+)(\w*)\n(.*?)^\1 *$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)")


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a reader would be."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", SHOWN)
def test_examples_of_docstrings(name: str) -> None:
    module = importlib.import_module(f"irqlora_jax.{name}")
    examples = {test.name: test for test in doctest.DocTestFinder().find(module) if test.examples}
    assert {f"{module.__name__}.{one}" for one in SHOWN[name]} <= examples.keys()
    said: list[str] = []
    for example in examples.values():
        doctest.DocTestRunner().run(example, out=said.append)
    assert not said, "".join(said)


def blocks(page: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page with the lines that they begin in."""
    text = page.read_text(encoding="utf-8")
    found = [match for match in _FENCE.finditer(text) if match[2] == "python"]
    # Files of the package in docs/extending.md: tests/test_extending.py adds them to a copy.
    found = [m for m in found if not re.match(r"# (append to )?irqlora_jax/", m[3])]
    return [(text.count("\n", 0, match.start(3)), match[3]) for match in found]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_one_after_the_other(page: Path) -> None:
    names: dict[str, object] = {"__name__": page.stem}
    for line, code in blocks(page):
        exec(compile("\n" * line + code, str(page), "exec"), names)


def test_the_architecture_page_lists_the_floors() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", page, re.MULTILINE)
    floors = {int(floor): set(re.findall(r"`(\w+)`", rooms)) for floor, rooms in rows}
    assert floors == {floor: set(rooms) for floor, rooms in enumerate(FLOORS, 1)}


def test_the_readme_is_short_and_shows_the_quickstart_as_it_is() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.split()) <= 1100
    config = Config.load("configs/quickstart.yaml")
    for label in ("plain nf3", "nf3 + ICQ", config.quant.label, f"{config.quant.label}, finetuned"):
        assert re.search(rf"^    {re.escape(label)}  ", readme, re.MULTILINE), label


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_shows_the_address_of_an_unknown_owner(page: Path) -> None:
    assert "github.com/OWNER" not in page.read_text(encoding="utf-8")
    assert "github/OWNER" not in page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The names by which GitHub links to the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):  # of the world outside
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{link}: there is no {target}"
        assert target.is_relative_to(ROOT), f"{link}: outside of the project"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_tests_that_a_page_names_are_there(page: Path) -> None:
    tests = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py"))
    for quoted in re.findall(r"`([^`\n]+)`", prose(page)):
        if re.fullmatch(r"test_\w+", quoted):
            assert f"def {quoted}(" in tests, f"there is no test {quoted}"
        elif re.fullmatch(r"[\w./-]+/(?!NAME)[\w-]+\.(py|md|yaml|json|sh)", quoted):
            places = (ROOT / quoted, ROOT / "irqlora_jax" / quoted)
            assert any(place.exists() for place in places), f"there is no {quoted}"


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_options_that_a_page_names_exist(page: Path) -> None:
    known = {"adapter.from"}
    for name, _ in named_fields(Config):
        parts = name.split(".")
        known |= {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
    sections = "|".join(sorted({name.split(".")[0] for name in known if "." in name}))
    named = re.compile(rf"(?:--|`)((?:{sections})\.[a-z][\w.]*\w)")
    files = (".md", ".json", ".jsonl", ".py", ".lock", ".gguf")
    for option in named.findall(page.read_text(encoding="utf-8")):
        assert option in known or option.endswith(files), f"there is no option {option}"
