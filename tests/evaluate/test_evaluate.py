"""Losses and scores against slow, plain computations with all logits in float64."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.data import Example, alpaca_prompt, encode_source
from irqlora_jax.evaluate import (
    Question,
    choice_scores,
    evaluation_loss,
    load_questions,
    perplexity,
    score_questions,
    score_text,
)
from irqlora_jax.evaluate import choices as choices_module
from irqlora_jax.evaluate import tasks as tasks_module
from irqlora_jax.evaluate.perplexity import nll, text_windows
from irqlora_jax.evaluate.tasks import EvalConfig, evaluate_run
from irqlora_jax.model.llama import Llama
from irqlora_jax.runs.load import Run
from tests.models import TINY, tiny_llama, word_tokenizer

MODEL = Llama(TINY)
VOCAB = TINY.vocab_size


def random_examples(count=7, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 50, count)
    return [
        Example(rng.integers(0, VOCAB, n).astype(np.int32), rng.random(n) < 0.5) for n in lengths
    ]


def plain_nll(example, log_probs):
    logs = log_probs(example.tokens)
    places = np.flatnonzero(example.targets[1:])
    return -logs[places, example.tokens[1:][places]].sum(), len(places)


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 1024), (3, 10), (16, 64)])
def test_evaluation_loss_is_the_mean_over_targets(variables, log_probs, batch_size, chunk):
    examples = random_examples()
    sums = [plain_nll(example, log_probs) for example in examples]
    want = sum(value for value, _ in sums) / sum(count for _, count in sums)
    loss = evaluation_loss(MODEL, variables, examples, batch_size, chunk)
    assert loss == pytest.approx(want, rel=1e-5)


def test_padding_does_not_change_the_nll(variables):
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, VOCAB, (1, 55)).astype(np.int32), rng.random((1, 55)) < 0.5
    value, count = nll(MODEL, variables, {"tokens": tokens, "targets": targets})
    padding = np.full((1, 9), 17, np.int32)
    tokens = np.concatenate([tokens, padding], axis=1)
    targets = np.concatenate([targets, padding < 0], axis=1)
    padded, padded_count = nll(MODEL, variables, {"tokens": tokens, "targets": targets})
    assert float(count) == float(padded_count) == targets[:, 1:55].sum()
    np.testing.assert_allclose(value, padded, rtol=1e-6)


def test_nothing_to_evaluate_is_an_error(variables):
    with pytest.raises(ValueError, match="there are no examples"):
        evaluation_loss(MODEL, variables, [])
    example = Example(np.ones(3, np.int32), np.array([True, False, False]))
    with pytest.raises(ValueError, match="has a target"):
        evaluation_loss(MODEL, variables, [example])


@pytest.mark.parametrize("count", [2, 7, 8, 9, 29, 30])
@pytest.mark.parametrize(("window", "stride"), [(8, None), (8, 7), (8, 3), (8, 1), (2, 1)])
def test_windows_score_each_token_once_with_the_promised_context(count, window, stride):
    tokens = np.arange(count, dtype=np.int32)
    scored = []
    for example in text_windows(tokens, window, stride):
        assert len(example.tokens) <= window and example.targets.any()
        for place in np.flatnonzero(example.targets):
            token = int(example.tokens[place])
            scored.append(token)
            least = window - (stride or window - 1)
            assert place >= min(token, least)
    assert scored == list(range(1, count))


def test_bad_windows_are_refused():
    tokens = np.arange(9, dtype=np.int32)
    with pytest.raises(ValueError, match="window = 1: expected"):
        text_windows(tokens, 1)
    for stride in (0, 8):
        with pytest.raises(ValueError, match=f"stride = {stride}: expected 1 to window - 1 = 7"):
            text_windows(tokens, 8, stride)
    with pytest.raises(ValueError, match="the text has 1 tokens"):
        text_windows(tokens[:1], 8)


TOKENIZER = word_tokenizer(VOCAB)


@pytest.mark.parametrize("settings", [{"window": 64}, {"window": 9}, {"window": 9, "stride": 2}])
def test_perplexity_is_that_of_a_loop_over_tokens(variables, log_probs, settings):
    ids = np.random.default_rng(0).integers(3, VOCAB, 30)
    tokens = [1, *ids]
    window, stride = settings["window"], settings.get("stride", settings["window"] - 1)
    logs = []
    for place in range(1, len(tokens)):
        start = 0 if place < window else (place - window) // stride * stride + stride
        logs.append(log_probs(tokens[start:place])[-1, tokens[place]])
    text = " ".join(f"w{i}" for i in ids)
    value = perplexity(MODEL, variables, text, TOKENIZER, **settings)
    assert value == pytest.approx(math.exp(-np.mean(logs)), rel=1e-5)


def test_a_byte_order_mark_and_the_kind_of_line_end_do_not_change_the_perplexity(
    variables, monkeypatch, tmp_path
):
    run = Run(tmp_path, None, MODEL, variables, TOKENIZER, None)
    monkeypatch.setattr(tasks_module, "load_run", lambda *_, **__: run)
    monkeypatch.chdir(tmp_path)
    found = []
    for name, data in {
        "plain": b"w3 w4\nw5 w6",
        "marked": b"\xef\xbb\xbfw3 w4\nw5 w6",
        "windows": b"w3 w4\r\nw5 w6",
    }.items():
        (tmp_path / name).write_bytes(data)
        text = str(tmp_path / name)
        asked = EvalConfig("model", "perplexity", text=text, progress=False)
        found.append(evaluate_run(asked)["perplexity"])
    assert found[0] == found[1] == found[2]


def test_the_scores_of_a_text_are_consistent(variables):
    ids = np.random.default_rng(0).integers(3, VOCAB, 30)
    text = " ".join(f"w{i}" for i in ids) + " \N{GREEK SMALL LETTER PI}"
    scores = score_text(MODEL, variables, text, TOKENIZER, window=9, stride=2, batch_size=3)
    assert scores.perplexity == perplexity(MODEL, variables, text, TOKENIZER, window=9, stride=2)
    assert scores.perplexity == pytest.approx(math.exp(scores.nll))
    assert scores.tokens == 31 and scores.bytes == len(text) + 1
    bits = scores.nll * 31 / math.log(2) / scores.bytes
    assert scores.bits_per_byte == pytest.approx(bits)
    assert (scores.window, scores.stride) == (9, 2)
    whole = score_text(MODEL, variables, text, TOKENIZER)
    assert (whole.window, whole.stride) == (2048, 2047)
    with pytest.raises(ValueError, match="window = 2049: expected at most max_position_emb"):
        score_text(MODEL, variables, text, TOKENIZER, window=2049)


def random_questions(count, longest_choice, seed=0, pool=None):
    rng = np.random.default_rng(seed)

    def words(low, high):
        return tuple(int(i) for i in rng.integers(3, VOCAB, rng.integers(low, high + 1)))

    result = []
    for index in range(count):
        choices = tuple(words(1, longest_choice) for _ in range(rng.integers(2, 5)))
        answer = int(rng.integers(len(choices)))
        subject = "rare" if index % 4 == 0 else "common"
        result.append(Question(subject, words(1, 25), choices, answer, pool))
    return result


def plain_scores(question, log_probs):
    scores = []
    for choice in question.choices:
        logs = log_probs(question.prompt + choice)
        first = len(question.prompt) - 1
        scores.append(sum(logs[first + i, token] for i, token in enumerate(choice)))
    return np.array(scores)


@pytest.mark.parametrize("longest_choice", [1, 3])
@pytest.mark.parametrize("batch_size", [4, 32])
def test_accuracy_is_that_of_a_loop_over_choices(variables, log_probs, longest_choice, batch_size):
    asked = random_questions(23, longest_choice)
    result = score_questions(MODEL, variables, asked, batch_size)
    right = {"rare": [], "common": []}
    for question in asked:
        scores = plain_scores(question, log_probs)
        rivals = np.delete(scores, question.answer)
        # Far from ties, so that rounding does not matter; equal choices are ties on both sides.
        assert all(r == scores[question.answer] or abs(r - scores[question.answer]) > 1e-4
                   for r in rivals)  # fmt: skip
        right[question.subject].append(scores[question.answer] > rivals.max())
    assert result.by_subject == {s: pytest.approx(np.mean(r)) for s, r in right.items()}
    assert result.accuracy == pytest.approx(np.mean(right["rare"] + right["common"]))
    assert result.subject_mean == pytest.approx(
        (np.mean(right["rare"]) + np.mean(right["common"])) / 2
    )
    assert result.accuracy != result.subject_mean  # the subjects have different sizes
    assert result.count == 23
    assert 0 < result.accuracy < 1


@pytest.mark.parametrize("common", [0, 40, 130])
def test_sharing_prefixes_does_not_change_the_scores(variables, log_probs, common):
    """Choices of one token, of several, and such that begin alike or with one another."""
    rng = np.random.default_rng(common)
    shared = tuple(int(i) for i in rng.integers(3, VOCAB, common))
    choices = ((5,), (6, 7), (6, 8), (6, 7, 9, 10), (11, 12, 5), (6,))
    asked = []
    for q in random_questions(7, 1):
        # The likeliest tokens, so that some choices are what the model itself would say.
        best = []
        for _ in range(3):
            logs = log_probs((*shared, *q.prompt, *best))[-1]
            best.append(int(np.argmax(logs)))
        own = (*choices, tuple(best[:2]), tuple(best))
        asked.append(dataclasses.replace(q, prompt=shared + q.prompt, choices=own))
    finished = []
    scores, greedy = choice_scores(MODEL, variables, asked, 4, done=finished.append)
    for question, values, likeliest in zip(asked, scores, greedy, strict=True):
        np.testing.assert_allclose(values, plain_scores(question, log_probs), rtol=1e-4)
        best = question.choices[-1]
        assert likeliest.tolist() == [c == best[: len(c)] for c in question.choices]
        assert likeliest[-1] and not likeliest.all()
    assert sum(finished) == 7
    # (6, 7, 9) holds the beginnings of all choices but of (11, 12, 5) and of the likeliest.
    asked = dataclasses.replace(asked[0], choices=choices)
    assert len(choices_module._rows(asked)) == 2


def test_long_choices_are_scored_in_chunks(variables, log_probs, monkeypatch):
    monkeypatch.setattr(choices_module, "_CHUNK", 20)
    asked = random_questions(3, 40, seed=5)
    assert max(len(c) for q in asked for c in q.choices) > 20
    scores, _ = choice_scores(MODEL, variables, asked, 3)
    for question, values in zip(asked, scores, strict=True):
        np.testing.assert_allclose(values, plain_scores(question, log_probs), rtol=1e-4)


def test_prompts_are_grouped_by_what_they_begin_with():
    """Examples in front of some subjects, fewer of them in front of others, and none."""
    rng = np.random.default_rng(0)

    def words(count):
        return tuple(int(i) for i in rng.integers(3, VOCAB, count))

    head, others = words(100), words(300)
    examples = [words(80) for _ in range(3)]
    prompts = [words(20) for _ in range(9)]
    whole = head + examples[0] + examples[1] + examples[2]
    prompts += [whole + words(30) for _ in range(16)]
    prompts += [head + examples[0] + words(30) for _ in range(12)]
    prompts += [others + words(30) for _ in range(24)]
    prompts += [head + examples[0] + examples[1] + words(30) for _ in range(2)]
    order = rng.permutation(len(prompts))
    groups = choices_module.group_by_prefix([prompts[i] for i in order], 8)
    found = {common: sorted(order[i] for i in members) for common, members in groups}
    # Two prompts are no batch: they stay behind the shorter beginning.
    assert found == {
        0: list(range(9)),
        340: list(range(9, 25)),
        180: [*range(25, 37), 61, 62],
        300: list(range(37, 61)),
    }
    # Nobody gains from a cache of little, and one prompt is no group.
    assert choices_module.group_by_prefix([(1, 2, 3)] * 4, 2) == [(0, [0, 1, 2, 3])]
    assert choices_module.group_by_prefix([words(90)], 2) == [(0, [0])]
    assert choices_module.group_by_prefix([], 2) == []
    # Each one begins with the one before: deep, but no deeper than its steps.
    long = words(4000)
    chain = [long[: 1 + i] for i in range(4000)]
    members = [i for _, group in choices_module.group_by_prefix(chain, 4) for i in group]
    assert sorted(members) == list(range(4000))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 255, 256, 257, 500, 513, 1025, 2048])
def test_buckets_are_few_and_hold_what_they_must(length):
    size = choices_module.bucket(length)
    assert length <= size < max(32 + length, 1.25 * length + 1)
    assert size in {choices_module.bucket(n) for n in (size, length)}
    assert len({choices_module.bucket(n) for n in range(1, 2049)}) == 20


def test_a_prompt_longer_than_the_context_is_cut_and_counted(variables, log_probs):
    short = Llama(tiny_llama(max_position_embeddings=12))
    rng = np.random.default_rng(3)
    prompt = (1, *(int(i) for i in rng.integers(3, VOCAB, 30)))
    question = Question("s", prompt, ((5,), (6, 7, 8)), 1)
    # 12 positions hold 10 tokens of the prompt, bos among them, and 2 of the longest choice.
    cut = dataclasses.replace(question, prompt=prompt[:1] + prompt[-9:])
    whole = dataclasses.replace(question, prompt=prompt[:1] + prompt[-8:])
    want = plain_scores(cut, log_probs)
    for answer in (0, 1):
        asked = [dataclasses.replace(q, answer=answer) for q in (question, whole)]
        result = score_questions(short, variables, asked, 2)
        assert result.truncated == 1
        alone = score_questions(short, variables, asked[:1], 2)
        assert alone.accuracy == float(want[answer] > want[1 - answer])
    with pytest.raises(ValueError, match="a choice of s has 13 tokens: expected at most max_"):
        score_questions(short, variables, [Question("s", (1,), ((5,) * 13, (6,)), 0)])


def test_normalized_accuracy_divides_by_the_characters(variables, log_probs):
    asked = random_questions(30, 3)
    rng = np.random.default_rng(1)
    asked = [
        dataclasses.replace(q, lengths=tuple(int(i) for i in rng.integers(1, 40, len(q.choices))))
        for q in asked
    ]
    right = []
    for question in asked:
        scores = plain_scores(question, log_probs) / np.array(question.lengths)
        right.append(scores[question.answer] > np.delete(scores, question.answer).max())
    result = score_questions(MODEL, variables, asked, 32)
    assert result.accuracy_norm == pytest.approx(np.mean(right)) != result.accuracy
    without = [dataclasses.replace(asked[0], lengths=None), *asked[1:]]
    assert score_questions(MODEL, variables, without, 32).accuracy_norm is None


def test_mixed_questions_are_each_asked_in_their_own_way(variables):
    single, multi = random_questions(6, 1, seed=1), random_questions(6, 3, seed=2)
    multi = [q for q in multi if not q.single]
    mixed = [q for pair in zip(multi, single, strict=False) for q in pair]
    alone = [score_questions(MODEL, variables, [q], 4).accuracy for q in mixed]
    result = score_questions(MODEL, variables, mixed, 4)
    assert result.accuracy == pytest.approx(np.mean(alone))
    assert result.recall is None and result.bits_per_fact is None


def test_recall_and_bits_look_at_the_whole_vocabulary(variables, log_probs):
    asked, recalled, bits = [], [], []
    for index, question in enumerate(random_questions(8, 1, pool=32)):
        logs = log_probs(question.prompt)[-1]
        best, second = np.argsort(-logs)[:2].tolist()
        # Every other question offers the second-best token, without the best one beside it.
        token = best if index % 2 else second
        other = next(i for i in range(VOCAB) if i not in (best, second))
        asked.append(Question("s", question.prompt, ((other,), (token,)), 1, pool=32))
        recalled.append(index % 2)
        bits.append(5 + logs[token] / math.log(2))
    result = score_questions(MODEL, variables, asked, 4)
    assert result.accuracy == 1
    assert result.recall == np.mean(recalled) == 0.5
    assert result.bits_per_fact == pytest.approx(np.mean(bits), rel=1e-5)

    one = asked[0]
    without = [*asked[1:], Question("s", one.prompt, one.choices, one.answer)]
    assert score_questions(MODEL, variables, without, 4).bits_per_fact is None


@pytest.mark.parametrize("longest_choice", [1, 3])
def test_ties_count_as_wrong(variables, longest_choice):
    base = variables["base"]
    blank = {"base": base | {"lm_head": {"weight": jnp.zeros_like(base["lm_head"]["weight"])}}}
    asked = [
        Question("s", (3, 4), tuple((c,) * longest_choice for c in (5, 6, 7)), answer, pool=VOCAB)
        for answer in range(3)
    ]
    result = score_questions(MODEL, blank, asked, 4)
    assert result.accuracy == 0
    if longest_choice == 1:
        # All tokens equally likely: nothing is known beyond the pool.
        assert result.bits_per_fact == pytest.approx(0, abs=1e-5)


def test_nan_scores_count_as_wrong(variables):
    broken = jax.tree.map(lambda x: x * jnp.nan, variables)
    assert score_questions(MODEL, broken, random_questions(4, 1), 4).accuracy == 0


def write(tmp_path, *rows):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return str(path)


ROW = {"subject": "s", "prompt": "w3 w4", "choices": ["w5", "w6 w7"], "answer": 1, "pool": 8}


def test_questions_are_read(tmp_path):
    spaced = ROW | {"prompt": "w3 w4 ", "choices": [" w5", "w6 w7"]}
    single = ROW | {"choices": ["w5", "w6"]}
    del single["pool"]
    path = write(tmp_path, ROW, spaced, single)
    first, second, third = load_questions(path, TOKENIZER)
    assert first == second == Question("s", (1, 3, 4), ((5,), (6, 7)), 1, 8, (2, 5))
    assert third == Question("s", (1, 3, 4), ((5,), (6,)), 1, None, (2, 2))
    assert third.single and not first.single
    assert load_questions(path, TOKENIZER, limit=1) == [first]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"not JSON: .* at line 2, column 2"),
        ([1], "line 2 is of type list: expected an object"),
        ({"prompt": "w3"}, "line 2 has no column 'subject': its columns are prompt; expected are"),
        (ROW | {"subject": 3}, "line 2: subject = 3: expected text"),
        (ROW | {"prompt": None}, "line 2: prompt = None: expected text"),
        (ROW | {"choices": ["w5"]}, r"line 2: choices = \['w5'\]: expected at least two"),
        (ROW | {"choices": "w5 w6"}, "line 2: choices = 'w5 w6': expected at least two"),
        (ROW | {"choices": ["w5", 6]}, r"line 2: choices = \['w5', 6\]: expected at least"),
        (ROW | {"choices": ["w5", ""]}, "line 2: the choice '' has no tokens"),
        (ROW | {"answer": 2}, "line 2: answer = 2: expected the index of a choice, 0 to 1"),
        (ROW | {"answer": -1}, "line 2: answer = -1: expected the index"),
        (ROW | {"answer": "w5"}, "line 2: answer = 'w5': expected the index"),
        (ROW | {"answer": True}, "line 2: answer = True: expected the index"),
        (ROW | {"pool": 0}, "line 2: pool = 0: expected a whole number of at least 1, or null"),
    ],
)
def test_bad_questions_are_refused(tmp_path, row, message):
    with pytest.raises(ValueError, match=message) as error:
        load_questions(write(tmp_path, ROW, row), TOKENIZER)
    assert "questions.jsonl" in str(error.value)


OPTIONS = {
    "instruction": "w3 w4\n\nAnswer format: w5/w6/w7",
    "input": "",
    "output": "w8 w9 w6",
    "answer": "w6",
}


def test_instructions_with_options_are_read(tmp_path):
    (tmp_path / "boolq").mkdir()
    path = tmp_path / "boolq" / "test.json"
    path.write_text(json.dumps([OPTIONS]))
    (question,) = load_questions(str(path), TOKENIZER)
    words = {i: token for token, i in TOKENIZER.get_vocab().items()}
    assert [[words[i] for i in choice] for choice in question.choices] == [
        ["w8", "w9", "w5"],
        ["w8", "w9", "w6"],
        ["w8", "w9", "w7"],
    ]
    assert question.answer == 1 and question.subject == "boolq"
    assert question.prompt == tuple(
        encode_source(TOKENIZER, [alpaca_prompt(OPTIONS["instruction"])])[0]
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"instruction": "w3"},
            "row 2: instruction = .*expected one that ends with 'Answer for",
        ),
        ({"answer": "w9"}, "row 2: answer = 'w9': expected one of w5, w6, w7, with which outp"),
        ({"output": "w7"}, "row 2: answer = 'w6': expected one of w5, w6, w7, with which outp"),
        ({"output": None}, "row 2: output = None: expected text"),
    ],
)
def test_bad_options_are_refused(tmp_path, row, message):
    path = tmp_path / "options.json"
    path.write_text(json.dumps([OPTIONS, OPTIONS | row]))
    with pytest.raises(ValueError, match=message) as error:
        load_questions(str(path), TOKENIZER)
    assert "\n" not in str(error.value)


def test_no_questions_are_refused(tmp_path, variables):
    with pytest.raises(FileNotFoundError, match="nothing: there is no such file"):
        load_questions("nothing", TOKENIZER)
    with pytest.raises(ValueError, match="has no rows"):
        load_questions(write(tmp_path, ""), TOKENIZER)
    bare = word_tokenizer(VOCAB, bos_token=None, eos_token=None)
    with pytest.raises(ValueError, match="line 1: the prompt has no tokens"):
        load_questions(write(tmp_path, ROW | {"prompt": " "}), bare)
    with pytest.raises(ValueError, match="there are no questions"):
        score_questions(MODEL, variables, [])
