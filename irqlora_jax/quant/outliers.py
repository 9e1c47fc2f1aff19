"""Outliers: the few weights of a matrix that keep 16 bits.

They are chosen first. Something else takes their places, and the rest of the quantizer sees only
that. `quant.outliers` is their exact share of the weights of a matrix, so that the shapes of a base
follow from its configuration.

A list over the whole matrix, in row order, holds them. So rows may have different numbers of
outliers: most of the large weights of a trained matrix are in few rows and columns. An outlier
takes 32 bits: a float16 and the uint16 index of its column. Each row takes 16 more bits for the
number of its outliers, 16 / in bits a weight.

float16 has 11 significant bits, so it holds every bfloat16 weight exactly from 6e-5 to 65,504.
bfloat16 has only 8.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float16, Int, Int32, UInt16

from irqlora_jax.text import require

LARGEST = 65504.0
"""The largest float16."""
_MOST_COLUMNS = 2**16 - 1


class Outliers(NamedTuple):
    """The outliers of a matrix, in row order.

    Attributes:
        values: their weights.
        columns: their columns.
        counts: the number of outliers in every row.
    """

    values: Float16[Array, " n"]
    columns: UInt16[Array, " n"]
    counts: UInt16[Array, " out"]

    def rows(self) -> Int32[Array, " n"]:
        """The row of every outlier."""
        rows = jnp.arange(self.counts.size, dtype=jnp.int32)
        return jnp.repeat(rows, self.counts, total_repeat_length=self.values.size)

    def put(self, weight: Float[Array, "out in"]) -> Float[Array, "out in"]:
        """The matrix with the outliers in their places."""
        values = self.values.astype(weight.dtype)
        places = weight.at[self.rows(), self.columns.astype(jnp.int32)]
        return places.set(values, unique_indices=True, indices_are_sorted=True)

    def take_out(self, weight: Float[Array, "out in"]) -> Float[Array, "out in"]:
        """The matrix with 0 in the places of the outliers."""
        return self._replace(values=jnp.zeros_like(self.values)).put(weight)

    def put_rows(
        self, weight: Float[Array, "some in"], place: Int[Array, " out"]
    ) -> Float[Array, "some in"]:
        """Like `put`, for some rows of the matrix.

        Args:
            weight: the rows.
            place: where each row of the matrix is in `weight`; its number of rows, or more, if a
                row is not there.
        """
        places = weight.at[place[self.rows()], self.columns.astype(jnp.int32)]
        return places.set(self.values.astype(weight.dtype), mode="drop")


def outlier_count(shape: tuple[int, ...], share: float) -> int:
    """The number of outliers of a matrix: the share of its weights, rounded."""
    return round(share * shape[0] * shape[1])


def find_largest(size: Float[Array, "out in"], count: int) -> Bool[Array, "out in"]:
    """Marks exactly `count` of the largest numbers. Of equal ones, the first in row order.

    A bisection over the bits of float32, which order numbers of at least 0 as whole numbers. XLA's
    `top_k` is 10 times slower on a CPU (40 s for 45 million weights).

    Args:
        size: numbers of at least 0.
        count: from 1 to the number of weights.

    Examples:
        >>> find_largest(jnp.array([[3.0, 5.0, 1.0], [5.0, 3.0, 3.0]]), 3).tolist()
        [[True, True, False], [True, False, False]]
    """
    bits = lax.bitcast_convert_type(size.astype(jnp.float32), jnp.int32)
    limit = _bisect(lambda limit: jnp.sum(bits >= limit) >= count, 31)
    above, equal = bits > limit, bits == limit
    missing = count - above.sum()
    places = jnp.arange(size.size, dtype=jnp.int32).reshape(size.shape)
    end = _bisect(lambda end: jnp.sum(equal & (places < end)) <= missing, size.size.bit_length())
    return above | (equal & (places < end))


def _bisect(holds: Callable[[Array], Array], bits: int) -> Int32[Array, ""]:
    """The largest whole number of some bits for which something holds that holds for 0."""

    def step(i: Array, found: Array) -> Array:
        higher = found + (1 << (bits - 1 - i))
        return jnp.where(holds(higher), higher, found)

    return lax.fori_loop(0, bits, step, jnp.int32(0))


def split(weight: Float[Array, "out in"], chosen: Bool[Array, "out in"], count: int) -> Outliers:
    """The sparse part of a matrix.

    Args:
        weight: the matrix. Weights beyond the range of float16 become its largest number.
        chosen: marks the outliers.
        count: their number.
    """
    flat = jnp.nonzero(chosen.ravel(), size=count)[0]
    values = jnp.clip(weight.ravel()[flat].astype(jnp.float32), -LARGEST, LARGEST)
    columns = flat % weight.shape[1]
    counts = chosen.sum(1, dtype=jnp.int32)
    return Outliers(
        values.astype(jnp.float16), columns.astype(jnp.uint16), counts.astype(jnp.uint16)
    )


def check_outliers(shape: tuple[int, ...], largest: float | None) -> None:
    """Checks that the sparse part can hold outliers of a matrix.

    Args:
        shape: of the matrix.
        largest: magnitude of its largest weight; None if unknown.

    Raises:
        ValueError: a row is too long, or a weight too large.
    """
    require(shape[1] <= _MOST_COLUMNS, "inputs", shape[1], f"{_MOST_COLUMNS} or fewer for outliers")
    fits = largest is None or largest <= LARGEST
    accepted = f"{LARGEST:.0f} or less for outliers, which are float16"
    require(fits, "largest weight", largest, accepted)
