"""Preference pairs from text, from messages, and from whole dialogues."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from irqlora_jax.data import eval_batches, hold_out, load_pairs, make_batches
from irqlora_jax.data.config import DataConfig
from irqlora_jax.data.preference import rows_of
from tests.models import byte_tokenizer

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROW = {"prompt": "Name a color.", "chosen": "red", "rejected": "twelve"}
TOKENIZER = byte_tokenizer(template=CHATML)


def load(
    folder: Path, rows: list[dict[str, Any]], length: int | None = None, **options: Any
) -> Any:
    file = folder / "pairs.json"
    file.write_text(json.dumps(rows))
    return load_pairs(str(file), DataConfig(format="preference", **options), TOKENIZER, length)


def texts(pair: Any) -> list[tuple[str, str]]:
    """What comes before the targets, and the targets, of both rows. "$" stands for eos."""
    shown = []
    for tokens, targets in pair:
        parts = (TOKENIZER.decode(tokens[mask]) for mask in (~targets, targets))
        shown.append(tuple(str(part).replace("</s>", "$") for part in parts))
    return shown


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: A color?\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        (ROW, "<s>Name a color.", " red$", " twelve$"),
        ({**ROW, "prompt": "A: ", "chosen": " red"}, "<s>A:", "  red$", " twelve$"),
        ({**ROW, "chosen": " red</s>"}, "<s>Name a color.", " red$", " twelve$"),
        # Anthropic's dialogues; both answers begin with "The ".
        (
            {"chosen": f"{HH} The red", "rejected": f"{HH} The 12"},
            f"<s>{HH}",
            " The red$",
            " The 12$",
        ),
        # Any other text: whole words.
        ({"chosen": "A red rose", "rejected": "A red rat"}, "<s>A red", " rose$", " rat$"),
        # Messages.
        (
            {"prompt": [user("Color?")], "chosen": [bot("red")], "rejected": [bot("12")]},
            "<user>Color?$<assistant>",
            "red$",
            "12$",
        ),
        (
            {"chosen": [user("Color?"), bot("red")], "rejected": [user("Color?"), bot("12")]},
            "<user>Color?$<assistant>",
            "red$",
            "12$",
        ),
        (
            {
                "prompt": "Color?",
                "chosen": [user("Color?"), bot("red")],
                "rejected": [user("Color?"), bot("12")],
            },
            "<user>Color?$<assistant>",
            "red$",
            "12$",
        ),
        # Earlier answers are not learned.
        (
            {
                "prompt": [user("Hi"), bot("Hello"), user("Color?")],
                "chosen": [bot("red")],
                "rejected": [bot("12")],
            },
            "<user>Hi$<assistant>Hello$<user>Color?$<assistant>",
            "red$",
            "12$",
        ),
    ],
)
def test_prompt_and_answers(tmp_path, row, prompt, chosen, rejected) -> None:
    (pair,) = load(tmp_path, [row])
    assert texts(pair) == [(prompt, chosen), (prompt, rejected)]


def test_both_answers_keep_the_same_part_of_a_long_prompt(tmp_path, caplog) -> None:
    row = {"prompt": "abcdefghij", "chosen": " 123456789", "rejected": " 12"}
    (pair,) = load(tmp_path, [row], source_length=6, target_length=5)
    assert texts(pair) == [("<s>fghij", " 1234"), ("<s>fghij", " 12$")]
    assert "1 of 1 rows were cut to data.source_length = 6" in caplog.text
    # The context leaves room for half as much answer.
    (pair,) = load(tmp_path, [row], 8)
    assert texts(pair) == [("<s>hij", " 123"), ("<s>hij", " 12$")]
    assert "the model's context of 8 tokens" in caplog.text
    assert max(len(tokens) for tokens, _ in pair) == 8


def test_long_conversations_are_cut_on_the_right(tmp_path, caplog) -> None:
    row = {"prompt": [user("Color?")], "chosen": [bot("red roses")], "rejected": [bot("12")]}
    (pair,) = load(tmp_path, [row], source_length=20, target_length=8)
    assert texts(pair)[0][1] == "red " and "were cut to data.source_length + " in caplog.text
    with pytest.raises(ValueError, match="none of its 1 rows has two different answers"):
        load(tmp_path, [row], source_length=16, target_length=8)


def test_equal_answers_are_left_out_and_said(tmp_path, caplog) -> None:
    pairs = load(tmp_path, [ROW, {**ROW, "rejected": "red"}, ROW])
    assert len(pairs) == 2
    assert "1 of 3 rows have a chosen answer equal to the rejected one" in caplog.text
    longer = {**ROW, "chosen": "twelve red", "rejected": "twelve hundred"}
    pairs = load(tmp_path, [ROW, longer], target_length=7)
    assert len(pairs) == 1 and caplog.text.count("equal to the rejected one") == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "has no column 'rejected'"),
        ({"prompt": "a", "completion": "b"}, "it looks like data.format = 'self_instruct'"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "rejected = None: expected text"),
        ({"prompt": 1, "chosen": "b", "rejected": "c"}, "prompt = 1: expected text"),
        ({"chosen": "b", "rejected": "c"}, "expected a column prompt, or the prompt in both"),
        ({"chosen": [bot("b")], "rejected": "c"}, "rejected is str: expected a list of messages"),
        ({"chosen": [bot("b")], "rejected": [{"role": "user"}]}, "message 1 of rejected: content"),
        (
            {"prompt": "a", "chosen": [bot("b")], "rejected": [bot("c")]},
            "prompt is str: expected a list of messages",
        ),
        ({**ROW, "rejected": "red"}, "none of its 1 rows has two different answers"),
    ],
)
def test_bad_rows_are_refused_in_a_sentence(tmp_path, row, message) -> None:
    with pytest.raises(ValueError) as info:
        load(tmp_path, [row])
    assert message in str(info.value) and str(tmp_path) in str(info.value)


def test_a_batch_has_the_rows_of_each_pair_one_after_the_other(tmp_path) -> None:
    words = ["one", "two", "three", "four", "five"]
    pairs = load(tmp_path, [{**ROW, "chosen": word} for word in words])
    batches = make_batches(pairs, DataConfig(format="preference", group_by_length=True), 2, 0)
    batch, places = batches[1], batches.indices(1)
    assert batch["tokens"].shape[0] == 4 and len(places) == 2
    for row, example in enumerate(rows_of([pairs[place] for place in places])):
        size = len(example.tokens)
        np.testing.assert_array_equal(batch["tokens"][row, :size], example.tokens)
        assert batch["targets"][row].sum() == example.targets.sum()
    held = list(eval_batches(pairs, 2))
    assert [part["tokens"].shape[0] for part in held] == [4, 4, 4]
    assert [int(part["targets"].any(axis=1).sum()) for part in held] == [4, 4, 2]
    stay, away = hold_out(pairs, 0.4, 0)
    assert len(stay) == 3 and len(away) == 2 and all(len(pair) == 2 for pair in away)
