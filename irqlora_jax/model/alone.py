"""Applies one decoder layer alone, to go through a model layer by layer.

The weights of the layer are arguments of the compiled program, so that one program serves all
layers of the same kind. `LlamaConfig.of_layer` gives their settings.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from irqlora_jax.model.attention import rope_rotations
from irqlora_jax.model.layer import Context, Layer, Settings

GROUPS = ("self_attn", "mlp")
"""The parts of a layer with linear layers."""


@functools.partial(jax.jit, static_argnames="settings")
def layer_outputs(
    settings: Settings, weights: Mapping[str, Any], x: Float[Array, "batch seq hidden"]
) -> Float[Array, "batch seq hidden"]:
    """The hidden states behind the layer.

    Args:
        settings: of the layer, without adapters.
        weights: the base of the layer, without the axis of stacked layers.
        x: the hidden states in front of the layer, in rows without padding.
    """
    return apply_alone(settings, weights, x, mutable=False)[0][0]


@functools.partial(jax.jit, static_argnames="settings")
def layer_moments(
    settings: Settings, weights: Mapping[str, Any], x: Float[Array, "batch seq hidden"]
) -> tuple[Float[Array, "batch seq hidden"], dict[str, Float32[Array, "in in"]]]:
    """`layer_outputs`, and for each projection the sum of x x^T over its inputs x."""
    ((x, _), _), found = apply_alone(settings, weights, x, mutable=["stats"])
    parts = (found["stats"][group] for group in GROUPS)
    return x, {name: own["gram"] for part in parts for name, own in part.items()}


def apply_alone(
    settings: Settings,
    weights: Mapping[str, Any],
    x: Float[Array, "batch seq hidden"],
    adapters: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """`Layer.apply` for rows without padding.

    Args:
        settings: of the layer.
        weights: the base of the layer.
        x: the hidden states in front of it.
        adapters: its adapters by group and projection; None: there are none.
        options: of `apply`.
    """
    positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None, :], x.shape[:2])
    context = Context(rope_rotations(settings.config, positions), None, None)
    carry, own = (x, None), (jnp.int32(0), adapters or {})
    return Layer(settings).apply({"base": weights}, carry, own, context, **options)
