"""Runs MMLU (Hendrycks et al., 2021) with the prompts and averages of its authors."""

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
from irqlora_jax.evaluate.choices import Question, choice_scores, truncate_prompt
from irqlora_jax.evaluate.mmlu_files import (
    CATEGORIES,
    LETTERS,
    SUBCATEGORIES,
    Subject,
    find_subjects,
    prompt_text,
    read_subject,
)
from irqlora_jax.files.checksums import check_seal, seal
from irqlora_jax.files.small import read_json, write_text
from irqlora_jax.messages import progress_bar
from irqlora_jax.model.llama import Llama

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class MmluScores:
    """Accuracies between 0 and 1, averaged over questions, not over subjects."""

    accuracy: float
    """Accuracy of all questions."""
    by_category: dict[str, float]
    """Accuracy of STEM, humanities, social sciences and other."""
    by_subcategory: dict[str, float]
    """Accuracy of the 17 subcategories."""
    by_subject: dict[str, float]
    count: int
    """Number of questions."""
    counts: dict[str, int]
    """Number of questions of each subject."""
    shots: dict[str, int]
    """Number of questions that had 0, 1, ... few-shot examples."""
    truncated: int
    """Number of questions truncated on the left: they exceed the context even without examples."""
    ties: int
    """Number of questions where several letters have the best score. The first of them counts."""


@dataclasses.dataclass(frozen=True)
class _Answers:
    """Answers to the questions of a subject."""

    correct: list[int]
    """1 or 0 for each question."""
    shots: list[int]
    """Few-shot examples of each question."""
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
    resume_file: Path | None = None,
    identity: str = "",
    progress: bool = False,
) -> MmluScores:
    """Evaluates a model on MMLU.

    A prompt is the line "The following are multiple choice questions (with answers) about
    SUBJECT." (with two spaces in front of the subject, as published), the first `shots` questions
    of dev/ with their answers, and the question up to "Answer:". If the prompt is longer than the
    context of the model, examples are removed one by one from the end. A question that does not
    fit without examples is truncated on the left.

    The answer is the most likely of the four letters, tokenized as after "Answer:" in running text
    (" A"). The first letter wins a tie, as in the published benchmark: a model with equal scores
    always answers A. If a letter is several tokens, their joint probability counts.

    The text of the files is used unchanged. The original code reads the files with pandas, whose
    recent versions turn the choice "None" into "nan" (10 of the 14,042 questions).

    Args:
        model: the architecture.
        variables: {"params": adapters, "base": base}.
        tokenizer: a transformers tokenizer.
        folder: contains dev/SUBJECT_dev.csv and test/SUBJECT_test.csv (and val/), without header,
            with the columns question, A, B, C, D, answer.
        shots: few-shot examples of each question.
        split: which questions to use.
        subjects: use only these (default: all in the folder).
        limit: use only the first `limit` questions of each subject.
        batch_size: questions of a forward pass.
        resume_file: file for the answers of the finished subjects. Subjects in it with the same
            data, settings and `identity` are not computed again.
        identity: identifies the model in `resume_file`.
        progress: show a progress bar.

    Raises:
        FileNotFoundError: no such folder, subject or file.
        ValueError: a malformed file, an invalid argument, or a model with NaN or infinite logits.
    """
    for name, value, least in (
        ("shots", shots, 0),
        ("limit", limit, 1),
        ("batch_size", batch_size, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} = {value}: expected a whole number of at least {least}")
    read = [
        read_subject(Path(folder), name, split, shots, limit)
        for name in find_subjects(Path(folder), split, subjects)
    ]
    letters = letter_tokens(tokenizer)
    context = model.config.max_position_embeddings
    setting = (identity, split, shots, limit, context, model.compute_dtype)
    kept = {} if resume_file is None else _read_resume_file(resume_file)
    finished: dict[str, _Answers] = {}
    total = sum(len(subject.rows) for subject in read)
    with progress_bar("MMLU", total, "q", show=progress) as bar:
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
                if resume_file is not None and not _write_resume_file(resume_file, kept):
                    resume_file = None
            finished[subject.name] = answers
            bar.set_postfix_str(_so_far(subject.name, finished))
    return _average(finished)


def letter_tokens(tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """Returns the tokens of the four letters as they follow "Answer:" in running text.

    Raises:
        ValueError: the tokens of "Answer:" change when a letter follows, or two letters are equal.
    """
    texts = ["\nAnswer:", *(f"\nAnswer: {letter}" for letter in LETTERS)]
    stem, *whole = encode_source(tokenizer, texts)
    letters = tuple(tuple(ids[len(stem) :]) for ids in whole)
    if any(ids[: len(stem)] != stem for ids in whole) or len({*letters, ()}) <= len(LETTERS):
        raise ValueError(
            "the tokenizer does not give four distinct letters ' A' to ' D' after 'Answer:' "
            f"({letters})"
        )
    return letters


def _encode(
    tokenizer: Any, subject: Subject, shots: int, room: int, bos_token_id: int | None
) -> tuple[list[tuple[int, ...]], list[int], int]:
    """Returns prompts that fit, the number of examples in each, and how many were truncated."""
    prompts: list[tuple[int, ...]] = [()] * len(subject.rows)
    used = [0] * len(subject.rows)
    remaining = list(range(len(subject.rows)))
    for count in range(shots, -1, -1):
        shown = subject.examples[:count]
        texts = [prompt_text(subject.name, shown, subject.rows[index]) for index in remaining]
        for index, tokens in zip(remaining, encode_source(tokenizer, texts), strict=True):
            prompts[index], used[index] = tuple(tokens), count
        remaining = [index for index in remaining if len(prompts[index]) > room]
        if not remaining:
            break
    for index in remaining:
        prompts[index] = truncate_prompt(prompts[index], room, bos_token_id)
    return prompts, used, len(remaining)


def subject_questions(
    model: Llama,
    tokenizer: Any,
    subject: Subject,
    letters: tuple[tuple[int, ...], ...],
    shots: int,
) -> tuple[list[Question], list[int], int]:
    """Makes the questions of a subject, each with up to `shots` examples, as many as fit.

    Returns:
        The questions, the number of examples of each, and how many questions were truncated.

    Raises:
        ValueError: the context of the model is too short for a letter.
    """
    # The last token of a letter is only predicted, so it needs no room.
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
        raise ValueError(f"{subject.name}: the logits of the model are NaN or infinite")
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
    """Averages over the questions of each group of subjects. Empty groups are left out."""
    pooled = {
        name: [value for subject in subjects for value in correct.get(subject, [])]
        for name, subjects in groups.items()
    }
    return {name: float(np.mean(values)) for name, values in pooled.items() if values}


def _so_far(name: str, finished: Mapping[str, _Answers]) -> str:
    correct = [value for answers in finished.values() for value in answers.correct]
    return f"{name}, {np.mean(correct):.1%} so far" if correct else name


def delete_resume_file(path: Path, count: int) -> None:
    """Deletes the file of finished subjects, unless it holds more than `count`.

    More subjects than that belong to other settings.
    """
    if path.is_file() and len(_read_resume_file(path)) <= count:
        path.unlink()


def _write_resume_file(path: Path, kept: Mapping[str, Any]) -> bool:
    """Writes the finished subjects; False if that failed, since it must not end hours of work."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(seal(kept)) + "\n")
    except OSError as error:
        logger.warning(
            "%s: cannot be written (%s), so an interrupted evaluation starts again from zero",
            path,
            error.strerror,
        )
        return False
    return True


def _read_resume_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        kept = check_seal(read_json(path))
        for values in kept.values():
            _Answers(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a file of finished subjects; delete it ({error})"
        ) from None
    return kept
