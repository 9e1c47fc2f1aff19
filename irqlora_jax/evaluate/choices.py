"""Log-probabilities of the choices of multiple-choice questions, in as few tokens as they need."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int

from irqlora_jax.data.batches import by_length
from irqlora_jax.model.llama import Cache, Llama, head_logits, head_weight

Item = TypeVar("Item")

# What prompts have in common, and the cache, are rounded up to these: few lengths are compiled.
_COMMON_STEP, _CACHE_STEP = 128, 256
# Fewer tokens in common are not worth a cache, which flash attention does not take.
_LEAST_COMMON = 64
_CHUNK = 1024  # positions whose logits exist at one time


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
    share: bool = True,
    done: Callable[[int], Any] | None = None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What `stream_scores` yields, in the order of the questions.

    `done` is called with the number of questions that were finished since the last call.
    """
    scores = [np.zeros(len(q.choices)) for q in questions]
    greedy = [np.zeros(len(q.choices), bool) for q in questions]
    for index, *answer in stream_scores(model, variables, questions, batch_size, share=share):
        scores[index], greedy[index] = answer
        if done is not None:
            done(1)
    return scores, greedy


def stream_scores(
    model: Llama,
    variables: Any,
    questions: Sequence[Question],
    batch_size: int,
    *,
    share: bool = True,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Log-probabilities of the choices given the prompts, question by question.

    What many prompts begin with, such as the examples in front of the questions of a subject, is
    computed once. Choices that begin alike share a row: four letters of one token each take one
    forward pass over the prompt alone, and so do "yes" and "yes indeed".

    Args:
        model: the architecture.
        variables: {"params": adapters, "base": base}.
        questions: each within the context of the model.
        batch_size: rows computed at one time.
        share: False computes every prompt from its start.

    Yields:
        The index of a question that is finished; of each of its choices the log-probabilities of
        the tokens (nats), summed, and whether they are the likeliest ones of the vocabulary.
    """
    rows = [(index, *row) for index, q in enumerate(questions) for row in _rows(q)]
    prompts = [questions[index].prompt for index, _, _ in rows]
    lengths = [len(prompt) + len(stem) for prompt, (_, stem, _) in zip(prompts, rows, strict=True)]
    most = _round_up(max((len(q.choices) for q in questions), default=0), 4)
    groups = group_by_prefix(prompts, batch_size) if share else [(0, list(range(len(rows))))]

    def dispatched() -> Iterator[tuple[list[int], tuple[Array, Array]]]:
        for common, group in sorted(groups, key=lambda g: -max(lengths[row] for row in g[1])):
            cache = None
            if common:
                needed = _slots(max(lengths[row] for row in group))
                padded = _padded(prompts[group[0]][:common])
                cache = _prefill(model, variables, *padded, needed)
            for places in by_length([lengths[row] for row in group], batch_size):
                part = [group[place] for place in places]
                asked = [(questions[rows[row][0]], *rows[row][1:]) for row in part]
                arrays = _batch(asked, common, batch_size, most)
                yield part, _score(model, variables, cache, *arrays)

    left = np.bincount([index for index, _, _ in rows], minlength=len(questions))
    scores = [np.zeros(len(q.choices)) for q in questions]
    greedy = [np.zeros(len(q.choices), bool) for q in questions]
    for part, outputs in _late(dispatched()) if rows else ():
        sums, likeliest = (np.asarray(output) for output in outputs)
        for place, row in enumerate(part):
            index, _, served = rows[row]
            scores[index][served] = sums[place, : len(served)]
            greedy[index][served] = likeliest[place, : len(served)]
            left[index] -= 1
            if left[index] == 0:
                yield index, scores[index], greedy[index]


def _late(items: Iterable[Item], behind: int = 2) -> Iterator[Item]:
    """Each item after two more were made: the device does not wait for Python to read results."""
    waiting: collections.deque[Item] = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > behind:
            yield waiting.popleft()
    yield from waiting


def group_by_prefix(
    prompts: Sequence[tuple[int, ...]], batch_size: int, least: int = _LEAST_COMMON
) -> list[tuple[int, list[int]]]:
    """Which prompts to compute behind one cache of what they begin with.

    Prompts leave the others, for a longer beginning of their own, where that saves tokens: the
    cache itself and rows that fill up a batch count.

    Args:
        prompts: as tokens.
        batch_size: rows computed at one time. No smaller group leaves the others.
        least: fewer tokens in common count as none.

    Returns:
        Groups: the number of tokens in common, never the last one of a prompt; and indices.
    """
    order = sorted(range(len(prompts)), key=lambda index: prompts[index])
    pairs = pairwise(order)
    shared = [0, *(_common(prompts[before], prompts[after]) for before, after in pairs)]

    def split(low: int, high: int) -> tuple[list[tuple[int, list[int]]], int, list[int]]:
        """Groups within a part of the order; what the others have in common, and they."""
        common = min(shared[low + 1 : high], default=0)
        # Steps of 16 tokens keep the recursion shallow.
        deeper = (common // 16 + 1) * 16
        cuts = [low, *(i for i in range(low + 1, high) if shared[i] < deeper), high]
        common = common if common >= least else 0
        groups, stay = [], []
        for start, end in pairwise(cuts):
            members = order[start:end]
            if max(batch_size, 2) <= len(members) < high - low:
                found, longer, members = split(start, end)
                groups += found
                rest = sum(len(prompts[index]) - longer for index in members)
                filled = _round_up(len(members), batch_size) / max(len(members), 1)
                if longer + rest * filled < rest + (longer - common) * len(members):
                    groups.append((longer, members))
                    continue
            stay += members
        return groups, common, stay

    groups, common, stay = split(0, len(order))
    return [*groups, (common, stay)] if stay else groups


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens that both begin with; the last token of neither is among them."""
    shortest = min(len(first), len(second)) - 1
    pairs = zip(first[:shortest], second[:shortest], strict=True)
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
) -> tuple[np.ndarray, ...]:
    """Arguments of `_score` behind the cache, of few shapes."""
    longest = max(len(q.choices[index]) for q, _, served in rows for index in served)
    longest = 4 ** (((longest - 1).bit_length() + 1) // 2)
    width = bucket(max(len(q.prompt) + len(stem) for q, stem, _ in rows) - common)
    tokens, first = np.zeros((batch_size, width), np.int32), np.zeros(batch_size, np.int32)
    choices = np.zeros((batch_size, longest, most), np.int32)
    given = np.zeros((batch_size, longest, most), bool)
    for place, (question, stem, served) in enumerate(rows):
        row = question.prompt[common:] + stem
        tokens[place, : len(row)] = row
        first[place] = len(row) - len(stem) - 1
        for column, index in enumerate(served):
            choice = question.choices[index]
            choices[place, : len(choice), column] = choice
            given[place, : len(choice), column] = True
    return tokens, first, choices, given


def bucket(length: int) -> int:
    """A length rounded up so that few remain: by 32 up to 256, then to a quarter of a doubling."""
    return _round_up(length, max(32, 1 << (length - 1).bit_length() >> 3))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _slots(needed: int) -> int:
    return min(_round_up(needed, _CACHE_STEP), 1 << (needed - 1).bit_length())


def _padded(tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """A row of tokens, padded on the right, and their number."""
    padded = np.zeros((1, _round_up(len(tokens), _COMMON_STEP)), np.int32)
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
    cache: Cache | None,
    tokens: Int[Array, "batch seq"],
    first: Int[Array, " batch"],
    choices: Int[Array, "batch length choices"],
    given: Bool[Array, "batch length choices"],
) -> tuple[Float32[Array, "batch choices"], Bool[Array, "batch choices"]]:
    """Summed log-probabilities of the given tokens of the choices; whether all are the likeliest.

    Args:
        model: the architecture.
        variables: its collections.
        cache: of what stands in front of all rows, if anything does.
        tokens: the rest of the prompts and what follows them, padded on the right.
        first: place of the last token of each prompt, which the choices follow.
        choices: their tokens; the next ones follow the next places.
        given: which of these there are.
    """
    (batch, seq), longest = tokens.shape, choices.shape[1]
    if cache is not None:
        cache = {
            "k": jnp.repeat(cache["k"], batch, axis=1),
            "v": jnp.repeat(cache["v"], batch, axis=1),
            "length": jnp.repeat(cache["length"], batch),
        }
    hidden = cast(Array, model.apply(variables, tokens, cache=cache, method="features"))
    places = jnp.minimum(first[:, None] + jnp.arange(longest)[None, :], seq - 1)
    hidden = jnp.take_along_axis(hidden, places[:, :, None], axis=1)
    head = head_weight(variables["base"])
    # Both are powers of two.
    width = min(longest, 1 << (max(1, _CHUNK // batch).bit_length() - 1))

    def chunks(x: Array) -> Array:
        return jnp.swapaxes(x.reshape(batch, -1, width, x.shape[2]), 0, 1)

    def add(
        carry: tuple[Array, Array], part: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array], None]:
        (total, greedy), (hidden, labels, counts) = carry, part
        logits = head_logits(hidden, head)
        chosen = jnp.take_along_axis(logits, labels, axis=2)
        chosen = chosen - jax.nn.logsumexp(logits, axis=2, keepdims=True)
        likeliest = jnp.argmax(logits, axis=2)[:, :, None].astype(jnp.int32) == labels
        total = total + jnp.where(counts, chosen, 0).sum(axis=1)
        return (total, greedy & (likeliest | ~counts).all(axis=1)), None

    shape = (batch, choices.shape[2])
    start = jnp.zeros(shape, jnp.float32), jnp.ones(shape, bool)
    return jax.lax.scan(add, start, tuple(map(chunks, (hidden, choices, given))))[0]
