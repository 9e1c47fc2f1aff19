"""What a base takes, as exact arithmetic on shapes: nothing is read and nothing is computed."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from irqlora_jax.base.file import Base
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.tree import insert, weight_shapes
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantized_shape
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.sharding import LINEAR_NAMES, device_bytes


@dataclasses.dataclass(frozen=True)
class Storage:
    """Bytes of a base.

    Attributes:
        codes: of the linear layers; their weights where they are not quantized.
        scales: with their second level.
        shifts: or zero points, with their second level.
        rest: embeddings, output matrix and norms.
        weights: number of weights of the linear layers, without padding.
    """

    codes: int
    scales: int
    shifts: int
    rest: int
    weights: int

    @property
    def total(self) -> int:
        """All bytes: base.safetensors is as long, but for its header."""
        return self.codes + self.scales + self.shifts + self.rest

    @property
    def bits(self) -> float:
        """Stored bits per weight of the linear layers."""
        return 8 * (self.total - self.rest) / self.weights


def measure_base(base: Base) -> Storage:
    """What a base takes: of all devices together for arrays, or of one for shapes with shardings.

    Args:
        base: arrays, or jax.ShapeDtypeStruct in their place.
    """
    parts = dict.fromkeys(("codes", "scales", "shifts"), 0)
    for weight in linears(base):
        if not isinstance(weight, QTensor):
            parts["codes"] += device_bytes(weight)
            continue
        parts["codes"] += device_bytes(weight.packed)
        scales = weight.scale_codes, weight.scale_max, weight.scale_offset
        parts["scales"] += device_bytes(scales)
        parts["shifts"] += device_bytes((weight.shift_codes, weight.shift_max))
    rest = device_bytes(base) - sum(parts.values())
    return Storage(**parts, rest=rest, weights=sum(map(_logical, linears(base))))


def linears(base: Base) -> Iterator[Any]:
    """The linear weights of a base, each stacked over the layers."""
    for group in ("self_attn", "mlp"):
        for linear in base["layers"][group].values():
            yield linear["weight"]


def _logical(weight: Any) -> int:
    layers = weight.packed.shape[0] if isinstance(weight, QTensor) else weight.shape[0]
    return layers * weight.shape[-1] * weight.shape[-2]


def abstract_base(llama: LlamaConfig, quant: QuantConfig, dtype: DTypeLike = jnp.bfloat16) -> Base:
    """The base that `hf.load_base` reads, with jax.ShapeDtypeStruct for its arrays.

    Args:
        llama: the architecture.
        quant: how the linear layers are stored.
        dtype: of what is not quantized.
    """
    layered, single = weight_shapes(llama)
    layers: Base = {}
    for path, shape in layered.items():
        weight: Any = jax.ShapeDtypeStruct(shape, dtype)
        if path[-1] in LINEAR_NAMES and quant.format != "none":
            weight = _quantized(shape, quant)
        add = functools.partial(_stacked, llama.num_hidden_layers)
        insert(layers, path, {"weight": jax.tree.map(add, weight)})
    base: Base = {"layers": layers}
    for path, shape in single.items():
        insert(base, path, {"weight": jax.ShapeDtypeStruct(shape, dtype)})
    return base


@functools.cache  # tracing the search takes a while, and many layers have one shape
def _quantized(shape: tuple[int, int], quant: QuantConfig) -> QTensor:
    return quantized_shape(shape, quant)


def _stacked(layers: int, x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((layers, *x.shape), x.dtype)
