"""Every format is written as those who published it do."""

import functools
import logging

import pytest

from irqlora_jax.data import alpaca_prompt, load_examples
from tests.data.small_data import config, learned, make_tokenizer, write_file


@pytest.fixture
def write(tmp_path):
    return functools.partial(write_file, tmp_path)


def test_alpaca_prompts_are_stanfords(write):
    tokenizer = make_tokenizer("byte")
    rows = [
        {"instruction": "Name a color.", "input": "night", "output": "dark blue"},
        {"instruction": "Name a color.", "input": "", "output": "red"},
        {"instruction": "Name a color.", "output": "red"},
        {"instruction": "Name a color.", "input": None, "output": "red"},
    ]
    examples = load_examples(write("a.json", rows), config("alpaca"), tokenizer)
    assert tokenizer.decode(examples[0].tokens) == (
        "<s>Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a color.\n\n### Input:\nnight\n\n### Response:dark blue</s>"
    )
    for example in examples[1:]:
        assert tokenizer.decode(example.tokens) == (
            "<s>Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nName a color.\n\n### Response:red</s>"
        )
        assert learned(example, tokenizer) == "red</s>"


def test_braces_and_percent_signs_in_a_prompt_stay():
    assert "\n100 % of {x} %s\n" in alpaca_prompt("100 % of {x} %s", "%d")


QA = [("question what is color of ada ?", "red"), ("what is color of bern ?", "dark blue")]


@pytest.mark.parametrize(
    ("format", "rows"),
    [
        ("input_output", [{"input": q, "output": a, "source": "x"} for q, a in QA]),
        ("self_instruct", [{"prompt": q, "completion": f" {a}"} for q, a in QA]),
        ("flan_v2", [{"inputs": q, "targets": a, "task": 3} for q, a in QA]),
        ("chip2", [{"text": f"<human>: {q}\n<bot>: {a}", "metadata": "x"} for q, a in QA]),
    ],
)
@pytest.mark.parametrize("kind", ["word", "byte", "piece"])
def test_formats_of_prompt_and_answer_are_spellings_of_one(write, kind, format, rows):
    tokenizer = make_tokenizer(kind)
    plain = write("plain.json", [{"input": q, "output": a} for q, a in QA])
    wanted = load_examples(plain, config(), tokenizer)
    found = load_examples(write("a.jsonl", rows), config(format), tokenizer)
    for one, other in zip(wanted, found, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.targets.tolist() == other.targets.tolist()


def test_chip2_is_the_first_question_and_its_answer(write):
    tokenizer = make_tokenizer("byte")
    text = "<human>: the cat\nsat\n<bot>: on the\nmat\n<human>: and\n<bot>: red"
    (example,) = load_examples(write("a.json", [{"text": text}]), config("chip2"), tokenizer)
    assert tokenizer.decode(example.tokens) == "<s>the cat\nsat on the\nmat</s>"
    assert learned(example, tokenizer) == " on the\nmat</s>"
    for bad in ("the cat", "<human>: the cat", "<bot>: a\n<human>: b"):
        path = write("b.jsonl", [{"text": text}, {"text": bad}])
        with pytest.raises(ValueError, match=r"b.jsonl, line 2: text = '.*expected '<human>:"):
            load_examples(path, config("chip2"), tokenizer)


@pytest.mark.parametrize("format", ["hh_rlhf", "oasst1"])
def test_whole_conversations_are_learned_behind_bos(write, format):
    tokenizer = make_tokenizer("byte")
    column = {"hh_rlhf": "chosen", "oasst1": "text"}[format]
    texts = ["\n\nHuman: the cat\n\nAssistant: sat", "### Human: the cat### Assistant: sat"]
    path = write("a.jsonl", [{column: text, "rejected": "x"} for text in texts])
    examples = load_examples(path, config(format), tokenizer)
    for text, example in zip(texts, examples, strict=True):
        assert tokenizer.decode(example.tokens) == f"<s>{text}</s>"
        assert not example.targets[0] and example.targets[1:].all()


def message(name, parent, text, rank=None, role=None, **more):
    role = role or ("assistant" if len(name) % 2 == 0 else "prompter")
    row = {"message_id": name, "parent_id": parent, "text": text, "role": role, "rank": rank}
    return row | more


TREES = [  # a name is its parent's and a letter
    message("ab", "a", "worse", 1),  # in front of its parent
    message("a", None, "first"),
    message("aa", "a", "better", 0.0),
    message("aaa", "aa", "no rank"),
    message("aab", "aa", "no rank either"),
    message("aaaa", "aaa", "gone", 0, deleted=True),
    message("aaab", "aaa", "NaN", float("nan")),
    message("aaac", "aaa", "ranked", 2),
    message("b", "", "second"),
    message("ba", "b", "reply", 5),
    message("xy", "x", "its parent is not here"),
]


def test_message_trees_become_their_best_conversations(write, caplog):
    tokenizer = make_tokenizer("byte")
    with caplog.at_level(logging.INFO):
        examples = load_examples(write("a.jsonl", TREES), config("oasst1"), tokenizer)
    assert [tokenizer.decode(example.tokens) for example in examples] == [
        "<s>### Human: first### Assistant: better### Human: no rank### Assistant: ranked</s>",
        "<s>### Human: second### Assistant: reply</s>",
    ]
    assert "2 conversations of the best replies, 6 of 11 messages" in caplog.text
    (only,) = load_examples(
        write("b.json", TREES), config("oasst1", max_examples=1), tokenizer
    )  # conversations are counted, not messages
    assert only.tokens.tolist() == examples[0].tokens.tolist()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([TREES[1], TREES[1]], "line 2: message_id = 'a' is also in .*a.jsonl, line 1"),
        ([TREES[0]], "no message begins a conversation"),
        ([TREES[1], TREES[2] | {"rank": "best"}], "line 2: rank = 'best': expected a number"),
        (
            [TREES[1], TREES[2] | {"rank": 10**400}],
            r"line 2: rank = 10+\.{3}0*: expected",
        ),
        ([TREES[1] | {"role": "bot"}], "line 1: role = 'bot': expected prompter, assistant"),
        ([TREES[1] | {"role": ["bot"]}], r"line 1: role = \['bot'\]: expected text"),
        ([{"text": "a"}, TREES[1]], "line 1: message_id = None: expected text"),
        ([TREES[1] | {"message_id": 7}], "line 1: message_id = 7: expected text"),
    ],
)
def test_bad_trees_are_refused(write, rows, message):
    # Of one reply the rank is read too.
    with pytest.raises(ValueError, match=message):
        load_examples(write("a.jsonl", rows), config("oasst1"), make_tokenizer())
