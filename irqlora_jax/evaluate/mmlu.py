"""MMLU (Hendrycks et al., 2021) as its authors ask and average it."""

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from irqlora_jax.data.examples import encode_source
from irqlora_jax.evaluate.choices import Question, choice_scores, fit
from irqlora_jax.evaluate.mmlu_files import (
    CATEGORIES,
    LETTERS,
    SUBCATEGORIES,
    Subject,
    find_subjects,
    prompt_text,
    read_subject,
)
from irqlora_jax.files.small import write_text
from irqlora_jax.model.llama import Llama

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class MmluScores:
    """Accuracies are between 0 and 1, and averages over questions, not over subjects."""

    accuracy: float
    """Of all questions."""
    by_category: dict[str, float]
    """Of the questions of STEM, humanities, social sciences and other."""
    by_subcategory: dict[str, float]
    """Of the questions of the 17 subcategories."""
    by_subject: dict[str, float]
    count: int
    """Number of questions."""
    counts: dict[str, int]
    """Number of questions of each subject."""
    shots: dict[str, int]
    """Number of questions that were asked with 0, 1, ... examples in front."""
    truncated: int
    """Questions that were cut on the left, because not even they alone fit into the context."""
    ties: int
    """Questions whose best score several letters share. The first of them is the answer given."""


@dataclasses.dataclass(frozen=True)
class _Answers:
    """What came of the questions of a subject."""

    correct: list[int]
    """1 or 0 a question."""
    shots: list[int]
    """Examples in front of each."""
    truncated: int
    ties: int


def mmlu(
    model: Llama,
    variables: Any,
    tokenizer: Any,
    folder: str | Path,
    *,
    shots: int = 5,
    split: Literal["test", "val"] = "test",
    subjects: Collection[str] = (),
    limit: int | None = None,
    batch_size: int = 8,
    keep: Path | None = None,
    identity: str = "",
    progress: bool = False,
) -> MmluScores:
    """Asks the questions of MMLU.

    A prompt is the line "The following are multiple choice questions (with answers) about
    SUBJECT." (with two spaces in front of the subject, as published), the first `shots` questions
    of dev/ with their answers, and the question up to "Answer:". Where it is longer than the
    context of the model, examples are left out from the end, one by one; a question that does not
    fit even alone is cut on the left. The answer given is the likeliest of the four letters as they
    follow "Answer:" in running text (" A"), the first of them if several are equally likely: that
    is the published benchmark, so a model without an opinion gets the share of A. A letter that the
    tokenizer writes as several tokens is scored by their joint probability.

    The text of the files is taken as it stands. The original reads it with pandas, of which recent
    versions make "nan" of the choice "None" (10 of the 14,042 questions).

    Args:
        model: the architecture.
        variables: {"params": adapters, "base": base}.
        tokenizer: of transformers.
        folder: holds dev/SUBJECT_dev.csv and test/SUBJECT_test.csv (and val/), without header, with
            the columns question, A, B, C, D, answer.
        shots: examples in front of each question.
        split: which questions are asked.
        subjects: ask these alone (default: all that are there).
        limit: ask only the first so many questions of each subject.
        batch_size: questions computed at one time.
        keep: file for the answers of the finished subjects; those that are there already, from the
            same data, settings and `identity`, are not asked again.
        identity: what `keep` is to tell models apart by.
        progress: show a bar.

    Raises:
        FileNotFoundError: no such folder, subject or file.
        ValueError: a malformed file, or an argument that is not accepted; or the model gives no
            numbers.
    """
    from tqdm import tqdm

    for name, value, least in (
        ("shots", shots, 0),
        ("limit", limit, 1),
        ("batch_size", batch_size, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} = {value}: accepted is a whole number of at least {least}")
    read = [
        read_subject(Path(folder), name, split, shots, limit)
        for name in find_subjects(Path(folder), split, subjects)
    ]
    letters = letter_tokens(tokenizer)
    context = model.config.max_position_embeddings
    setting = (identity, split, shots, limit, context, model.compute_dtype)
    kept = {} if keep is None else _load_kept(keep)
    finished: dict[str, _Answers] = {}
    total = sum(len(subject.rows) for subject in read)
    with tqdm(total=total, desc="MMLU", unit="q", disable=not progress) as bar:
        for subject in read:
            key = hashlib.sha256(
                repr((*setting, subject.name, subject.digest)).encode()
            ).hexdigest()
            if key in kept:
                answers = _Answers(**kept[key])
                bar.update(len(answers.correct))
            else:
                bar.set_postfix_str(_so_far(subject.name, finished))
                answers = _ask(
                    model, variables, tokenizer, subject, letters, shots, batch_size, bar
                )
                kept[key] = dataclasses.asdict(answers)
                if keep is not None and not _keep(keep, kept):
                    keep = None
            finished[subject.name] = answers
            bar.set_postfix_str(_so_far(subject.name, finished))
    return _average(finished)


def letter_tokens(tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """The tokens of the four letters as they follow "Answer:" in running text.

    Raises:
        ValueError: "Answer:" has other tokens where a letter follows, or two letters are the same.
    """
    texts = ["\nAnswer:", *(f"\nAnswer: {letter}" for letter in LETTERS)]
    stem, *whole = encode_source(tokenizer, texts)
    letters = tuple(tuple(ids[len(stem) :]) for ids in whole)
    if any(ids[: len(stem)] != stem for ids in whole) or len({*letters, ()}) <= len(LETTERS):
        raise ValueError(
            f"the tokenizer has no four distinct endings ' A' to ' D' of 'Answer:' ({letters})"
        )
    return letters


def _encode(
    tokenizer: Any, subject: Subject, shots: int, room: int, bos_token_id: int | None
) -> tuple[list[tuple[int, ...]], list[int], int]:
    """Prompts that fit, the number of examples in each, and how many had to be cut nevertheless."""
    prompts: list[tuple[int, ...]] = [()] * len(subject.rows)
    used = [0] * len(subject.rows)
    open_ = list(range(len(subject.rows)))
    for count in range(shots, -1, -1):
        shown = subject.examples[:count]
        texts = [prompt_text(subject.name, shown, subject.rows[index]) for index in open_]
        for index, tokens in zip(open_, encode_source(tokenizer, texts), strict=True):
            prompts[index], used[index] = tuple(tokens), count
        open_ = [index for index in open_ if len(prompts[index]) > room]
        if not open_:
            break
    for index in open_:
        prompts[index] = fit(prompts[index], room, bos_token_id)
    return prompts, used, len(open_)


def subject_questions(
    model: Llama,
    tokenizer: Any,
    subject: Subject,
    letters: tuple[tuple[int, ...], ...],
    shots: int,
) -> tuple[list[Question], list[int], int]:
    """The questions of a subject, each with as many of the `shots` examples as fit.

    Returns:
        The questions, the number of examples in front of each, and how many had to be cut.

    Raises:
        ValueError: the context of the model is too short for a letter.
    """
    # The last token of a letter is never read, so it needs no room.
    room = model.config.max_position_embeddings + 1 - max(map(len, letters))
    if room < 1:
        raise ValueError(
            f"the context of {model.config.max_position_embeddings} tokens is too short"
        )
    bos = model.config.bos_token_id
    prompts, used, truncated = _encode(tokenizer, subject, shots, room, bos)
    questions = [
        Question(subject.name, prompt, letters, LETTERS.index(row[-1]))
        for prompt, row in zip(prompts, subject.rows, strict=True)
    ]
    return questions, used, truncated


def _ask(
    model: Llama,
    variables: Any,
    tokenizer: Any,
    subject: Subject,
    letters: tuple[tuple[int, ...], ...],
    shots: int,
    batch_size: int,
    bar: Any,
) -> _Answers:
    questions, used, truncated = subject_questions(model, tokenizer, subject, letters, shots)
    scores, _ = choice_scores(model, variables, questions, batch_size, done=bar.update)
    table = np.stack(scores)
    if not np.isfinite(table).all():
        raise ValueError(f"{subject.name}: the model gives no numbers (NaN or infinite logits)")
    given = np.argmax(table, axis=1)
    return _Answers(
        correct=[int(g == q.answer) for g, q in zip(given, questions, strict=True)],
        shots=used,
        truncated=truncated,
        ties=int(((table == table.max(axis=1, keepdims=True)).sum(axis=1) > 1).sum()),
    )


def _average(finished: Mapping[str, _Answers]) -> MmluScores:
    correct = {name: answers.correct for name, answers in finished.items()}
    by_subcategory = _pool(correct, SUBCATEGORIES)
    by_category = _pool(
        correct,
        {
            name: [s for part in parts for s in SUBCATEGORIES[part]]
            for name, parts in CATEGORIES.items()
        },
    )
    everything = [value for values in correct.values() for value in values]
    used = Counter(count for answers in finished.values() for count in answers.shots)
    return MmluScores(
        accuracy=float(np.mean(everything)),
        by_category=by_category,
        by_subcategory=by_subcategory,
        by_subject={name: float(np.mean(values)) for name, values in correct.items()},
        count=len(everything),
        counts={name: len(values) for name, values in correct.items()},
        shots={str(count): used[count] for count in sorted(used)},
        truncated=sum(answers.truncated for answers in finished.values()),
        ties=sum(answers.ties for answers in finished.values()),
    )


def _pool(
    correct: Mapping[str, list[int]], groups: Mapping[str, Iterable[str]]
) -> dict[str, float]:
    """The mean over the questions of each group of subjects; groups without any are left out."""
    pooled = {
        name: [value for subject in subjects for value in correct.get(subject, [])]
        for name, subjects in groups.items()
    }
    return {name: float(np.mean(values)) for name, values in pooled.items() if values}


def _so_far(name: str, finished: Mapping[str, _Answers]) -> str:
    correct = [value for answers in finished.values() for value in answers.correct]
    return f"{name}, {np.mean(correct):.1%} so far" if correct else name


def forget(keep: Path, count: int) -> None:
    """Deletes a file of `count` finished subjects; one that holds those of other settings stays."""
    if keep.is_file() and len(_load_kept(keep)) <= count:
        keep.unlink()


def _keep(path: Path, kept: Mapping[str, Any]) -> bool:
    """Whether the finished subjects could be written; hours of work do not end because of them."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(kept) + "\n")
    except OSError as error:
        logger.warning(
            "%s: cannot be written (%s), so an interrupted evaluation begins anew",
            *(path, error.strerror),
        )
        return False
    return True


def _load_kept(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        for values in kept.values():
            _Answers(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no file of finished subjects; delete it ({error})") from None
    return kept
