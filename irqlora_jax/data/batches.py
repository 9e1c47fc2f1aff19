"""Puts examples into batches. Batches have few different shapes, so few programs are compiled."""

import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from jaxtyping import Int

from irqlora_jax.data.config import DataConfig
from irqlora_jax.data.examples import Example
from irqlora_jax.data.order import (
    Part,
    WeightedDraws,
    block_order,
    epoch_order,
    source_seed,
    split_blocks,
)
from irqlora_jax.data.packing import pack, pad_packed
from irqlora_jax.data.preference import Pair, rows_of
from irqlora_jax.data.streaming import StreamedExamples

Item = TypeVar("Item")
Batch = dict[str, np.ndarray]
"""{"tokens": int32 [batch, seq], "targets": bool [batch, seq]}, padded on the right. Packed batches
also have "segment_ids": int32 [batch, seq], which are 1, 2, ..., and 0 for padding. A preference
pair has two rows, one after the other: chosen and rejected."""

_SORTED_BATCHES = 50  # grouping by length sorts the examples within chunks of this many batches


class Batches:
    """Batches for training, as a pure function of the step.

    A row holds one example, or several with packing. Each epoch visits all rows once, in a new
    random order. A batch may hold the end of one epoch and the start of the next. With weights,
    each row of a batch comes from a source that is drawn by weight, and each source goes through
    its own epochs. `batches[step]` depends only on the arguments and the step, so training resumed
    from a checkpoint sees the same batches as training without an interruption.

    Attributes:
        rows: number of rows of an epoch.
    """

    def __init__(
        self,
        examples: Sequence[Example | Pair],
        batch_size: int,
        seed: int,
        multiple: int | None = None,
        group_by_length: bool = False,
        packing_length: int | None = None,
        parts: Sequence[Part] | None = None,
    ) -> None:
        """Stores the examples and plans the rows.

        Args:
            examples: the training set. Without packing and grouping, no example is read here if
                `multiple` is given.
            batch_size: rows (or pairs) of a batch; may exceed the number in the training set.
            seed: seed of the random orders.
            multiple: the length of a batch is the length of its longest row, rounded up to a
                multiple of this (default: `length_multiple`).
            group_by_length: put examples of similar length into a batch. The first batch holds the
                longest example, so that a lack of memory shows at the first step.
            packing_length: pack several examples into each row of this length. The same examples
                share a row in all epochs; the order of the rows changes in every epoch.
            parts: the sources of the examples, in their order (default: one source). With weights,
                a packed row holds examples of one source, and the weights count rows.

        Raises:
            ValueError: no examples, or an argument out of range.
        """
        multiple = length_multiple(examples) if multiple is None else multiple
        _check(examples, batch_size, multiple)
        self._examples, self._batch_size, self._seed = examples, batch_size, seed
        self._multiple, self._packing_length = multiple, packing_length
        parts = [Part(len(examples))] if parts is None else parts
        if sum(part.count for part in parts) != len(examples):
            raise ValueError(f"parts = {parts}: expected counts with the sum {len(examples)}")
        weights = [part.weight for part in parts if part.weight is not None]
        if weights and (len(weights) < len(parts) or group_by_length):
            raise ValueError("parts: expected weights for all or none, and none when grouped")
        self._draws = WeightedDraws(weights, seed) if weights else None
        counts = [part.count for part in parts]
        # Rows of packed examples; None if every example is a row.
        self._rows: list[list[int]] | None = None
        if packing_length is not None:
            if group_by_length:
                raise ValueError("group_by_length = True: expected False with a packing_length")
            lengths = _lengths(examples)
            groups = np.split(lengths, np.cumsum(counts)[:-1]) if weights else [lengths]
            packed = [pack(group, packing_length, seed) for group in groups]
            starts = [0, *np.cumsum([len(group) for group in groups]).tolist()]
            self._rows = [
                [start + index for index in row]
                for start, rows in zip(starts, packed, strict=False)
                for row in rows
            ]
            counts = list(map(len, packed))
        self._counts = counts
        self.rows = sum(counts)
        blocks = split_blocks(parts)
        # A batch spans at most two epochs, unless it is larger than the training set.
        cached = functools.lru_cache(maxsize=2 * len(parts))
        if weights:
            self._order = cached(functools.partial(_source_order, tuple(parts), counts, seed))
        elif group_by_length:
            order = functools.partial(_grouped_order, _lengths(examples), batch_size, seed)
            self._order = cached(lambda _, epoch: order(epoch))
        elif blocks is None:
            self._order = cached(lambda _, epoch: epoch_order(self.rows, seed, epoch))
        else:
            self._order = cached(lambda _, epoch: block_order(blocks, seed, epoch))

    def indices(self, step: int) -> list[int]:
        """Indices of the examples in the batch of a step."""
        return [index for row in self._rows_of(step) for index in row]

    def _rows_of(self, step: int) -> list[list[int]]:
        if step < 0:
            raise IndexError(f"step = {step}: expected 0 or more")
        first = step * self._batch_size
        if self._draws is None:
            places = [(0, place) for place in range(first, first + self._batch_size)]
            counts = [self.rows]
        else:
            places, counts = self._draws.places(first, self._batch_size), self._counts
        rows = [
            sum(counts[:source])
            + int(self._order(source, place // counts[source])[place % counts[source]])
            for source, place in places
        ]
        return [[row] for row in rows] if self._rows is None else [self._rows[row] for row in rows]

    def __getitem__(self, step: int) -> Batch:
        rows = [[self._examples[index] for index in row] for row in self._rows_of(step)]
        if self._packing_length is not None:
            return pad_packed(rows, self._packing_length)  # type: ignore[arg-type]
        flat = rows_of([row[0] for row in rows])
        return pad(flat, len(flat), self._multiple)

    def __iter__(self) -> Iterator[Batch]:
        step = 0
        while True:
            yield self[step]
            step += 1


def make_batches(
    examples: Sequence[Example | Pair],
    config: DataConfig,
    batch_size: int,
    seed: int,
    max_length: int | None = None,
    parts: Sequence[Part] | None = None,
) -> Batches:
    """Makes the batches of a configuration: in random order, grouped by length, or packed.

    Args:
        examples: the training set.
        config: `packing`, `packing_length`, `group_by_length`, and the lengths.
        batch_size: rows (or pairs) of a batch.
        seed: seed of the random orders.
        max_length: context length of the model in tokens, as given to `load_examples`.
        parts: the sources of the examples; default: one source.

    Raises:
        ValueError: no examples, or one that is longer than `packing_length`.
    """
    length = longest_row(config, max_length)
    if config.packing:
        return Batches(examples, batch_size, seed, packing_length=length, parts=parts)
    grouped = config.group_by_length
    multiple = min(64, length) if config.streaming else None  # does not read the examples
    return Batches(examples, batch_size, seed, multiple, grouped, parts=parts)


def prefetch(make: Callable[[int], Item], steps: Iterable[int]) -> Generator[Item, None, None]:
    """Yields make(step) for every step. A thread makes each result while the previous one is used.

    An error of `make` is raised in place of its result. Closing the iterator waits for the thread.
    """
    with ThreadPoolExecutor(1, "batches") as worker:
        waiting: Future[Item] | None = None
        for step in steps:
            following = worker.submit(make, step)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


def longest_row(config: DataConfig, max_length: int | None = None) -> int:
    """Length of the longest possible row of a configuration, in tokens with padding.

    Args:
        config: `packing`, `packing_length`, and the lengths.
        max_length: context length of the model, in tokens.
    """
    if config.packing and config.packing_length is not None:
        return config.packing_length
    pair = config.source_length + config.target_length
    length = max(config.sequence_length if kind == "text" else pair for kind in config.formats)
    length = min(length, length if max_length is None else max_length)
    multiple = 64 if length >= 64 else 8
    return length if config.packing else -(-length // multiple) * multiple


def _lengths(examples: Sequence[Example | Pair]) -> Int[np.ndarray, " examples"]:
    if isinstance(examples, StreamedExamples):
        return examples.lengths()
    return np.array([len(example.tokens) for example in examples])


def _source_order(
    parts: tuple[Part, ...], counts: Sequence[int], seed: int, source: int, epoch: int
) -> Int[np.ndarray, " rows"]:
    """Returns an order of one epoch of one of several sources."""
    blocks, place = parts[source].blocks, source_seed(seed, source, epoch)
    return epoch_order(counts[source], *place) if blocks is None else block_order(blocks, *place)


def _grouped_order(
    lengths: Int[np.ndarray, " examples"], batch_size: int, seed: int, epoch: int
) -> Int[np.ndarray, " examples"]:
    """Returns an order of one epoch in which the examples of a batch have similar lengths."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    # The first `begun` examples complete the last batch of the previous epoch.
    begun = min(-epoch * len(lengths) % batch_size, len(lengths))
    head, rest = order[:begun], order[begun:]
    if epoch == 0:
        place = int(np.argmax(lengths[rest]))
        rest[[0, place]] = rest[[place, 0]]
    cuts = np.arange(0, len(rest), _SORTED_BATCHES * batch_size)[1:]
    parts = [part[np.argsort(-lengths[part], kind="stable")] for part in np.split(rest, cuts)]
    rest = np.concatenate(parts)
    whole = len(rest) // batch_size
    first = 1 if epoch == 0 else 0  # the batch with the longest example stays first
    batches = rest[: whole * batch_size].reshape(whole, batch_size)
    rng.shuffle(batches[first:])
    return np.concatenate([head, batches.ravel(), rest[whole * batch_size :]])


def eval_batches(
    examples: Sequence[Example | Pair], batch_size: int, multiple: int | None = None
) -> Iterator[Batch]:
    """Yields all examples (or pairs) once, the longest first. Empty rows fill up the last batch."""
    multiple = length_multiple(examples) if multiple is None else multiple
    for indices in batches_by_length([len(example.tokens) for example in examples], batch_size):
        rows = rows_of([examples[index] for index in indices])
        yield pad(rows, batch_size * len(rows) // len(indices), multiple)


def length_multiple(examples: Sequence[Example | Pair]) -> int:
    """64 tokens, or less if all examples are shorter: then all batches have one shape.

    In that case the result is the longest length, rounded up to a multiple of 8.
    """
    longest = max((len(row.tokens) for row in rows_of(examples)), default=64)
    return min(64, -(-longest // 8) * 8)


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Returns groups of up to `batch_size` indices, the longest items first.

    The largest batch comes first, so that a lack of memory shows at once.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def pad(rows: Sequence[Example], batch_size: int, multiple: int) -> Batch:
    """Pads rows to one length, a multiple of `multiple`. Empty rows without targets fill it up."""
    _check(rows, batch_size, multiple)
    longest = max(1, *(len(row.tokens) for row in rows))  # streamed rows may be empty
    shape = (batch_size, -(-longest // multiple) * multiple)
    # Any padding id works: attention is causal, and padding is never a target.
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = row.tokens
        targets[index, : len(row.targets)] = row.targets
    return {"tokens": tokens, "targets": targets}


def hold_out(examples: Sequence[Item], fraction: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Splits off a random fraction of the examples (or pairs), at least one unless `fraction` is 0.

    Returns:
        The remaining examples and the held-out examples, both in their original order.

    Raises:
        ValueError: no example would remain.
    """
    chosen = held_indices(len(examples), fraction, seed)
    held = set(chosen)
    stay = [example for index, example in enumerate(examples) if index not in held]
    return stay, [examples[index] for index in chosen]


def held_indices(count: int, fraction: float, seed: int) -> list[int]:
    """Indices of the examples that `hold_out` holds out, in their order.

    Raises:
        ValueError: no example would remain.
    """
    held = max(1, round(count * fraction)) if fraction > 0 else 0
    if held >= count:
        raise ValueError(
            f"data.eval_fraction = {fraction} holds out {held} of {count} examples: expected a "
            "share that leaves at least one"
        )
    return sorted(np.random.default_rng(seed).permutation(count)[:held].tolist())


def _check(examples: Sequence[Example | Pair], batch_size: int, multiple: int) -> None:
    if not examples:
        raise ValueError("there are no examples")
    for name, value in (("batch_size", batch_size), ("multiple", multiple)):
        if value < 1:
            raise ValueError(f"{name} = {value}: expected a whole number of at least 1")
