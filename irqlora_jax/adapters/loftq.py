"""LoftQ: a start at which a quantized layer and its pair together are close to the weights, where
LoRA's own leaves the whole error of the quantizer (Li et al., ICLR 2024, algorithm 1).

In turns, Q = quantize(W - s B A) and then s B A = the best approximation of rank r of W - Q, with
s = alpha / rank and Q as it is stored: its codes, scales and shifts. The first Q is that of W.

Beside W there is one float32 matrix of its size, in turns W, W - Q and W - s B A. Each is handed to
the program that makes the next, to be overwritten: the runtime may free what a program no longer
needs only after the next one has begun. That is also why the first Q is that of a float32 copy; of
any other W the quantizer would make one of its own.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from irqlora_jax.config import QuantConfig
from irqlora_jax.quant.qtensor import QTensor, quantize

EXACT_UP_TO = 512
"""Layers whose smaller side is no longer, or no longer than 8 times the rank, have all their
singular values computed; beyond it that takes too long."""
OVERSAMPLING, POWER_ITERATIONS = 10, 4
SLAB = 2**18
"""Weights whose remaining error is computed at a time."""
_wide = functools.partial(jnp.matmul, precision="highest")  # GPUs would round float32 to TF32


def loftq(
    weight: Float[Array, "out in"],
    config: QuantConfig,
    rank: int,
    scaling: float,
    iterations: int,
    key: PRNGKeyArray,
    dtype: DTypeLike = jnp.float32,
) -> tuple[QTensor, Float[Array, "rank in"], Float[Array, "out rank"]]:
    """Q, lora_A and lora_B with W ~ Q + scaling * lora_B lora_A.

    Of all turns that of the least Frobenius error is kept, Q and the pair fitted to it: the error
    need not fall from turn to turn. It is never above that of the quantizer alone, whose Q is the
    first. Singular values that are 0 give rows of A and columns of B that are 0, and so without a
    gradient: those beyond the smaller side of the layer, and all of them where nothing is to be
    corrected.

    Args:
        weight: W (float32, bfloat16 or float16).
        config: how it is quantized, in any way that `quantize` knows.
        rank: r.
        scaling: s, what the update is multiplied by: alpha / rank.
        iterations: turns.
        key: of the directions that `randomized_svd` begins with; without effect on small layers.
        dtype: of the pair. What is lost to its rounding the next turn quantizes.

    Raises:
        ValueError: no turn, no rank; what `quantize` refuses.

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
            raise ValueError(f"{name} = {value}: accepted is a whole number of at least 1")
    scale = jnp.float32(scaling)
    rest = jnp.array(weight, jnp.float32, copy=True)
    quantized = quantize(rest, config)
    best, least = None, jnp.inf
    for turn in range(iterations):
        error = _error(weight, quantized, rest)
        a, b = _fit(error, scale, jax.random.fold_in(key, turn), rank, jnp.dtype(dtype))
        norm = float(_distance(error, a, b, scale))
        if best is None or norm < least:
            best, least = (quantized, a, b), norm
        if turn + 1 < iterations:
            rest = _rest(weight, a, b, scale, error)
            del quantized  # there are two at a time: the best and the next
            quantized = quantize(rest, config)
    assert best is not None
    return best


@functools.partial(jax.jit, donate_argnames="room", keep_unused=True)
def _error(weight: Array, quantized: QTensor, room: Array) -> Array:
    """W - Q, in the memory of `room`."""
    return weight.astype(jnp.float32) - quantized.dequantize()


@functools.partial(jax.jit, donate_argnames="room", keep_unused=True)
def _rest(weight: Array, a: Array, b: Array, scale: Array, room: Array) -> Array:
    """W - s B A, what is left to quantize, in the memory of `room`."""
    return weight.astype(jnp.float32) - _update(a, b, scale)


@functools.partial(jax.jit, static_argnames=("rank", "dtype"))
def _fit(
    error: Array, scale: Array, key: Array, rank: int, dtype: DTypeLike
) -> tuple[Array, Array]:
    """The pair of least error for a given W - Q, the roots of its singular values on both sides."""
    if min(error.shape) <= max(EXACT_UP_TO, 8 * rank):
        u, s, v = exact_svd(error, rank)
    else:
        u, s, v = randomized_svd(error, rank, key)
    root, spare = jnp.sqrt(s / scale), rank - s.size
    a = jnp.pad(root[:, None] * v, ((0, spare), (0, 0)))
    b = jnp.pad(u * root[None, :], ((0, 0), (0, spare)))
    return a.astype(dtype), b.astype(dtype)


@jax.jit
def _distance(error: Array, a: Array, b: Array, scale: Array) -> Float32[Array, ""]:
    """The Frobenius norm of W - Q - s B A, some rows at a time."""
    rows, columns = error.shape
    count = min(rows, max(1, SLAB // columns))

    def add(i: Array, total: Array) -> Array:
        # The last rows begin early where they are fewer: those that were counted already are not.
        start = jnp.minimum(i * count, rows - count)
        some, left = (lax.dynamic_slice_in_dim(x, start, count) for x in (error, b))
        new = start + jnp.arange(count) >= i * count
        return total + jnp.sum(jnp.where(new[:, None], some - _update(a, left, scale), 0) ** 2)

    return jnp.sqrt(lax.fori_loop(0, -(-rows // count), add, jnp.float32(0)))


def _update(a: Array, b: Array, scale: Array) -> Array:
    """s B A."""
    return _wide(b.astype(jnp.float32), a.astype(jnp.float32) * scale)


def exact_svd(x: Float32[Array, "m n"], rank: int) -> tuple[Array, Array, Array]:
    """U [m, k], S [k] and V [k, n] of the largest k = min(rank, m, n) singular values."""
    u, s, v = jnp.linalg.svd(x, full_matrices=False)
    return u[:, :rank], s[:rank], v[:rank]


def randomized_svd(
    x: Float32[Array, "m n"], rank: int, key: PRNGKeyArray
) -> tuple[Array, Array, Array]:
    """`exact_svd`, but that what it leaves of x may be 1 % larger (Halko et al. 2011, 4.4 and 5.1).

    A basis of a few more than `rank` random directions is turned towards the largest singular
    values by power iterations; x is then decomposed inside of it. The bound is of Frobenius norms,
    and measured, for ranks up to an eighth of the smaller side (tests/test_loftq.py): at its
    tightest for the errors of quantizers, whose singular values hardly fall.
    """
    size = min(rank + OVERSAMPLING, *x.shape)
    basis = jax.random.normal(key, (x.shape[1], size))
    for _ in range(POWER_ITERATIONS):
        basis, _ = jnp.linalg.qr(_wide(x, basis))
        basis, _ = jnp.linalg.qr(_wide(x.T, basis))
    # x in the basis of its inputs: [m, size]. The second QR leaves a square to decompose.
    left, square = jnp.linalg.qr(_wide(x, basis))
    u, s, v = jnp.linalg.svd(square)
    return _wide(left, u[:, :rank]), s[:rank], _wide(v[:rank], basis.T)
