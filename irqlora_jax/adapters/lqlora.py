"""LQ-LoRA (arXiv 2311.12023): W as a low-rank matrix plus a quantized one, by turns.

Unlike LoftQ (`loftq.py`), it begins with the low-rank matrix, so the quantizer never sees the
largest singular directions of W. In turn t, with Q_0 = 0,

    s B A = the best rank-r approximation of W - Q_(t-1),    Q_t = quantize(W - s B A)

It stops as soon as the error |W - Q_t - s B A| grows, and keeps the turn before. The released code
returns the worse last turn.

The error can be weighed by the Fisher information F, the sum of the squared gradients of a text's
sequences: |sqrt(F) * (W - Q - s B A)| with the elementwise product. The best approximation for
general weights is not known, but it is for weights of rows and columns, F_ij ~ d_i e_j:

    s B A = D^-1 (the best rank-r approximation of D (W - Q) E) E^-1

with D = diag(sqrt(d)), the means of F over each row, and E = diag(sqrt(e)), over each column.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, PRNGKeyArray

from irqlora_jax.adapters.loftq import EXACT_UP_TO, exact_svd, product, randomized_svd
from irqlora_jax.adapters.method import Initialization
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.quant.inputs import InputMoments, as_moments
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.quant.slabs import map_slabs, rows_of, slab_rows, sum_slabs
from irqlora_jax.text import require

Sides = Literal["none", "rows", "columns", "both"]
SIDES = "none", "rows", "columns", "both"


class Decomposition(NamedTuple):
    """W ~ quantized + scaling * lora_B lora_A.

    Attributes:
        quantized: Q.
        lora_a: A.
        lora_b: B.
        errors: of every turn that was run, in the order of the turns. Without weights, Frobenius
            norms of what remains; with weights, relative to a mean weight of 1.
    """

    quantized: QTensor
    lora_a: Float[Array, "rank in"]
    lora_b: Float[Array, "out rank"]
    errors: tuple[float, ...]


class Weights(NamedTuple):
    """Weights of squared errors, relative to their mean."""

    each: Array | None
    rows: Array
    columns: Array


def lqlora(
    weight: Float[Array, "out in"],
    config: QuantConfig,
    rank: int,
    scaling: float,
    iterations: int,
    key: PRNGKeyArray,
    dtype: DTypeLike = jnp.float32,
    *,
    fisher: Float[Array, "out in"] | None = None,
    sides: Sides = "both",
    keep_last: bool = False,
    gram: Float[Array, "in in"] | InputMoments | None = None,
    damping: float = 0.0,
) -> Decomposition:
    """Computes Q, lora_A and lora_B with W ~ Q + scaling * lora_B lora_A.

    Each row of A has the norm of its column of B. Every turn of a larger layer begins its
    `randomized_svd` with the same random directions, so chance does not end the turns.

    Args:
        weight: W (float32, bfloat16 or float16).
        config: configuration of the quantizer, as for `quantize`.
        rank: r.
        scaling: s, the factor of the update: alpha / rank.
        iterations: largest number of turns.
        key: random key of `randomized_svd`; without effect on small layers.
        dtype: type of the pair. The next turn also quantizes its rounding error.
        fisher: F, the weights of the squared errors, 0 or more; None: all equal. Its scale has no
            effect.
        sides: where F has an effect on the pair: weights of rows, of columns, or of both.
        keep_last: return the last turn, whose error is larger, as the released code does.
        gram: X^T X of the layer's inputs, for a quantizer that needs it.
        damping: added to F, as a fraction of its mean; and as for `quantize`.

    Raises:
        ValueError: fewer than 1 turn, a rank below 1, no such sides, F of another shape, negative
            or not finite, a row or column of F that is 0 without damping, or an error of
            `quantize`.

    Examples:
        >>> weight = jax.random.normal(jax.random.key(0), (24, 64))
        >>> config = QuantConfig(format="nf2", calibration="none")
        >>> found = lqlora(weight, config, 4, scaling=2.0, iterations=9, key=jax.random.key(1))
        >>> found.lora_a.shape, found.lora_b.shape
        ((4, 64), (24, 4))
        >>> rest = weight - found.quantized.dequantize() - 2.0 * found.lora_b @ found.lora_a
        >>> abs(float(jnp.linalg.norm(rest)) - min(found.errors)) < 1e-4
        True
    """
    for name, value in (("iterations", iterations), ("rank", rank)):
        require(value >= 1, name, value, "a whole number of at least 1")
    weights = None if fisher is None else _weights(weight, fisher, sides, damping)
    gram = as_moments(gram, damping) if gram is not None and config.needs_inputs else None
    quantized, best, errors = None, None, []
    for _ in range(iterations):
        given = quantized, weights, jnp.float32(scaling), key
        quantized = None  # keeps only two in memory: this one and the best
        a, b = _pair(weight, *given, rank=rank, dtype=jnp.dtype(dtype))
        del given
        minus = b.astype(jnp.float32), a.astype(jnp.float32) * jnp.float32(scaling)
        quantized = quantize(weight, config, minus=minus, gram=gram)
        each = None if weights is None else weights.each
        errors.append(float(_error(weight, quantized, minus, each)))
        grew = best is not None and errors[-1] > errors[-2]
        if best is None or keep_last or not grew:
            best = quantized, a, b
        if grew:
            break
    assert best is not None
    return Decomposition(*best, tuple(errors))


def _weights(weight: Array, fisher: Array, sides: Sides, damping: float) -> Weights:
    require(sides in SIDES[1:], "sides", sides, ", ".join(SIDES[1:]))
    require(fisher.shape == weight.shape, "fisher", fisher.shape, f"shape {weight.shape}")
    least, largest = float(fisher.min()), float(fisher.max())
    fine = least >= 0 and largest < jnp.inf
    require(fine, "fisher (least, largest)", (least, largest), "finite numbers of 0 or more")
    require(damping >= 0, "damping", damping, "0 or more")
    found = _relative(fisher, sides, jnp.float32(damping))
    empty = min(float(found.rows.min()), float(found.columns.min())) == 0
    accepted = "more than 0, because a row or column of the matrix has no gradients"
    require(not empty, "damping", damping, accepted)
    return found


@functools.partial(jax.jit, static_argnames="sides")
def _relative(fisher: Array, sides: Sides, damping: Array) -> Weights:
    each = fisher.astype(jnp.float32)
    mean = each.mean()
    each = (each / jnp.where(mean > 0, mean, 1) + damping) / (1 + damping)
    rows, columns = (jnp.sqrt(each.mean(axis)) for axis in (1, 0))
    rows = jnp.ones_like(rows) if sides == "columns" else rows
    columns = jnp.ones_like(columns) if sides == "rows" else columns
    return Weights(each, rows, columns)


@functools.partial(jax.jit, static_argnames=("rank", "dtype"))
def _pair(
    weight: Array,
    quantized: QTensor | None,
    weights: Weights | None,
    scale: Array,
    key: Array,
    rank: int,
    dtype: DTypeLike,
) -> tuple[Array, Array]:
    """The best pair for W - Q."""
    rows, columns = weight.shape
    count = slab_rows((rows, columns))
    dense = None if quantized is None else quantized.dequantize_rows()

    def remaining(start: Array | int) -> Array:
        part = rows_of(weight, start, count).astype(jnp.float32)
        part = part if dense is None else part - dense(start, count)
        if weights is None:
            return part
        return rows_of(weights.rows[:, None], start, count) * part * weights.columns[None]

    if min(weight.shape) <= max(EXACT_UP_TO, 8 * rank):
        u, s, v = exact_svd(map_slabs(remaining, rows, count), rank)
    else:
        u, s, v = randomized_svd(remaining, (rows, columns), count, rank, key)
    if weights is not None:
        u, v = u / weights.rows[:, None], v / weights.columns[None]
        lengths = jnp.linalg.norm(u, axis=0), jnp.linalg.norm(v, axis=1)
        u, v, s = u / lengths[0][None], v / lengths[1][:, None], s * lengths[0] * lengths[1]
    size, spare = jnp.sqrt(s / scale), rank - s.size
    a = jnp.pad(size[:, None] * v, ((0, spare), (0, 0))).astype(dtype)
    b = jnp.pad(u * size[None], ((0, 0), (0, spare))).astype(dtype)
    return a, b


@jax.jit
def _error(
    weight: Array, quantized: QTensor, minus: tuple[Array, Array], each: Array | None
) -> Float32[Array, ""]:
    """The norm of what remains, weighed by `each` if it is given."""
    rows, columns = weight.shape
    count, dense = slab_rows((rows, columns)), quantized.dequantize_rows()
    left, right = minus

    def squares(start: Array | int, new: Bool[Array, "count 1"]) -> Array:
        part = rows_of(weight, start, count).astype(jnp.float32) - dense(start, count)
        part = (part - product(rows_of(left, start, count), right)) ** 2
        part = part if each is None else part * rows_of(each, start, count)
        return jnp.sum(jnp.where(new, part, 0))

    return jnp.sqrt(sum_slabs(squares, rows, count))


@dataclasses.dataclass(frozen=True)
class LqloraOptions:
    """Options of LQ-LoRA."""

    iterations: int = 100
    """Largest number of turns. They end as soon as the error grows, often after 10 to 30."""
    weights: Sides = "none"
    """Weights of the error, by the squared gradients of a text (Fisher information): of the rows,
    of the columns, or of both as in the paper; needs `calibrate.data` and `calibrate.metric`
    gradients. "none": all weights count the same."""
    keep_last: bool = False
    """Keep the turn whose error is larger, as in the released code (for parity only)."""

    def __post_init__(self) -> None:
        field, turns = "adapter.lqlora.iterations", self.iterations
        require(turns >= 1, field, turns, "a whole number of at least 1")
        sides = self.weights
        require(sides in SIDES, "adapter.lqlora.weights", sides, ", ".join(SIDES))


def _fit_layer(
    weight: Array,
    quant: QuantConfig,
    rank: int,
    scale: float,
    options: LqloraOptions,
    key: PRNGKeyArray,
    dtype: DTypeLike,
    *,
    gram: Array | InputMoments | None = None,
    damping: float = 0.01,
    fisher: Array | None = None,
) -> tuple[QTensor, Array, Array]:
    weighed = options.weights != "none"
    if weighed and fisher is None:
        raise ValueError(
            f"adapter.lqlora.weights = {options.weights!r}: needs the gradients of the layer, "
            "which calibration text gives; expected their squares (fisher)"
        )
    sides: Sides = options.weights if weighed else "both"
    found = lqlora(
        weight,
        quant,
        rank,
        scale,
        options.iterations,
        key,
        dtype,
        fisher=fisher if weighed else None,
        sides=sides,
        keep_last=options.keep_last,
        gram=gram,
        damping=damping,
    )
    return found[:3]


LQLORA = Initialization(
    name="lqlora",
    title="LQ-LoRA",
    fit=_fit_layer,
    options=LqloraOptions(),
    needs=lambda options: "nothing" if options.weights == "none" else "fisher",
)
