"""CLoQ (arXiv 2501.18475): LoftQ for the outputs of a layer instead of its weights.

The update corrects what the quantizer changes in the outputs for typical inputs X [tokens, in].
With H = X^T X = R R^T, the squared error of the outputs is the squared Frobenius norm of
(W - Q - s B A) R. For a given Q, the best pair (theorem 3.1) is

    s B A = (the best rank-r approximation of (W - Q) R) R^-1

The quantizer and the pair take turns as in LoftQ (`loftq.py`); the paper's single turn is
iterations = 1. R is the only matrix besides W and Q that is materialized.
"""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from irqlora_jax.adapters.loftq import loftq
from irqlora_jax.adapters.method import Initialization
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.inputs import InputMoments, as_moments
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.text import require


def cloq(
    weight: Float[Array, "out in"],
    config: QuantConfig,
    rank: int,
    scaling: float,
    iterations: int,
    gram: Float[Array, "in in"] | InputMoments,
    damping: float,
    key: PRNGKeyArray,
    dtype: DTypeLike = jnp.float32,
) -> tuple[QTensor, Float[Array, "rank in"], Float[Array, "out rank"]]:
    """Computes Q, lora_A and lora_B with W X^T ~ (Q + scaling * lora_B lora_A) X^T.

    The iteration with the smallest error of the outputs is kept. Each row of A and its column of B
    have the same norm, so the pair does not depend on the scale of H. If all inputs have the same
    moments and are uncorrelated, the result is LoftQ's.

    Args:
        weight: W (float32, bfloat16 or float16).
        config: configuration of the quantizer, as for `quantize`.
        rank: r.
        scaling: s, the factor of the update: alpha / rank.
        iterations: number of iterations.
        gram: H, the sum or the mean of x x^T over inputs x of the layer. The quantizer gets it too
            if it needs it. `InputMoments` have their own damping.
        damping: this fraction of the mean diagonal of H is added to the diagonal (`input_root`).
        key: random key of `randomized_svd`; without effect on small layers.
        dtype: type of the pair. The next iteration also quantizes its rounding error.

    Raises:
        ValueError: as `loftq` and `input_root`.

    Examples:
        >>> import jax
        >>> weight = jax.random.normal(jax.random.key(0), (24, 64))
        >>> x = jax.random.normal(jax.random.key(1), (99, 64))
        >>> x = x.at[:, 0].multiply(20)  # the outputs depend most on the first input
        >>> config = QuantConfig(format="nf2", calibration="none")
        >>> q, a, b = cloq(weight, config, 4, 2.0, 2, x.T @ x, 0.01, jax.random.key(2))
        >>> error = weight - q.dequantize() - 2.0 * b @ a
        >>> bool(jnp.abs(error[:, 0]).mean() < 0.1 * jnp.abs(error[:, 1:]).mean())
        True
    """
    columns = weight.shape[1]
    inputs = as_moments(gram, damping)
    shape, accepted = inputs.gram.shape, f"shape {(columns, columns)}"
    require(shape == (columns, columns), "gram", shape, accepted)
    given = {"gram": inputs, "root": inputs.root}
    return loftq(weight, config, rank, scaling, iterations, key, dtype, **given)


@dataclasses.dataclass(frozen=True)
class CloqOptions:
    """Options of CLoQ."""

    iterations: int = 3
    """Number of iterations. The best one is kept."""

    def __post_init__(self) -> None:
        field, turns = "adapter.cloq.iterations", self.iterations
        require(turns >= 1, field, turns, "a whole number of at least 1")


def _fit_layer(
    weight: Array,
    quant: QuantConfig,
    rank: int,
    scale: float,
    options: CloqOptions,
    key: PRNGKeyArray,
    dtype: DTypeLike,
    *,
    gram: Array | InputMoments | None = None,
    damping: float = 0.01,
) -> tuple[QTensor, Array, Array]:
    if gram is None:
        raise ValueError(
            "adapter.init = 'cloq': needs the inputs of the layer, which calibration text gives; "
            "expected their second moments (gram)"
        )
    return cloq(weight, quant, rank, scale, options.iterations, gram, damping, key, dtype)


CLOQ = Initialization(
    name="cloq",
    title="CLoQ",
    fit=_fit_layer,
    options=CloqOptions(),
    needs=lambda options: "inputs",
)
