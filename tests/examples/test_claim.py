"""The comparison of methods on SmolLM2: its questions, its statistics, and a small run of it."""

import json
import math

import jax
import pytest

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.model.llama import Llama
from tests.examples.scripts import scripts
from tests.models import WORLD, tiny_llama

pytestmark = pytest.mark.usefixtures("optimizer_promotion")

SMOLLM2 = WORLD.parent / "smollm2"


@pytest.fixture(scope="module")
def modules():
    with scripts(SMOLLM2, "knowledge", "claim_tables", "claim", "claim_adapters") as found:
        yield found


@pytest.fixture(scope="module")
def tables(modules):
    return modules["claim_tables"]


# ---------------------------------------------------------------------------------- the questions

ROWS = {
    "ARC-easy": (
        "Please choose the correct answer to the question: What is (a) warm: ice or fire?\n\n"
        "Answer1: ice Answer2: fire, e.g. Option 3 Answer3: both\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer2",
        "Question: What is (a) warm: ice or fire?\nAnswer:",
        ["ice", "fire, e.g. Option 3", "both"],
    ),
    "PIQA": (
        "Please choose the correct solution to the question: Open it.\n\nSolution1: Pull.\n\n"
        "Solution2: Push.\n\nAnswer format: solution1/solution2",
        "solution2",
        "Question: Open it.\nAnswer:",
        ["Pull.", "Push."],
    ),
    "OpenBookQA": (
        "Please choose the correct answer to the question: The sun is\n\nAnswer1: cold "
        "Answer2: hot\n\nAnswer format: answer1/answer2",
        "answer2",
        "The sun is",
        ["cold", "hot"],
    ),
    "BoolQ": (
        "Please answer the following question with true or false, question: is it so?\n\n"
        "Answer format: true/false",
        "false",
        "Question: is it so?\nAnswer:",
        ["yes", "no"],
    ),
    "WinoGrande": (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        "Ann met Bea when _ was late.\n\nOption1: Ann Option2: Bea Answer format: option1/option2",
        "option2",
        "Ann met Bea when ",
        ["Ann was late.", "Bea was late."],
    ),
}


@pytest.mark.parametrize("task", ROWS)
def test_a_row_becomes_the_question_of_the_harness(modules, task):
    instruction, answer, prompt, choices = ROWS[task]
    found = modules["knowledge"].as_question(task, {"instruction": instruction, "answer": answer})
    assert found == {"subject": task, "prompt": prompt, "choices": choices, "answer": 1}


@pytest.mark.parametrize(
    ("instruction", "answer"),
    [
        ("Choose: Answer1: a Answer2: b", "answer1"),
        ("Choose: Q\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2", "answer3"),
        ("Choose: Q\n\nAnswer1: a\n\nAnswer format: answer1/answer2", "answer1"),
    ],
)
def test_a_row_of_another_form_is_refused(modules, instruction, answer):
    with pytest.raises(ValueError, match=r"instruction = .*expected"):
        modules["knowledge"].as_question("PIQA", {"instruction": instruction, "answer": answer})


# ---------------------------------------------------------------------------------- the statistics


def figures(answers: float, validation: float, right: int = 0) -> dict:
    shares = {"a": [right, 10], "b": [2 * right, 40]}
    return {"answers": answers, "validation": validation, "right": shares, "entropy": 2.9}


def test_the_rate_is_that_of_the_first_seed_on_validation_rows(tables):
    results = {
        tables.Run("nf3", "qlora", 16, 0, 1e-3): figures(1.0, 2.0),
        tables.Run("nf3", "qlora", 16, 0, 3e-3): figures(5.0, 1.9),
        tables.Run("nf3", "qlora", 16, 1, 1e-3): figures(1.0, 0.1),
        tables.Run("nf3", "qlora", 64, 0, 1e-3): figures(1.0, 0.1),
        tables.Run("nf3", "qlora", 16, 1, 3e-3): figures(4.0, 1.9),
    }
    assert tables.chosen_rate(results, "qlora", "nf3", 16) == 3e-3
    assert tables.chosen_rate(results, "icq", "nf3", 16) is None
    found = tables.chosen(results)
    assert [each["answers"] for each in found["nf3", "qlora", 16].values()] == [5.0, 4.0]
    assert list(found) == [("nf3", "qlora", 16), ("nf3", "qlora", 64)]


def test_the_error_of_a_share_is_that_of_the_questions(tables):
    """Two seeds with the same questions: the error of one sample of 10, and one of 40."""
    mean, error = tables.share([figures(1, 1, right=4), figures(1, 1, right=6)], ["a", "b"])
    assert mean == pytest.approx(100 * (0.5 + 0.25) / 2)
    assert error == pytest.approx(100 * math.sqrt(0.5**2 / 10 + 0.25 * 0.75 / 40) / 2)


# -------------------------------------------------------------------------------- what is compared


def test_adapters_have_about_equal_numbers_of_parameters(modules):
    """Of SmolLM2's shapes, with one layer of 30. A mergeable QA-HiRA has one number for a block."""
    config = tiny_llama(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
    )
    counts = {}
    for name, method in modules["claim_adapters"].METHODS.items():
        model = Llama(config, adapter=AdapterConfig(**method.adapter))
        new = jax.eval_shape(model.init_adapters, jax.random.key(0))
        counts[name] = sum(leaf.size for leaf in jax.tree.leaves(new))
    assert 30 * counts["qlora"] == 4_884_480
    assert counts.pop("qahira g64") == sum(
        out * columns // 64 for out, columns in config.linear_shapes.values()
    )
    assert all(abs(count / counts["qlora"] - 1) < 0.1 for count in counts.values()), counts


# ---------------------------------------------------------------------------------- a small run


def test_a_small_run_resumes_and_reports(modules, tables, monkeypatch, tmp_path, capsys):
    """Factworld's base in SmolLM2's place: bits cost what they should, and finetuning helps."""
    claim = modules["claim"]
    asked = [json.loads(row) for row in (WORLD / "data" / "train.jsonl").read_text().splitlines()]
    rows = [{"instruction": r["input"], "input": "", "output": r["output"]} for r in asked[:500]]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "text.txt").write_text("\n".join(row["input"] for row in asked[500:600]))
    made = []
    run = claim.Bench.run

    def counted(bench, wanted):
        made.append(wanted)
        if len(made) == 4:
            raise KeyboardInterrupt
        return run(bench, wanted)

    monkeypatch.setattr(claim.Bench, "run", counted)
    flags = ["--model", str(WORLD / "base-small"), "--alpaca", str(tmp_path / "alpaca.json")]
    flags += ["--text", str(tmp_path / "text.txt"), "--formats", "nf4", "nf2", "--ranks", "4"]
    flags += ["--rates", "1e-3", "--seeds", "1", "--steps", "10", "--output", str(tmp_path / "out")]
    flags += ["--calibrate_tokens", "2048"]
    flags += ["--methods", "full", "full+lora", "qlora", "feedback+cloq"]
    with pytest.raises(KeyboardInterrupt):
        claim.main(flags)
    with (tmp_path / "out" / "results.jsonl").open("a") as file:
        file.write('{"format": "nf')
    claim.main(flags)
    assert len(made) == 7 and len(set(made)) == 6
    _, results = claim.read(tmp_path / "out" / "results.jsonl", tables.Settings, tables.Run)
    loss = {key.format + " " + key.method: own["answers"] for key, own in results.items()}
    text = {key.format + " " + key.method: own["text"] for key, own in results.items()}
    assert loss["none full+lora"] < loss["none full"]
    assert text["none full"] < text["nf4 qlora"] < text["nf2 qlora"]
    assert loss["nf2 feedback+cloq"] < loss["nf2 qlora"]
    assert len(set(text.values())) == 6
    shown = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert f"{loss['nf2 feedback+cloq']:.4f}" in shown
    assert f"{loss['nf2 feedback+cloq'] - loss['nf2 qlora']:+.4f}" in shown
    assert shown in capsys.readouterr().out

    with pytest.raises(ValueError, match="was begun with steps = 10, not 11"):
        claim.main([*flags, "--steps", "11"])
    claim.main(["--report", "--output", str(tmp_path / "out")])
    assert shown in capsys.readouterr().out
