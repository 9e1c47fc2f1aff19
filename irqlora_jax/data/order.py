"""Random orders of rows, as pure functions of the seed and the place in the stream."""

import dataclasses
import threading
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

_BLOCK = 4096  # draws whose sources come from one random generator
POOL = 16_384
"""Least number of rows that are shuffled together where blocks are read one after the other."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of a training set.

    Attributes:
        count: number of its examples.
        weight: share of the draws, relative to the other parts; None for all: every example once
            an epoch.
        blocks: sizes of groups of examples that are read together; None if each is read alone.
    """

    count: int
    weight: float | None = None
    blocks: tuple[int, ...] | None = None


def epoch_order(count: int, *seed: int) -> Int[np.ndarray, " rows"]:
    """A random order of all rows. `seed` includes the epoch."""
    return np.random.default_rng(seed).permutation(count)


def block_order(blocks: Sequence[int], *seed: int) -> Int[np.ndarray, " rows"]:
    """A random order that reads blocks of rows one after the other.

    The blocks come in a random order. Neighbors in it form a pool of at least 16,384 rows, and the
    rows of a pool come in a random order. So a reader holds the blocks of one pool.

    Args:
        blocks: number of rows of each block, in the order of the rows.
        seed: includes the epoch.
    """
    rng = np.random.default_rng(seed)
    ends = np.cumsum(blocks).tolist()
    chosen: list[Int[np.ndarray, " rows"]] = []
    pools: list[Int[np.ndarray, " rows"]] = []
    held = 0
    for block in rng.permutation(len(blocks)):
        end = int(ends[block])
        chosen.append(np.arange(end - blocks[block], end))
        held += blocks[block]
        if held >= POOL:
            pools.append(rng.permutation(np.concatenate(chosen)))
            chosen, held = [], 0
    if chosen:
        pools.append(rng.permutation(np.concatenate(chosen)))
    return np.concatenate(pools)


def split_blocks(parts: Sequence[Part]) -> list[int] | None:
    """The blocks of all parts together; None if no part has blocks."""
    if all(part.blocks is None for part in parts):
        return None
    found: list[int] = []
    for part in parts:
        whole, rest = divmod(part.count, POOL)
        found += part.blocks or [POOL] * whole + [rest] * (rest > 0)
    return found


class WeightedDraws:
    """An endless stream of draws from several sources, at random by weight.

    Draw i is a function of the seed and i alone.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        """`weights`: of the sources, positive; they need not sum to 1."""
        self._bounds = np.cumsum(weights) / np.sum(weights)
        self._seed = seed
        # before[b][s]: draws from source s in front of block b.
        self._before = [np.zeros(len(weights), int)]
        self._lock = threading.Lock()

    def places(self, first: int, count: int) -> list[tuple[int, int]]:
        """For each of `count` draws from `first` on: the source, and how many draws from the same
        source came before."""
        found: list[tuple[int, int]] = []
        for block in range(first // _BLOCK, (first + count - 1) // _BLOCK + 1):
            sources, seen = self._sources(block), self._count_before(block).copy()
            for place, source in enumerate(sources, block * _BLOCK):
                if first <= place < first + count:
                    found.append((int(source), int(seen[source])))
                seen[source] += 1
        return found

    def _sources(self, block: int) -> Int[np.ndarray, " draws"]:
        # The third number keeps these seeds apart from the seeds of the orders.
        drawn = np.random.default_rng((self._seed, block, 1)).random(_BLOCK)
        found = np.searchsorted(self._bounds, drawn, side="right")
        return np.minimum(found, len(self._bounds) - 1)

    def _count_before(self, block: int) -> Int[np.ndarray, " sources"]:
        with self._lock:
            while len(self._before) <= block:
                drawn = self._sources(len(self._before) - 1)
                counts = np.bincount(drawn, minlength=len(self._bounds))
                self._before.append(self._before[-1] + counts)
            return self._before[block]


def source_seed(seed: int, source: int, epoch: int) -> tuple[int, int, int]:
    """Seed of the order of one epoch of one of several sources."""
    return seed, epoch, 2 + source
