"""Trains a quantized decoder layer so that its outputs come close to those in full precision.

The layers in front of it are quantized already. Its inputs are the outputs of this quantized
prefix, and the outputs to reach are those of the full-precision layer behind the full-precision
prefix. So a layer also corrects errors of the layers in front of it. What is trained is in
`quant/trained.py`: ApiQ (arXiv 2402.05147) or EfficientQAT's block training (arXiv 2407.11062).

Training uses scales and shifts in float32. Storage rounds them, so the result is measured after
storing, and a result that is worse than its start is dropped.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float32

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.base.fit_layer import (
    WHOLE,
    Data,
    Job,
    Rows,
    StoredLinear,
    Weights,
    fit,
    mean_losses,
    trained_leaves,
)
from irqlora_jax.model.layer import Settings
from irqlora_jax.model.tree import LAYERS, linear_path, matrix_name
from irqlora_jax.quant.config import KEPT, QuantConfig
from irqlora_jax.quant.encode import encode_with
from irqlora_jax.quant.trained import ApiqOptions, BlockOptions, Leaves
from irqlora_jax.sharding import LINEAR_NAMES
from irqlora_jax.text import require

_ORDER = (LINEAR_NAMES[:3], LINEAR_NAMES[3:4], LINEAR_NAMES[4:6], LINEAR_NAMES[6:])
"""ApiQ-lw's order. Linear layers with the same inputs do not affect each other."""


class TrainedLayer(NamedTuple):
    """The result of `train_layer`.

    Attributes:
        linears: the linear layers by projection.
        loss_before: mean squared error of the layer's output for the start, over all rows. With
            `same_inputs` it is the sum of both errors.
        loss_after: the same for `linears`, as they are stored.
        kept: projections that kept their start, because training or storing made them worse.
        losses: the training loss before each step.
        norms: the norm of the gradient of each step.
    """

    linears: dict[str, StoredLinear]
    loss_before: float
    loss_after: float
    kept: tuple[str, ...]
    losses: Float32[np.ndarray, " steps"]
    norms: Float32[np.ndarray, " steps"]


def train_layer(
    settings: Settings,
    quant: QuantConfig,
    layer: int,
    weights: Weights,
    start: Mapping[str, StoredLinear],
    inputs: Rows,
    full_inputs: Rows,
    options: ApiqOptions | BlockOptions,
) -> TrainedLayer:
    """Trains the linear layers of a decoder layer.

    The pairs are trained as LoRA's, with the factor `settings.adapter.scale`. Equal
    arguments give equal results, bit by bit.

    Args:
        settings: architecture, adapter and implementation of the attention.
        quant: how the matrices are stored.
        layer: number of the layer, for rules and messages.
        weights: its float weights.
        start: its linear layers by projection, as they were quantized. Their weights are what
            `quant` gives, or that of W minus the update of the pair (LoftQ).
        inputs: inputs of the layer in the quantized model, in the type of the computation. NumPy
            arrays stay in the memory of the host, and are copied to the device row by row.
        full_inputs: inputs of the layer in full precision.
        options: the method.

    Raises:
        ValueError: shapes that do not fit, or a loss that is NaN or infinite; the message names the
            layer.
    """
    name, configs = f"{LAYERS}.{layer}", layer_configs(quant, layer)
    _check(name, settings, configs, start, inputs, full_inputs)
    whole = layer_job(settings, configs, options)
    groups = [(whole, LINEAR_NAMES)]
    if options.match == "linear":
        trained = [name for name, (weight, pair) in start.items() if weight is not None or pair]
        parts = (tuple(name for name in each if name in trained) for each in _ORDER)
        groups = [(dataclasses.replace(whole, outputs=part), part) for part in parts if part]
    data = Data(inputs, full_inputs, options.batch)
    wanted = data.wanted(whole, weights)
    before = mean_losses(whole, weights, start, data, wanted)
    accepted = "a finite number; check the inputs and the weights"
    require(bool(np.isfinite(before).all()), f"{name}: loss before training", before, accepted)
    linears, kept, curves = dict(start), [], []
    for job, names in groups:
        targets = wanted if job is whole else data.wanted(job, weights)
        losses = mean_losses(job, weights, linears, data, targets)
        leaves, curve = fit(job, weights, linears, names, data, targets, name)
        curves.append(curve)
        stored = {one: _store(job, configs[one], leaves[one], linears[one]) for one in names}
        new = linears | stored
        better = mean_losses(job, weights, new, data, targets) < losses
        for one, wins in zip(names, np.broadcast_to(better, len(names)), strict=True):
            linears[one] = new[one] if wins else linears[one]
            kept += [] if wins else [one]
    after = mean_losses(whole, weights, linears, data, wanted)
    if not after[0] <= before[0]:  # each linear layer gained, but all of them together lost
        linears, after, kept = dict(start), before, list(LINEAR_NAMES)
    losses, norms = np.concatenate(curves).T
    return TrainedLayer(linears, float(before[0]), float(after[0]), tuple(kept), losses, norms)


def layer_configs(quant: QuantConfig, layer: int) -> dict[str, QuantConfig]:
    """The configuration of each linear layer of a decoder layer."""
    return {one: quant.for_matrix(matrix_name(linear_path(one), layer)) for one in LINEAR_NAMES}


def layer_job(
    settings: Settings, configs: Mapping[str, QuantConfig], options: ApiqOptions | BlockOptions
) -> Job:
    """Compares the outputs of the decoder layer."""
    symmetric = tuple((one, config.symmetric) for one, config in configs.items())
    return Job(_lora(settings), options, symmetric, WHOLE)


def _check(
    name: str,
    settings: Settings,
    configs: Mapping[str, QuantConfig],
    start: Mapping[str, StoredLinear],
    inputs: np.ndarray | Array,
    full_inputs: np.ndarray | Array,
) -> None:
    accepted = f"shape {full_inputs.shape}, as in full precision"
    require(inputs.shape == full_inputs.shape, f"{name}: inputs", inputs.shape, accepted)
    require(inputs.size > 0, f"{name}: inputs", inputs.shape, "at least one row")
    names = ", ".join(LINEAR_NAMES)
    require(set(start) == set(LINEAR_NAMES), f"{name}: start", sorted(start), names)
    for one, (weight, pair) in start.items():
        where, config = f"{name}.{one}", configs[one]
        format = KEPT if weight is None else weight.format
        require(format == config.format, f"{where}: format", format, config.format)
        if weight is not None:
            size, accepted = weight.block_size, str(config.block_size)
            require(size == config.block_size, f"{where}: block_size", size, accepted)
        accepted = "no pair, because the settings have no adapter"
        ok = settings.adapter is not None or not pair
        require(ok, f"{where}: pair", sorted(pair), accepted)


def _lora(settings: Settings) -> Settings:
    """The settings for training: plain LoRA, and float weights instead of packed ones."""
    own = settings.adapter
    kept = own and {"rank": own.rank, "alpha": own.alpha, "scaling": own.scaling}
    adapter = kept and AdapterConfig(method="lora", **kept)
    return dataclasses.replace(settings, adapter=adapter, matmul=None, deterministic=True)


def _store(job: Job, config: QuantConfig, leaves: Leaves, start: StoredLinear) -> StoredLinear:
    """A trained linear layer in the form of its start."""
    pair = {leaf: leaves[leaf].astype(array.dtype) for leaf, array in start.pair.items()}
    if start.weight is None or not trained_leaves(job.options, set(leaves) - set(pair)):
        return StoredLinear(start.weight, pair)
    numbers = job.options.numbers(leaves, start.weight, config.symmetric)
    packed = encode_with(numbers.weight, config, *numbers[1:], outliers=start.weight.outliers)
    return StoredLinear(packed, pair)
