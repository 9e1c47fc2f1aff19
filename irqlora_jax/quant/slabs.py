"""Processes a matrix in slabs of rows, so that intermediates are never materialized as a whole.

If the last slab would be short, it starts earlier, so that all slabs have the same number of rows.
"""

from collections.abc import Callable
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Shaped

_CACHED = 2**18  # weights in a slab on a CPU: 1 MB
_WIDE = 2**26  # weights in a slab elsewhere: 256 MB, so that most matrices need a single slab
Rows = TypeVar("Rows")


def slab_rows(shape: tuple[int, int]) -> int:
    """Number of rows in a slab of a matrix on jax's default backend."""
    weights = _CACHED if jax.default_backend() == "cpu" else _WIDE
    rows, columns = shape
    return min(rows, max(1, weights // columns))


def rows_of(x: Array, start: Array | int, count: int) -> Array:
    """`count` rows of x from `start` on; x itself if it has no other rows."""
    if x.shape[0] == count:
        return x
    # Otherwise XLA converts a whole bfloat16 matrix, which CPUs cannot slice, before the loop.
    x, start = lax.optimization_barrier((x, start))
    return lax.dynamic_slice_in_dim(x, start, count)


def map_slabs(work: Callable[[Array | int], Rows], rows: int, count: int) -> Rows:
    """Concatenates the results of work(start), arrays [count, ...], over all slabs."""
    if count == rows:
        return work(0)

    def step(i: Array, results: Rows) -> Rows:
        start = jnp.minimum(i * count, rows - count)

        def place(whole: Array, part: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(whole, part, start, 0)

        return cast(Rows, jax.tree.map(place, results, work(start)))

    like = jax.eval_shape(work, 0)
    results = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), like)
    return lax.fori_loop(0, -(-rows // count), step, results)


def sum_slabs(
    work: Callable[[Array | int, Bool[Array, "count 1"]], Array], rows: int, count: int
) -> Array:
    """Sums work(start, new) over all slabs. `new` marks the rows that no earlier slab had."""

    def step(i: Array | int, total: Array | float) -> Array:
        start = jnp.minimum(i * count, rows - count)
        new = start + jnp.arange(count) >= i * count
        return total + work(start, new[:, None])

    like = jax.eval_shape(step, 0, 0.0)
    return lax.fori_loop(0, -(-rows // count), step, jnp.zeros(like.shape, like.dtype))


def cut_blocks(rows: Shaped[Array, "rows in"], size: int) -> Shaped[Array, "blocks size"]:
    """The blocks of some rows, one row after the other. Zeros fill the last block of a row."""
    return jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % size))).reshape(-1, size)
