"""What a calibration with a text needs, from shapes alone (`base/layerwise.py`)."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from irqlora_jax.base.statistics import SAME_INPUTS, alone, gradient_moments, input_moments
from irqlora_jax.config import Config
from irqlora_jax.messages import progress_bar
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.tree import Tree, insert, weight_shapes
from irqlora_jax.plan.measure import PlanDevice, silent_stderr

_FACTOR = 6
"""Matrices [in, in] that the Cholesky factor of the feedback needs at the same time."""
_ROUNDING = 3
"""Copies of a matrix [out, in] while it is rounded."""


@dataclasses.dataclass(frozen=True)
class CalibrationNeed:
    """What the calibration needs, before the training.

    Attributes:
        device: peak memory of the device, in bytes: a layer in float32, its statistics, the
            activations of `calibrate.batch_size` rows.
        host: bytes of the hidden states on the host.
        work: floating-point operations of the products.
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
        insert(weights, path, {"weight": like(shape)})
    layer = sum(4 * leaf.size for leaf in jax.tree.leaves(weights))
    program, given = input_moments, (alone(llama), weights, x)
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
    rounding = max(
        4 * (_FACTOR * columns**2 + _ROUNDING * rows * columns) for rows, columns in shapes.values()
    )
    rounded = 2 * layer + statistics + rounding
    size = jnp.dtype(asked.activations).itemsize
    values, depth = asked.rows * asked.length * llama.hidden_size, llama.num_hidden_layers
    host, trainer = values * size, config.quant.trainer
    if asked.metric == "gradients":  # states of all layers, gradients behind and in front of one
        host = values * (size * (depth + 1) + 8)
    elif trainer is not None:  # also in full precision, in float32 and the outputs to reach
        host = values * (2 * size * (size < 4) + 8 + 4 * (1 + trainer.same_inputs))
    return CalibrationNeed(max(collected, rounded), host, depth * _work(config, llama))


def _work(config: Config, llama: LlamaConfig) -> float:
    """Operations of the products of one layer."""
    asked, shapes = config.calibrate, llama.linear_shapes
    tokens = asked.rows * asked.length
    forward = 2.0 * tokens * sum(map(math.prod, shapes.values()))
    feedback = sum(2.0 * rows * columns**2 for rows, columns in shapes.values())
    if asked.metric == "gradients":  # two passes forward, one backward
        return 4 * forward + asked.rows * feedback + feedback
    trainer = config.quant.trainer
    training = 0.0 if trainer is None else 3 * trainer.epochs * forward
    inputs = {columns for name, (_, columns) in shapes.items() if name not in SAME_INPUTS}
    return training + 2 * forward + tokens * sum(2.0 * columns**2 for columns in inputs) + feedback
