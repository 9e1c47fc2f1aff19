"""Log-probabilities of the choices of multiple-choice questions, in as few rows as they need."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int

from irqlora_jax.data.batches import by_length, pad
from irqlora_jax.data.examples import Example
from irqlora_jax.llama import Cache, Llama

# What prompts have in common, and the cache, are rounded up to these: few lengths are compiled.
_COMMON_STEP, _CACHE_STEP = 128, 256


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
    lengths: tuple[int, ...] | None = None
    """Characters of each choice, for scores that are normalized by them."""

    @property
    def single(self) -> bool:
        """Whether every choice is one token."""
        return all(len(choice) == 1 for choice in self.choices)


def fit(prompt: Sequence[int], room: int, bos_token_id: int | None) -> tuple[int, ...]:
    """A prompt cut on the left to `room` tokens; a bos in front stays."""
    if len(prompt) <= room:
        return tuple(prompt)
    head = tuple(prompt[:1]) if prompt[0] == bos_token_id and room > 1 else ()
    return head + tuple(prompt[len(prompt) - room + len(head) :])


def choice_scores(
    model: Llama,
    variables: Any,
    questions: Sequence[Question],
    batch_size: int,
    *,
    multiple: int = 32,
    done: Callable[[int], Any] | None = None,
) -> tuple[list[np.ndarray], list[int]]:
    """Log-probabilities (nats) of the tokens of every choice given the prompt, summed.

    What all prompts begin with is computed once. Choices that begin alike share a row: four letters
    of one token each take one forward pass over the prompt alone, and so do "yes" and "yes indeed".

    Args:
        model: the architecture.
        variables: {"params": adapters, "base": base}.
        questions: each within the context of the model.
        batch_size: rows computed at one time.
        multiple: rows are padded to a multiple of so many tokens, so that few lengths are compiled.
        done: called with the number of questions that were finished since the last call.

    Returns:
        The scores of the choices of each question, and the likeliest token behind each prompt.
    """
    rows = [(index, *row) for index, q in enumerate(questions) for row in _rows(q)]
    scores = [np.zeros(len(q.choices)) for q in questions]
    best = [0] * len(questions)
    if not rows:
        return scores, best
    left = np.bincount([index for index, _, _ in rows], minlength=len(questions))
    most = _round_up(max(len(q.choices) for q in questions), 4)
    common = questions[0].prompt[: _common([q.prompt for q in questions])]
    needed = max(len(questions[index].prompt) + len(stem) for index, stem, _ in rows)
    cache = _prefill(model, variables, *_padded(common), _slots(needed))
    groups = by_length([len(questions[index].prompt) for index, _, _ in rows], batch_size)
    # Dispatched ahead of being read, so that the device does not wait for Python.
    ahead: list[tuple[list[int], tuple[Array, Array]]] = []
    for group in [*groups, None]:
        if group is not None:
            part = [(questions[rows[row][0]], *rows[row][1:]) for row in group]
            arrays = _batch(part, len(common), batch_size, most, multiple)
            ahead.append((group, _score(model, variables, cache, *arrays)))
        while ahead and (group is None or len(ahead) > 2):
            finished, outputs = ahead.pop(0)
            sums, likeliest = (np.asarray(output) for output in outputs)
            for place, row in enumerate(finished):
                index, _, served = rows[row]
                scores[index][served] = sums[place, : len(served)]
                best[index] = int(likeliest[place])
                left[index] -= 1
            if done is not None:
                done(len({rows[row][0] for row in finished if left[rows[row][0]] == 0}))
    return scores, best


def _common(prompts: Sequence[tuple[int, ...]]) -> int:
    """Number of tokens that all prompts begin with; the last token of none is among them."""
    first, last = min(prompts), max(prompts)
    shortest = min(map(len, prompts)) - 1
    pairs = zip(first[:shortest], last[:shortest], strict=True)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), shortest)


def _rows(question: Question) -> list[tuple[tuple[int, ...], list[int]]]:
    """What is to follow the prompt in each row, and the choices that can be read from that row."""
    rows: list[tuple[tuple[int, ...], list[int]]] = []
    for index in sorted(range(len(question.choices)), key=lambda i: -len(question.choices[i])):
        # Nothing follows the last token of a choice, so it need not be in the row.
        stem = question.choices[index][:-1]
        for tokens, served in rows:
            if tokens[: len(stem)] == stem:
                served.append(index)
                break
        else:
            rows.append((stem, [index]))
    return rows


def _batch(
    rows: Sequence[tuple[Question, tuple[int, ...], list[int]]],
    common: int,
    batch_size: int,
    most: int,
    multiple: int,
) -> tuple[np.ndarray, ...]:
    """Arguments of `_score` behind the cache."""
    longest = max(len(q.choices[index]) for q, _, served in rows for index in served)
    longest = 1 << (longest - 1).bit_length()  # few shapes
    examples, lengths = [], np.ones(batch_size, np.int32)
    stems = np.zeros((batch_size, longest - 1), np.int32)
    choices = np.zeros((batch_size, most, longest), np.int32)
    given = np.zeros((batch_size, most, longest), bool)
    for place, (question, stem, served) in enumerate(rows):
        tokens = np.array(question.prompt[common:], np.int32)
        examples.append(Example(tokens, np.zeros(len(tokens), bool)))
        lengths[place] = len(tokens)
        stems[place, : len(stem)] = stem
        for column, index in enumerate(served):
            choice = question.choices[index]
            choices[place, column, : len(choice)] = choice
            given[place, column, : len(choice)] = True
    return pad(examples, batch_size, multiple)["tokens"], lengths, stems, choices, given


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _slots(needed: int) -> int:
    return min(_round_up(needed, _CACHE_STEP), 1 << (needed - 1).bit_length())


def _padded(tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """A row of tokens, padded on the right, and their number."""
    padded = np.zeros((1, _round_up(max(len(tokens), 1), _COMMON_STEP)), np.int32)
    padded[0, : len(tokens)] = tokens
    return padded, np.array([len(tokens)], np.int32)


@functools.partial(jax.jit, static_argnames=("model", "slots"))
def _prefill(
    model: Llama,
    variables: Any,
    tokens: Int[Array, "1 seq"],
    lengths: Int[Array, " 1"],
    slots: int,
) -> Cache:
    """The cache of what all rows begin with, with room for `slots` tokens in all."""
    cache = model.init_cache(1, slots)
    return cast(Any, model.apply(variables, tokens, cache, lengths, method="decode"))[1]


@functools.partial(jax.jit, static_argnames="model")
def _score(
    model: Llama,
    variables: Any,
    cache: Cache,
    tokens: Int[Array, "batch seq"],
    lengths: Int[Array, " batch"],
    stems: Int[Array, "batch shorter"],
    choices: Int[Array, "batch choices length"],
    given: Bool[Array, "batch choices length"],
) -> tuple[Float32[Array, "batch choices"], Int[Array, " batch"]]:
    """Summed log-probabilities of the given tokens of the choices, and the likeliest first token.

    Args:
        model: the architecture.
        variables: its collections.
        cache: of what stands in front of all rows.
        tokens: the rest of the prompts, padded on the right.
        lengths: of them.
        stems: what follows each prompt, token by token.
        choices: the tokens of the choices; the first ones follow the prompt, the next ones the
            first token of the stem, and so on.
        given: which of these there are.
    """
    batch, more = tokens.shape[0], stems.shape[1]

    def add(total: Array, logits: Array, place: Any) -> Array:
        labels = jax.lax.dynamic_index_in_dim(choices, place, 2, keepdims=False)
        counts = jax.lax.dynamic_index_in_dim(given, place, 2, keepdims=False)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels, axis=1)
        return total + jnp.where(counts, chosen, 0)

    def advance(carry: tuple[Array, Cache], place: Array) -> tuple[tuple[Array, Cache], None]:
        total, cache = carry
        token = jax.lax.dynamic_slice_in_dim(stems, place, 1, axis=1)
        logits, cache = cast(Any, model.apply(variables, token, cache, method="decode"))
        return (add(total, logits, place + 1), cache), None

    wide: Cache = {
        "k": jnp.repeat(cache["k"], batch, axis=1),
        "v": jnp.repeat(cache["v"], batch, axis=1),
        "length": jnp.repeat(cache["length"], batch),
    }
    logits, wide = cast(Any, model.apply(variables, tokens, wide, lengths, method="decode"))
    total = add(jnp.zeros(choices.shape[:2], jnp.float32), logits, 0)
    if more > 0:
        (total, _), _ = jax.lax.scan(advance, (total, wide), jnp.arange(more))
    return total, jnp.argmax(logits, axis=1).astype(jnp.int32)
