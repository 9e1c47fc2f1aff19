"""What a calibration with a text needs, from shapes alone (`base/layerwise.py`)."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from irqlora_jax.base.fit_layer import StoredLinear, lower_step
from irqlora_jax.base.statistics import SAME_INPUTS, alone, gradient_moments, input_moments
from irqlora_jax.base.train_layer import layer_configs, layer_job
from irqlora_jax.config import Config
from irqlora_jax.messages import progress_bar
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.tree import Tree, insert, leaf_path, weight_shapes
from irqlora_jax.plan.measure import PlanDevice, new_bytes, silent_stderr
from irqlora_jax.quant.config import KEPT, QuantConfig
from irqlora_jax.quant.encode import quantized_shape

_FACTOR = 6
"""Matrices [in, in] that a Cholesky factor needs at the same time, for the feedback or CLoQ."""
_FACTOR_WORK = 8 / 3
"""Operations of the factor of the feedback, by the third power of the number of inputs: two
Cholesky factors (1/3 each) and the inverse in between (2)."""
_ROUNDING = 3
"""Copies of a matrix [out, in] while it is rounded."""


@dataclasses.dataclass(frozen=True)
class CalibrationNeed:
    """What the calibration needs, before the training.

    Attributes:
        device: peak memory of the device, in bytes: a layer in float32 and its statistics, with
            the activations of `calibrate.batch_size` rows, with the factors and copies of one
            matrix, or with a step of `quant.training`.
        host: bytes of the hidden states on the host.
        work: floating-point operations of the products and the factors.
    """

    device: int
    host: int
    work: float


def measure_calibration(config: Config, llama: LlamaConfig, target: PlanDevice) -> CalibrationNeed:
    """Compiles the program for the statistics of a layer, from shapes alone.

    Args:
        config: of the run; with `calibrate.data`.
        llama: the architecture.
        target: the device to compile for.
    """
    asked, shapes = config.calibrate, llama.linear_shapes
    where = jax.sharding.SingleDeviceSharding(target.devices[0])
    like = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=where)
    x = like((asked.batch_size, asked.length, llama.hidden_size))
    weights: Tree = {}
    for path, shape in weight_shapes(llama)[0].items():
        insert(weights, leaf_path(path), like(shape))
    layer = sum(4 * leaf.size for leaf in jax.tree.leaves(weights))
    program, given = input_moments, (alone(llama, 0), weights, x)
    chosen = config.quant.budget is not None and config.quant.allocation.errors == "fisher"
    squares = asked.metric == "gradients" and (chosen or config.adapter.needs == "fisher")
    if asked.metric == "gradients":
        program, given = gradient_moments, (*given, x, squares)
    with progress_bar("Compiling the calibration of a layer"), silent_stderr():
        lowered = program.trace(*given).lower()
        found = lowered.compile(compiler_options=target.options).memory_analysis()
    assert found is not None
    moments = {
        name: 4 * columns**2
        for name, (_, columns) in shapes.items()
        if asked.metric == "gradients" or name not in SAME_INPUTS
    }
    statistics = sum(moments.values()) + squares * layer
    collected = layer + 4 * x.size + found.temp_size_in_bytes + 2 * statistics
    factors = _FACTOR * _needs_factor(config.quant) or 1
    if config.adapter.needs == "inputs":  # CLoQ keeps its own factor while it quantizes
        factors = _FACTOR + 1
    rounding = max(
        4 * (factors * columns**2 + _ROUNDING * rows * columns) for rows, columns in shapes.values()
    )
    rounded = 2 * layer + statistics + rounding
    trained = 0
    if config.quant.training != "none":
        trained = layer + statistics + _step_memory(config, llama, weights, target)
    size = jnp.dtype(asked.activations).itemsize
    values, depth = asked.rows * asked.length * llama.hidden_size, llama.num_hidden_layers
    host, trainer = values * size, config.quant.trainer
    if asked.metric == "gradients":  # states of all layers, gradients behind and in front of one
        host = values * (size * (depth + 1) + 8)
    elif trainer is not None:  # also in full precision, in float32 and the outputs to reach
        host = values * (2 * size * (size < 4) + 8 + 4 * (1 + trainer.same_inputs))
    device = max(collected, rounded, trained)
    return CalibrationNeed(device, host, depth * _work(config, llama))


def _needs_factor(quant: QuantConfig) -> bool:
    """Whether any matrix may need the factor of the error feedback."""
    rules = (dataclasses.replace(quant, rules=(), **rule.overrides) for rule in quant.rules)
    return any(one.needs_factor for one in (quant, *rules))


def _step_memory(config: Config, llama: LlamaConfig, weights: Tree, target: PlanDevice) -> int:
    """Bytes of a step that trains the first layer, with its arguments."""
    options, configs = config.quant.trainer, layer_configs(config.quant, 0)
    assert options is not None
    adapter = None if config.adapter.start.fit is None else config.adapter
    linears: dict[str, StoredLinear] = {}
    for name, (rows, columns) in llama.linear_shapes.items():
        own = configs[name]
        pair: Any = {}
        if adapter is not None and name in adapter.targets:
            sizes = {"lora_A": (adapter.rank, columns), "lora_B": (rows, adapter.rank)}
            dtype = jnp.dtype(adapter.dtype)
            pair = {leaf: jax.ShapeDtypeStruct(shape, dtype) for leaf, shape in sizes.items()}
        packed = None if own.format == KEPT else quantized_shape((rows, columns), own)
        linears[name] = StoredLinear(packed, pair)
    settings = dataclasses.replace(alone(llama, 0), adapter=adapter)
    shape = options.batch, config.calibrate.length, llama.hidden_size
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    with progress_bar("Compiling the training of a layer"), silent_stderr():
        job = layer_job(settings, configs, options)
        lowered = lower_step(job, weights, linears, x, target.devices[0])
        found = lowered.compile(compiler_options=target.options).memory_analysis()
    assert found is not None
    return found.argument_size_in_bytes + new_bytes(found)


def _work(config: Config, llama: LlamaConfig) -> float:
    """Operations of the products of one layer."""
    asked, shapes = config.calibrate, llama.linear_shapes
    tokens = asked.rows * asked.length
    forward = 2.0 * tokens * sum(map(math.prod, shapes.values()))
    kinds = {name: columns for name, (_, columns) in shapes.items() if name not in SAME_INPUTS}
    feedback = 0.0
    if _needs_factor(config.quant):
        feedback = sum(2.0 * rows * columns**2 for rows, columns in shapes.values())
        own = kinds if asked.metric == "inputs" else {name: n for name, (_, n) in shapes.items()}
        feedback += _FACTOR_WORK * sum(float(columns) ** 3 for columns in own.values())
    if asked.metric == "gradients":  # two passes forward, one backward
        grams = asked.rows * sum(2.0 * rows * columns**2 for rows, columns in shapes.values())
        return 4 * forward + grams + feedback
    trainer = config.quant.trainer
    training = 0.0 if trainer is None else 3 * trainer.epochs * forward
    grams = tokens * sum(2.0 * columns**2 for columns in kinds.values())
    return training + 2 * forward + grams + feedback
