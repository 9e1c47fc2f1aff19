"""LoftQ: initializes the pair so that the quantized layer plus its update is close to the weights.
LoRA's initialization keeps the whole quantization error (Li et al., ICLR 2024, algorithm 1).

It alternates: Q = quantize(W - s B A), then s B A = the best rank-r approximation of W - Q, with
s = alpha / rank and Q as stored (codes, scales and shifts). The first Q is quantize(W).

W - Q and W - s B A are computed slab by slab and never materialized, except for small layers (exact
SVD). So little memory is needed besides W and two packed matrices: Q and the best one.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, PRNGKeyArray

from irqlora_jax.adapters.method import Initialization
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.quant.inputs import InputMoments, as_moments
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.quant.slabs import map_slabs, rows_of, slab_rows, sum_slabs
from irqlora_jax.text import require

EXACT_UP_TO = 512
"""Layers whose smaller side is at most this, or at most 8 times the rank, use an exact SVD. For
larger layers it would take too long."""
OVERSAMPLING, POWER_ITERATIONS = 10, 4
product = functools.partial(jnp.matmul, precision="highest")
"""A matrix product in float32, which GPUs would round to TF32."""
Some = Callable[[Array | int], Float32[Array, "count in"]]
"""Maps a first row to the rows of a slab of a matrix."""


def loftq(
    weight: Float[Array, "out in"],
    config: QuantConfig,
    rank: int,
    scaling: float,
    iterations: int,
    key: PRNGKeyArray,
    dtype: DTypeLike = jnp.float32,
    *,
    gram: Float[Array, "in in"] | InputMoments | None = None,
    damping: float = 0.01,
    root: Float32[Array, "in in"] | None = None,
) -> tuple[QTensor, Float[Array, "rank in"], Float[Array, "out rank"]]:
    """Computes Q, lora_A and lora_B with W ~ Q + scaling * lora_B lora_A.

    The error need not fall in every iteration, so the iteration with the smallest Frobenius error
    is kept. Its error never exceeds that of the quantizer alone, which gives the first Q. Singular
    values of 0 give rows of A and columns of B that are 0 and get no gradient. Singular values are
    0 beyond the smaller side of the layer, and where there is no error to correct.

    Args:
        weight: W (float32, bfloat16 or float16).
        config: configuration of the quantizer, as for `quantize`.
        rank: r.
        scaling: s, the factor of the update: alpha / rank.
        iterations: number of iterations.
        key: random key of `randomized_svd`; without effect on small layers.
        dtype: type of the pair. The next iteration also quantizes its rounding error.
        gram: X^T X of the layer's inputs, for a quantizer that needs it.
        damping: as for `quantize`.
        root: R, lower triangular, not singular. The error is then the norm of (W - Q - s B A) R,
            and each row of A has the norm of its column of B. CLoQ gives R; LoftQ has none.

    Raises:
        ValueError: fewer than 1 iteration, a rank below 1, or an error of `quantize`.

    Examples:
        >>> weight = jax.random.normal(jax.random.key(0), (24, 64))
        >>> config = QuantConfig(format="nf2", calibration="none")
        >>> q, a, b = loftq(weight, config, 4, scaling=2.0, iterations=2, key=jax.random.key(1))
        >>> a.shape, b.shape
        ((4, 64), (24, 4))
        >>> alone = jnp.linalg.norm(weight - quantize(weight, config).dequantize())
        >>> bool(jnp.linalg.norm(weight - q.dequantize() - 2.0 * b @ a) < alone)
        True
    """
    for name, value in (("iterations", iterations), ("rank", rank)):
        if value < 1:
            raise ValueError(f"{name} = {value}: expected a whole number of at least 1")
    scale = jnp.float32(scaling)
    out_features, in_features = weight.shape
    gram = as_moments(gram, damping) if gram is not None and config.needs_inputs else None
    # The first update is 0, so that every iteration runs the same program.
    a, b = (jnp.zeros(shape, dtype) for shape in ((rank, in_features), (out_features, rank)))
    best, least = None, jnp.inf
    for turn in range(iterations):
        minus = _factors(a, b, scale)
        quantized = quantize(weight, config, minus=minus, gram=gram)
        own = jax.random.fold_in(key, turn)
        a, b, norm = _fit(weight, quantized, scale, own, rank, jnp.dtype(dtype), root)
        if best is None or norm < least:
            best, least = (quantized, a, b), float(norm)
        del quantized  # keeps only two in memory: the best and the next
    assert best is not None
    return best


@functools.partial(jax.jit, static_argnames=("rank", "dtype"))
def _fit(
    weight: Array,
    quantized: QTensor,
    scale: Array,
    key: Array,
    rank: int,
    dtype: DTypeLike,
    root: Array | None = None,
) -> tuple[Array, Array, Float32[Array, ""]]:
    """The best pair for W - Q, each row of A as long as its column of B, and the Frobenius norm of
    (W - Q - s B A) R."""
    rows, columns = weight.shape
    count, dequantized = slab_rows((rows, columns)), quantized.dequantize_rows()

    def error(start: Array | int) -> Array:
        return rows_of(weight, start, count).astype(jnp.float32) - dequantized(start, count)

    if min(weight.shape) <= max(EXACT_UP_TO, 8 * rank):
        u, s, v = exact_svd(_times(map_slabs(error, rows, count), root), rank)
    else:
        u, s, v = randomized_svd(error, (rows, columns), count, rank, key, root)
    if root is not None:
        # V R^-1. The inverse itself would be less accurate.
        v = jax.scipy.linalg.solve_triangular(root, v.T, trans="T", lower=True).T
        lengths = jnp.linalg.norm(v, axis=1)
        s, v = s * lengths, v / lengths[:, None]
    size, spare = jnp.sqrt(s / scale), rank - s.size
    a = jnp.pad(size[:, None] * v, ((0, spare), (0, 0))).astype(dtype)
    b = jnp.pad(u * size[None, :], ((0, 0), (0, spare))).astype(dtype)
    left, right = _factors(a, b, scale)

    def square(start: Array | int, new: Bool[Array, "count 1"]) -> Array:
        remaining = _times(error(start) - product(rows_of(left, start, count), right), root)
        return jnp.sum(jnp.where(new, remaining, 0) ** 2)

    return a, b, jnp.sqrt(sum_slabs(square, rows, count))


def _times(x: Array, root: Array | None) -> Array:
    """x R."""
    return x if root is None else product(x, root)


def _factors(a: Array, b: Array, scale: Array) -> tuple[Array, Array]:
    """s B A as two matrices in float32."""
    return b.astype(jnp.float32), a.astype(jnp.float32) * scale


def exact_svd(x: Float32[Array, "m n"], rank: int) -> tuple[Array, Array, Array]:
    """U [m, k], S [k] and V [k, n] of the largest k = min(rank, m, n) singular values."""
    u, s, v = jnp.linalg.svd(x, full_matrices=False)
    return u[:, :rank], s[:rank], v[:rank]


def randomized_svd(
    some: Some,
    shape: tuple[int, int],
    count: int,
    rank: int,
    key: PRNGKeyArray,
    root: Float32[Array, "n n"] | None = None,
) -> tuple[Array, Array, Array]:
    """Like `exact_svd`, with a residual up to 1 % larger (Halko et al. 2011, 4.4 and 5.1).

    Power iterations turn a basis of slightly more than `rank` random directions towards the largest
    singular values; x is then decomposed in that basis. The 1 % refers to Frobenius norms and was
    measured for ranks up to an eighth of the smaller side (tests/adapters/test_loftq.py).
    Quantization errors come closest to it, because their singular values decay slowly.

    Args:
        some: maps a first row to `count` rows of x; reads x POWER_ITERATIONS + 1 times in all.
        shape: shape of x.
        count: rows in a slab.
        rank: number of singular values.
        key: random key of the directions.
        root: decompose x R instead, for an R with the columns of x as rows. x R is not computed: R
            is multiplied with the basis, which is much smaller.
    """
    rows, columns = shape

    def outward(basis: Array) -> Array:
        return basis if root is None else product(root, basis)

    def turned(basis: Array) -> Array:
        """(x R)^T (x R) basis."""
        directions = outward(basis)

        def own(start: Array | int, new: Bool[Array, "count 1"]) -> Array:
            x = some(start)
            return product(x.T, jnp.where(new, product(x, directions), 0))

        found = sum_slabs(own, rows, count)
        return found if root is None else product(root.T, found)

    basis = jax.random.normal(key, (columns, min(rank + OVERSAMPLING, *shape)))
    for _ in range(POWER_ITERATIONS):
        basis, _ = jnp.linalg.qr(turned(basis))
    # x R in the basis of its inputs: [m, size]. A second QR leaves a square matrix to decompose.
    directions = outward(basis)
    inside = map_slabs(lambda start: product(some(start), directions), rows, count)
    left, square = jnp.linalg.qr(inside)
    u, s, v = jnp.linalg.svd(square)
    return product(left, u[:, :rank]), s[:rank], product(v[:rank], basis.T)


@dataclasses.dataclass(frozen=True)
class LoftqOptions:
    """Options of LoftQ."""

    iterations: int = 3
    """Number of iterations. The best one is kept."""

    def __post_init__(self) -> None:
        field, turns = "adapter.loftq.iterations", self.iterations
        require(turns >= 1, field, turns, "a whole number of at least 1")


def _fit_layer(
    weight: Array,
    quant: QuantConfig,
    rank: int,
    scale: float,
    options: LoftqOptions,
    key: PRNGKeyArray,
    dtype: DTypeLike,
    *,
    gram: Array | InputMoments | None = None,
    damping: float = 0.01,
) -> tuple[QTensor, Array, Array]:
    turns = options.iterations
    return loftq(weight, quant, rank, scale, turns, key, dtype, gram=gram, damping=damping)


LOFTQ = Initialization(name="loftq", title="LoftQ", fit=_fit_layer, options=LoftqOptions())
