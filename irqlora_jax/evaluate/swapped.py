"""Losses of a model in which one matrix is swapped, e.g. for its quantized version.

The layers in front of the swapped matrix do not see the swap, so their activations are computed
once. This saves half of the work. The weights of a layer are arguments of the compiled program, so
that one program serves all layers and projections.
"""

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from irqlora_jax.model.alone import layer_moments, layer_outputs
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.layer import Settings, rms_norm
from irqlora_jax.model.llama import Llama, head_weight
from irqlora_jax.model.loss import row_cross_entropy
from irqlora_jax.model.tree import LAYERS, find_stack, insert, linear_path, linear_weights
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.sharding import LINEAR_NAMES

Batches = Sequence[Int[np.ndarray, "_ seq"]]
"""Rows without padding. All tokens of a row except the first one are scored."""


class Whole(NamedTuple):
    """Measurements of a model in which nothing is swapped.

    Attributes:
        loss: mean negative log-likelihood of a token, in nats.
        moments: by layer and projection, the mean square of each input channel, [in].
    """

    loss: float
    moments: list[dict[str, Float32[np.ndarray, " in"]]]


def measure_whole(model: Llama, base: Mapping[str, Any], batches: Batches) -> Whole:
    """Computes the loss of a model, and the second moments of the inputs of its linear layers."""
    hidden, moments = _embed(model, base, batches), []
    tokens = sum(batch.size for batch in batches)
    for layer in range(model.config.num_hidden_layers):
        weights = _pick(model, base, layer)
        found = [_measured_layer(_settings(model, layer), weights, x) for x in hidden]
        hidden = [x for x, _ in found]
        sums = jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *(m for _, m in found))
        moments.append({name: np.asarray(total) / tokens for name, total in sums.items()})
    return Whole(_mean_loss(model, base, hidden, batches), moments)


def swapped_losses(
    model: Llama,
    base: Mapping[str, Any],
    other: Mapping[str, Any],
    batches: Batches,
    matrices: Collection[tuple[int, str]],
) -> Iterator[tuple[int, str, float]]:
    """Yields the loss of `base` with one matrix from `other`, for one matrix after the other.

    Weights that are packed are dequantized, a layer at a time.

    Args:
        model: the architecture, without adapters.
        base: all other weights.
        other: a base of the same architecture, e.g. in another format.
        batches: the rows to score.
        matrices: layer and projection of each matrix to swap.

    Yields:
        Layer, projection, and mean negative log-likelihood of a token in nats.
    """
    depth = model.config.num_hidden_layers
    hidden = _embed(model, base, batches)
    last = max((layer for layer, _ in matrices), default=-1)
    for layer in range(last + 1):
        own, settings = _pick(model, base, layer), _settings(model, layer)
        names = [name for name in LINEAR_NAMES if (layer, name) in matrices]
        others = _pick(model, other, layer) if names else {}
        for name in names:
            group, _ = linear_path(name)
            weights = own | {group: own[group] | {name: others[group][name]}}
            outputs = [layer_outputs(settings, weights, x) for x in hidden]
            for later in range(layer + 1, depth):
                weights = _pick(model, base, later)
                outputs = [layer_outputs(_settings(model, later), weights, x) for x in outputs]
            yield layer, name, _mean_loss(model, base, outputs, batches)
        hidden = [layer_outputs(settings, own, x) for x in hidden]


def _settings(model: Llama, layer: int) -> Settings:
    config = model.config.of_layer(layer)
    return Settings(config, None, model.attention, model.matmul, deterministic=True)


def _embed(model: Llama, base: Mapping[str, Any], batches: Batches) -> list[Array]:
    return [base["embed_tokens"]["weight"][batch].astype(model.compute_dtype) for batch in batches]


def _pick(model: Llama, base: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """The weights of a layer. Its matrices are dense, in the type of the activations."""
    stack, index = find_stack(base, layer, model.config.num_hidden_layers)
    return _pick_from(stack, jnp.int32(index), model.compute_dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _pick_from(stack: Mapping[str, Any], index: Int[Array, ""], dtype: str) -> dict[str, Any]:
    own = jax.tree.map(lambda x: x[index], stack)

    def dense(weight: Any) -> Array:
        packed = isinstance(weight, QTensor)
        return weight.dequantize(dtype) if packed else weight.astype(dtype)

    for name, weight in linear_weights(own).items():
        insert(own, (*linear_path(name), "weight"), dense(weight))
    return own


@functools.partial(jax.jit, static_argnames="settings")
def _measured_layer(
    settings: Settings, weights: Mapping[str, Any], x: Float[Array, "batch seq hidden"]
) -> tuple[Float[Array, "batch seq hidden"], dict[str, Float32[Array, " in"]]]:
    """Also the sum of the squares of each input channel, by projection."""
    x, moments = layer_moments(settings, weights, x)
    return x, {name: jnp.diagonal(gram) for name, gram in moments.items()}


def _mean_loss(
    model: Llama, base: Mapping[str, Any], hidden: Sequence[Array], batches: Batches
) -> float:
    rest = {name: part for name, part in base.items() if name.partition("_")[0] != LAYERS}
    sums = [
        _sum_nll(model.config, rest, x, batch) for x, batch in zip(hidden, batches, strict=True)
    ]
    scored = sum(batch[:, 1:].size for batch in batches)
    return sum(float(np.asarray(part, np.float64).sum()) for part in sums) / scored


@functools.partial(jax.jit, static_argnames="config")
def _sum_nll(
    config: LlamaConfig,
    base: Mapping[str, Any],
    x: Float[Array, "batch seq hidden"],
    tokens: Int[Array, "batch seq"],
) -> Float32[Array, " batch"]:
    features = rms_norm(x, base["norm"]["weight"], config.rms_norm_eps)
    targets = jnp.ones(tokens.shape, bool)
    return row_cross_entropy(features, head_weight(base), tokens, targets)[0]
