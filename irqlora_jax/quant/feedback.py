"""Rounding with error feedback (GPTQ, arXiv 2210.17323).

Columns are rounded one after the other. The error of a column is passed on to the columns that are
not rounded yet, so that the outputs for typical inputs change least. The released code's order of
operations is kept: within 128 columns, each column updates the next ones; all later columns are
updated once, by a matrix product.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Float32, Int, UInt8

from irqlora_jax.text import require

_COLUMNS = 128
RoundColumn = Callable[[Array, Array], tuple[Array, Array]]
"""(column [out], its index) -> its codes uint8 [out], and the values they stand for."""


def check_moments(gram: Float[Array, "in in"]) -> Float32[Array, " in"]:
    """The diagonal of the second moments: one number for each input.

    Raises:
        ValueError: NaN, infinite or negative second moments (not while JAX traces a function).
    """
    diagonal = jnp.diagonal(gram).astype(jnp.float32)
    fine = jnp.isfinite(gram).all() & (diagonal >= 0).all()
    wrong = "a matrix with NaN, infinite or negative moments"
    require(isinstance(fine, Tracer) or bool(fine), "gram", wrong, "X^T X")
    return diagonal


def damped_moments(gram: Float[Array, "in in"], damping: float) -> Float32[Array, "in in"]:
    """H + d I, where d is this fraction of the mean diagonal of H.

    A moment of 0 counts as 1: such an input has no effect, and must not make the matrix singular.

    Raises:
        ValueError: negative damping, or as in `check_moments`.
    """
    require(damping >= 0, "damping", damping, "0 or more")
    diagonal = check_moments(gram)
    diagonal = jnp.where(diagonal == 0, 1, diagonal)
    step = damping * diagonal.mean()
    identity = jnp.eye(len(gram), dtype=bool)
    return jnp.where(identity, diagonal + step, gram.astype(jnp.float32))


def feedback_factor(gram: Float[Array, "in in"], damping: float = 0.01) -> Float32[Array, "in in"]:
    """Upper Cholesky factor U of the inverse of the damped second moments: U^T U = (H + d I)^-1.

    While JAX traces a function, the values are unknown, and moments are not refused.

    Args:
        gram: H, the sum or the mean of x x^T over the inputs x of the layer.
        damping: d is this fraction of the mean diagonal of H.

    Raises:
        ValueError: NaN, infinite or negative second moments, or too few different inputs: the
            damped matrix has no Cholesky factor.
    """
    damped = damped_moments(gram, damping)
    identity = jnp.eye(len(gram), dtype=jnp.float32)
    inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(damped), True), identity)
    factor = jnp.linalg.cholesky(inverse, upper=True)
    check_factor(factor, damping)
    return factor


def check_factor(factor: Float32[Array, "in in"], damping: float) -> None:
    """Refuses a Cholesky factor that does not exist.

    Raises:
        ValueError: NaN in the factor, unless JAX traces a function.
    """
    fine = jnp.isfinite(factor).all()
    more = "more tokens (calibrate.rows) than the layer has inputs"
    accepted = f"more damping (calibrate.damping), or {more}"
    require(isinstance(fine, Tracer) or bool(fine), "damping", damping, accepted)


def round_with_feedback(
    weight: Float32[Array, "out in"],
    factor: Float32[Array, "in in"],
    round_column: RoundColumn,
    order: Int[Array, " in"] | None = None,
) -> UInt8[Array, "out in"]:
    """The codes of a matrix, whose columns are rounded one after the other.

    Args:
        weight: the matrix.
        factor: `feedback_factor` of the inputs' second moments; with an order, of `gram[order][:,
            order]`.
        round_column: rounds one column. Its scales and shifts do not depend on other columns.
        order: the columns in the order in which they are rounded; None: from left to right. The
            largest moments first is better if the scales are fixed ("act-order").
    """
    columns = weight.shape[1]
    index = jnp.arange(columns) if order is None else order
    width = min(_COLUMNS, columns)
    padding = -columns % width
    # Columns behind the last one: they get no error, and pass none on.
    work = jnp.pad(weight[:, index], ((0, 0), (0, padding)))
    index = jnp.pad(index, (0, padding))
    upper = jnp.pad(factor, ((0, padding), (0, padding)))
    upper += jnp.diag((jnp.arange(columns + padding) >= columns).astype(jnp.float32))

    def round_part(place: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        work, codes = carry
        start = place * width
        part = lax.dynamic_slice_in_dim(work, start, width, 1)
        own = lax.dynamic_slice(upper, (start, start), (width, width))

        def step(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            part, errors, codes = carry
            code, value = round_column(part[:, j], index[start + j])
            error = (part[:, j] - value) / own[j, j]
            later = jnp.where(jnp.arange(width) > j, own[j], 0)
            codes = codes.at[:, start + j].set(code)
            return part - jnp.outer(error, later), errors.at[:, j].set(error), codes

        errors = jnp.zeros_like(part)
        _, errors, codes = lax.fori_loop(0, width, step, (part, errors, codes))
        across = lax.dynamic_slice_in_dim(upper, start, width, 0)
        across = jnp.where((jnp.arange(columns + padding) >= start + width)[None], across, 0)
        return work - jnp.matmul(errors, across, precision="highest"), codes

    codes = jnp.zeros(work.shape, jnp.uint8)
    _, codes = lax.fori_loop(0, (columns + padding) // width, round_part, (work, codes))
    codes = codes[:, :columns]
    return codes if order is None else jnp.zeros_like(codes).at[:, order].set(codes)
