"""Computes the exact size of a base from shapes, without reading or quantizing weights."""

import dataclasses
import fnmatch
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from irqlora_jax.base.file import Base
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.tree import (
    find_stack,
    insert,
    leaf_path,
    linear_path,
    linear_stacks,
    matrix_name,
    stack_names,
    stacks,
    weight_shapes,
)
from irqlora_jax.quant.config import KEPT, QuantConfig
from irqlora_jax.quant.encode import quantized_shape, stored_bits
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.sharding import LINEAR_NAMES, device_bytes
from irqlora_jax.text import require


@dataclasses.dataclass(frozen=True)
class Storage:
    """Sizes of the parts of a base, in bytes.

    Attributes:
        codes: codes of the linear layers, or their weights if they are not quantized.
        scales: scales with their second level, and their updates.
        shifts: shifts or zero points with their second level, and their updates.
        rest: embeddings, output matrix and norms.
        weights: number of weights of the linear layers, without padding.
        outliers: weights of the linear layers that keep 16 bits, and their places.
    """

    codes: int
    scales: int
    shifts: int
    rest: int
    weights: int
    outliers: int = 0

    @property
    def total(self) -> int:
        """All bytes: the size of base.safetensors without its header."""
        return self.codes + self.scales + self.shifts + self.outliers + self.rest

    @property
    def bits(self) -> float:
        """Stored bits per weight of the linear layers."""
        return 8 * (self.total - self.rest) / self.weights


def measure_base(base: Base) -> Storage:
    """Measures arrays over all devices together, but shapes with shardings per device.

    Args:
        base: arrays or their shapes (jax.ShapeDtypeStruct).
    """
    parts = dict.fromkeys(("codes", "scales", "shifts", "outliers"), 0)
    linears = [weight for _, weight in linear_stacks(base)]
    for weight in linears:
        if not isinstance(weight, QTensor):
            parts["codes"] += device_bytes(weight)
            continue
        parts["codes"] += device_bytes(weight.packed)
        scales = weight.scale_codes, weight.scale_max, weight.scale_offset, weight.scale_update
        parts["scales"] += device_bytes(scales)
        shifts = weight.shift_codes, weight.shift_max, weight.shift_update
        parts["shifts"] += device_bytes(shifts)
        parts["outliers"] += device_bytes(weight.outliers)
    rest = device_bytes(base) - sum(parts.values())
    return Storage(**parts, rest=rest, weights=sum(map(_logical, linears)))


def _logical(weight: Any) -> int:
    layers = weight.packed.shape[0] if isinstance(weight, QTensor) else weight.shape[0]
    return layers * weight.shape[-1] * weight.shape[-2]


def abstract_base(llama: LlamaConfig, quant: QuantConfig, dtype: DTypeLike = jnp.bfloat16) -> Base:
    """Makes the tree of `hf.load_base` with jax.ShapeDtypeStruct in place of arrays.

    Args:
        llama: the architecture.
        quant: quantization settings.
        dtype: type of the weights that are not quantized.

    Raises:
        ValueError: a rule matches no matrix.
    """
    layered, single = weight_shapes(llama)
    base: Base = {}
    for name, layers in plan_stacks(llama, quant).items():
        for path, shape in layered.items():
            config = quant.for_matrix(matrix_name(path, layers.start))
            weight: Any = jax.ShapeDtypeStruct(shape, dtype)
            if path[-1] in LINEAR_NAMES and config.format != KEPT:
                weight = packed_shape(shape, config)
            add = functools.partial(_stacked, len(layers))
            insert(base, (name, *leaf_path(path)), jax.tree.map(add, weight))
    for path, shape in single.items():
        insert(base, leaf_path(path), jax.ShapeDtypeStruct(shape, dtype))
    return base


def plan_stacks(llama: LlamaConfig, quant: QuantConfig) -> dict[str, range]:
    """Plans into which stacks the layers of a base go (`model.tree.stack_names`).

    Raises:
        ValueError: a rule matches no matrix of the model, or there is a budget in place of rules.
    """
    shapes = {linear_path(name): shape for name, shape in llama.linear_shapes.items()}
    accepted = "null here: irqlora quantize and irqlora train choose rules for it"
    require(quant.budget is None, "quant.budget", quant.budget, accepted)
    names = [
        [matrix_name(path, layer) for path in shapes] for layer in range(llama.num_hidden_layers)
    ]
    for place, rule in enumerate(quant.rules):
        matched = any(fnmatch.fnmatchcase(name, rule.match) for row in names for name in row)
        accepted = f"a pattern of names such as {names[0][0]} (layers 0 to {len(names) - 1})"
        require(matched, f"quant.rules[{place}].match", rule.match, accepted)

    def kind(name: str, shape: tuple[int, int]) -> Any:
        config = quant.for_matrix(name)
        if config.format == KEPT:
            return None
        leaves, structure = jax.tree.flatten(packed_shape(shape, config))
        return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)

    return stack_names([tuple(map(kind, row, shapes.values())) for row in names])


@functools.cache  # as packed_shape
def matrix_bits(shape: tuple[int, int], quant: QuantConfig, dtype: DTypeLike) -> int:
    """Stored bits of a matrix.

    Args:
        shape: of the matrix.
        quant: its configuration, without rules.
        dtype: its type if it is not quantized.
    """
    if quant.format == KEPT:
        return 8 * math.prod(shape) * jnp.dtype(dtype).itemsize
    return stored_bits(shape, quant)


def bits_by_layer(base: Base, depth: int) -> dict[str, list[float]]:
    """Stored bits a weight of every matrix: by projection, lists over the layers.

    Args:
        base: arrays or their shapes.
        depth: number of layers.
    """
    found: dict[str, list[float]] = {name: [] for name in LINEAR_NAMES}
    for layers in stacks(base, depth).values():
        stack, _ = find_stack(base, layers.start, depth)
        for name, bits in found.items():
            group, _ = linear_path(name)
            weight = stack[group][name]["weight"]
            bits += [8 * device_bytes(weight) / _logical(weight)] * len(layers)
    return found


@functools.cache  # tracing the search is slow, and many layers have the same shape
def packed_shape(shape: tuple[int, int], quant: QuantConfig) -> QTensor:
    """The shapes of a packed matrix. `quant` is its own configuration, without rules."""
    return quantized_shape(shape, quant)


def _stacked(layers: int, x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((layers, *x.shape), x.dtype)
