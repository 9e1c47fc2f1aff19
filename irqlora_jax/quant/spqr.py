"""SpQR (arXiv 2306.03078): integers with error feedback, and outliers that stay as they are.

It differs from GPTQ (`feedback.py`) as follows:

- The scale and the zero point of a group of columns are chosen when the loop reaches the group,
  from weights that already contain the errors of earlier columns. The range need not contain 0, and
  the zero point is not rounded.
- Outliers do not take part in this choice. They are the weights without which the rest of the group
  has a far smaller error.
- A weight whose own error is too large becomes an outlier. It keeps its value, errors of earlier
  columns included, and passes no error on.
- Scales and zero points may be quantized, over 16 rows of the same group of columns.

OAC (arXiv 2405.15025) is the same with another Gram matrix: the mean of G^T G over the gradients G
[out, in] of the loss with respect to the weights, one per sample. There is no released code of OAC,
so this is our reading of the paper.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped, UInt8

from irqlora_jax.quant.entropy import quotient
from irqlora_jax.quant.feedback import feedback_factor
from irqlora_jax.text import require

_SMALLEST = 1e-9  # the smallest divisor, as in the released code
STATISTIC_ROWS = 16
"""Rows whose scales, or zero points, share a second level."""


class Spqr(NamedTuple):
    """A matrix from `spqr`: scale * (code - zero), except outliers.

    Attributes:
        weight: the dequantized matrix, with its outliers.
        codes: an outlier has the code of 0.
        outliers: where `weight` holds an outlier.
        scale: of each row and group. Group g has the columns at the places g * group to (g + 1) *
            group - 1 of the order in which they are rounded.
        zero: zero points, not rounded.
    """

    weight: Float32[Array, "out in"]
    codes: UInt8[Array, "out in"]
    outliers: Bool[Array, "out in"]
    scale: Float32[Array, "out groups"]
    zero: Float32[Array, "out groups"]


def spqr(
    weight: Float[Array, "out in"],
    gram: Float[Array, "in in"],
    bits: int,
    group: int,
    threshold: float = float("inf"),
    *,
    damping: float = 1.0,
    order: Int[Array, " in"] | None = None,
    symmetric: bool = False,
    statistic_bits: int | None = None,
    leave_one_out: bool = True,
) -> Spqr:
    """Quantizes a matrix with SpQR.

    With U = `feedback_factor(gram, damping)`, the limit is threshold * the mean over the columns c
    of var(w_c) / U_cc^2. An outlier has (w - q)^2 / U_cc^2 > limit (section 4 of the paper).

    Args:
        weight: the matrix.
        gram: X^T X of the inputs, or G^T G of gradients (OAC).
        bits: of a code.
        group: columns that share a scale and a zero point.
        threshold: of outliers, relative; infinity: no outliers.
        damping: as a fraction of the mean diagonal of `gram`. The paper uses 1 with groups of 16.
        order: the columns in the order in which they are rounded; None: from left to right.
        symmetric: fixes the zero point in the middle of the codes.
        statistic_bits: bits of the codes of scales and zero points; None: not quantized.
        leave_one_out: chooses scales without likely outliers. False: with all weights
            ("simplified" in the released code).

    Raises:
        ValueError: `group` does not divide the columns, or `STATISTIC_ROWS` the rows if statistics
            are quantized; an error of `feedback_factor`.
    """
    rows, columns = weight.shape
    require(columns % group == 0, "group", group, f"a divisor of the {columns} columns")
    if statistic_bits is not None:
        require(rows % STATISTIC_ROWS == 0, "rows", rows, f"a multiple of {STATISTIC_ROWS}")
    order = jnp.arange(columns) if order is None else order
    factor = feedback_factor(gram[order][:, order], damping)
    found = _spqr(
        weight.astype(jnp.float32)[:, order],
        factor,
        jnp.float32(threshold),
        bits,
        group,
        symmetric,
        statistic_bits,
        leave_one_out and threshold != float("inf"),
    )
    weight, codes, outliers = (jnp.zeros_like(x).at[:, order].set(x) for x in found[:3])
    return Spqr(weight, codes, outliers, *found[3:])


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7))
def _spqr(
    weight: Array,
    factor: Array,
    threshold: Array,
    bits: int,
    group: int,
    symmetric: bool,
    statistic_bits: int | None,
    leave_one_out: bool,
) -> Spqr:
    """As `spqr`, for columns in the order of rounding."""
    rows, columns = weight.shape
    diagonal = jnp.diagonal(factor)
    limit = threshold * (weight.var(0, ddof=1) / diagonal**2).mean()

    def round_group(place: Array, found: Spqr) -> Spqr:
        start = place * group
        part = lax.dynamic_slice_in_dim(found.weight, start, group, 1)
        upper = lax.dynamic_slice(factor, (start, start), (group, group))
        own = jnp.diagonal(upper)
        fitted = part
        if leave_one_out:
            gain = leave_one_out_gain(part, own, bits, symmetric)
            fitted = _replace(part, gain > limit)
        scale, zero = _fit(fitted, bits, symmetric)
        if statistic_bits is not None:
            scale, zero = (_second_level(x, statistic_bits) for x in (scale, zero))

        def step(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            part, errors, codes, outliers = carry
            column = part[:, j]
            error = (column - _dequantize(_code(column, scale, zero, bits), scale, zero)) / own[j]
            outlier = error**2 > limit
            code = _code(jnp.where(outlier, 0, column), scale, zero, bits)
            value = jnp.where(outlier, column, _dequantize(code, scale, zero))
            error = (column - value) / own[j]
            later = jnp.where(jnp.arange(group) > j, upper[j], 0)
            return (
                (part - jnp.outer(error, later)).at[:, j].set(value),
                errors.at[:, j].set(error),
                codes.at[:, j].set(code.astype(jnp.uint8)),
                outliers.at[:, j].set(outlier),
            )

        codes, outliers = jnp.zeros(part.shape, jnp.uint8), jnp.zeros(part.shape, bool)
        carry = (part, jnp.zeros_like(part), codes, outliers)
        part, errors, codes, outliers = lax.fori_loop(0, group, step, carry)
        across = lax.dynamic_slice_in_dim(factor, start, group, 0)
        across = jnp.where((jnp.arange(columns) >= start + group)[None], across, 0)
        work = found.weight - jnp.matmul(errors, across, precision="highest")
        new = Spqr(part, codes, outliers, scale[:, None], zero[:, None])
        places = Spqr(start, start, start, place, place)
        put = functools.partial(lax.dynamic_update_slice_in_dim, axis=1)
        return jax.tree.map(put, found._replace(weight=work), new, places)

    statistics = jnp.zeros((rows, columns // group), jnp.float32)
    codes, outliers = jnp.zeros(weight.shape, jnp.uint8), jnp.zeros(weight.shape, bool)
    found = Spqr(weight, codes, outliers, statistics, statistics)
    return lax.fori_loop(0, columns // group, round_group, found)


def leave_one_out_gain(
    weight: Float32[Array, "out group"],
    diagonal: Float32[Array, " group"],
    bits: int,
    symmetric: bool = False,
) -> Float32[Array, "out group"]:
    """How much the error of a row falls if one of its weights is left out.

    The error is the sum of (w - q)^2 / U_cc^2, with the scale and the zero point that fit the
    weights which are counted.

    Args:
        weight: a group of columns.
        diagonal: U_cc of these columns.
        bits: of a code.
        symmetric: as for `spqr`.
    """

    def error(counted: Array) -> Array:
        scale, zero = _fit(weight, bits, symmetric, counted)
        codes = _code(weight, scale[:, None], zero[:, None], bits)
        off = (weight - _dequantize(codes, scale[:, None], zero[:, None])) / diagonal[None]
        return jnp.where(counted[None], off**2, 0).sum(1)

    group = weight.shape[1]
    without = lax.map(error, ~jnp.eye(group, dtype=bool))
    return error(jnp.ones(group, bool))[:, None] - without.T


def _replace(weight: Array, outliers: Array) -> Array:
    """Puts the mean of the rest of the row in the place of outliers."""
    count = jnp.maximum((~outliers).sum(1, dtype=jnp.float32), 1)
    rest = jnp.where(outliers, 0, weight).sum(1) / count
    return jnp.where(outliers, rest[:, None], weight)


def _fit(
    weight: Array, bits: int, symmetric: bool, counted: Array | None = None
) -> tuple[Float32[Array, " out"], Float32[Array, " out"]]:
    """The scale and the zero point of the range of every row."""
    low, high = weight, weight
    if counted is not None:
        low, high = jnp.where(counted[None], low, jnp.inf), jnp.where(counted[None], high, -jnp.inf)
    low, high = low.min(1), high.max(1)
    if symmetric:
        high = jnp.maximum(jnp.abs(low), high)
        low = jnp.where(low < 0, -high, low)
    nothing = (low == 0) & (high == 0)
    low, high = jnp.where(nothing, -1, low), jnp.where(nothing, 1, high)
    scale = quotient(high - low, jnp.full_like(low, 2**bits - 1))
    return scale, jnp.full_like(scale, 2 ** (bits - 1)) if symmetric else -low / scale


def _code(weight: Array, scale: Array, zero: Array, bits: int) -> Shaped[Array, "*shape"]:
    codes = jnp.round(quotient(weight, jnp.maximum(scale, _SMALLEST)) + zero)
    return jnp.clip(codes, 0, 2**bits - 1)


def _dequantize(codes: Array, scale: Array, zero: Array) -> Array:
    return scale * (codes - zero)


def _second_level(statistic: Float32[Array, " out"], bits: int) -> Float32[Array, " out"]:
    """Quantizes a scale, or a zero point, over 16 rows."""
    rows = statistic.reshape(-1, STATISTIC_ROWS)
    scale, zero = (x[:, None] for x in _fit(rows, bits, False))
    return _dequantize(_code(rows, scale, zero, bits), scale, zero).reshape(-1)
