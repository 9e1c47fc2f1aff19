"""Sorts within a GPU kernel (Pallas, Triton backend): a thread sorts a column of a buffer.

A column consists of chunks that fit into registers. Batcher's odd-even merge sort sorts each chunk.
Then a bitonic network merges pairs of sorted runs: its steps between chunks load two chunks at a
time, and its steps within a chunk stay in registers. The loops over chunks are real loops, so the
program does not grow with the column.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float32, Int32

Pairs = list[tuple[int, int]]


def sort_columns(
    read: Callable[[Array], Float32[Array, " columns"]],
    columns_ref: Any,
    n: int,
    chunk: int,
    barrier: Callable[[], None],
) -> None:
    """Sorts every column, -0 before 0.

    Args:
        read: returns row i of the input; called once for each i = 0 .. n - 1.
        columns_ref: [n or more, columns], float32; rows 0 .. n - 1 are written.
        n: number of rows, a power of two.
        chunk: rows in registers at a time, a power of two up to n.
        barrier: after it, every thread can read what was written before it.
    """
    n_chunks = n // chunk
    rows = range(chunk)

    def load(i: Array) -> list[Array]:
        return [_key(plt.load(columns_ref.at[i * chunk + row])) for row in rows]

    def store(i: Array, keys: list[Array]) -> None:
        for row in rows:
            plt.store(columns_ref.at[i * chunk + row], _value(keys[row]))

    def each(n: Any, work: Callable[[Array], None]) -> None:
        lax.fori_loop(0, n, lambda i, carry: (work(i), carry)[1], 0)
        barrier()

    def sort_one(i: Array) -> None:
        keys = [_key(read(i * chunk + row)) for row in rows]
        store(i, _exchanged(keys, odd_even_pairs(chunk)))

    def exchange(one: Array, other: Array, mirrored: bool) -> None:
        turn = slice(None, None, -1 if mirrored else 1)
        pairs = list(zip(load(one), load(other)[turn], strict=True))
        store(one, [jnp.minimum(a, b) for a, b in pairs])
        store(other, [jnp.maximum(a, b) for a, b in pairs][turn])

    def merge(level: Array) -> None:
        """Merges pairs of sorted runs of 2**level chunks."""

        def mirror(i: Array) -> None:
            one = i + ((i >> level) << level)
            exchange(one, one ^ ((2 << level) - 1), mirrored=True)

        def halve(j: Array) -> None:
            distance = level - 1 - j

            def straight(i: Array) -> None:
                one = i + ((i >> distance) << distance)
                exchange(one, one + (1 << distance), mirrored=False)

            each(n_chunks // 2, straight)

        def finish(i: Array) -> None:
            store(i, _exchanged(load(i), bitonic_pairs(chunk)))

        each(n_chunks // 2, mirror)
        each(level, halve)
        each(n_chunks, finish)

    each(n_chunks, sort_one)
    if n_chunks > 1:
        each(n_chunks.bit_length() - 1, merge)


def odd_even_pairs(n: int) -> Pairs:
    """Batcher's network, which sorts n = 2**k numbers.

    Process the pairs in order: the smaller number of a pair goes to its first place.
    """
    if n == 1:
        return []
    half = odd_even_pairs(n // 2)
    return half + [(i + n // 2, j + n // 2) for i, j in half] + _merge_pairs(0, n, 1)


def _merge_pairs(start: int, n: int, stride: int) -> Pairs:
    """Merges the two sorted halves of the places start, start + stride, .. below start + n."""
    if 2 * stride >= n:
        return [(start, start + stride)]
    even = _merge_pairs(start, n, 2 * stride)
    odd = _merge_pairs(start + stride, n, 2 * stride)
    rest = range(start + stride, start + n - stride, 2 * stride)
    return even + odd + [(i, i + stride) for i in rest]


def bitonic_pairs(n: int) -> Pairs:
    """Sorts n = 2**k numbers that rise and then fall, or fall and then rise."""
    distances = [n >> k for k in range(1, n.bit_length())]
    return [(i, i + d) for d in distances for i in range(n) if not i & d]


def _exchanged(keys: list[Array], pairs: Pairs) -> list[Array]:
    keys = list(keys)
    for i, j in pairs:
        keys[i], keys[j] = jnp.minimum(keys[i], keys[j]), jnp.maximum(keys[i], keys[j])
    return keys


def _key(x: Float32[Array, " columns"]) -> Int32[Array, " columns"]:
    """Integers in the order of the floats, -0 before 0."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _value(key: Int32[Array, " columns"]) -> Float32[Array, " columns"]:
    return lax.bitcast_convert_type(key ^ ((key >> 31) & 0x7FFFFFFF), jnp.float32)
