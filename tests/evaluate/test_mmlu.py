"""MMLU against a slow reference: one question at a time, all logits, plain averages."""

import csv
import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from irqlora_jax import hf
from irqlora_jax.evaluate import mmlu as mmlu_of
from irqlora_jax.evaluate import tasks as tasks_module
from irqlora_jax.evaluate.choices import choice_scores, group_by_prefix
from irqlora_jax.evaluate.mmlu import letter_tokens, subject_questions
from irqlora_jax.evaluate.mmlu_files import CATEGORIES, SUBCATEGORIES, prompt_text, read_subject
from irqlora_jax.evaluate.tasks import EvalConfig, evaluate_run
from irqlora_jax.model.llama import Llama
from irqlora_jax.runs.load import Run, read_evaluation
from tests.models import (
    SHARED,
    STORIES,
    byte_tokenizer,
    needs_stories,
    tiny_llama,
)

REAL = SHARED / "mmlu"
CONTEXT = 256
SUBJECTS = ("abstract_algebra", "anatomy", "sociology", "virology")


# Batches of one size, so that all tests share their programs.
mmlu = functools.partial(mmlu_of, batch_size=4)


@functools.partial(jax.jit, static_argnums=0)
def next_logits(model, variables, tokens, last):
    return model.apply(variables, tokens[None])[0, last]


SPACE = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"
LETTER_MERGES = [(SPACE, letter) for letter in "ABCD"]
TOKENIZERS = {
    "single": byte_tokenizer(LETTER_MERGES),
    "all of two": byte_tokenizer(),
    "one single": byte_tokenizer(LETTER_MERGES[1:2]),
}
MODEL = Llama(tiny_llama(vocab_size=264, bos_token_id=0, max_position_embeddings=CONTEXT))


@pytest.fixture
def folder(tmp_path):
    """Files of the official layout; the subjects have different sizes and long questions."""
    rng = np.random.default_rng(0)
    words = ["a", "b,", "cd", '"e"', "'f'", "g\nh", "\N{GREEK SMALL LETTER PI}"]

    def text(most):
        return " ".join(rng.choice(words, rng.integers(1, most)))

    for split, counts in (("dev", [5] * 4), ("test", [3, 7, 5, 4]), ("val", [2] * 4)):
        (tmp_path / "data" / split).mkdir(parents=True)
        for subject, count in zip(SUBJECTS, counts, strict=True):
            rows = [
                [text(9), *(text(2) for _ in range(4)), "ABCD"[rng.integers(4)]]
                for _ in range(count)
            ]
            if split == "test":
                rows[0][0] = "long " * (40 if subject == "anatomy" else 15)
            path = tmp_path / "data" / split / f"{subject}_{split}.csv"
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows)
    return tmp_path / "data"


def reference(model, variables, tokenizer, folder, subject, shots=5, split="test", limit=None):
    """Of each question: whether it is right, the examples in front, and whether it was cut.

    Written after the published evaluation script: the text is put together from the start for each
    number of examples, the first that fits is asked, and argmax decides.
    """
    context = model.config.max_position_embeddings

    def rows(part):
        path = folder / part / f"{subject}_{part}.csv"
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.reader(file))

    def block(row):
        a, b, c, d = row[1:5]
        return f"{row[0]}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"

    def encode(text):
        ids = tokenizer.encode(text, add_special_tokens=False)
        return [tokenizer.bos_token_id, *ids]

    def last_logs(tokens):
        padded = np.zeros(context, np.int32)
        padded[: len(tokens)] = tokens
        logits = next_logits(model, variables, padded, np.int32(len(tokens) - 1))
        logits = np.asarray(logits, np.float64)
        return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()

    dev, results = rows("dev"), []
    for row in rows(split)[:limit]:
        for count in range(shots, -2, -1):
            text = "The following are multiple choice questions (with answers) about "
            for word in subject.split("_"):
                text += " " + word
            text += ".\n\n"
            for example in dev[: max(count, 0)]:
                text += block(example) + " " + example[5] + "\n\n"
            text += block(row)
            tokens = encode(text)
            endings = [encode(text + " " + letter)[len(tokens) :] for letter in "ABCD"]
            if len(tokens) + max(map(len, endings)) - 1 <= context:
                break
        if count == -1:
            over = len(tokens) + max(map(len, endings)) - 1 - context
            tokens = tokens[:1] + tokens[1 + over :]
        scores = []
        for ending in endings:
            score, seen = 0.0, list(tokens)
            for token in ending:
                score += last_logs(seen)[token]
                seen.append(token)
            scores.append(score)
        close = np.sort(scores)[-1] - np.sort(scores)[-2] < 1e-5
        results.append(("ABCD"[np.argmax(scores)] == row[5], max(count, 0), count == -1, close))
    return results


@pytest.mark.parametrize("name", TOKENIZERS)
def test_scores_are_those_of_the_slow_reference(variables, folder, name):
    tokenizer = TOKENIZERS[name]
    lengths = {len(letter) for letter in letter_tokens(tokenizer)}
    assert lengths == {"single": {1}, "all of two": {2}, "one single": {1, 2}}[name]
    want = {s: reference(MODEL, variables, tokenizer, folder, s) for s in SUBJECTS}
    assert not any(close for rows in want.values() for *_, close in rows)
    scores = mmlu(MODEL, variables, tokenizer, folder)
    right = {s: [row[0] for row in rows] for s, rows in want.items()}
    everything = [value for values in right.values() for value in values]
    assert scores.by_subject == pytest.approx({s: np.mean(v) for s, v in right.items()})
    assert scores.accuracy == pytest.approx(np.mean(everything))
    assert scores.accuracy != pytest.approx(np.mean(list(scores.by_subject.values())))
    assert 0 < scores.accuracy < 1
    assert scores.count == 19 and scores.counts == {s: len(v) for s, v in right.items()}
    used = [row[1] for rows in want.values() for row in rows]
    assert scores.shots == {str(n): used.count(n) for n in sorted(set(used))}
    assert len(set(used)) > 2
    assert scores.truncated == sum(row[2] for rows in want.values() for row in rows) > 0
    # anatomy and virology are health, the others stand alone in theirs.
    health = np.mean(right["anatomy"] + right["virology"])
    assert scores.by_subcategory == pytest.approx(
        {
            "math": np.mean(right["abstract_algebra"]),
            "culture": np.mean(right["sociology"]),
            "health": health,
        }
    )
    assert scores.by_category == pytest.approx(
        {
            "STEM": np.mean(right["abstract_algebra"]),
            "social sciences": np.mean(right["sociology"]),
            "other": health,
        }
    )


def test_options_choose_the_questions(variables, folder):
    tokenizer = TOKENIZERS["single"]
    scores = mmlu(MODEL, variables, tokenizer, folder, shots=1, split="val", subjects=["virology"])
    want = reference(MODEL, variables, tokenizer, folder, "virology", 1, "val")
    assert scores.by_subject == {"virology": np.mean([row[0] for row in want])}
    assert set(scores.shots) <= {"0", "1"}
    limited = mmlu(MODEL, variables, tokenizer, folder, shots=0, limit=2)
    assert limited.counts == dict.fromkeys(SUBJECTS, 2) and limited.shots == {"0": 8}


def test_the_batch_changes_nothing(variables, folder):
    arguments = (MODEL, variables, TOKENIZERS["single"], folder)
    one, four = (mmlu(*arguments, shots=0, limit=3, batch_size=size) for size in (1, 4))
    assert one == four


def test_computing_examples_once_changes_nothing(variables, folder):
    """Also where the questions of several subjects, with and without examples, are mixed."""
    tokenizer, asked = TOKENIZERS["single"], []
    for subject in SUBJECTS:
        read = read_subject(folder, subject, "test", 5, None)
        asked += subject_questions(MODEL, tokenizer, read, letter_tokens(tokenizer), 5)[0]
    groups = group_by_prefix([question.prompt for question in asked], 4)
    assert sum(common > 0 for common, _ in groups) > 1
    apart, together = (
        np.stack(choice_scores(MODEL, variables, asked, 4, share=share)[0])
        for share in (False, True)
    )
    np.testing.assert_allclose(together, apart, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(together.argmax(axis=1), apart.argmax(axis=1))


def test_equal_scores_give_the_answer_a(variables, folder):
    base = variables["base"]
    name = "lm_head" if "lm_head" in base else "embed_tokens"
    blank = {"base": base | {name: {"weight": jnp.zeros_like(base[name]["weight"])}}}
    scores = mmlu(MODEL, blank, TOKENIZERS["single"], folder)
    texts = [(folder / "test" / f"{s}_test.csv").read_text(encoding="utf-8") for s in SUBJECTS]
    answers = [row[-1] for text in texts for row in csv.reader(io.StringIO(text, newline=""))]
    assert scores.accuracy == pytest.approx(np.mean([answer == "A" for answer in answers]))
    assert scores.ties == 19


def test_nan_scores_are_an_error(variables, folder):
    broken = jax.tree.map(lambda x: x * jnp.nan, variables)
    with pytest.raises(ValueError, match="abstract_algebra: the logits of the model are NaN"):
        mmlu(MODEL, broken, TOKENIZERS["single"], folder)


def test_the_57_subjects_have_their_place():
    subjects = [subject for group in SUBCATEGORIES.values() for subject in group]
    assert len(subjects) == len(set(subjects)) == 57 and len(SUBCATEGORIES) == 17
    parts = [part for group in CATEGORIES.values() for part in group]
    assert sorted(parts) == sorted(SUBCATEGORIES)
    # Numbers of subjects of the four categories, as published.
    sizes = [sum(len(SUBCATEGORIES[part]) for part in group) for group in CATEGORIES.values()]
    assert sizes == [18, 13, 12, 14]


def test_the_prompt_as_published():
    row = ["What?", "one", "two", "three", "four", "C"]
    assert prompt_text("high_school_biology", [row], row) == (
        "The following are multiple choice questions (with answers) about  high school biology."
        "\n\nWhat?\nA. one\nB. two\nC. three\nD. four\nAnswer: C"
        "\n\nWhat?\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    )


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no folder {REAL}")
def test_the_prompts_match_published_ones():
    """Prompts without examples, as the QLoRA authors give them out."""
    lines = (REAL / "zero_shot_mmlu_val.json").read_text(encoding="utf-8").splitlines()
    published = {(row["subject"], row["input"]) for row in map(json.loads, lines)}
    found, asked = 0, 0
    for path in (REAL / "test").glob("*_test.csv"):
        subject = path.name.removesuffix("_test.csv")
        heads = [text for name, text in published if name == subject]
        with path.open(newline="", encoding="utf-8") as file:
            row = next(csv.reader(file))
        head = prompt_text(subject, [], row).partition(row[0])[0]
        asked += len(heads)
        found += sum(text.startswith(head) and text.endswith("\nAnswer:") for text in heads)
    assert found == asked == len(published) > 1000


@needs_stories
def test_a_letter_of_two_tokens_beside_one_of_one():
    tokenizer = hf.load_tokenizer(STORIES)
    letters = letter_tokens(tokenizer)
    pieces = [tokenizer.convert_ids_to_tokens(list(letter)) for letter in letters]
    assert ["".join(piece) for piece in pieces] == ["\u2581A", "\u2581B", "\u2581C", "\u2581D"]
    assert [len(piece) for piece in pieces] == [2, 1, 2, 2]


def test_a_tokenizer_without_letters_is_refused():
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<unk>": 0, "Answer:": 1}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    with pytest.raises(
        ValueError, match="not give four distinct letters ' A' to ' D' after 'Answer:'"
    ):
        letter_tokens(tokenizer)


def spoil(folder, what):
    path = folder / "test" / "anatomy_test.csv"
    change = {
        "columns": lambda: path.write_text("What?,one,two,three,A\n"),
        "answer": lambda: path.write_text("What?,1,2,3,4,A\nWhat?,1,2,3,4,E\n"),
        "empty": lambda: path.write_text(""),
        "bytes": lambda: path.write_bytes(b"What\xff"),
        "quotes": lambda: path.write_text('"What?,1,2,3,4,A\n'),
        "no dev": lambda: (folder / "dev" / "anatomy_dev.csv").unlink(),
        "short dev": lambda: (folder / "dev" / "anatomy_dev.csv").write_text("W?,1,2,3,4,A\n"),
        "none": lambda: [f.unlink() for f in (folder / "test").iterdir()],
        "no folder": lambda: (
            [f.unlink() for f in (folder / "test").iterdir()] and (folder / "test").rmdir()
        ),
    }[what]
    change()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "columns",
            r"anatomy_test.csv, row 1 has 5 columns: expected question, A, B, C, D, an",
        ),
        ("answer", r"anatomy_test.csv, row 2: answer = 'E': expected A, B, C or D"),
        ("empty", "anatomy_test.csv has no rows"),
        ("bytes", r"anatomy_test.csv, line 1 is not UTF-8 text \(byte 4\)"),
        ("quotes", "anatomy_test.csv is not CSV"),
        ("no dev", "anatomy_dev.csv: no such file"),
        ("short dev", "shots = 5: .*anatomy_dev.csv has 1 examples"),
        ("none", r"no files SUBJECT_test.csv there"),
        ("no folder", "no folder test there"),
    ],
)
def test_bad_files_are_refused(variables, folder, what, message):
    spoil(folder, what)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        mmlu(MODEL, variables, TOKENIZERS["single"], folder)
    assert "\n" not in str(error.value)


def test_questions_may_hold_line_separators_and_a_file_a_byte_order_mark(tmp_path):
    row = ["What\u2028is\x85this?", "one\x0c", "two\x1c", "three\r\n", "four", "C"]
    (tmp_path / "test").mkdir()
    with (tmp_path / "test" / "anatomy_test.csv").open("w", encoding="utf-8-sig", newline="") as f:
        csv.writer(f).writerow(row)
    assert read_subject(tmp_path, "anatomy", "test", 0, None).rows == [row]


def test_bad_arguments_are_refused(variables, folder):
    arguments = (MODEL, variables, TOKENIZERS["single"], folder)
    with pytest.raises(
        FileNotFoundError, match=r"has no alchemy_test.csv; it has abstract_algebra"
    ):
        mmlu(*arguments, subjects=["anatomy", "alchemy"])
    for name in ("limit", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} = 0: expected a whole number of at least"):
            mmlu(*arguments, **{name: 0})
    with pytest.raises(ValueError, match="shots = -1: expected a whole number of at least 0"):
        mmlu(*arguments, shots=-1)


class Counting:
    """A tokenizer that counts the questions that it is asked."""

    def __init__(self, inner, stop_at=None):
        self.inner, self.subjects, self.stop_at = inner, [], stop_at

    def __call__(self, texts, **settings):
        if isinstance(texts, list) and texts and texts[0].startswith("The following"):
            subject = texts[0].split("about  ")[1].split(".")[0].replace(" ", "_")
            if subject == self.stop_at:
                raise KeyboardInterrupt
            if subject not in self.subjects:
                self.subjects.append(subject)
        return self.inner(texts, **settings)

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_finished_subjects_are_taken_up_again(variables, folder, tmp_path):
    resume_file = tmp_path / "resume.part"
    whole = mmlu(MODEL, variables, TOKENIZERS["single"], folder)

    def ask(tokenizer, **settings):
        return mmlu(MODEL, variables, tokenizer, folder, resume_file=resume_file, **settings)

    with pytest.raises(KeyboardInterrupt):
        ask(Counting(TOKENIZERS["single"], stop_at="sociology"))
    again = Counting(TOKENIZERS["single"])
    assert ask(again) == whole
    assert again.subjects == ["sociology", "virology"]
    # Other settings, another model or other data are not mixed in.
    for settings in ({"shots": 4}, {"identity": "other"}, {"limit": 2}):
        other = Counting(TOKENIZERS["single"])
        assert ask(other, **settings) == mmlu(
            *(MODEL, variables, TOKENIZERS["single"], folder),
            **{k: v for k, v in settings.items() if k != "identity"},
        )
        assert other.subjects == list(SUBJECTS)
    path = folder / "test" / "virology_test.csv"
    path.write_text(path.read_text() + "New?,1,2,3,4,A\n")
    changed = Counting(TOKENIZERS["single"])
    assert ask(changed).count == whole.count + 1
    assert changed.subjects == ["virology"]


def test_another_file_is_not_taken_for_finished_subjects(variables, folder, tmp_path):
    for text in ("no JSON", '{"a": {"correct": [1]}}', "[1]"):
        (tmp_path / "resume.part").write_text(text)
        with pytest.raises(
            ValueError, match=r"resume.part is not a file of finished subjects; delete"
        ):
            mmlu(
                MODEL, variables, TOKENIZERS["single"], folder, resume_file=tmp_path / "resume.part"
            )


def test_scores_survive_when_they_cannot_be_kept(variables, folder, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "resume.part"
    scores = mmlu(MODEL, variables, TOKENIZERS["single"], folder, limit=1, resume_file=path)
    assert scores.count == 4
    assert caplog.text.count("cannot be written") == 1


@pytest.fixture
def loaded(monkeypatch, variables, tmp_path):
    """`evaluate_run` with the tiny model; its folder is no run of ours."""
    (tmp_path / "model").mkdir()
    tokenizer = Counting(TOKENIZERS["single"])
    run = Run(tmp_path / "model", None, MODEL, variables, tokenizer, None)
    monkeypatch.setattr(tasks_module, "load_run", lambda *_, **__: run)
    monkeypatch.chdir(tmp_path)
    return run


def test_the_task_goes_on_where_it_was_interrupted(loaded, folder, tmp_path, said):
    settings = {"mmlu": str(folder), "batch_size": 4, "progress": False}
    asked = EvalConfig("model", "mmlu", output=str(tmp_path / "scores.json"), **settings)
    loaded.tokenizer.stop_at = "sociology"
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(asked)
    part = tmp_path / "scores.json.part"
    assert part.is_file() and "the same command resumes" in said[-1]
    loaded.tokenizer.stop_at, loaded.tokenizer.subjects = None, []
    result = evaluate_run(asked)
    assert loaded.tokenizer.subjects == ["sociology", "virology"]
    assert not part.exists()
    assert not list((tmp_path / "model").iterdir())
    written = read_evaluation(tmp_path / "scores.json")
    assert written == json.loads(json.dumps(result))
    assert written["task"] == "mmlu" and written["settings"]["shots"] == 5
    assert written["count"] == 19 and set(written["versions"]) == {"irqlora_jax", "jax"}
    table = next(text for text in said if text.startswith("subject"))
    assert f"{written['accuracy']:.1%}" in table.splitlines()[-1]
    assert "[other]" in table and "  health" in table and "sociology" in table


def test_a_missing_extra_is_named(monkeypatch):
    """Before a model is read."""
    find = tasks_module.importlib.util.find_spec
    without = lambda name, *rest: None if name == "lm_eval" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(tasks_module.importlib.util, "find_spec", without)
    with pytest.raises(ValueError, match=r'needs lm-eval; pip install "irqlora_jax\[eval\]"'):
        evaluate_run(EvalConfig("nowhere", "lm-eval:arc_easy"))


def test_results_of_many_tasks_have_a_file_of_their_own():
    def stem(names):
        return tasks_module._file_stem(EvalConfig("r", f"lm-eval:{names}"))

    assert stem("arc_easy,piqa") == "eval-lm-eval-arc_easy+piqa"
    assert stem("a/b") == "eval-lm-eval-a_b"
    many = [",".join(f"task{i}" for i in range(50 + more)) for more in (0, 1)]
    assert len({stem(names) for names in many}) == 2 and max(map(len, map(stem, many))) < 110


def test_the_table_is_shown_before_the_file_fails(loaded, folder, tmp_path, said):
    (tmp_path / "file").write_text("")
    asked = EvalConfig(
        *("model", "mmlu"),
        mmlu=str(folder),
        limit=1,
        output=str(tmp_path / "file" / "out.json"),
        batch_size=4,
        progress=False,
    )
    with pytest.raises(OSError, match=r"out.json: cannot be written \(.*--output FILE") as error:
        evaluate_run(asked)
    assert "\n" not in str(error.value)
    assert any(text.startswith("subject") for text in said)


def test_progress_names_subject_and_accuracy(variables, folder, capsys):
    mmlu(MODEL, variables, TOKENIZERS["single"], folder, limit=2, progress=True)
    shown = capsys.readouterr().err
    assert "8 of 8" in shown and "virology" in shown and "so far" in shown


@pytest.mark.skipif(not (STORIES.is_dir() and REAL.is_dir()), reason="no real data")
def test_real_questions_and_a_real_model():
    base, config = hf.load_base(STORIES, None)
    model, variables = Llama(config), {"params": {}, "base": base}
    tokenizer = hf.load_tokenizer(STORIES)
    subject = "high_school_european_history"  # the longest questions
    scores = mmlu(model, variables, tokenizer, REAL, subjects=[subject], limit=6, batch_size=4)
    want = reference(model, variables, tokenizer, REAL, subject, limit=6)
    assert scores.by_subject[subject] == np.mean([row[0] for row in want])
    assert scores.truncated == sum(row[2] for row in want) > 0
