"""Examples to batches, of few shapes so that few programs are compiled."""

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from irqlora_jax.data.examples import Example

Batch = dict[str, np.ndarray]
"""{"tokens": int32 [batch, seq], "targets": bool [batch, seq]}, padded on the right."""


class Batches:
    """Batches for training, as a pure function of the step.

    The examples are drawn without end: one random order of all of them after the other, so that
    each is seen once per epoch; a batch may hold the end of one epoch and the start of the next.
    `batches[step]` depends on the arguments and the step alone: training that goes on from a
    checkpoint sees what it would have seen.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        seed: int,
        multiple: int | None = None,
    ) -> None:
        """Keeps the examples.

        Args:
            examples: the training set.
            batch_size: rows of a batch; may be more than there are examples.
            seed: of the orders.
            multiple: the length of a batch is that of its longest row, rounded up to this (default:
                `length_multiple`).
        """
        multiple = length_multiple(examples) if multiple is None else multiple
        _check(examples, batch_size, multiple)
        self._examples, self._batch_size = examples, batch_size
        self._multiple = multiple
        # A batch touches two epochs at most, unless it is larger than the training set.
        self._order = functools.lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng((seed, epoch)).permutation(len(examples))
        )

    def indices(self, step: int) -> list[int]:
        """Which examples the batch of a step holds."""
        if step < 0:
            raise IndexError(f"step = {step}: accepted is 0 or more")
        count = len(self._examples)
        first = step * self._batch_size
        places = range(first, first + self._batch_size)
        return [int(self._order(place // count)[place % count]) for place in places]

    def __getitem__(self, step: int) -> Batch:
        rows = [self._examples[index] for index in self.indices(step)]
        return pad(rows, self._batch_size, self._multiple)

    def __iter__(self) -> Iterator[Batch]:
        step = 0
        while True:
            yield self[step]
            step += 1


def eval_batches(
    examples: Sequence[Example], batch_size: int, multiple: int | None = None
) -> Iterator[Batch]:
    """All examples once, the longest first; the last batch is filled up with empty rows."""
    multiple = length_multiple(examples) if multiple is None else multiple
    for indices in by_length([len(example.tokens) for example in examples], batch_size):
        yield pad([examples[index] for index in indices], batch_size, multiple)


def length_multiple(examples: Sequence[Example]) -> int:
    """64 tokens; where no example is that long, the longest one rounded up to 8, and one shape."""
    longest = max((len(example.tokens) for example in examples), default=64)
    return min(64, -(-longest // 8) * 8)


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in groups of up to `batch_size`, longest first (so that what does not fit into the
    memory fails at once)."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def pad(rows: Sequence[Example], batch_size: int, multiple: int) -> Batch:
    """Rows of one length, a multiple of `multiple`; missing rows have no targets."""
    _check(rows, batch_size, multiple)
    longest = max(len(row.tokens) for row in rows)
    shape = (batch_size, -(-longest // multiple) * multiple)
    # Any id will do: no token sees a later one, and no target stands there.
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = row.tokens
        targets[index, : len(row.targets)] = row.targets
    return {"tokens": tokens, "targets": targets}


def hold_out(
    examples: Sequence[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Splits off a random share (at least one example, unless `fraction` is 0).

    Returns:
        The examples that stay, and those held out; both in their order.

    Raises:
        ValueError: no example would stay.
    """
    count = len(examples)
    held = max(1, round(count * fraction)) if fraction > 0 else 0
    if held >= count:
        raise ValueError(
            f"data.eval_fraction = {fraction} holds out {held} of {count} examples: accepted is a "
            "share that leaves at least one"
        )
    chosen = set(np.random.default_rng(seed).permutation(count)[:held].tolist())
    stay = [example for index, example in enumerate(examples) if index not in chosen]
    return stay, [examples[index] for index in sorted(chosen)]


def _check(examples: Sequence[Example], batch_size: int, multiple: int) -> None:
    if not examples:
        raise ValueError("there are no examples")
    for name, value in (("batch_size", batch_size), ("multiple", multiple)):
        if value < 1:
            raise ValueError(f"{name} = {value}: accepted is a whole number of at least 1")
