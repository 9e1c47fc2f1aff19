"""The page about a run: what it shows, and that nothing in a folder can break it."""

import dataclasses
import html
import html.parser
import json
import math
import shlex
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from irqlora_jax import cli
from irqlora_jax.base.file import save_base
from irqlora_jax.base.survey import BINS
from irqlora_jax.config import QuantizeConfig, parse_flags
from irqlora_jax.evaluate.mmlu_files import SUBCATEGORIES
from irqlora_jax.evaluate.sensitivity import SensitivityConfig
from irqlora_jax.quant.config import QuantConfig, QuantRule
from irqlora_jax.report import svg, write
from irqlora_jax.report.markup import tag
from irqlora_jax.report.page import page
from irqlora_jax.report.quantized import calibration_name
from irqlora_jax.report.run_data import metric_curve, read_metrics, read_run_data
from irqlora_jax.report.scored import wilson
from irqlora_jax.report.sensitivity import sensitivity_page
from irqlora_jax.sharding import LINEAR_NAMES
from tests.models import NARROW, PLAIN, quantize_base, random_base

HOSTILE = "</pre><script>alert(1)</script> & \"quoted\" 'too' \x00\x1b ]]> \ud800 <!--"
SVG = "{http://www.w3.org/2000/svg}"


def write_lines(file: Path, rows: Sequence[Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_survey(layers: int = 32) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def kind(entropy: float, codes: list[int]) -> dict[str, Any]:
        values = {n: (entropy + rng.normal(0, 0.01, layers)).tolist() for n in LINEAR_NAMES}
        errors = {n: (0.09 + rng.normal(0, 0.002, layers)).tolist() for n in LINEAR_NAMES}
        return {"mean_entropy": entropy, "entropy": values, "error": errors, "codes": codes}

    shifts = np.histogram(rng.normal(0, 0.05, 9999), BINS, (-1.0025, 1.0025))[0].tolist()
    codes = [int(1e6 * math.exp(-(((i - 7) / 5) ** 2))) for i in range(16)]
    return {
        "format": "nf4",
        "calibration": "icq",
        "block_size": 64,
        "weights": 1000,
        "sampled": 10,
        "plain": kind(3.68, codes),
        "calibrated": kind(3.75, codes[::-1]) | {"shifts": shifts},
    }


def make_metrics(steps: int = 400) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(10, steps + 1, 10):
        rows.append(
            {
                "step": step,
                "loss": 1 + math.exp(-step / 100),
                "grad_norm": 0.3,
                "learning_rate": 2e-4,
                "tokens_per_second": 5000.0 + step,
                "device_share": 0.98,
                "peak_memory": 7 * 2**30,
            }
        )
        if step % 100 == 0:
            rows.append({"step": step, "eval_loss": 1.1 + math.exp(-step / 100)})
    return rows


def make_mmlu(accuracy: float, baseline: bool) -> dict[str, Any]:
    subjects = [name for part in SUBCATEGORIES.values() for name in part]
    return {
        "task": "mmlu",
        "baseline": baseline,
        "checkpoint": "last",
        "step": None if baseline else 400,
        "settings": {"task": "mmlu", "baseline": baseline, "mmlu": "mmlu data", "subjects": []},
        "accuracy": accuracy,
        "count": 57 * 100,
        "by_subject": {name: accuracy + 0.002 * i for i, name in enumerate(subjects)},
        "counts": dict.fromkeys(subjects, 100),
    }


def make_results() -> list[dict[str, Any]]:
    names = ("model", "entropy", "loss", "accuracy", "bits", "seconds")
    rows = [
        ("full precision", None, 1.4942, 0.771, 32.0, 0.0),
        ("nf4 + ICQ", 3.75, 2.7268, 0.573, 4.38, 2.3),
        ("nf4 + ICQ, finetuned", 3.75, 1.3454, 0.764, 4.38, 17.6),
    ]
    return [dict(zip(names, row, strict=True)) for row in rows]


def make_config(**changes: Any) -> dict[str, Any]:
    return {
        "model": "somewhere/base",
        "output_dir": "runs/x",
        "quant": {"format": "nf4", "block_size": 64, "calibration": "none"},
        "adapter": {"method": "iec", "rank": 6, "alpha": 9.0, "targets": list(LINEAR_NAMES)},
        "train": {"steps": 400},
    } | changes


RULES = (QuantRule("*.down_proj", format="nf4"),)
ASKED = SensitivityConfig(
    "some/model", "a text.txt", "out", QuantConfig("nf3", rules=RULES), projections=LINEAR_NAMES[:6]
)


def make_sensitivity(layers: int = 30) -> dict[str, Any]:
    """The contents of a sensitivity.json; the worst is layers.7.mlp.gate_proj."""
    rng = np.random.default_rng(1)
    costs: dict[str, list[float | None]] = {
        name: rng.normal(0.01, 0.01, layers).tolist() for name in ASKED.projections
    }
    costs["gate_proj"][7], costs["q_proj"][2], costs["k_proj"][3] = 1.2345, -0.75, None
    ratio = rng.uniform(1, 99, layers).tolist()
    return {
        "settings": dataclasses.asdict(ASKED),
        "directory": "/here",
        "tokens": 2044,
        "rows": 4,
        "full_precision": 3.25,
        "quantized": 4.5,
        "losses": {},
        "costs": costs,
        "outliers": {name: {"channel": [5] * layers, "ratio": ratio} for name in LINEAR_NAMES},
        "survey": make_survey(layers),
        "suggestion": {"rules": "a rule", "added": 3, "bits_before": 3.26, "bits_after": 3.36},
        "versions": {"jax": "0.10.2"},
        "seconds": 12.0,
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_base(file, random_base(NARROW, PLAIN), NARROW, PLAIN, "somewhere/base")
    return file


def test_the_page_of_a_mixed_base_draws_bits_and_repeats_its_rules(tmp_path: Path) -> None:
    quant = dataclasses.replace(PLAIN, rules=(QuantRule("*.down_proj", format="none"),))
    mixed = quantize_base(random_base(NARROW), PLAIN, LINEAR_NAMES[:6])
    save_base(tmp_path / "base.safetensors", mixed, NARROW, quant, "some/base")
    found = read_run_data(tmp_path)
    assert found.bits is not None and found.storage is not None
    assert found.bits["down_proj"] == [32.0, 32.0]
    mean = sum(sum(bits) for bits in found.bits.values()) / 14  # matrices have the same shape
    assert mean == pytest.approx(found.storage.bits)
    made = page(found)
    assert "Bits by layer and projection" in made
    command = html.unescape(made.split("<pre>")[1].split("</pre>")[0])
    flags = shlex.split(command)[2:]
    assert parse_flags(QuantizeConfig, flags, "irqlora quantize").quant == quant
    uniform = random_base(NARROW, PLAIN)
    save_base(tmp_path / "base.safetensors", uniform, NARROW, PLAIN, "some/base")
    assert "Bits by layer" not in page(read_run_data(tmp_path))


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    """The folder of a run with everything in it, made by hand."""
    folder = tmp_path / "a run"
    folder.mkdir()
    shutil.copyfile(base, folder / "base.safetensors")
    write_lines(folder / "metrics.jsonl", make_metrics())
    environment = {
        "device": "NVIDIA H100",
        "platform": "gpu",
        "devices": 2,
        "versions": {"jax": "0.10.2"},
    }
    files = {
        "config.json": make_config(),
        "quantization.json": make_survey(),
        "results.json": make_results(),
        "eval-mmlu.json": make_mmlu(0.41, False),
        "eval-mmlu-baseline.json": make_mmlu(0.35, True),
        "environment.json": environment,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


class Strict(html.parser.HTMLParser):
    """Every element is closed in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.seen.add(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(text: str) -> ElementTree.Element:
    """The page as XML, and as HTML; the same elements in both."""
    strict = Strict()
    strict.feed(text)
    strict.close()
    assert strict.open == []
    root = ElementTree.fromstring(text)
    assert {element.tag.removeprefix(SVG).lower() for element in root.iter()} == {
        name.lower() for name in strict.seen
    }
    # As HTML, only these may be closed at once outside of a picture.
    for element in root.iter():
        if not element.tag.startswith(SVG) and len(element) == 0 and not element.text:
            assert element.tag in ("meta", "td", "th", "p", "pre", "div"), element.tag
    return root


def figures(root: ElementTree.Element) -> dict[str, list[list[str]]]:
    """The table of every plot, by title, its head first."""
    return {
        figure.findtext("figcaption") or "": [
            ["".join(cell.itertext()) for cell in row] for row in figure.iter("tr")
        ]
        for figure in root.iter("figure")
    }


def sections(root: ElementTree.Element) -> list[str]:
    return ["".join(h2.itertext()) for h2 in root.iter("h2")]


ALL = [
    "Results",
    "Training",
    "Evaluation",
    "Entropy of the codes",
    "Codes, shifts and errors",
    "Memory",
    "Repeat it",
]


def test_the_page_shows_what_was_measured(run: Path) -> None:
    text = page(read_run_data(run))
    root = parse(text)
    assert sections(root) == ALL
    shown, survey = figures(root), make_survey()
    for name in LINEAR_NAMES:
        assert shown[name][0] == ["layer", "plain", "ICQ"]
        for layer in (0, 31):
            plain, after = (
                survey[kind]["entropy"][name][layer] for kind in ("plain", "calibrated")
            )
            assert shown[name][1 + layer] == [str(layer), f"{plain:.5g}", f"{after:.5g}"]
        assert float(shown[f"Error of {name}"][1][1]) == pytest.approx(
            100 * survey["plain"]["error"][name][0], rel=1e-4
        )
    means = [np.mean([survey["plain"]["entropy"][n][i] for n in LINEAR_NAMES]) for i in range(32)]
    shown_means = [float(row[1]) for row in shown["Mean of all projections"][1:]]
    np.testing.assert_allclose(shown_means, means, rtol=1e-4)
    codes = shown["How often each level of nf4 is used"]
    counts = survey["plain"]["codes"]
    assert [row[0] for row in codes[1:4]] == ["-1.00", "-0.70", "-0.53"]
    shares = [100 * count / sum(counts) for count in counts]
    np.testing.assert_allclose([float(row[1]) for row in codes[1:]], shares, rtol=1e-4)
    shifts = shown["Shifts of the blocks"]
    assert sum(float(row[2]) for row in shifts[1:]) == pytest.approx(100, abs=0.01)
    around = [row for row in shifts[1:] if float(row[0]) < 0 < float(row[1])]
    assert len(around) == 1 and float(around[0][0]) == -float(around[0][1])

    assert shown["Loss"][0] == ["step", "training", "evaluation"]
    assert ["100", "1.3679", "1.4679"] in shown["Loss"] and ["110", "1.3329", ""] in shown["Loss"]
    assert shown["Speed"][-1] == ["400", "5400"]
    assert shown["Peak memory"][1] == ["10", "7"]
    stem = shown["MMLU, STEM"]
    assert stem[0] == ["", "before finetuning", "finetuned, step 400"]
    low, high = wilson(0.41, 100)
    assert stem[1][:1] + stem[1][2:] == ["astronomy", f"41.0% ({low:.1%} to {high:.1%})"]
    subjects = [row[0] for title, rows in shown.items() if "MMLU" in title for row in rows[1:]]
    assert len(set(subjects)) == 57
    words = " ".join("".join(root.itertext()).split())
    for sentence in (
        "mean entropy of the codes 3.680 before and 3.750 after, of 4 bits",
        "Evaluation loss from 2.7268 to 1.3454 nats a token and accuracy from 57.3% to 76.4% "
        "after 400 steps.",
        "LoRA with IEC, rank 6, alpha 9, on 7 projections of every layer",
        "2 times NVIDIA H100",
        "jax 0.10.2",
        "The device held 7.00 GiB at most while training.",
        "irqlora eval --run NEW_FOLDER --task mmlu --baseline --mmlu 'mmlu data'",
    ):
        assert sentence in words, sentence


def test_the_page_about_sensitivity_names_the_worst() -> None:
    found = make_sensitivity()
    root = parse(sensitivity_page(found))
    titles = ["Loss by matrix", "Rules", "Entropy of the codes", "Outlier channels", "Repeat it"]
    assert sections(root) == titles
    words = " ".join("".join(root.itertext()).split())
    for sentence in (
        "The worst is layers.7.mlp.gate_proj with +1.2345 nats.",
        "quantizing everything adds +1.2500.",
        "the 3 matrices that cost most per bit, and need 3.36 instead of 3.26 bits a weight.",
        "a text.txt, 2,044 tokens in 4 rows",
        "nf3 + ICQ, with rules",
    ):
        assert sentence in words, sentence
    costs, shown = found["costs"], figures(root)["Loss by layer and projection"]
    assert shown[0] == ["layer", *costs]
    for layer, row in enumerate(shown[1:]):
        values = [costs[name][layer] for name in costs]
        assert row == [str(layer), *("-" if v is None else f"{v:+.6f}" for v in values)]
    # A cell for each value, the darkest for the worst one, and blue below 0.
    (picture,) = [
        f for f in root.iter("figure") if f.findtext("figcaption") == "Loss by layer and projection"
    ]
    cells = list(picture.iter(f"{SVG}rect"))
    assert len(cells) == 30 * 6 - 1
    opacity = [float(cell.get("fill-opacity", 0)) for cell in cells]
    assert max(opacity) == opacity[7 * 6 - 1 + 4] == 0.55
    assert [cell.get("class") for cell in cells].index("f s0") <= 2 * 6
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    assert "1234.5" in texts and "-750.0" in texts and max(map(len, map(str, texts))) <= 8
    # The command has the settings that are not defaults.
    commands = next(
        iter("".join(pre.itertext()) for pre in root.iter("pre") if "cd " in str(pre.text))
    )
    flags = shlex.split(commands.split("\n")[1])[2:]
    repeated = parse_flags(SensitivityConfig, flags, "irqlora sensitivity")
    assert repeated == dataclasses.replace(ASKED, output_dir="NEW_FOLDER")


def test_without_data_for_an_evaluation_the_training_loss_is_shown(run: Path) -> None:
    rows = [row | {"loss": None, "training_loss": None} for row in make_results()]
    rows[-1]["training_loss"] = 1.2345
    (run / "results.json").write_text(json.dumps(rows))
    words = " ".join("".join(parse(page(read_run_data(run))).itertext()).split())
    assert "training loss (nats/token)" in words and "1.2345" in words
    assert "Training loss 1.2345 nats a token and accuracy from 57.3% to 76.4%" in words
    assert "evaluation loss" not in words.lower()


def test_the_commands_run_from_anywhere(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths of the configuration are relative to where the training was started."""
    environment = {"device": "cpu", "versions": {}, "directory": "/home/x's folder"}
    (run / "environment.json").write_text(json.dumps(environment))
    mmlu = make_mmlu(0.4, False) | {"directory": "/data of x"}
    (run / "eval-mmlu.json").write_text(json.dumps(mmlu))
    monkeypatch.chdir(run)
    root = parse(page(read_run_data(Path("."))))
    blocks = ["".join(pre.itertext()) for pre in root.iter("pre")]
    commands = [shlex.split(line) for line in blocks[0].split("\n")]
    assert commands[0] == ["cd", "/home/x's folder"]
    config = str(run / "config.json")
    output = ["--output_dir", "NEW_FOLDER"]
    assert commands[1] == ["irqlora", "train", "--config", config, *output]
    folders = [c[c.index("--mmlu") + 1] for c in commands[2:]]
    assert sorted(folders) == ["/data of x/mmlu data", "mmlu data"]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"calibration": "none"}, "no calibration"),
        ({}, "no calibration"),
        ({"calibration": "icq", "rounding": "nearest"}, "ICQ"),
        ({"calibration": "none", "rounding": "feedback"}, "error feedback"),
        ({"calibration": "gptq", "rounding": "feedback"}, "GPTQ"),
        ({"calibration": "joint", "rounding": "feedback"}, "joint + error feedback"),
        ({"calibration": "none", "training": "apiq"}, "ApiQ"),
        ({"calibration": "newer", "training": "newest"}, "newer + newest"),
    ],
)
def test_rounding_and_training_are_part_of_the_calibration(settings: Any, name: str) -> None:
    assert calibration_name(settings) == name


def test_the_page_names_feedback_on_plain_scales(run: Path) -> None:
    config = make_config()
    config["quant"]["rounding"] = "feedback"
    (run / "config.json").write_text(json.dumps(config))
    survey = json.loads((run / "quantization.json").read_text())
    changes = {"calibration": "none", "rounding": "feedback"}
    (run / "quantization.json").write_text(json.dumps(survey | changes))
    text = page(dataclasses.replace(read_run_data(run), quant=config["quant"]))
    assert "no calibration" not in text.lower() and "Error feedback" in text


def test_a_cpu_is_never_called_busy(run: Path) -> None:
    """The program that feeds it runs on the same cores."""
    assert "Share of time with a busy device" in figures(parse(page(read_run_data(run))))
    environment = run / "environment.json"
    environment.write_text(json.dumps({"platform": "cpu"}))
    assert "Share of time with a busy device" not in figures(parse(page(read_run_data(run))))


def test_lines_and_bars_lie_where_their_figures_say(run: Path) -> None:
    root = parse(page(read_run_data(run)))
    loss = next(f for f in root.iter("figure") if f.findtext("figcaption") == "Loss")
    paths = {
        p.get("class"): p.get("d") for p in loss.iter(f"{SVG}path") if "l " in p.get("class", "")
    }
    path = paths["l s0"]
    assert path is not None
    points = np.array([p.split() for p in path.removeprefix("M").split("L")], float)
    expected = np.array([[row["step"], row["loss"]] for row in make_metrics() if "loss" in row])
    for axis, sign in ((0, 1), (1, -1)):  # paper counts from the top
        line = np.polyfit(expected[:, axis], points[:, axis], 1)
        assert sign * line[0] > 0
        np.testing.assert_allclose(np.polyval(line, expected[:, axis]), points[:, axis], atol=0.11)
    bars = next(f for f in root.iter("figure") if f.findtext("figcaption") == "MMLU, STEM")
    width = [
        float(r.get("width", 0))
        for r in bars.iter(f"{SVG}rect")
        if r.find(f"{SVG}title") is not None
    ]
    values = [float(c.split("%")[0]) for row in figures(root)["MMLU, STEM"][1:] for c in row[1:]]
    np.testing.assert_allclose(np.array(width) / width[0], np.array(values) / values[0], rtol=5e-3)


def test_nothing_is_fetched_and_nothing_runs(run: Path) -> None:
    text = page(read_run_data(run))
    assert "default-src 'none'" in text.replace("&#x27;", "'")
    for word in ("<script", "href=", "src=", "url(", "@import", "<link", "onload"):
        assert word not in text
    assert set(text.split("http")[1:][0][:20].split()) and all(
        part.startswith("://www.w3.org/2000/svg") or part.startswith("-equiv")
        for part in text.split("http")[1:]
    )


def test_hostile_text_stays_text(run: Path) -> None:
    hostile = HOSTILE.replace("\ud800", "")  # which YAML refuses
    (run / "config.json").write_text(
        json.dumps(make_config(model=hostile, data={"train": hostile}))
    )
    rows = [row | {"model": hostile} for row in make_results()]
    (run / "results.json").write_text(json.dumps(rows))
    questions = {
        "task": HOSTILE,
        "settings": {"task": HOSTILE, "questions": HOSTILE},
        "by_subject": {HOSTILE: 0.5, "b": 0.25},
        "accuracy": 0.4,
    }
    (run / "eval-x.json").write_text(json.dumps(questions))
    survey = make_survey(2)
    for kind in ("plain", "calibrated"):
        for measure in ("entropy", "error"):
            survey[kind][measure][HOSTILE] = survey[kind][measure].pop("q_proj")
    (run / "quantization.json").write_text(json.dumps(survey | {"calibration": HOSTILE}))
    path = write.report(write.ReportConfig(str(run)))
    text = path.read_text(encoding="utf-8")
    assert "<script" not in text and "<!--" not in text
    root = parse(text)
    assert sections(root) == ALL
    assert "".join(root.itertext()).count("<script>alert(1)</script>") >= 8
    with pytest.raises(
        (AssertionError, ElementTree.ParseError)
    ):  # the parser of this test is strict indeed
        parse(text.replace("&lt;script", "<script", 1))


@pytest.mark.parametrize(
    ("missing", "without"),
    [
        ("quantization.json", {"Entropy of the codes", "Codes, shifts and errors"}),
        ("metrics.jsonl", {"Training"}),
        ("results.json", {"Results"}),
        ("eval-*.json", {"Evaluation"}),
        ("base.safetensors", {"Memory"}),
        ("environment.json", set()),
        ("config.json", set()),
        ("[!b]*.json*", set(ALL) - {"Memory", "Repeat it"}),
    ],
)
def test_what_is_missing_is_left_out(run: Path, missing: str, without: set[str]) -> None:
    for file in run.glob(missing):
        file.unlink()
    assert sections(parse(page(read_run_data(run)))) == [
        name for name in ALL if name not in without
    ]


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"plain": {}}', '[{"model": 3}]', "\x00"])
def test_what_is_broken_is_named(run: Path, content: str) -> None:
    names = ["quantization.json", "results.json", "eval-mmlu.json", "environment.json"]
    names += ["metrics.jsonl", "config.json", "base.safetensors"]
    for name in names:
        kept = (run / name).read_bytes()
        (run / name).write_text(content)
        root = parse(page(read_run_data(run)))
        # Lines that are none are skipped, and what is merely empty is not broken.
        sound = (("results.json", "[]"), ("eval-mmlu.json", '{"plain": {}}'))
        if name != "metrics.jsonl" and (name, content) not in sound:
            words = "".join(root.itertext())
            assert "Left out" in sections(root) or set(ALL) - set(sections(root)), (name, words)
        (run / name).write_bytes(kept)
    assert sections(parse(page(read_run_data(run)))) == ALL


def test_missing_numbers_are_gaps(run: Path) -> None:
    rows = make_metrics(100)
    rows[2]["loss"] = None  # as the log writes nan
    rows[3]["tokens_per_second"] = math.inf
    for row in rows:
        row["grad_norm"] = math.nan
    write_lines(run / "metrics.jsonl", rows)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('not a line\n{"loss": 3}\n{"step": 110, "lo')
    root = parse(page(read_run_data(run)))
    assert sections(root) == [*ALL, "Left out"]
    assert "metrics.jsonl cannot be used: ValueError: damaged lines 12, 13" in "".join(
        root.itertext()
    )
    shown = figures(root)
    assert shown["Loss"][3][:2] == ["30", "-"] and shown["Speed"][4] == ["40", "-"]
    assert not any("gradient" in title for title in shown)  # nothing of it can be drawn
    loss = next(f for f in root.iter("figure") if f.findtext("figcaption") == "Loss")
    lines = [
        p for p in loss.iter(f"{SVG}path") if p.get("class") == "l s0" and "L" in p.get("d", "")
    ]
    assert len(lines) == 2
    for word in ("nan", "inf", "None"):
        assert word not in " ".join(p.get("d", "") for p in root.iter(f"{SVG}path"))


def test_a_sample_may_hold_line_separators(tmp_path: Path) -> None:
    rows = [{"step": 1, "samples": [{"prompt": "a\u2028b", "answer": "c\x85d\x0ce"}]}]
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(rows[0], ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_metrics(path) == rows


def test_long_runs_are_averaged() -> None:
    rows = [{"step": step, "loss": float(step)} for step in range(1, 1001)]
    steps, values = metric_curve(rows, "loss", max_points=200)
    assert steps == list(range(5, 1001, 5)) and values == list(range(3, 1001, 5))
    assert metric_curve(rows, "missing") == ([], [])


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1.0), (2.61, 2.79), (-3.0, 5.0), (1e-7, 3e-7), (0.0, 123456.0), (5.0, 5.0), (1e9, 3e9)],
)
def test_ticks_are_round_different_and_within(low: float, high: float) -> None:
    ends = svg.nice_limits(low, high)
    for a, b in ((low, high), ends):
        marks = svg.ticks(a, b)
        assert all(a - 1e-9 * abs(a) <= mark <= b + 1e-9 * abs(b) for mark in marks)
        labels = svg.tick_labels(marks)
        assert len(set(labels)) == len(marks) >= (1 if a == b else 2)
        assert max(map(len, labels)) <= 8
    assert ends[0] <= low and high <= ends[1]


def test_intervals_against_published_ones() -> None:
    """Wilson intervals of Newcombe (1998), table I."""
    for right, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)):
        assert wilson(right / count, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(0.5, None) == wilson(0.5, 0) == (None, None)


def test_markup_escapes_what_it_is_given() -> None:
    element = tag("p", HOSTILE, tag("b", "<"), class_=HOSTILE, data_x=1 / 3, none=None)
    (found,) = [ElementTree.fromstring(element)]
    assert found.get("data-x") == "0.33" and found.get("none") is None
    cleaned = (
        HOSTILE.replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\ud800", "\ufffd")
    )
    assert found.text == cleaned and found.get("class") == cleaned


def test_from_python_the_path_is_shown_without_configuration(run: Path, capsys) -> None:
    path = write.report(write.ReportConfig(str(run)))
    assert capsys.readouterr().out == f"written to {path}\n"


def test_a_run_survives_a_page_that_cannot_be_written(
    run: Path, monkeypatch, capsys, said: list[str]
) -> None:
    (run / "report.html").mkdir()  # what is moved there is refused
    write.try_to_write(run)
    assert len(said) == 1 and "was not written" in said[0] and "irqlora report --run" in said[0]
    assert cli.main(["report", f"--run={run}"]) == 2
    assert "--output FILE" in capsys.readouterr().err

    def fail(found: Any) -> str:
        raise RuntimeError("an error\nof two lines")

    monkeypatch.setattr(write, "page", fail)
    write.try_to_write(run)
    assert "RuntimeError: an error of two lines" in said[1]


@pytest.mark.skipif(
    not any(map(shutil.which, ("chromium", "google-chrome"))), reason="there is no browser"
)
@pytest.mark.parametrize("about", ["run", "sensitivity"])
def test_a_phone_shows_it_without_scrolling_sideways(run: Path, tmp_path: Path, about: str) -> None:
    text = page(read_run_data(run)) if about == "run" else sensitivity_page(make_sensitivity())
    text = text.replace("http-equiv", "data-was")  # or else this test could not look
    text = text.replace("<details", '<details open=""')
    frame = tag("iframe", " ", srcdoc=text, width=360, height=700, id="page")
    script = """<script>onload = () => {
        const page = document.getElementById("page").contentDocument;
        const out = [...page.querySelectorAll("figure > svg")].filter(picture => {
          const box = picture.getBoundingClientRect();
          return [...picture.querySelectorAll("text")].some(text => {
            const own = text.getBoundingClientRect();
            return own.left < box.left - 1 || own.right > box.right + 1;
          });
        });
        document.title = `${page.documentElement.scrollWidth} wide, ${out.length} cut, `
          + `${page.querySelectorAll("figure > svg").length} drawn`;
      }</script>"""
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f"<!DOCTYPE html><title>-</title>{frame}{script}", encoding="utf-8")
    browser = shutil.which("chromium") or shutil.which("google-chrome") or ""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", wrapper.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    title = done.stdout.split("<title>")[1].split("</title>")[0]
    count = 28 if about == "run" else 10
    expected = [f"{width} wide, 0 cut, {count} drawn" for width in (360, 345)]
    assert title in expected, title
