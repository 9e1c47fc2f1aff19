"""Q-BaRA: fewer inputs and outputs for a higher rank (arXiv 2407.17029; the formulas are from the
authors' code).

    y += (alpha / r) repeat(B A mean(x), k_out)        mean over each k_in inputs

A is [R, in / k_in] and B [out / k_out, R]. R is as large as LoRA's number of parameters allows: 2 r
for k_in = k_out = 2. The factor stays alpha / r, as in the code.
"""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from irqlora_jax.adapters import lora
from irqlora_jax.adapters.iec import spread
from irqlora_jax.adapters.method import Method, Params, Shape
from irqlora_jax.adapters.qalora import check_group, groups_of
from irqlora_jax.text import require


@dataclasses.dataclass(frozen=True)
class QbaraOptions:
    """Options of Q-BaRA."""

    k_in: int = 2
    """Inputs that are averaged. To merge the adapter into the quantized base without loss, a
    multiple of quant.block_size."""
    k_out: int = 2
    """Outputs that get the same update."""

    def __post_init__(self) -> None:
        check_group("adapter.qbara.k_in", self.k_in)
        check_group("adapter.qbara.k_out", self.k_out)


def init(
    key: PRNGKeyArray, shape: Shape, rank: int, options: QbaraOptions, dtype: DTypeLike
) -> Params:
    """lora_A [R, in / k_in] uniform in +-1/sqrt(in / k_in); lora_B [out / k_out, R] 0."""
    rows, columns = small_shape("qbara", shape, options.k_in, options.k_out)
    inner = max(1, rank * (shape[0] + shape[1]) // (rows + columns))
    return lora.init(key, columns, rows, inner, dtype)


def small_shape(method: str, shape: Shape, k_in: int, k_out: int) -> Shape:
    """(out / k_out, in / k_in).

    Raises:
        ValueError: one of them does not divide.
    """
    accepted = f"a divisor of {shape[0]}, the number of outputs of a target"
    require(shape[0] % k_out == 0, f"adapter.{method}.k_out", k_out, accepted)
    return shape[0] // k_out, groups_of(f"adapter.{method}.k_in", k_in, shape[1])


def apply(
    params: Params,
    x: Float[Array, "*batch in"],
    dropped: Float[Array, "*batch in"],
    scale: float,
    out_features: int,
) -> Float[Array, "*batch out"]:
    """The scaled update. `dropped` is x after dropout."""
    del x
    pooled = spread(dropped, params["lora_A"].shape[1])
    y = lora.apply(params, pooled, pooled, scale)
    return jnp.repeat(y, out_features // y.shape[-1], axis=-1)


def fold(params: Params, shape: Shape) -> Params:
    """The LoRA pair of rank R with the same update."""
    a, b = params["lora_A"], params["lora_B"]
    k_in, k_out = shape[1] // a.shape[1], shape[0] // b.shape[0]
    return {"lora_A": jnp.repeat(a, k_in, axis=1) / k_in, "lora_B": jnp.repeat(b, k_out, axis=0)}


def reduced(params: Params, shape: Shape) -> Float[Array, "out groups"]:
    """The update of each weight at scale 1, once for k_in inputs."""
    update = jnp.matmul(params["lora_B"], params["lora_A"], precision="highest")
    rows, columns = update.shape
    return jnp.repeat(update, shape[0] // rows, axis=0) * (columns / shape[1])


QBARA = Method(
    name="qbara",
    title="Q-BaRA",
    description="a Q-BaRA adapter",
    init=init,
    apply=lambda params, x, dropped, scale, weight: apply(
        params, x, dropped, scale, weight.shape[0]
    ),
    files=lora.LORA.files,
    fold=fold,
    reduced=reduced,
    has_pair=False,
    options=QbaraOptions(),
)
