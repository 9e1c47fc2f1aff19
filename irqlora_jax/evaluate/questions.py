"""Reads multiple-choice questions, and scores the most likely choice of a model."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from irqlora_jax.data.examples import Row, alpaca_prompt, encode_pairs, read_rows
from irqlora_jax.evaluate.choices import Question, choice_scores, truncate_prompt
from irqlora_jax.model.llama import Llama
from irqlora_jax.text import shorten

_COLUMNS = ("subject", "prompt", "choices", "answer")
_OPTIONS = re.compile(r"Answer format: *([^/\s]+(?:/[^/\s]+)+)\s*$")


@dataclasses.dataclass(frozen=True)
class QuestionScores:
    """Scores of multiple-choice questions. Accuracies and recall are between 0 and 1."""

    accuracy: float
    """Fraction of questions where the right choice is strictly more likely than all others."""
    by_subject: dict[str, float]
    """Accuracy of each subject."""
    count: int
    """Number of questions."""
    recall: float | None
    """Fraction of questions where the right choice is the most likely token of the vocabulary. None
    unless all choices are single tokens."""
    bits_per_fact: float | None
    """Mean of log2(pool) minus the answer's cross-entropy in bits: the knowledge of the model per
    fact. Negative if the model is worse than a uniform guess from the pool. None unless all choices
    are single tokens and all questions have a pool."""
    accuracy_norm: float | None = None
    """Accuracy with log-probabilities divided by the number of characters of each choice. None if
    the questions have no lengths."""
    truncated: int = 0
    """Number of questions with a prompt truncated on the left to fit into the context."""
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    """Number of questions of each subject."""

    @property
    def subject_mean(self) -> float:
        """Accuracy averaged over the subjects, each with equal weight."""
        return sum(self.by_subject.values()) / len(self.by_subject)


def load_questions(path: str, tokenizer: Any, limit: int | None = None) -> list[Question]:
    """Reads questions from a .jsonl (or .json) file.

    A row has "subject", "prompt", "choices" (texts) and "answer" (index of the right choice, from
    0), and optionally "pool" (see `Question`). Prompt and choice are always joined by one space,
    whether or not the file has it; but if the prompt ends with a line break, by none.

    A row may also be an instruction with its options, as in the commonsense files of LLM-Adapters.
    "instruction" ends with e.g. "Answer format: true/false", and "output" ends with "answer", which
    is one of the options. The choices are then the output with each option in place of the answer,
    and the prompt is Alpaca's. The subject is the name of the file; if that is test, train or val,
    the subject is the name of its folder.

    Args:
        path: the file.
        tokenizer: a transformers tokenizer.
        limit: read only the first `limit` questions (None: all).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a malformed row; the message names the row and the reason.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    first = read_rows(path, ())[0].columns
    if "instruction" in first and "choices" not in first:
        rows = read_rows(path, ("instruction", "output", "answer"))[:limit]
        subject = file.parent.name if file.stem in ("test", "train", "val") else file.stem
        rows = [_from_instruction(row, subject) for row in rows]
        prompts = [row.columns["prompt"] for row in rows for _ in row.columns["choices"]]
        choices = [choice for row in rows for choice in row.columns["choices"]]
        pairs = encode_pairs(tokenizer, prompts, choices, join=False)
    else:
        rows = read_rows(path, _COLUMNS)[:limit]
        for row in rows:
            _check(row)
        # Without spaces at the seam, all choices of a row have the same prompt.
        prompts = [row.text("prompt").rstrip(" ") for row in rows for _ in row.columns["choices"]]
        choices = [choice.lstrip(" ") for row in rows for choice in row.columns["choices"]]
        pairs = encode_pairs(tokenizer, prompts, choices, join=True)
    return _to_questions(rows, pairs)


def _to_questions(
    rows: Sequence[Row], pairs: Sequence[tuple[list[int], list[int]]]
) -> list[Question]:
    left = iter(pairs)
    questions = []
    for row in rows:
        texts = row.columns["choices"]
        own = [next(left) for _ in texts]
        for text, (prompt, choice) in zip(texts, own, strict=True):
            if not prompt:
                raise ValueError(f"{row.place}: the prompt has no tokens")
            if not choice:
                raise ValueError(f"{row.place}: the choice {shorten(text)} has no tokens")
        questions.append(
            Question(
                subject=row.text("subject"),
                prompt=tuple(own[0][0]),
                choices=tuple(tuple(choice) for _, choice in own),
                answer=row.columns["answer"],
                pool=row.columns.get("pool"),
                lengths=tuple(len(text.strip(" ")) for text in texts),
            )
        )
    return questions


def _from_instruction(row: Row, subject: str) -> Row:
    """Converts a row with options in its instruction into a row with choices."""
    instruction, output, answer = (row.text(n) for n in ("instruction", "output", "answer"))
    found = _OPTIONS.search(instruction)
    if found is None:
        raise ValueError(
            f"{row.place}: instruction = '... {instruction[-40:]!s}': expected one that ends "
            "with 'Answer format: OPTION/OPTION'".replace("\n", " ")
        )
    options = found[1].split("/")
    if answer not in options or not output.endswith(answer):
        accepted = f"one of {', '.join(options)}, with which output ends"
        raise ValueError(f"{row.place}: answer = {shorten(answer)}: expected {accepted}")
    stem = output.removesuffix(answer)
    columns = {
        "subject": subject,
        "prompt": alpaca_prompt(instruction, row.text("input", "")),
        "choices": [stem + option for option in options],
        "answer": options.index(answer),
    }
    return Row(row.place, columns)


def _check(row: Row) -> None:
    for name in ("subject", "prompt"):
        row.text(name)
    choices, answer, pool = row.columns["choices"], row.columns["answer"], row.columns.get("pool")
    if not (
        isinstance(choices, list) and len(choices) > 1 and all(type(c) is str for c in choices)
    ):
        raise ValueError(f"{row.place}: choices = {shorten(choices)}: expected at least two texts")
    if type(answer) is not int or not 0 <= answer < len(choices):
        accepted = f"the index of a choice, 0 to {len(choices) - 1}"
        raise ValueError(f"{row.place}: answer = {shorten(answer)}: expected {accepted}")
    if pool is not None and (type(pool) is not int or pool < 1):
        accepted = "a whole number of at least 1, or null"
        raise ValueError(f"{row.place}: pool = {shorten(pool)}: expected {accepted}")


def score_questions(
    model: Llama,
    variables: Any,
    questions: Sequence[Question],
    batch_size: int = 32,
    *,
    done: Callable[[int], Any] | None = None,
) -> QuestionScores:
    """Scores all questions.

    The score of a choice is the summed log-probability of its tokens given the prompt. A question
    counts as right only if the right choice is strictly better than all others. Ties count as
    wrong, so a model with equal scores for all choices gets 0.

    Args:
        model: the architecture.
        variables: {"params": adapters, "base": base}.
        questions: from `load_questions`. Prompts are truncated on the left to fit the context.
        batch_size: rows of a forward pass. A question needs one row if its choices differ only in
            their last token, and at most one row per choice.
        done: called with the number of questions that were finished since the last call.

    Raises:
        ValueError: no questions, or a choice longer than the context.
    """
    if not questions:
        raise ValueError("there are no questions")
    asked = [_truncate(model, question) for question in questions]
    scores, greedy = choice_scores(model, variables, asked, batch_size, done=done)
    right = [_wins(values, q.answer) for values, q in zip(scores, asked, strict=True)]
    normalized = None
    if all(q.lengths is not None and all(q.lengths) for q in asked):
        pairs = zip(scores, asked, strict=True)
        normalized = [_wins(values / np.array(q.lengths), q.answer) for values, q in pairs]
    single = all(q.single for q in asked)
    recall = [bool(best[q.answer]) for best, q in zip(greedy, asked, strict=True)]
    bits = None
    pools = [q.pool for q in asked if q.pool is not None]
    if single and len(pools) == len(asked):
        answers = [values[q.answer] / math.log(2) for values, q in zip(scores, asked, strict=True)]
        bits = float(np.mean(answers)) + float(np.mean([math.log2(pool) for pool in pools]))
    subjects: dict[str, list[bool]] = {name: [] for name in sorted({q.subject for q in asked})}
    for question, value in zip(asked, right, strict=True):
        subjects[question.subject].append(value)
    return QuestionScores(
        accuracy=float(np.mean(right)),
        by_subject={subject: float(np.mean(values)) for subject, values in subjects.items()},
        count=len(asked),
        recall=float(np.mean(recall)) if single else None,
        bits_per_fact=bits,
        accuracy_norm=None if normalized is None else float(np.mean(normalized)),
        truncated=sum(q.prompt != old.prompt for q, old in zip(asked, questions, strict=True)),
        counts={subject: len(values) for subject, values in subjects.items()},
    )


def _wins(scores: np.ndarray, answer: int) -> bool:
    return bool((scores[answer] > np.delete(scores, answer)).all())


def _truncate(model: Llama, question: Question) -> Question:
    """Truncates the prompt to the context. The last token of a choice needs no room."""
    longest = max(map(len, question.choices))
    room = model.config.max_position_embeddings + 1 - longest
    if room < 1:
        raise ValueError(
            f"a choice of {question.subject} has {longest} tokens: expected at most "
            f"max_position_embeddings = {model.config.max_position_embeddings}"
        )
    prompt = truncate_prompt(question.prompt, room, model.config.bos_token_id)
    return dataclasses.replace(question, prompt=prompt)
