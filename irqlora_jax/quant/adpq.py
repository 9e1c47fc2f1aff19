"""AdpQ (arXiv 2405.13358): the adaptive LASSO chooses outliers, which get a quantizer of their own.

The adaptive LASSO with the weights themselves as first estimates has a closed form. It shrinks w to
sign(w) max(|w| - penalty / |w|, 0). Weights that are not 0 after it are outliers: |w| >
sqrt(penalty). So a penalty for a share of outliers is the square of a quantile of |w|, and no
search is needed.

The paper's code is not released. The following are readings of a re-implementation by others
(github.com/Tfloow/auto_adpq): symmetric codes, groups counted along the rows, and scales that are
stored as float16 reciprocals, while the codes come from the scales before rounding. Its search for
the penalty is left out: it has an absolute tolerance, and finds too few outliers among weights far
below 0.1.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float16, Float32, Int8

from irqlora_jax.quant.entropy import quotient
from irqlora_jax.quant.outliers import outlier_count
from irqlora_jax.text import require


class Adpq(NamedTuple):
    """A matrix from `adpq`: code / reciprocal of its group and kind.

    Attributes:
        codes: whole numbers from -(2^(bits-1) - 1) to 2^(bits-1) - 1.
        outliers: where the weights are outliers.
        reciprocals: of the steps between the values of the codes: the core's, and the outliers'. 1
            if a group has none, or only zeros.
    """

    codes: Int8[Array, "out in"]
    outliers: Bool[Array, "out in"]
    reciprocals: Float16[Array, "out groups two"]

    def dequantize(self) -> Float16[Array, "out in"]:
        """The weights, as the re-implementation computes them."""
        columns = self.codes.shape[1]
        group = -(-columns // self.reciprocals.shape[1])
        core, outlier = (self.reciprocals[..., i].repeat(group, 1)[:, :columns] for i in (0, 1))
        return self.codes.astype(jnp.float16) / jnp.where(self.outliers, outlier, core)


def adaptive_lasso(
    weight: Float[Array, "*shape"], penalty: float | Float[Array, ""]
) -> Float[Array, "*shape"]:
    """sign(w) max(|w| - penalty / |w|, 0), the closed form of the adaptive LASSO.

    Examples:
        >>> adaptive_lasso(jnp.array([-2.0, 0.0, 0.5, 4.0]), 1.0).tolist()
        [-1.5, 0.0, 0.0, 3.75]
    """
    size = jnp.abs(weight)
    kept = size > jnp.sqrt(penalty)
    return jnp.where(kept, jnp.sign(weight) * (size - penalty / jnp.where(kept, size, 1)), 0)


def lasso_penalty(weight: Float[Array, "out in"], share: float) -> Float32[Array, ""]:
    """The penalty with which the adaptive LASSO keeps a share of the weights.

    It keeps round(share * weights) of them, or fewer if several are as large as the limit.

    Args:
        weight: the matrix.
        share: of outliers, at least 0 and below 1.
    """
    require(0 <= share < 1, "share", share, "a number from 0 to below 1")
    size = jnp.sort(jnp.abs(weight.astype(jnp.float32)).ravel())
    return size[size.size - 1 - outlier_count(weight.shape, share)] ** 2


@functools.partial(jax.jit, static_argnames=("bits", "group"))
def adpq(
    weight: Float[Array, "out in"], bits: int, penalty: float | Float[Array, ""], group: int = 128
) -> Adpq:
    """Quantizes a matrix with AdpQ.

    Args:
        weight: the matrix. The type in which it is scaled is its own.
        bits: of a code; 2 or more.
        penalty: of the adaptive LASSO (lambda' in the paper), e.g. from `lasso_penalty`.
        group: consecutive weights of a row that share a scale for the core and one for outliers.

    Raises:
        ValueError: fewer than 2 bits, or more than 8.

    Examples:
        >>> weight = jnp.array([[0.1, -0.2, 5.0, 0.3, -9.0, 0.0, 0.1, 0.3]])
        >>> q = adpq(weight, 3, lasso_penalty(weight, 0.25))
        >>> q.codes.tolist()  # 5 and -9 in steps of 3, the rest in steps of 0.1
        [[1, -2, 2, 3, -3, 0, 1, 3]]
    """
    require(2 <= bits <= 8, "bits", bits, "2 to 8")
    rows, columns = weight.shape
    # In float32 for every type: the limit must not be rounded.
    outliers = jnp.abs(weight.astype(jnp.float32)) > jnp.sqrt(jnp.float32(penalty))
    groups = -(-columns // group)
    padding = ((0, 0), (0, groups * group - columns))
    blocks = jnp.pad(weight, padding).reshape(rows, groups, group)
    apart = jnp.pad(outliers, padding).reshape(blocks.shape)
    most = 2 ** (bits - 1) - 1

    def reciprocal(own: Array) -> Array:
        largest = jnp.where(own, jnp.abs(blocks), 0).max(-1).astype(jnp.float32)
        step = quotient(jnp.full_like(largest, most), jnp.where(largest > 0, largest, 1))
        return jnp.where(largest > 0, step, 1).astype(weight.dtype)

    both = jnp.stack([reciprocal(~apart), reciprocal(apart)], -1)
    scaled = blocks * jnp.where(apart, both[..., 1:], both[..., :1])
    codes = jnp.clip(jnp.round(scaled), -most, most).astype(jnp.int8)
    codes = codes.reshape(rows, -1)[:, :columns]
    return Adpq(codes, outliers, both.astype(jnp.float16))
