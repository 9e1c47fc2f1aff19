"""Computes log-probabilities of multiple-choice answers. Common prefixes are computed once."""

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

from irqlora_jax.data.batches import batches_by_length
from irqlora_jax.model.layer import Cache
from irqlora_jax.model.llama import Llama, head_logits, head_weight
from irqlora_jax.processes import fetch

Item = TypeVar("Item")

# Common prefixes and caches are padded to multiples of these, so that few lengths are compiled.
_PREFIX_STEP, _CACHE_STEP = 128, 256
# A shorter common prefix is not worth a cache, because flash attention does not support caches.
_MIN_PREFIX = 64
_CHUNK = 1024  # positions whose logits are in memory at the same time


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt and its possible continuations, as tokens."""

    subject: str
    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    answer: int
    """Index of the right choice."""
    pool: int | None = None
    """Number of plausible answers for a model that knows only the answer's type."""
    lengths: tuple[int, ...] | None = None
    """Number of characters of each choice, for scores normalized by length."""

    @property
    def single(self) -> bool:
        """Whether every choice is one token."""
        return all(len(choice) == 1 for choice in self.choices)


def truncate_prompt(prompt: Sequence[int], room: int, bos_token_id: int | None) -> tuple[int, ...]:
    """Truncates a prompt on the left to `room` tokens. A bos at its start stays."""
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
    """Collects the results of `stream_scores` in the order of the questions.

    Args:
        model, variables, questions, batch_size, share: as for `stream_scores`.
        done: called with the number of questions that were finished since the last call.

    Returns:
        For each question, over its choices: the summed log-probabilities (nats), and whether all
        tokens of the choice are the most likely ones.
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
    """Yields the log-probabilities of the choices given the prompts, question by question.

    A common prefix of many prompts is computed once, e.g. the few-shot examples of a subject.
    Choices with a common prefix share a row: four letters of one token each need one forward pass
    over the prompt alone; "yes" and "yes indeed" also need only one row.

    Args:
        model: the architecture.
        variables: {"params": adapters, "base": base}.
        questions: each fits into the context of the model.
        batch_size: rows of a forward pass.
        share: False computes every prompt from its start.

    Yields:
        The index of a finished question. For each of its choices: the summed log-probability of
        its tokens (nats), and whether all its tokens are the most likely ones of the vocabulary.
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
            for places in batches_by_length([lengths[row] for row in group], batch_size):
                part = [group[place] for place in places]
                asked = [(questions[rows[row][0]], *rows[row][1:]) for row in part]
                arrays = _batch(asked, common, batch_size, most)
                yield part, _score(model, variables, cache, *arrays)

    left = np.bincount([index for index, _, _ in rows], minlength=len(questions))
    scores = [np.zeros(len(q.choices)) for q in questions]
    greedy = [np.zeros(len(q.choices), bool) for q in questions]
    for part, outputs in _pipelined(dispatched()) if rows else ():
        sums, likeliest = (fetch(output) for output in outputs)
        for place, row in enumerate(part):
            index, _, served = rows[row]
            scores[index][served] = sums[place, : len(served)]
            greedy[index][served] = likeliest[place, : len(served)]
            left[index] -= 1
            if left[index] == 0:
                yield index, scores[index], greedy[index]


def _pipelined(items: Iterable[Item], behind: int = 2) -> Iterator[Item]:
    """Delays each item until `behind` more exist, so that the device never waits for the host."""
    waiting: collections.deque[Item] = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > behind:
            yield waiting.popleft()
    yield from waiting


def group_by_prefix(
    prompts: Sequence[tuple[int, ...]], batch_size: int, least: int = _MIN_PREFIX
) -> list[tuple[int, list[int]]]:
    """Groups prompts that share a cache of their common prefix.

    A group is split off with a longer prefix where that saves tokens. The count includes the
    cache itself and the rows that pad a batch.

    Args:
        prompts: as tokens.
        batch_size: rows of a forward pass. Smaller groups are not split off.
        least: a shorter common prefix counts as none.

    Returns:
        Groups: the length of the common prefix, which excludes the last token of every prompt;
        and the indices of the prompts.
    """
    order = sorted(range(len(prompts)), key=lambda index: prompts[index])
    pairs = pairwise(order)
    shared = [0, *(_common(prompts[before], prompts[after]) for before, after in pairs)]

    def split(low: int, high: int) -> tuple[list[tuple[int, list[int]]], int, list[int]]:
        """Splits order[low:high]: the groups split off, the prefix of the rest, and the rest."""
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
    """Length of the common prefix; it excludes the last token of both."""
    shortest = min(len(first), len(second)) - 1
    pairs = zip(first[:shortest], second[:shortest], strict=True)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), shortest)


def _rows(question: Question) -> list[tuple[tuple[int, ...], list[int]]]:
    """Returns the tokens after the prompt in each row, and the choices scored by that row."""
    rows: list[tuple[tuple[int, ...], list[int]]] = []
    for index in sorted(range(len(question.choices)), key=lambda i: -len(question.choices[i])):
        # The last token of a choice is only predicted, so the row does not need it.
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
    """Makes the array arguments of `_score`, padded to few different shapes."""
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
    """Rounds a length up so that few lengths are compiled.

    The step is 32 up to 256, then 1/8 of the next power of two.
    """
    return _round_up(length, max(32, 1 << (length - 1).bit_length() >> 3))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _slots(needed: int) -> int:
    return min(_round_up(needed, _CACHE_STEP), 1 << (needed - 1).bit_length())


def _padded(tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Pads a row of tokens on the right; also returns their number."""
    padded = np.zeros((1, _round_up(len(tokens), _PREFIX_STEP)), np.int32)
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
    """Computes the cache of the common prefix, with room for `slots` tokens in total."""
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
    """Sums the log-probabilities of each choice's tokens, and checks if all are the likeliest.

    Args:
        model: the architecture.
        variables: its collections.
        cache: of the common prefix of all rows, if there is one.
        tokens: the rest of each prompt and the tokens after it, padded on the right.
        first: position of the last token of each prompt; it predicts the first token of a choice.
        choices: tokens of the choices; token i is predicted at position first + i.
        given: mask of the tokens that exist in `choices`.
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
    # `longest` and `width` are powers of two, so `width` divides `longest`.
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
