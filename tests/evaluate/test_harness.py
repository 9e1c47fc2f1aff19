"""lm-eval's tasks against slow, plain computations, and against our own tasks."""

import csv
import dataclasses
import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax import hf
from irqlora_jax.evaluate import tasks as tasks_module
from irqlora_jax.evaluate.tasks import EvalConfig, evaluate_run
from irqlora_jax.model.llama import Llama
from irqlora_jax.runs.load import Run, read_evaluation
from tests.data.small_data import make_tokenizer
from tests.models import SHARED, tiny_llama

pytest.importorskip("lm_eval")

from irqlora_jax.evaluate import harness as harness_module
from irqlora_jax.evaluate import harness_model
from irqlora_jax.evaluate.choices import choice_scores
from irqlora_jax.evaluate.harness import harness
from irqlora_jax.evaluate.harness_model import AnswerCache, HarnessLM
from irqlora_jax.evaluate.mmlu import letter_tokens, subject_questions
from irqlora_jax.evaluate.mmlu_files import LETTERS, prompt_text, read_subject

pytestmark = pytest.mark.filterwarnings("ignore")  # of other packages

TASKS = Path(__file__).parent / "lm_eval_tasks"
CONTEXT, VOCAB = 256, 400
TOKENIZERS = {"byte": make_tokenizer("byte"), "piece": make_tokenizer("piece")}
MODEL = Llama(tiny_llama(vocab_size=VOCAB, max_position_embeddings=CONTEXT))
TEXT = "the cat sat on the mat and the answer is red or green, dark blue at night."
WORDS = np.array(TEXT.split(" "))
COMMONSENSE = {
    "arc_easy": ("ARC-Easy", "answer", 4),
    "arc_challenge": ("ARC-Challenge", "answer", 5),
    "piqa": ("piqa", "solution", 2),
    "winogrande": ("winogrande", "option", 2),
    "boolq": ("boolq", None, 2),
    "openbookqa": ("openbookqa", "answer", 4),
}


@pytest.fixture(autouse=True)
def few_tasks(monkeypatch):
    """None of the thousands that come with lm-eval, which take seconds to list."""
    only_ours = functools.partial(harness_module.TaskManager, include_defaults=False)
    monkeypatch.setattr(harness_module, "TaskManager", only_ours)


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


def plain_score(context, continuation, log_probs):
    """As `HFLM`: cut on the left, and nothing behind the last token."""
    row = (context + continuation)[-(CONTEXT + 1) :]
    logs = log_probs(row[:-1])[-len(continuation) :]
    total = sum(log[token] for log, token in zip(logs, continuation, strict=True))
    return total, [int(np.argmax(log)) for log in logs] == continuation


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_loglikelihoods_are_those_of_a_loop(variables, log_probs, kind):
    tokenizer = TOKENIZERS[kind]
    lm = HarnessLM(MODEL, variables, tokenizer, 4)
    shared = "the cat sat on the mat and the answer is " * 4
    arguments = [
        *((shared + end, " red") for end in ("now", "at night.", "or green", "blue", "dark")),
        *(("the answer is", end) for end in (" red", " green", " dark blue at night.")),
        ("the answer is ", "red"),  # the space goes to the continuation
        ("the answer is", " red"),  # a second time
        ("", "the cat sat"),
        ("<s>the cat", " sat"),
        ("the mat " * 300, "and the cat sat"),  # cut on the left
        ("the cat", " sat on the mat" * 64),  # one token is left of the context
    ]
    whole = tokenizer.encode("the answer is dark")
    best = int(np.argmax(log_probs(whole)[-1]))
    if kind == "byte":  # what the model itself would say
        arguments.append(("the answer is dark", tokenizer.decode([best])))
    found = lm.loglikelihood(requests(*arguments))
    truncated = 0
    for (context, continuation), (total, greedy) in zip(arguments, found, strict=True):
        if context == "":
            front = [tokenizer.bos_token_id]
            rest = tokenizer.encode(continuation, add_special_tokens=False)
        else:
            spelled = context.startswith("<s>")
            encode = functools.partial(tokenizer.encode, add_special_tokens=not spelled)
            front = encode(context.rstrip())
            rest = encode(context + continuation)[len(front) :]
            assert front.count(1) == 1 and front[0] == 1
        truncated += len(front) + len(rest) > CONTEXT + 1
        want, best = plain_score(front, rest, log_probs)
        assert total == pytest.approx(want, abs=1e-4 * max(1, len(rest)))
        assert greedy == best
    assert lm.truncated == truncated == 2
    assert found[5] == found[8] == found[9] != found[6]
    assert any(greedy for _, greedy in found) == (kind == "byte")


def test_a_continuation_without_room_is_refused(variables):
    lm = HarnessLM(MODEL, variables, TOKENIZERS["byte"], 4)
    for count in (0, CONTEXT + 1):
        with pytest.raises(ValueError, match=f"continuation has {count} tokens: expected 1 to"):
            lm._loglikelihood_tokens([(("", ""), [1, 2], [5] * count)])


def test_nan_scores_are_an_error(variables):
    broken = jax.tree.map(lambda x: x * jnp.nan, variables)
    lm = HarnessLM(MODEL, broken, TOKENIZERS["byte"], 4)
    for call, args in ((lm.loglikelihood, ("the", " cat")), (lm.loglikelihood_rolling, ("the",))):
        with pytest.raises(ValueError, match="logits of the model are NaN"):
            call(requests(args))


def test_rolling_windows_score_each_token_once(variables, log_probs):
    tokenizer = TOKENIZERS["byte"]
    lm = HarnessLM(MODEL, variables, tokenizer, 4)
    texts = ["the cat", "night. " * 200, "the cat sat on the mat " * 100, "x"]
    found = lm.loglikelihood_rolling(requests(*((text,) for text in texts)))
    for text, total in zip(texts, found, strict=True):
        tokens = [tokenizer.bos_token_id, *tokenizer.encode(text)]  # lm-eval's bos and its own
        want = 0.0
        for place in range(1, len(tokens)):
            # Whole windows; the last one ends with the text and has as much context as fits.
            window = (place - 1) // CONTEXT
            start = min(window * CONTEXT, max(0, len(tokens) - 1 - CONTEXT))
            want += log_probs(tokens[start:place])[-1, tokens[place]]
        assert total == pytest.approx(want, rel=1e-5)
    assert lm.loglikelihood_rolling([]) == []


def test_texts_are_those_of_a_greedy_loop(variables, log_probs):
    tokenizer = TOKENIZERS["byte"]
    lm = HarnessLM(MODEL, variables, tokenizer, 4)
    contexts = ["the cat sat", "the answer is", "blue " * 300]

    def loop(context, count, stops):
        """As `HFLM`: special tokens may hold a stop too, and are left out afterwards."""
        tokens = tokenizer.encode(context)[-(CONTEXT - count) :]
        new = []
        while len(new) < count and tokenizer.eos_token_id not in new:
            if any(stop in tokenizer.decode(new) for stop in stops):
                break
            new.append(int(np.argmax(log_probs(tokens + new)[-1])))
        text = tokenizer.decode(new, skip_special_tokens=True)
        for stop in stops:
            text = text.split(stop)[0]
        return text

    whole = [loop(context, 12, []) for context in contexts]
    across = whole[2][3:6]  # a text of two tokens
    lengths = set()
    for until in (None, "s", ["", across]):
        settings = {"max_gen_toks": 12, "do_sample": False, "temperature": 0.0, "until": until}
        found = lm.generate_until(requests(*((context, settings) for context in contexts)))
        stops = [stop for stop in until or () if stop]
        assert found == [loop(context, 12, stops) for context in contexts]
        lengths.add(sum(map(len, found)))
    assert len(lengths) == 3
    assert lm.truncated == 3  # one context, three times


def test_texts_may_be_drawn(variables):
    arguments = ("the cat sat", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8})
    asked = requests(arguments, arguments)
    lm, again = (HarnessLM(MODEL, variables, TOKENIZERS["byte"], 4) for _ in range(2))
    first = lm.generate_until(asked)
    assert first == again.generate_until(asked)
    assert first[0] != first[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "generation_kwargs has num_beams: expected until, max_gen_toks"),
        ({"max_gen_toks": CONTEXT}, "max_gen_toks = 256: expected fewer than max_position"),
    ],
)
def test_other_generations_are_refused(variables, settings, message):
    lm = HarnessLM(MODEL, variables, TOKENIZERS["byte"], 4)
    with pytest.raises(ValueError, match=message):
        lm.generate_until(requests(("the cat", settings)))


def write_tasks(folder, data):
    """The task files, with the folder of the data put in."""
    folder.mkdir()
    for path in TASKS.glob("*.yaml"):
        text = path.read_text(encoding="utf-8").replace("DATA", str(data))
        (folder / path.name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def data(tmp_path):
    """Commonsense files in their form, with questions that say little."""
    rng = np.random.default_rng(0)
    for name, option, count in COMMONSENSE.values():
        options = [f"{option}{i + 1}" for i in range(count)] if option else ["true", "false"]
        rows = []
        for _ in range(7):
            answer = options[rng.integers(count)]
            question = f"Please choose: {' '.join(rng.choice(WORDS, rng.integers(2, 9)))}?"
            row = {
                "instruction": f"{question}\n\nAnswer format: {'/'.join(options)}",
                "input": "",
                "output": f"the correct answer is {answer}",
                "answer": answer,
            }
            rows.append(row)
        (tmp_path / "data" / name).mkdir(parents=True)
        path = tmp_path / "data" / name / "test.json"
        path.write_text(json.dumps(rows), encoding="utf-8")
    return tmp_path / "data"


@pytest.fixture
def loaded(monkeypatch, variables, tmp_path):
    """`evaluate_run` with the tiny model; its folder is no run of ours."""
    (tmp_path / "model").mkdir()
    run = Run(tmp_path / "model", None, MODEL, variables, TOKENIZERS["byte"], None)
    monkeypatch.setattr(tasks_module, "load_run", lambda *_, **__: run)
    monkeypatch.chdir(tmp_path)


def test_commonsense_tasks_score_as_our_own_questions(loaded, data, tmp_path, said):
    names = [f"local_{name}" for name in COMMONSENSE]
    folder = write_tasks(tmp_path / "tasks", data)
    settings = {"batch_size": 4, "progress": False}
    asked = EvalConfig("model", f"lm-eval:{','.join(names)}", task_folder=str(folder), **settings)
    asked = dataclasses.replace(asked, output=str(tmp_path / "scores.json"))
    result = evaluate_run(asked)
    assert list(result["scores"]) == names
    for name, (file, _, _) in COMMONSENSE.items():
        path = data / file / "test.json"
        ours = EvalConfig("model", "questions", questions=str(path), **settings)
        ours = evaluate_run(ours)
        scores = result["scores"][f"local_{name}"]
        assert scores["acc"] == pytest.approx(ours["accuracy"])
        assert scores["acc_norm"] == pytest.approx(ours["accuracy_norm"])
        error = np.sqrt(scores["acc"] * (1 - scores["acc"]) / 6)
        assert scores["acc_stderr"] == pytest.approx(error)
    every = [scores["acc"] for scores in result["scores"].values()]
    assert result["mean_acc"] == pytest.approx(np.mean(every))
    assert 0 < result["mean_acc"] < 1
    assert result["counts"] == dict.fromkeys(names, 7)
    assert result["shots"] == dict.fromkeys(names, 0)
    stem = f"eval-lm-eval-{'+'.join(names)}"
    file = tasks_module._file_stem(asked)
    assert file == stem or file.startswith(stem[:80])
    written = read_evaluation(tmp_path / "scores.json")
    assert written == json.loads(json.dumps(result))
    table = next(text for text in said if text.startswith("task"))
    assert "local_boolq" in table and f"{result['mean_acc']:.4f}" in table.splitlines()[-1]


def test_what_was_answered_is_not_asked_again(loaded, data, tmp_path, monkeypatch, said):
    folder = write_tasks(tmp_path / "tasks", data)
    asked = EvalConfig(
        *("model", "lm-eval:local_boolq,local_piqa"),
        task_folder=str(folder),
        batch_size=4,
        progress=False,
        output=str(tmp_path / "scores.json"),
    )
    whole = evaluate_run(asked)
    stream = harness_model.stream_scores
    counts = []

    def interrupted(*arguments, **settings):
        counts.append(len(arguments[2]))
        for number, answer in enumerate(stream(*arguments, **settings)):
            yield answer
            if number == 4:
                raise KeyboardInterrupt

    monkeypatch.setattr(harness_model, "stream_scores", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(asked)
    part = tmp_path / "scores.json.part"
    assert "the same command resumes" in said[-1] and str(part.name) in said[-1]
    with part.open("a") as file:
        file.write('["broken off')
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(asked)
    again = evaluate_run(asked)
    assert counts == [14, 9, 4]
    assert again["scores"] == whole["scores"]
    assert not part.exists()


def test_answers_of_another_model_are_not_taken_up(variables, tmp_path):
    asked = requests(("the cat", " sat"))
    other = jax.tree.map(lambda x: x * 1.1, variables)
    found = []
    for identity, weights in (("one", variables), ("two", other), ("two", variables)):
        cache = AnswerCache(tmp_path / "part", identity)
        found.append(
            HarnessLM(MODEL, weights, TOKENIZERS["byte"], 4, cache=cache).loglikelihood(asked)
        )
    assert found[0] != found[1] == found[2]


def test_scores_survive_when_they_cannot_be_kept(variables, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = AnswerCache(tmp_path / "file" / "part", "")
    lm = HarnessLM(MODEL, variables, TOKENIZERS["byte"], 4, cache=cache)
    assert len(lm.loglikelihood(requests(("the", " cat"), ("a", " cat")))) == 2
    assert caplog.text.count("cannot be written") == 1


def test_unknown_tasks_and_folders_are_refused(loaded, data, tmp_path):
    folder = write_tasks(tmp_path / "tasks", data)
    near = EvalConfig("model", "lm-eval:local_bolq", task_folder=str(folder))
    with pytest.raises(ValueError, match=r"'lm-eval:local_bolq': .* similar names: local_boolq"):
        evaluate_run(near)
    with pytest.raises(FileNotFoundError, match="task_folder = 'nowhere': no such folder"):
        evaluate_run(EvalConfig("model", "lm-eval:local_boolq", task_folder="nowhere"))


MMLU_TASK = """
task: ours_mmlu
dataset_path: json
dataset_kwargs: {{cache_dir: {folder}/cache, data_files: {{test: {folder}/prompts.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: prompt
doc_to_choice: [A, B, C, D]
doc_to_target: answer
metric_list:
  - metric: acc
"""


def mmlu_scores(model, variables, tokenizer, mmlu, subject, folder, limit=None):
    """Log-probabilities of the letters and accuracy, ours and lm-eval's, on the same prompts."""
    read = read_subject(mmlu, subject, "test", 5, limit)
    letters = letter_tokens(tokenizer)
    questions, used, _ = subject_questions(model, tokenizer, read, letters, 5)
    ours, _ = choice_scores(model, variables, questions, 4)
    texts = [
        prompt_text(subject, read.examples[:shots], row)
        for row, shots in zip(read.rows, used, strict=True)
    ]
    lm = HarnessLM(model, variables, tokenizer, 4)
    pairs = [(text, f" {letter}") for text in texts for letter in LETTERS]
    theirs = np.reshape([total for total, _ in lm.loglikelihood(requests(*pairs))], (-1, 4))
    folder.mkdir()
    rows = [
        {"prompt": text, "answer": LETTERS.index(row[-1])}
        for text, row in zip(texts, read.rows, strict=True)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "task.yaml").write_text(MMLU_TASK.format(folder=folder), encoding="utf-8")
    arguments = (model, variables, tokenizer, ["ours_mmlu"])
    result = harness(*arguments, folder=str(folder), batch_size=4)
    right = [np.argmax(s) == q.answer for s, q in zip(ours, questions, strict=True)]
    return np.stack(ours), theirs, float(np.mean(right)), result.scores["ours_mmlu"]["acc"], used


def test_mmlu_scores_are_those_of_lm_eval(variables, tmp_path):
    rng = np.random.default_rng(0)

    def question(longest):
        return " ".join(rng.choice(WORDS, rng.integers(2, longest))), *rng.choice(WORDS, 4)

    for split, count in (("dev", 5), ("test", 12)):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        longest = 9 if split == "dev" else 60
        rows = [[*question(longest), "ABCD"[rng.integers(4)]] for _ in range(count)]
        path = tmp_path / "mmlu" / split / f"anatomy_{split}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    arguments = (MODEL, variables, TOKENIZERS["byte"], tmp_path / "mmlu", "anatomy")
    ours, theirs, own, other, used = mmlu_scores(*arguments, tmp_path / "task")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert own == pytest.approx(other) and 0 < own < 1
    assert len(set(used)) > 1  # not all examples fit


REAL = [SHARED / name for name in ("stories260K", "mmlu", "commonsense")]


@pytest.mark.skipif(not all(p.is_dir() for p in REAL), reason=f"no folders {REAL}")
def test_real_questions_and_a_real_model(tmp_path):
    stories, mmlu, commonsense = REAL
    base, config = hf.load_base(stories, None)
    model, variables = Llama(config), {"params": {}, "base": base}
    tokenizer = hf.load_tokenizer(stories)
    subject = "abstract_algebra"
    arguments = (model, variables, tokenizer, mmlu, subject, tmp_path / "mmlu")
    ours, theirs, own, other, _ = mmlu_scores(*arguments, limit=6)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert own == pytest.approx(other)
    for file, _, _ in COMMONSENSE.values():
        (tmp_path / "data" / file).mkdir(parents=True)
        shutil.copy(commonsense / file / "test.json", tmp_path / "data" / file)
    folder = write_tasks(tmp_path / "tasks", tmp_path / "data")
    names = [f"local_{name}" for name in COMMONSENSE]
    result = harness(
        *(model, variables, tokenizer, names), folder=str(folder), limit=8, batch_size=16
    )
    assert result.counts == dict.fromkeys(names, 8) and result.mean_acc is not None
