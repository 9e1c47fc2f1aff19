"""Puts what was trained beside the base into its packed weights. The codes do not change."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from irqlora_jax.adapters.scales import put, split
from irqlora_jax.base.file import Base
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import LAYERS, Tree, linear_path, stacks
from irqlora_jax.quant.qtensor import QTensor


def changed_base(
    model: Llama, variables: Mapping[str, Tree], change: Callable[[Any, Any], QTensor]
) -> Base:
    """The base with another weight for every target.

    Args:
        model: with an adapter.
        variables: {"params": adapters, "base": base}.
        change: (parameters of a layer, its weight) -> the new weight.

    Raises:
        ValueError: as `change`; the target is named.
    """
    adapter, depth = model.adapter, model.config.num_hidden_layers
    assert adapter is not None
    base: Base = dict(variables["base"])
    for name, layers in stacks(base, depth).items():
        stack = base[name] = {**base[name]}
        for target in adapter.targets:
            group, projection = linear_path(target)
            params = variables["params"][LAYERS][group][projection]
            own = jax.tree.map(lambda x, of=layers: x[of.start : of.stop], params)
            try:
                weight = jax.jit(jax.vmap(change))(own, stack[group][projection]["weight"])
            except ValueError as error:
                raise ValueError(f"{target}: {error}") from error
            stack[group] = {
                **stack[group],
                projection: {**stack[group][projection], "weight": weight},
            }
    return base


def with_scales(model: Llama, variables: Mapping[str, Tree]) -> tuple[Llama, dict[str, Tree]]:
    """Moves trained scales and shifts (`adapter.scales`) from the adapter into the base.

    Returns:
        A model and variables with the same outputs. Without trained scales, these are the given
        ones.

    Raises:
        ValueError: the scales do not belong to this base.
    """
    adapter = model.adapter
    if adapter is None or not adapter.scales:
        return model, dict(variables)
    base = changed_base(model, variables, lambda params, weight: put(split(params)[0], weight))
    has_leaves = lambda tree: "block_scale" in tree  # noqa: E731
    params = jax.tree.map(lambda own: split(own)[1], variables["params"], is_leaf=has_leaves)
    plain = model.clone(adapter=dataclasses.replace(adapter, scales=0))
    return plain, {**variables, "params": params, "base": base}
