"""A damaged file of a run is named in a sentence, or the result is bit by bit the same."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fault_damage import FOLDER_DAMAGES, Case, damages_of, judge, reference
from irqlora_jax.runs.checkpoints import Checkpoints

pytestmark = pytest.mark.usefixtures("optimizer_promotion", "shared_steps")

FINE = {"refused", "harmless", "said", "same bytes"}
# The commands that read a file, by file.
READ = {
    "config.json": ("eval", "report"),
    "checksums.json": ("eval", "report"),
    "tokenizer/chat_template.jinja": ("eval",),
    "tokenizer/tokenizer.json": ("eval",),
    "tokenizer/generation_config.json": ("eval",),
    "base.safetensors": ("eval",),
    "metrics.jsonl": ("report",),
    "results.json": ("report",),
    "quantization.json": ("report",),
    "eval-perplexity.json": ("report",),
    "checkpoints/4/_CHECKPOINT_METADATA": ("eval",),
    "checkpoints/4/default/manifest.ocdbt": ("eval",),
}


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """Results of the undamaged run by command, filled by the first test that needs one."""
    return {}


@pytest.fixture
def outcome(
    inputs: Path,
    whole: Path,
    expected: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Case], tuple[str, str]]:
    """Judges a case in a new folder, and says the message."""

    def run(case: Case, damaged: str = "run") -> tuple[str, str]:
        def fresh() -> Path:
            scratch = inputs.parent / "scratch"  # always the same, for it stands in results
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.copytree(whole / damaged, scratch / damaged)
            monkeypatch.chdir(scratch)
            return scratch

        if case.use not in expected:
            expected[case.use] = reference(inputs, fresh(), damaged, case.use)
        found, answer = judge(inputs, fresh(), damaged, case, expected[case.use])
        return found, answer.error or answer.said

    return run


@pytest.mark.parametrize("target", READ)
def test_no_damage_of_a_file_goes_unnoticed(outcome, target: str) -> None:
    found = {}
    for use in READ[target]:
        for damage in damages_of(Path(target)):
            case = Case(target, damage, use)
            name, text = outcome(case)
            assert name in FINE, f"{case}: {name}: {text}"
            found[use, damage] = name
    # A check that refuses nothing would pass as well.
    assert sum(name in ("refused", "said") for name in found.values()) > len(found) / 2


@pytest.mark.parametrize("target", ["checkpoints/4", "checkpoints", "tokenizer"])
def test_no_damage_of_a_folder_goes_unnoticed(outcome, target: str) -> None:
    for damage in FOLDER_DAMAGES:
        name, text = outcome(Case(target, damage, "eval"))
        assert name in FINE, f"{target}: {damage}: {name}: {text}"


@pytest.mark.parametrize(
    "case",
    [
        Case("metrics.jsonl", "truncated", "train"),
        Case("metrics.jsonl", "deleted", "train"),
        Case("tokenizer/chat_template.jinja", "deleted", "train"),
        Case("checkpoints/4/_CHECKPOINT_METADATA", "deleted", "train"),
        Case("checkpoints/4", "half deleted", "train"),
        Case("report.html", "garbage", "train"),
        Case("environment.json", "a folder", "train"),
        Case("results.json", "a folder", "train"),
        Case("checkpoints/4", "deleted", "eval best"),
    ],
    ids=str,
)
def test_other_commands_notice_damage(outcome, case: Case) -> None:
    name, text = outcome(case)
    assert name in FINE, f"{name}: {text}"


def test_a_changed_training_line_is_reported(whole: Path, tmp_path: Path, outcome) -> None:
    shutil.copytree(whole / "run", tmp_path / "run")
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.log(4) is not None and checkpoints.log(4) != checkpoints.log(2)
    name, text = outcome(Case("metrics.jsonl", "deleted", "report"))
    assert name == "said" and "metrics.jsonl cannot be used" in text and "up to step 4" in text
