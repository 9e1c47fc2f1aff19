"""Tokens and masks are exact, every example comes once per epoch, and bad files are refused."""

import json
import logging
import sys
import types
from collections import Counter

import numpy as np
import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from irqlora_jax.config import DataConfig
from irqlora_jax.data import (
    Batches,
    Example,
    alpaca_prompt,
    eval_batches,
    hold_out,
    load_examples,
)

WORDS = ["question", "what", "is", "color", "of", "ada", "bern", "?", "answer"]
WORDS += ["red", "green", "blue", "dark"]
ROWS = [
    {"input": "question what is color of ada bern ?  answer", "output": "red"},
    {"input": "question what is color of bern ?  answer", "output": "dark blue"},
]
CORPUS = [
    "the cat sat on the mat and the answer is red or green, dark blue at night.",
    alpaca_prompt("Name a color.", "night") + "red",
    alpaca_prompt("Name a color.") + "dark blue",
    *(f"{row['input']} {row['output']}" for row in ROWS),
]


def make_tokenizer(kind="word", bos=True, eos=True, template="<s> $A"):
    """A word-level, byte-level ("byte") or SentencePiece-like ("piece") tokenizer.

    `bos` and `eos` say whether the tokenizer names them, `template` what it adds by itself.
    """
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    if kind == "word":
        vocab = {token: index for index, token in enumerate(special + WORDS)}
        core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        core = Tokenizer(models.BPE(unk_token="<unk>"))
        alphabet = []
        if kind == "byte":
            core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            core.decoder = decoders.ByteLevel()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
        else:
            replace = normalizers.Replace(" ", "▁")
            # No piece spans two words, as in LLaMA's vocabulary.
            core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
            core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
            core.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            )
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        core.train_from_iterator(CORPUS, trainer)
    if template:
        core.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    names = {"bos_token": "<s>"} if bos else {}
    names |= {"eos_token": "</s>"} if eos else {}
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **names)


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        if not isinstance(content, str):
            lines = [json.dumps(row) for row in content]
            content = "\n".join(lines) if name.endswith("l") else f"[{', '.join(lines)}]"
        path.write_text(content, encoding="utf-8")
        return str(path)

    return write


def config(format="input_output", **values):
    return DataConfig(format=format, **values)


def learned(example, tokenizer):
    return tokenizer.decode(example.tokens[example.targets])


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


def test_the_files_formats_agree(write):
    tokenizer = make_tokenizer()
    wrapped = json.dumps({"version": 1, "data": ROWS})
    blank_lines = "\n".join(json.dumps(row) + "\n" for row in ROWS)
    paths = [write("a.json", ROWS), write("b.json", wrapped), write("c.jsonl", blank_lines)]
    one, two, three = (load_examples(path, config(), tokenizer) for path in paths)
    for a, b, c in zip(one, two, three, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist() == c.tokens.tolist()
    assert len(load_examples(paths[0], config(max_examples=1), tokenizer)) == 1


def test_json_strings_may_hold_other_line_ends(write):
    row = json.dumps({"input": "the\u2028cat", "output": "sat"}, ensure_ascii=False)
    (example,) = load_examples(write("a.jsonl", row), config(), make_tokenizer("byte"))
    assert "the\u2028cat" in make_tokenizer("byte").decode(example.tokens)


def test_an_empty_answer_is_an_eos_and_is_logged(write, caplog):
    path = write("a.jsonl", [ROWS[0] | {"output": ""}, ROWS[1]])
    with caplog.at_level(logging.WARNING):
        examples = load_examples(path, config(), make_tokenizer())
    assert learned(examples[0], make_tokenizer()) == "</s>"
    assert "1 of 2 rows have an empty answer" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", "not JSON: .* at line 1, column 1"),
        ("a.json", '[{"input": "a",\n"output" 3}]', "not JSON: .* at line 2, column 10"),
        ("a.jsonl", '{"input": "a", "output": "b"}\n{"input"}', "not JSON: .* at line 2, column 9"),
        ("a.json", "[]", "has no rows"),
        ("a.jsonl", "\n\n", "has no rows"),
        ("a.json", '{"rows": []}', "accepted is a list of objects"),
        (
            "a.json",
            '[{"input": "a", "output": "b"}, 3]',
            "row 2 is of type int: accepted is an obj",
        ),
        (
            "a.jsonl",
            '{"input": "a", "output": "b"}\n\n{"question": "a", "output": "b"}',
            "line 3 has no column 'input': its columns are question, output; expected are input, o",
        ),
        ("a.json", [{"input": "a", "output": 3}], "row 1: output = 3: accepted is text"),
        ("a.json", [{"input": None, "output": "a"}], "row 1: input = None: accepted is text"),
        ("a.csv", "input,output", "accepted is a file"),
        ("a.txt", "red", "a file of rows is .json or .jsonl"),
    ],
)
def test_bad_rows_are_refused(write, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        load_examples(write(name, content), config(), make_tokenizer())
    assert name in str(error.value) and "\n" not in str(error.value)


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


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"red \xff\xfe")
    with pytest.raises(ValueError, match=r"a.txt is not UTF-8 text \(byte 4\)"):
        load_examples(str(tmp_path / "a.txt"), config("text"), make_tokenizer())


@pytest.mark.parametrize("name", ["nothing.json", "/no/such/file", "a/b/c", "./x", "a b"])
def test_a_missing_file_is_not_looked_for_on_the_hub(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_examples(name, config(), make_tokenizer())


def test_a_folder_and_an_empty_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is a folder: accepted is a file"):
        load_examples(str(tmp_path), config(), make_tokenizer())
    with pytest.raises(ValueError, match="has no name"):
        load_examples("", config(), make_tokenizer())


@pytest.fixture
def hub(monkeypatch):
    """hub(load): a stand-in for `datasets`, whose import takes seconds."""

    def hub(load):
        error = type("DatasetsError", (Exception,), {})
        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
        exceptions = types.SimpleNamespace(DatasetsError=error)
        monkeypatch.setitem(sys.modules, "datasets.exceptions", exceptions)

    return hub


def test_hub_data_is_read_from_the_split_train(hub, write):
    calls = []

    def load(name, split):
        calls.append((name, split))
        return iter(ROWS)

    hub(load)
    tokenizer = make_tokenizer()
    examples = load_examples("someone/some.data-set", config(), tokenizer)
    local = load_examples(write("a.json", ROWS), config(), tokenizer)
    assert [e.tokens.tolist() for e in examples] == [e.tokens.tolist() for e in local]
    assert calls == [("someone/some.data-set", "train")]


def test_what_the_hub_does_not_give_is_one_sentence(hub):
    def load(name, split):
        raise ConnectionError("no\nnetwork")

    hub(load)
    with pytest.raises(FileNotFoundError, match=r"^someone/data: there is no .*: no network$"):
        load_examples("someone/data", config(), make_tokenizer())


def some_examples(lengths):
    """Examples that can be told apart: example i consists of tokens i + 1."""
    return [
        Example(np.full(length, index + 1, np.int32), np.arange(length) > 0)
        for index, length in enumerate(lengths)
    ]


def drawn(batches, steps):
    return [index for step in range(steps) for index in batches.indices(step)]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 25])
def test_each_example_comes_once_per_epoch(batch_size):
    batches = Batches(some_examples([2] * 7), batch_size, seed=0)
    order = drawn(batches, steps=7)
    for epoch in range(len(order) // 7):
        assert sorted(order[7 * epoch : 7 * epoch + 7]) == list(range(7))


def test_orders_differ_between_epochs_and_seeds_and_nothing_else():
    examples = some_examples([2] * 50)
    first, second = (drawn(Batches(examples, 50, seed), 2) for seed in (0, 1))
    assert first[:50] != first[50:] and first[:50] != second[:50]
    assert first == drawn(Batches(examples, 50, 0), 2)
    # Neighboring seeds must not share orders of other epochs.
    orders = Counter(tuple(o) for o in (first[:50], first[50:], second[:50], second[50:]))
    assert max(orders.values()) == 1
    # The batch size cuts the same stream.
    assert first == drawn(Batches(examples, 10, 0), 10)


def test_a_batch_depends_on_its_step_alone():
    examples = some_examples(range(2, 13))
    ahead = Batches(examples, 4, seed=3)
    batches = [batch for batch, _ in zip(ahead, range(9), strict=False)]
    behind = Batches(examples, 4, seed=3)
    for step in [8, 2, 2, 5, 0]:
        for name, values in behind[step].items():
            np.testing.assert_array_equal(values, batches[step][name])


def test_batches_are_padded_without_targets_to_a_multiple():
    lengths = [2, 9, 17, 30]
    batches = Batches(some_examples(lengths), 2, seed=0, multiple=8)
    seen = set()
    for step in range(20):
        batch = batches[step]
        assert batch["tokens"].dtype == np.int32 and batch["targets"].dtype == bool
        longest = max(lengths[index] for index in batches.indices(step))
        assert batch["tokens"].shape == batch["targets"].shape == (2, -(-longest // 8) * 8)
        seen.add(batch["tokens"].shape)
        for row, index in enumerate(batches.indices(step)):
            length = lengths[index]
            assert (batch["tokens"][row, :length] == index + 1).all()
            assert batch["targets"][row].sum() == length - 1
            assert not batch["targets"][row, length:].any()
    assert len(seen) <= 4


def test_eval_batches_hold_every_example_once_longest_first():
    lengths = [3, 30, 2, 17, 9]
    batches = list(eval_batches(some_examples(lengths), 2, multiple=8))
    assert [batch["tokens"].shape for batch in batches] == [(2, 32), (2, 16), (2, 8)]
    rows = [row for batch in batches for row in zip(batch["tokens"], batch["targets"], strict=True)]
    found = [(int(tokens[0]), int(targets.sum())) for tokens, targets in rows]
    assert found == [(2, 29), (4, 16), (5, 8), (1, 2), (3, 1), (0, 0)]


def test_held_out_examples_are_a_random_part():
    examples = some_examples([2] * 40)
    stay, held = hold_out(examples, 0.25, seed=0)
    names = [int(example.tokens[0]) for example in stay + held]
    assert len(held) == 10 and sorted(names) == list(range(1, 41))
    _, other = hold_out(examples, 0.25, seed=1)
    assert [e.tokens[0] for e in held] != [e.tokens[0] for e in other]
    assert len(hold_out(examples, 0.001, seed=0)[1]) == 1
    assert hold_out(examples, 0.0, seed=0) == (examples, [])
    with pytest.raises(ValueError, match="holds out 1 of 1 examples"):
        hold_out(examples[:1], 0.1, seed=0)


def test_bad_arguments_of_batches_are_refused():
    examples = some_examples([2])
    with pytest.raises(ValueError, match="there are no examples"):
        Batches([], 2, seed=0)
    with pytest.raises(ValueError, match="batch_size = 0"):
        Batches(examples, 0, seed=0)
    with pytest.raises(ValueError, match="multiple = 0"):
        Batches(examples, 1, seed=0, multiple=0)
    with pytest.raises(IndexError, match="step = -1"):
        Batches(examples, 1, seed=0)[-1]
