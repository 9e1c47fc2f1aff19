"""QA-LoRA: LoRA whose first factor sees one number for each group of inputs (arXiv 2309.14717,
algorithm 1).

    y += (alpha / r) gain B A mean(x)        mean over each group of `group` inputs

The update of a weight is the same for all inputs of a group. If a group holds whole blocks of the
base, the update becomes part of the shifts (`absorb.py`).
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from irqlora_jax.adapters import lora
from irqlora_jax.adapters.iec import spread
from irqlora_jax.adapters.method import Method, Params, Shape
from irqlora_jax.text import require


@dataclasses.dataclass(frozen=True)
class QaloraOptions:
    """Options of QA-LoRA."""

    group: int = 64
    """Inputs that share a column of A. To merge the adapter into the quantized base without loss, a
    multiple of quant.block_size. The paper uses 32 for both."""
    pooling: Literal["mean", "sum", "peft"] = "mean"
    """What A sees of a group. "mean": as in the authors' code. "sum": as in the paper, with
    gradients that are `group` times as large. "peft": the mean times the number of groups, as in
    PEFT. The three differ only in the scale of the update, so an adapter needs the one that it was
    trained with."""

    def __post_init__(self) -> None:
        check_group("adapter.qalora.group", self.group)
        known = ("mean", "sum", "peft")
        require(self.pooling in known, "adapter.qalora.pooling", self.pooling, ", ".join(known))


def check_group(field: str, group: int) -> None:
    """Refuses a group of less than one."""
    require(group >= 1, field, group, "a whole number of at least 1")


def groups_of(field: str, group: int, in_features: int) -> int:
    """The number of groups of a layer.

    Raises:
        ValueError: the group does not divide the inputs.
    """
    accepted = f"a divisor of {in_features}, the number of inputs of a target"
    require(in_features % group == 0, field, group, accepted)
    return in_features // group


def init(
    key: PRNGKeyArray, shape: Shape, rank: int, options: QaloraOptions, dtype: DTypeLike
) -> Params:
    """lora_A [rank, groups] Xavier-uniform as in the authors' code, or with pooling "peft" uniform
    in +-1/sqrt(groups) as in PEFT; lora_B [out, rank] 0."""
    groups = groups_of("adapter.qalora.group", options.group, shape[1])
    if options.pooling == "peft":
        return lora.init(key, groups, shape[0], rank, dtype)
    return xavier_pair(key, (shape[0], groups), rank, dtype)


def xavier_pair(key: PRNGKeyArray, shape: Shape, rank: int, dtype: DTypeLike) -> Params:
    """lora_A [rank, in] uniform in +-sqrt(6 / (in + rank)), and lora_B [out, rank] 0."""
    bound = math.sqrt(6 / (shape[1] + rank))
    return {
        "lora_A": jax.random.uniform(key, (rank, shape[1]), dtype, -bound, bound),
        "lora_B": jnp.zeros((shape[0], rank), dtype),
    }


def apply(
    params: Params,
    x: Float[Array, "*batch in"],
    dropped: Float[Array, "*batch in"],
    scale: float = 1.0,
) -> Float[Array, "*batch out"]:
    """scale * B A mean(x). `dropped` is x after dropout.

    Examples:
        >>> params = {"lora_A": jnp.array([[1.0, 10.0]]), "lora_B": jnp.array([[2.0]])}
        >>> x = jnp.array([[1.0, 3.0, 0.0, 1.0]])
        >>> apply(params, x, x).tolist()
        [[14.0]]
    """
    del x
    pooled = spread(dropped, params["lora_A"].shape[1])
    return lora.apply(params, pooled, pooled, scale)


def reduced(params: Params, shape: Shape) -> Float[Array, "out groups"]:
    """The update of each weight of a group at scale 1: B A / group."""
    update = jnp.matmul(params["lora_B"], params["lora_A"], precision="highest")
    return update * (update.shape[1] / shape[1])


def fold(params: Params, shape: Shape) -> Params:
    """The LoRA pair with the same update: every column of A stands for the inputs of its group."""
    group = shape[1] // params["lora_A"].shape[1]
    return params | {"lora_A": jnp.repeat(params["lora_A"], group, axis=1) / group}


def _factor(options: QaloraOptions, shape: Shape) -> float:
    group = options.group
    return {"mean": 1.0, "sum": float(group), "peft": shape[1] / group}[options.pooling]


def _file_factor(options: QaloraOptions, shape: Shape) -> float:
    """PEFT's own pooling, whatever the adapter was trained with."""
    return _factor(options, shape) * options.group / shape[1]


def _peft_fields(adapter: Any) -> dict[str, Any]:
    own = {"use_qalora": True, "qalora_group_size": adapter.qalora.group}
    return {**lora.peft_fields(adapter), **own}


QALORA = Method(
    name="qalora",
    title="QA-LoRA",
    description="a QA-LoRA adapter",
    init=init,
    apply=lambda params, x, dropped, scale, weight: apply(params, x, dropped, scale),
    files=lora.LORA.files,
    fold=fold,
    reduced=reduced,
    factor=_factor,
    peft=_peft_fields,
    file_factor=_file_factor,
    has_pair=False,
    options=QaloraOptions(),
)
