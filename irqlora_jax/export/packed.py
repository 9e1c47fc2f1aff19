"""Writes a quantized base with its codes in the layout of another program.

A layout says which tensors a quantized matrix becomes, and how config.json describes them. All
other weights are written as they are. Matrices are read twice, one at a time: first to check and
describe them, then to write them.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from irqlora_jax.export.model import (
    Part,
    save_config,
    save_parts,
    stored_weight,
    tensor_places,
    tensor_values,
)
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import Tree
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.sharding import LINEAR_NAMES

Parts = dict[str, Part]
ELSE = "or kind merged or dequantized"
"""Kinds that can hold every base."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How another program stores quantized matrices.

    Attributes:
        facts: (start of a message, matrix without leading axes, type of the other weights) -> what
            describes the matrix. Raises ValueError for a matrix that the layout cannot hold; the
            message says what would do.
        describe: (facts by name of the layer, names of the linear layers that are not quantized,
            type of the other weights) -> quantization_config.
        parts: (function that reads the matrix, its facts, quantization_config, type of the other
            weights) -> its tensors by the end of their names.
        file: name of a file with quantization_config alone, for older programs.
    """

    facts: Callable[[str, QTensor, str], Any]
    describe: Callable[[Mapping[str, Any], list[str], str], dict[str, Any]]
    parts: Callable[[Callable[[], QTensor], Any, dict[str, Any], str], Parts]
    file: str | None = None


def save_packed(
    folder: Path,
    model: Llama,
    variables: Mapping[str, Tree],
    kind: str,
    layout: Layout,
    *,
    dtype: str,
    shard_size: float = 5.0,
    progress: bool = False,
) -> dict[str, Any]:
    """Writes config.json and the weights of the base, without the adapter.

    Args:
        folder: existing folder to write to.
        model: the architecture.
        variables: {"params": adapters, "base": base}.
        kind: of the export, for messages.
        layout: of the quantized matrices.
        dtype: of the other weights.
        shard_size: largest file of weights, in GB.
        progress: show a bar.

    Returns:
        The facts of all quantized matrices by name.

    Raises:
        ValueError: the layout cannot hold the base; the message says what would do.
    """
    model, config = model.clone(adapter=None), model.config
    read = functools.partial(stored_weight, variables["base"], config)
    facts: dict[str, Any] = {}
    dense: list[str] = []
    places = tensor_places(config)
    for name, (_, path, layer) in places.items():
        if layer is None or path[-1] not in LINEAR_NAMES:
            continue
        linear, weight = name.removesuffix(".weight"), read(path, layer)
        if not isinstance(weight, QTensor):
            dense.append(linear)
            continue
        start = f"kind = {kind!r}: {linear} has"
        if weight.outliers is not None:
            raise ValueError(
                f"{start} outliers, for which the layout has no place; expected a base without "
                f"outliers, {ELSE}"
            )
        facts[linear] = layout.facts(start, weight, dtype)
    if not facts:
        raise ValueError(f"kind = {kind!r}: the base is not quantized; expected kind merged")
    described = layout.describe(facts, dense, dtype)
    parts: Parts = {}
    for name, (shape, path, layer) in places.items():
        linear = name.removesuffix(".weight")
        if linear in facts:
            own = functools.partial(read, path, layer or 0)
            found = layout.parts(own, facts[linear], described, dtype)
            parts |= {f"{linear}.{end}": part for end, part in found.items()}
        else:
            values = functools.partial(tensor_values, model, variables, path, layer)
            parts[name] = Part(shape, dtype, values)
    save_parts(folder, parts, shard_size=shard_size, progress=progress)
    save_config(folder, config, dtype, quantization_config=described)
    if layout.file is not None:
        (folder / layout.file).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return facts


def shared(kind: str, facts: Mapping[str, Any], name: str) -> Any:
    """The value of a field that all matrices have in common.

    Raises:
        ValueError: they differ.
    """
    found = {getattr(own, name): linear for linear, own in facts.items()}
    if len(found) > 1:
        texts = " and ".join(f"{each} ({linear})" for each, linear in found.items())
        raise ValueError(
            f"kind = {kind!r}: the matrices differ in {name}: {texts}; expected one quant.format "
            f"and quant.block_size for all, {ELSE}"
        )
    return next(iter(found))
