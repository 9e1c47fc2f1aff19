"""QA-LoRA with IEC: the adapter of IR-QLoRA's released code for integers.

    u = A sum(x) + beta1 spread(x, r)        sum over each group of inputs; spread of all of x
    y += (alpha / r) (B u + beta2 spread(u, out))

`spread` is IEC's connection (`iec.py`). It averages windows of in / r inputs. Where a window holds
whole groups, the update is constant within every group and becomes part of the shifts.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from irqlora_jax.adapters import iec, qalora
from irqlora_jax.adapters.method import Method, Params, Shape
from irqlora_jax.sharding import split_activation


@dataclasses.dataclass(frozen=True)
class QaloraIecOptions:
    """Options of QA-LoRA with IEC."""

    group: int = 64
    """Inputs that share a column of A. The released code uses 32, also for quant.block_size. To
    merge the adapter into the quantized base without loss, both the group and the windows of the
    connection, in / gcd(in, rank) inputs, must be multiples of quant.block_size."""

    def __post_init__(self) -> None:
        qalora.check_group("adapter.qalora_iec.group", self.group)


def init(
    key: PRNGKeyArray, shape: Shape, rank: int, options: QaloraIecOptions, dtype: DTypeLike
) -> Params:
    """QA-LoRA's pair of the authors' code, and beta1 and beta2 at 0."""
    groups = qalora.groups_of("adapter.qalora_iec.group", options.group, shape[1])
    pair = qalora.xavier_pair(key, (shape[0], groups), rank, dtype)
    return pair | {"beta1": jnp.zeros((), dtype), "beta2": jnp.zeros((), dtype)}


def apply(
    params: Params,
    x: Float[Array, "*batch in"],
    dropped: Float[Array, "*batch in"],
    scale: float = 1.0,
) -> Float[Array, "*batch out"]:
    """The scaled update. The connection takes x itself, before dropout (as released)."""
    a, b, beta1, beta2 = (
        params[name].astype(x.dtype) for name in ("lora_A", "lora_B", "beta1", "beta2")
    )
    group = x.shape[-1] // a.shape[1]
    u = group * iec.spread(dropped, a.shape[1]) @ a.T + beta1 * iec.spread(x, a.shape[0])
    u = split_activation(u) * scale
    return u @ b.T + beta2 * iec.spread(u, b.shape[0])


def fold(params: Params, shape: Shape) -> Params:
    """The LoRA pair with the same update."""
    group = shape[1] // params["lora_A"].shape[1]
    return iec.fold(params | {"lora_A": jnp.repeat(params["lora_A"], group, axis=1)})


def reduced(params: Params, shape: Shape) -> Float[Array, "out groups"]:
    """The update at scale 1 of weights that have the same one: of a group, or of the inputs that
    groups and windows have in common."""
    group = shape[1] // params["lora_A"].shape[1]
    window = shape[1] // math.gcd(shape[1], params["lora_A"].shape[0])
    pair = fold(params, shape)
    one = pair["lora_A"][:, :: math.gcd(group, window)]
    return jnp.matmul(pair["lora_B"], one, precision="highest")


QALORA_IEC = Method(
    name="qalora_iec",
    title="QA-LoRA with IEC",
    description="a QA-LoRA adapter with IEC (information elastic connection)",
    init=init,
    apply=lambda params, x, dropped, scale, weight: apply(params, x, dropped, scale),
    files=iec.IEC.files,
    fold=fold,
    reduced=reduced,
    has_pair=False,
    faster=iec.IEC.faster,
    options=QaloraIecOptions(),
)
