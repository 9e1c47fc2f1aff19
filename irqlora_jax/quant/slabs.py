"""Matrices, some rows at a time: what is computed of them on the way never exists as a whole.

The last slab begins early where it would be short, so that all have the same number of rows.
"""

from collections.abc import Callable
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

_CACHED = 2**18  # weights that a CPU works on at a time: 1 MB
_WIDE = 2**26  # and any other device: 256 MB, so that few matrices need more than one slab
Rows = TypeVar("Rows")


def slab_rows(shape: tuple[int, int]) -> int:
    """How many rows of a matrix are a slab on this machine's devices."""
    weights = _CACHED if jax.default_backend() == "cpu" else _WIDE
    rows, columns = shape
    return min(rows, max(1, weights // columns))


def rows_of(x: Array, start: Array | int, count: int) -> Array:
    """Some rows of x, or x itself if they are all."""
    if x.shape[0] == count:
        return x
    # XLA would widen all of a bfloat16 matrix, which a CPU cannot slice, before the loop.
    x, start = lax.optimization_barrier((x, start))
    return lax.dynamic_slice_in_dim(x, start, count)


def map_slabs(work: Callable[[Array | int], Rows], rows: int, count: int) -> Rows:
    """What work(start) computes of `count` rows from start on, arrays [count, ...], for all."""
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
    """The sum of work(start, new) over all slabs; `new` are the rows that no slab before it had."""

    def step(i: Array | int, total: Array | float) -> Array:
        start = jnp.minimum(i * count, rows - count)
        new = start + jnp.arange(count) >= i * count
        return total + work(start, new[:, None])

    like = jax.eval_shape(step, 0, 0.0)
    return lax.fori_loop(0, -(-rows // count), step, jnp.zeros(like.shape, like.dtype))
