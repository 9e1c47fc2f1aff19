"""QA-HiRA: one matrix between pooled inputs and repeated outputs, of full rank (arXiv 2407.17029;
the formulas are from the authors' code).

    y += (alpha / r) repeat(M mean(x), k_out)        mean over each k_in inputs

M is [out / k_out, in / k_in]. The rank r is only part of the factor. M starts at 0. (The authors'
code draws it at random, so its training does not start at the base.)
"""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from irqlora_jax.adapters.iec import spread
from irqlora_jax.adapters.method import Method, Params, Shape
from irqlora_jax.adapters.qalora import check_group
from irqlora_jax.adapters.qbara import small_shape
from irqlora_jax.sharding import split_activation


@dataclasses.dataclass(frozen=True)
class QahiraOptions:
    """Options of QA-HiRA. M has in x out / (k_in k_out) parameters: as many as LoRA of rank 64 for
    4096 x 4096 and a product of 32, and up to 2.5 times as many for the layers of larger models."""

    k_in: int = 4
    """Inputs that are averaged. To merge the adapter into the quantized base without loss, a
    multiple of quant.block_size. With k_out 1, M then changes the shift of every block freely."""
    k_out: int = 8
    """Outputs that get the same update."""

    def __post_init__(self) -> None:
        check_group("adapter.qahira.k_in", self.k_in)
        check_group("adapter.qahira.k_out", self.k_out)


def init(
    key: PRNGKeyArray, shape: Shape, rank: int, options: QahiraOptions, dtype: DTypeLike
) -> Params:
    """matrix [out / k_out, in / k_in] 0."""
    del key, rank
    return {"matrix": jnp.zeros(small_shape("qahira", shape, options.k_in, options.k_out), dtype)}


def apply(
    params: Params,
    x: Float[Array, "*batch in"],
    dropped: Float[Array, "*batch in"],
    scale: float,
    out_features: int,
) -> Float[Array, "*batch out"]:
    """The scaled update. `dropped` is x after dropout."""
    del x
    matrix = params["matrix"].astype(dropped.dtype)
    y = (split_activation(spread(dropped, matrix.shape[1])) * scale) @ matrix.T
    return jnp.repeat(y, out_features // matrix.shape[0], axis=-1)


def reduced(params: Params, shape: Shape) -> Float[Array, "out groups"]:
    """The update of each weight at scale 1, once for k_in inputs."""
    matrix = params["matrix"]
    rows, columns = matrix.shape
    return jnp.repeat(matrix, shape[0] // rows, axis=0) * (columns / shape[1])


QAHIRA = Method(
    name="qahira",
    title="QA-HiRA",
    description="a QA-HiRA adapter",
    init=init,
    apply=lambda params, x, dropped, scale, weight: apply(
        params, x, dropped, scale, weight.shape[0]
    ),
    files={"matrix": "lora_A.weight"},
    reduced=reduced,
    splits={"matrix": ("out", "blocks")},
    has_pair=False,
    faster=(),
    options=QahiraOptions(),
)
