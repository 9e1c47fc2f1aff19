"""Examples have exact tokens, masks and lengths with every tokenizer."""

import functools
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irqlora_jax import hf
from irqlora_jax.data import alpaca_prompt, load_examples
from tests.data.small_data import ROWS, WORDS, config, learned, make_tokenizer, write_file

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def write(tmp_path):
    return functools.partial(write_file, tmp_path)


@pytest.mark.parametrize("kind", ["word", "byte", "piece"])
def test_the_targets_are_the_answer_and_the_rest_is_the_prompt(write, kind):
    tokenizer = make_tokenizer(kind)
    examples = load_examples(write("a.jsonl", ROWS), config(), tokenizer)
    for row, example in zip(ROWS, examples, strict=True):
        assert (
            learned(example, tokenizer).replace(" </s>", "</s>").strip() == f"{row['output']}</s>"
        )
        prompt = tokenizer.decode(example.tokens[~example.targets], skip_special_tokens=True)
        assert prompt.split() == row["input"].split()
        assert example.tokens.dtype == np.int32 and example.targets.dtype == bool
        # The mask is one run: nothing in front of the answer, all of the answer.
        assert (np.diff(example.targets.astype(int)) >= 0).all()


@pytest.mark.parametrize("kind", ["word", "byte", "piece"])
@pytest.mark.parametrize(
    ("prompt", "answer"), [("the cat", "sat"), ("the cat ", "sat"), ("the cat", " sat")]
)
def test_input_output_has_the_tokens_of_the_running_text(write, kind, prompt, answer):
    tokenizer = make_tokenizer(kind, eos=False)
    if kind == "word":
        prompt, answer = prompt.replace("the cat", "answer is"), answer.replace("sat", "red")
    path = write("a.json", [{"input": prompt, "output": answer}])
    (example,) = load_examples(path, config(), tokenizer)
    whole = tokenizer(f"{prompt.strip()} {answer.strip()}")["input_ids"]
    assert example.tokens.tolist() == whole
    assert learned(example, tokenizer).strip() == answer.strip()


def test_no_space_is_added_where_the_seam_has_white_space(write):
    tokenizer = make_tokenizer("byte", eos=False)
    path = write("a.json", [{"input": "the cat\n", "output": "sat"}])
    (example,) = load_examples(path, config(), tokenizer)
    assert tokenizer.decode(example.tokens) == "<s>the cat\nsat"


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"template": "<s> $A"}, 1),
        ({"template": None}, 1),  # named, but not added by itself
        ({"template": "<s> $A </s>"}, 1),
        ({"bos": False, "template": "<s> $A"}, 1),  # added, but not named
        ({"bos": False, "template": None}, 0),
        ({"bos": False, "template": "$A </s>"}, 0),
    ],
)
@pytest.mark.parametrize("format", ["input_output", "text", "spelled"])
def test_bos_comes_exactly_once_and_eos_only_at_the_end(write, settings, count, format):
    tokenizer = make_tokenizer(**settings)
    spelled = "<s>" if format == "spelled" and settings.get("bos", True) else ""
    if format == "text":
        path = write("a.txt", "question what is red")
    else:
        path = write("a.jsonl", [{"input": spelled + "question what is", "output": "red"}])
    kind = "text" if format == "text" else "input_output"
    (example,) = load_examples(path, config(kind), tokenizer)
    words = tokenizer.convert_tokens_to_ids(["question", "what", "is", "red"])
    assert example.tokens.tolist() == [1] * count + words + [2]


def test_without_eos_the_answer_ends_with_its_last_token(write):
    tokenizer = make_tokenizer(eos=False)
    examples = load_examples(write("a.jsonl", ROWS), config(), tokenizer)
    assert [learned(example, tokenizer) for example in examples] == ["red", "dark blue"]


def test_long_prompts_lose_their_start_and_long_answers_their_end(write, caplog):
    tokenizer = make_tokenizer()
    row = {"input": "question what is color of", "output": "red green blue dark"}
    path = write("a.jsonl", [row, ROWS[0] | {"input": "answer"}])
    with caplog.at_level(logging.WARNING):
        first, second = load_examples(path, config(source_length=3, target_length=2), tokenizer)
    assert tokenizer.decode(first.tokens[~first.targets]) == "<s> color of"
    assert learned(first, tokenizer) == "red green"  # eos counts: it does not fit either
    assert learned(second, tokenizer) == "red </s>"
    assert "1 of 2 rows were cut" in caplog.text

    lengths = config(source_length=6, target_length=5)
    first, _ = load_examples(path, lengths, tokenizer)
    assert tokenizer.decode(first.tokens) == f"<s> {row['input']} {row['output']} </s>"


def test_a_prompt_without_bos_is_cut_on_the_left_too(write):
    tokenizer = make_tokenizer(bos=False, template=None)
    path = write("a.jsonl", [{"input": "question what is color of", "output": "red"}])
    (example,) = load_examples(path, config(source_length=3), tokenizer)
    assert tokenizer.decode(example.tokens[~example.targets]) == "is color of"


def test_train_on_source_learns_all_but_the_first_token(write):
    path = write("a.jsonl", ROWS)
    for example in load_examples(path, config(train_on_source=True), make_tokenizer()):
        assert not example.targets[0] and example.targets[1:].all()


def test_text_is_joined_and_cut_into_windows(write):
    tokenizer = make_tokenizer()
    documents = ["question what is color", "red green", "blue"]
    path = write("a.txt", "\n<|endoftext|>\n".join(documents) + "\n<|endoftext|>\n")
    examples = load_examples(path, config("text", sequence_length=4), tokenizer)
    stream = np.concatenate([example.tokens for example in examples])
    text = "<s> question what is color </s> <s> red green </s> <s> blue </s>"
    # The 13th token would be a window of its own, with nothing to learn.
    assert tokenizer.decode(stream) == text.rsplit(" ", len(text.split()) - 12)[0]
    for example in examples:
        assert len(example.tokens) == 4
        assert example.targets.tolist() == [False, True, True, True]

    rows = write("b.jsonl", [{"text": text} for text in documents])
    same = load_examples(rows, config("text", sequence_length=4), tokenizer)
    assert all((a.tokens == b.tokens).all() for a, b in zip(examples, same, strict=True))
    fewer = load_examples(path, config("text", sequence_length=4, max_examples=2), tokenizer)
    assert len(fewer) == 2


def test_an_empty_answer_is_an_eos_and_is_logged(write, caplog):
    path = write("a.jsonl", [ROWS[0] | {"output": ""}, ROWS[1]])
    with caplog.at_level(logging.WARNING):
        examples = load_examples(path, config(), make_tokenizer())
    assert learned(examples[0], make_tokenizer()) == "</s>"
    assert "1 of 2 rows have an empty answer" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", " \n\n", "has no text"),
        ("a.txt", "<|endoftext|>\n<|endoftext|>\n", "has no text"),
        ("a.jsonl", [{"input": "red"}], "line 1 has no column 'text'"),
    ],
)
def test_bad_text_is_refused(write, name, content, message):
    with pytest.raises(ValueError, match=message):
        load_examples(write(name, content), config("text"), make_tokenizer())


def test_rows_without_tokens_are_refused(write):
    bare = make_tokenizer(bos=False, eos=False, template=None)
    path = write("a.jsonl", [ROWS[0], ROWS[0] | {"output": " "}])
    with pytest.raises(ValueError, match=r"line 2: output = ' ' has no tokens"):
        load_examples(path, config(), bare)
    path = write("b.jsonl", [ROWS[0] | {"input": ""}])
    with pytest.raises(ValueError, match=r"line 1: the prompt has no tokens"):
        load_examples(path, config(), bare)
    with pytest.raises(ValueError, match="fewer than 2 tokens"):
        load_examples(write("a.txt", "red"), config("text"), bare)


def test_whole_conversations_are_cut_on_the_right(write, caplog):
    tokenizer = make_tokenizer()
    path = write("a.jsonl", [{"chosen": "question what is color of ada"}, {"chosen": "red"}])
    lengths = config("hh_rlhf", source_length=2, target_length=3)
    with caplog.at_level(logging.WARNING):
        first, second = load_examples(path, lengths, tokenizer)
    assert tokenizer.decode(first.tokens) == "<s> question what is color"
    assert tokenizer.decode(second.tokens) == "<s> red </s>"
    assert "1 of 2 rows were cut to data.source_length + data.target_length = 5" in caplog.text


words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(st.tuples(words, words), min_size=1, max_size=4),
    lengths=st.tuples(st.integers(2, 14), st.integers(2, 14)),
    max_length=st.integers(2, 20),
)
def test_no_example_is_longer_than_the_context(tmp_path_factory, pairs, lengths, max_length):
    tokenizer = make_tokenizer()
    rows = [{"input": source, "output": target} for source, target in pairs]
    path = write_file(tmp_path_factory.mktemp("rows"), "a.json", rows)
    settings = config(source_length=lengths[0], target_length=lengths[1])
    free = load_examples(path, settings, tokenizer)
    cut = load_examples(path, settings, tokenizer, max_length)
    for whole, example in zip(free, cut, strict=True):
        if len(whole.tokens) <= max_length:
            assert whole.tokens.tolist() == example.tokens.tolist()
            continue
        assert len(example.tokens) == max_length and example.tokens[0] == 1
        # The answer keeps its start, the prompt its end, and each of them half of the room.
        answer = example.tokens[example.targets]
        prompt = example.tokens[~example.targets][1:]
        wanted, source = whole.tokens[whole.targets], whole.tokens[~whole.targets][1:]
        assert answer.tolist() == wanted[: len(answer)].tolist()
        assert prompt.tolist() == source[len(source) - len(prompt) :].tolist()
        assert len(answer) >= min(len(wanted), max_length // 2)
        assert len(prompt) + 1 >= min(len(source) + 1, max_length // 2)


@pytest.mark.parametrize("format", ["input_output", "hh_rlhf", "chat", "text"])
def test_cuts_to_the_context_are_counted(write, caplog, format):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    short, long = "red", "question what is color of ada bern ?"
    rows = {
        "input_output": [{"input": "what is", "output": text} for text in (short, long)],
        "hh_rlhf": [{"chosen": text} for text in (short, long)],
        "chat": [{"messages": [{"role": "assistant", "content": t}]} for t in ("is red", long)],
        "text": [{"text": text} for text in (short, long)],
    }[format]
    path = write("a.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        examples = load_examples(path, config(format), tokenizer, 256)
        assert not caplog.text
        examples = load_examples(path, config(format, sequence_length=256), tokenizer, 5)
    assert max(len(example.tokens) for example in examples) == 5
    if format == "text":
        assert "data.sequence_length = 256 is more than the model's context of 5" in caplog.text
        # Nothing of the text is lost.
        assert sum(len(example.tokens) for example in examples) == 3 + 2 + 8
    else:
        assert "1 of 2 rows were cut to the model's context of 5 tokens" in caplog.text
    assert caplog.text.count("\n") == 1
    with pytest.raises(ValueError, match="max_length = 1: expected a whole number of at least"):
        load_examples(path, config(format), tokenizer, 1)


def test_rows_with_nothing_to_learn_are_left_out_and_counted(write, caplog):
    bare = make_tokenizer(bos=False, eos=False, template=None)
    path = write("a.jsonl", [{"chosen": "red"}, {"chosen": "red green"}, {"chosen": ""}])
    with caplog.at_level(logging.WARNING):
        (example,) = load_examples(path, config("hh_rlhf"), bare)
    assert bare.decode(example.tokens) == "red green"
    assert "2 of 3 rows have no token to learn and are left out" in caplog.text
    path = write("b.jsonl", [{"chosen": "red"}, {"chosen": ""}])
    with pytest.raises(ValueError, match=r"none of its 2 rows has a token to learn .*'hh_rlhf'"):
        load_examples(path, config("hh_rlhf"), bare)


def test_half_characters_are_refused(write):
    path = write("a.jsonl", '{"input": "red", "output": "red \\ud83d"}')
    with pytest.raises(ValueError, match=r"line 1: output contains an unpaired surrogate, \\ud83d"):
        load_examples(path, config(), make_tokenizer())


@pytest.mark.parametrize("format", ["alpaca", "hh_rlhf", "chat", "text"])
def test_llamas_sentencepiece_model_without_any_other_file(tmp_path, write, format):
    source = SHARED / "llama_tokenizer" / "tokenizer.model"
    if not source.is_file():
        pytest.skip("no data")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.model").symlink_to(source)
    tokenizer = hf.load_tokenizer(tmp_path / "model")
    assert tokenizer.pad_token_id is None
    rows = {
        "alpaca": [{"instruction": "Say it.", "input": "", "output": "Hello\n🙂"}],
        "hh_rlhf": [{"chosen": "\n\nHuman: Hi\n\nAssistant: Hello"}],
        "chat": [
            {
                "messages": [
                    {"role": "user", "content": "Say it."},
                    {"role": "assistant", "content": "Hello\n🙂"},
                ]
            }
        ],
        "text": [{"text": "Hello"}],
    }[format]
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + "
        "' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    (example,) = load_examples(write("a.json", rows), config(format), tokenizer)
    tokens = example.tokens.tolist()
    assert tokens[0] == 1 and tokens.count(1) == 1
    assert tokens[-1] == 2 and tokens.count(2) == 1
    text = {
        "alpaca": "Hello\n🙂</s>",
        "hh_rlhf": "\n\nHuman: Hi\n\nAssistant: Hello</s>",
        "chat": "Hello\n🙂 </s>",
        "text": "Hello</s>",
    }[format]
    assert learned(example, tokenizer).lstrip(" ") == text


def test_real_alpaca_rows():
    folder, model = SHARED / "alpaca" / "alpaca_tiny.json", SHARED / "stories260K"
    if not folder.is_file() or not model.is_dir():
        pytest.skip("no data")
    tokenizer = hf.load_tokenizer(model)
    settings = config("alpaca", source_length=2000, target_length=2000)
    rows = json.loads(folder.read_text())
    for row, example in zip(rows, load_examples(str(folder), settings, tokenizer), strict=True):
        prompt = tokenizer.decode(example.tokens[1:][~example.targets[1:]])
        assert prompt.strip() == alpaca_prompt(row["instruction"], row["input"])
        answer = example.tokens[example.targets]
        assert answer[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(answer[:-1]).strip() == row["output"].strip()
        assert np.diff(example.targets.astype(int)).sum() == 1
