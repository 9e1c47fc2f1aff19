"""Multiple-choice questions, answered by the choice that the model finds most likely."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from irqlora_jax.data.batches import by_length, pad
from irqlora_jax.data.examples import Example, Row, encode_pairs, read_rows
from irqlora_jax.evaluate.perplexity import row_nll
from irqlora_jax.llama import Llama, head_logits, head_weight

_COLUMNS = ("subject", "prompt", "choices", "answer")


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt and its possible continuations, as tokens."""

    subject: str
    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    answer: int
    """Index of the right choice."""
    pool: int | None = None
    """How many answers are equally likely for who knows the kind of answer but not the fact."""

    @property
    def single(self) -> bool:
        """Whether every choice is one token."""
        return all(len(choice) == 1 for choice in self.choices)


@dataclasses.dataclass(frozen=True)
class QuestionScores:
    """Shares are between 0 and 1."""

    accuracy: float
    """Share of all questions whose right choice is strictly more likely than every other one."""
    by_subject: dict[str, float]
    """The same for each subject."""
    count: int
    """Number of questions."""
    recall: float | None
    """Share of questions whose right choice is the likeliest token of the whole vocabulary. None
    unless all choices are single tokens."""
    bits_per_fact: float | None
    """Mean of log2(pool) minus the answer's cross-entropy in bits: what the model knows of a fact.
    Negative where it is surer of wrong answers than a guess from the pool would be. None unless all
    choices are single tokens and all questions have a pool."""

    @property
    def subject_mean(self) -> float:
        """Accuracy averaged over the subjects, each with equal weight."""
        return sum(self.by_subject.values()) / len(self.by_subject)


def load_questions(path: str, tokenizer: Any, limit: int | None = None) -> list[Question]:
    """Reads questions from a .jsonl (or .json) file.

    A row has "subject", "prompt", "choices" (texts), "answer" (index of the right one, from 0) and
    may have "pool" (see `Question`). One space stands between prompt and choice, whether or not
    the file has it there (none where the prompt ends a line).

    Args:
        path: the file.
        tokenizer: of transformers.
        limit: read at most so many (null: all).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a malformed row; says which and why.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    rows = read_rows(path, _COLUMNS)[:limit]
    for row in rows:
        _check(row)
    # Without their own spaces at the seam, all choices of a row have one prompt in common.
    prompts = [row.text("prompt").rstrip(" ") for row in rows for _ in row.columns["choices"]]
    choices = [choice.lstrip(" ") for row in rows for choice in row.columns["choices"]]
    pairs = iter(encode_pairs(tokenizer, prompts, choices, join=True))
    questions = []
    for row in rows:
        texts = row.columns["choices"]
        own = [next(pairs) for _ in texts]
        for text, (prompt, choice) in zip(texts, own, strict=True):
            if not prompt:
                raise ValueError(f"{row.place}: the prompt has no tokens")
            if not choice:
                raise ValueError(f"{row.place}: the choice {text!r} has no tokens")
        questions.append(
            Question(
                subject=row.text("subject"),
                prompt=tuple(own[0][0]),
                choices=tuple(tuple(choice) for _, choice in own),
                answer=row.columns["answer"],
                pool=row.columns.get("pool"),
            )
        )
    return questions


def _check(row: Row) -> None:
    for name in ("subject", "prompt"):
        row.text(name)
    choices, answer, pool = row.columns["choices"], row.columns["answer"], row.columns.get("pool")
    if not (
        isinstance(choices, list) and len(choices) > 1 and all(type(c) is str for c in choices)
    ):
        raise ValueError(f"{row.place}: choices = {choices!r}: accepted are at least two texts")
    if type(answer) is not int or not 0 <= answer < len(choices):
        accepted = f"the index of a choice, 0 to {len(choices) - 1}"
        raise ValueError(f"{row.place}: answer = {answer!r}: accepted is {accepted}")
    if pool is not None and (type(pool) is not int or pool < 1):
        accepted = "a whole number of at least 1, or null"
        raise ValueError(f"{row.place}: pool = {pool!r}: accepted is {accepted}")


def score_questions(
    model: Llama, variables: Any, questions: Sequence[Question], batch_size: int = 32
) -> QuestionScores:
    """Asks all questions.

    The score of a choice is the log-probability of its tokens given the prompt, summed. A question
    counts as right only if the right choice is strictly better than every other one: ties count as
    wrong, so that a model without an opinion gets 0, not the share of right answers that happen to
    stand first.

    Args:
        model: the architecture.
        variables: {"params": adapters, "base": base}.
        questions: of `load_questions`.
        batch_size: rows computed at one time. A question of single-token choices is one row, any
            other one row per choice.

    Raises:
        ValueError: no questions.
    """
    if not questions:
        raise ValueError("there are no questions")
    single = [q for q in questions if q.single]
    multi = [q for q in questions if not q.single]
    scores, recalled = _ask_single(model, variables, single, batch_size)
    pairs = [*zip(single, scores, strict=True)]
    pairs += zip(multi, _ask_multi(model, variables, multi, batch_size), strict=True)

    subjects: dict[str, list[bool]] = {name: [] for name in sorted({q.subject for q in questions})}
    for question, values in pairs:
        others = np.delete(values, question.answer)
        subjects[question.subject].append(bool((values[question.answer] > others).all()))
    bits = None
    pools = [question.pool for question in questions if question.pool is not None]
    if not multi and len(pools) == len(questions):
        answers = [values[question.answer] / math.log(2) for question, values in pairs]
        bits = float(np.mean(answers)) + float(np.mean([math.log2(pool) for pool in pools]))
    right = [value for values in subjects.values() for value in values]
    return QuestionScores(
        accuracy=float(np.mean(right)),
        by_subject={subject: float(np.mean(values)) for subject, values in subjects.items()},
        count=len(questions),
        recall=float(np.mean(recalled)) if not multi else None,
        bits_per_fact=bits,
    )


def _ask_single(
    model: Llama, variables: Any, questions: Sequence[Question], batch_size: int
) -> tuple[list[np.ndarray], list[bool]]:
    """Scores of the choices of each question, and whether the answer is the likeliest token."""
    most = max((len(q.choices) for q in questions), default=0)
    prompts = [
        Example(np.array(q.prompt, np.int32), np.zeros(len(q.prompt), bool)) for q in questions
    ]
    results: dict[int, tuple[np.ndarray, bool]] = {}
    pending = []
    for indices in by_length([len(q.prompt) for q in questions], batch_size):
        tokens = pad([prompts[index] for index in indices], batch_size, 32)["tokens"]
        last = np.zeros(batch_size, np.int32)
        choices = np.zeros((batch_size, most), np.int32)
        for place, index in enumerate(indices):
            question = questions[index]
            last[place] = len(question.prompt) - 1
            choices[place, : len(question.choices)] = [choice[0] for choice in question.choices]
        pending.append((indices, _next_token(model, variables, tokens, last, choices)))
    for indices, outputs in pending:
        scores, best = (np.asarray(output) for output in outputs)
        for place, index in enumerate(indices):
            question = questions[index]
            recalled = int(best[place]) == question.choices[question.answer][0]
            results[index] = (scores[place, : len(question.choices)], recalled)
    ordered = [results[index] for index in range(len(questions))]
    return [scores for scores, _ in ordered], [recalled for _, recalled in ordered]


@functools.partial(jax.jit, static_argnames="model")
def _next_token(
    model: Llama,
    variables: Any,
    tokens: Int[Array, "batch seq"],
    last: Int[Array, " batch"],
    choices: Int[Array, "batch choices"],
) -> tuple[Float32[Array, "batch choices"], Int[Array, " batch"]]:
    """Log-probabilities of the choices behind position `last`, and the likeliest token there."""
    features = cast(Array, model.apply(variables, tokens, method="features"))
    hidden = jnp.take_along_axis(features, last[:, None, None], axis=1)[:, 0]
    logits = head_logits(hidden, head_weight(variables["base"]))
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), choices, axis=1)
    return chosen, jnp.argmax(logits, axis=1)


def _ask_multi(
    model: Llama, variables: Any, questions: Sequence[Question], batch_size: int
) -> list[np.ndarray]:
    """Scores of the choices of each question; one row per choice."""
    rows = []
    for question in questions:
        for choice in question.choices:
            tokens = np.array(question.prompt + choice, np.int32)
            rows.append(Example(tokens, np.arange(len(tokens)) >= len(question.prompt)))
    scores = np.zeros(len(rows))
    groups = by_length([len(row.tokens) for row in rows], batch_size)
    pending = [
        row_nll(model, variables, pad([rows[index] for index in group], batch_size, 32))[0]
        for group in groups
    ]
    for group, values in zip(groups, pending, strict=True):
        scores[group] = -np.asarray(values, np.float64)[: len(group)]
    ends = np.cumsum([len(question.choices) for question in questions])[:-1]
    return np.split(scores, ends) if questions else []
