"""The steps that train the linear layers of a quantized decoder layer (`train_layer.py`)."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32

from irqlora_jax.adapters.method import Params
from irqlora_jax.model.alone import GROUPS, apply_alone
from irqlora_jax.model.layer import AdaptedLinear, Settings
from irqlora_jax.model.tree import Tree, insert, linear_path, others
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.quant.trained import ApiqOptions, BlockOptions, Leaves, round_matrix
from irqlora_jax.text import require

Rows = Float[np.ndarray, "rows seq hidden"] | Float[Array, "rows seq hidden"]
Weights = Mapping[str, Any]
"""The weights of a layer: `norm: {"weight"}` and `group: {projection: {"weight"}}`."""
WHOLE = ("",)
"""Stands for the output of the decoder layer."""
_FINITE = "finite numbers; try lower learning rates"


class StoredLinear(NamedTuple):
    """A linear layer of the quantized model.

    Attributes:
        weight: the packed weight; None: the weight stays in full precision.
        pair: lora_A [rank, in] and lora_B [out, rank]; empty: the layer has no adapter.
    """

    weight: QTensor | None
    pair: Params


@dataclasses.dataclass(frozen=True)
class Job:
    """What a compiled step depends on, besides shapes.

    Attributes:
        settings: of the layer.
        options: the method.
        symmetric: by projection, the setting of its quantizer.
        outputs: the outputs to compare: projections, or `WHOLE`.
    """

    settings: Settings
    options: ApiqOptions | BlockOptions
    symmetric: tuple[tuple[str, bool], ...]
    outputs: tuple[str, ...]


Wanted = list[list[list[np.ndarray]]]
"""Outputs in full precision, by batch, kind of inputs and output."""


class Data(NamedTuple):
    """The calibration rows. All rows of a batch are in one step."""

    inputs: Rows
    full_inputs: Rows
    batch: int

    def batches(self) -> list[slice]:
        """The rows of each step; the last step may have fewer."""
        count = len(self.inputs)
        return [slice(i, min(i + self.batch, count)) for i in range(0, count, self.batch)]

    def wanted(self, job: Job, weights: Weights) -> Wanted:
        """Computes the outputs to reach. They stay in the memory of the host."""
        kinds = [self.full_inputs, *([self.inputs] if job.options.same_inputs else [])]
        return [
            [
                [np.asarray(y) for y in layer_outputs(job, weights, {}, jnp.asarray(x[rows]))]
                for x in kinds
            ]
            for rows in self.batches()
        ]


def fit(
    job: Job,
    weights: Weights,
    linears: Mapping[str, StoredLinear],
    names: Sequence[str],
    data: Data,
    wanted: Wanted,
    where: str,
) -> tuple[dict[str, Leaves], Float32[np.ndarray, "steps 2"]]:
    """Trains some linear layers. Returns their leaves, and loss and gradient norm of each step.

    Args:
        job: what is computed.
        weights: the float weights of the layer.
        linears: all linear layers, as they are now.
        names: the projections to train.
        data: the rows.
        wanted: the outputs to reach.
        where: name of the layer, for messages.

    Raises:
        ValueError: the loss or the gradient becomes NaN or infinite.
    """
    options, steps = job.options, data.batches()
    trained: dict[str, Leaves] = {}
    fixed: dict[str, Leaves] = {}
    for one in names:
        trained[one], fixed[one] = _divided(job, linears[one], _weight(weights, one))
        # Copies, because a step overwrites the arrays that it gets.
        trained[one] = jax.tree.map(jnp.array, trained[one])
    packed = {one: linears[one].weight for one in names}
    others = {one: linear for one, linear in linears.items() if packed.get(one) is None}
    base = dense_weights(weights, others)
    pairs = {one: linear.pair for one, linear in linears.items()}
    accepted = "a learning rate above 0 for a part that the layer has"
    require(any(trained.values()), f"{where}: {type(options).__name__}", options.rates, accepted)
    state = optax.scale_by_adam().init(trained)
    curve: list[Array] = []
    for step in range(options.epochs * len(steps)):
        batch = step % len(steps)
        factor = jnp.float32(options.factor(step / (options.epochs * len(steps))))
        x = jnp.asarray(data.inputs[steps[batch]])
        given = fixed, base, pairs, packed, x, wanted[batch], factor
        trained, state, numbers = _step(job, trained, state, *given)
        curve.append(numbers)
        if batch == len(steps) - 1:  # waits for the device once in each epoch
            done = np.asarray(jnp.stack(curve))
            bad = np.flatnonzero(~np.isfinite(done).all(1))
            if bad.size:
                field = f"{where}: loss and gradient norm of step {bad[0]}"
                require(False, field, done[bad[0]].tolist(), _FINITE)
    norm = float(optax.tree.norm(trained))  # the last step may have been the first bad one
    require(math.isfinite(norm), f"{where}: norm of the trained values", norm, _FINITE)
    return {one: trained[one] | fixed[one] for one in names}, np.asarray(jnp.stack(curve))


def lower_step(
    job: Job,
    weights: Weights,
    linears: Mapping[str, StoredLinear],
    x: Float[jax.ShapeDtypeStruct, "batch seq hidden"],
    device: Any,
) -> jax.stages.Lowered:
    """A step that trains all linear layers, from shapes alone (jax.ShapeDtypeStruct).

    Args:
        job: what is computed.
        weights: the float weights of the layer.
        linears: its linear layers.
        x: the rows of a step.
        device: the device to compile for.
    """

    def given(weights: Weights, linears: Mapping[str, StoredLinear], x: Array) -> Any:
        both = {name: _divided(job, one, _weight(weights, name)) for name, one in linears.items()}
        trained, fixed = ({name: part[i] for name, part in both.items()} for i in (0, 1))
        packed = {name: one.weight for name, one in linears.items()}
        others = {name: one for name, one in linears.items() if one.weight is None}
        pairs = {name: one.pair for name, one in linears.items()}
        wanted = [layer_outputs(job, weights, {}, x)] * (1 + job.options.same_inputs)
        state, base = optax.scale_by_adam().init(trained), dense_weights(weights, others)
        return trained, state, fixed, base, pairs, packed, x, wanted, jnp.float32(1)

    where = jax.sharding.SingleDeviceSharding(device)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        jax.eval_shape(given, weights, dict(linears), x),
    )
    return _step.trace(job, *shapes).lower()


def _divided(job: Job, linear: StoredLinear, weight: Array) -> tuple[Leaves, Leaves]:
    """The leaves of a linear layer that are trained, and the other ones."""
    leaves = _start(job, linear, weight)
    ours = trained_leaves(job.options, leaves)
    fixed = {leaf: value for leaf, value in leaves.items() if leaf not in ours}
    return {leaf: leaves[leaf] for leaf in ours}, fixed


def _weight(weights: Weights, name: str) -> Array:
    group, _ = linear_path(name)
    return jnp.asarray(weights[group][name]["weight"])


def _start(job: Job, linear: StoredLinear, weight: Array) -> Leaves:
    """The leaves of a linear layer. Without a packed weight, only the pair is trained."""
    pair = {name: leaf.astype(jnp.float32) for name, leaf in linear.pair.items()}
    if linear.weight is None:
        return pair
    weight = weight.astype(jnp.float32)
    if pair:
        assert job.settings.adapter is not None
        # The packed weight need not hold what the pair adds.
        update = jnp.matmul(pair["lora_B"], pair["lora_A"], precision="highest")
        weight = weight - jnp.float32(job.settings.adapter.scale) * update
    if linear.weight.outliers is not None:  # the other weights determine the ranges
        weight = linear.weight.outliers.take_out(weight)
    return job.options.start(weight, linear.weight) | pair


def trained_leaves(options: ApiqOptions | BlockOptions, leaves: Iterable[str]) -> list[str]:
    """The leaves that are trained, because they have a learning rate."""
    return [leaf for leaf in leaves if options.rates.get(leaf, (0.0, 0.0))[0] > 0]


def dense_weights(weights: Weights, linears: Mapping[str, StoredLinear]) -> Tree:
    """The norms and biases, and the matrices of these linear layers as they are in the quantized
    model."""
    tree: Tree = {name: part for name, part in weights.items() if name not in GROUPS}
    for group in GROUPS:
        tree |= {group: rest} if (rest := others(weights[group])) else {}
    for name, linear in linears.items():
        packed = linear.weight
        dense = _weight(weights, name) if packed is None else packed.dequantize()
        insert(tree, (*linear_path(name), "weight"), dense)
    return tree


def mean_losses(
    job: Job,
    weights: Weights,
    linears: Mapping[str, StoredLinear],
    data: Data,
    wanted: Wanted,
) -> Float32[np.ndarray, " outputs"]:
    """The loss of each output over all rows, with the linear layers as they are stored."""
    base = dense_weights(weights, linears)
    pairs = {one: linear.pair for one, linear in linears.items()}
    total = np.zeros(len(job.outputs))
    for rows, targets in zip(data.batches(), wanted, strict=True):
        x = jnp.asarray(data.inputs[rows])
        total += (rows.stop - rows.start) * np.asarray(_losses(job, base, pairs, x, targets))
    return (total / len(data.inputs)).astype(np.float32)


@functools.partial(jax.jit, static_argnames="job", donate_argnames=("trained", "state"))
def _step(
    job: Job,
    trained: dict[str, Leaves],
    state: Any,
    fixed: dict[str, Leaves],
    base: Tree,
    pairs: Mapping[str, Params],
    packed: Mapping[str, QTensor | None],
    x: Array,
    wanted: list[list[Array]],
    factor: Float32[Array, ""],
) -> tuple[dict[str, Leaves], Any, Float32[Array, "2"]]:
    """One step of AdamW. Also returns the loss before it, and the norm of the gradient."""

    def loss(trained: dict[str, Leaves]) -> Array:
        tree, own_pairs = jax.tree.map(lambda leaf: leaf, base), dict(pairs)
        for name, like in packed.items():
            leaves = trained[name] | fixed[name]
            own_pairs[name] = {leaf: leaves[leaf] for leaf in pairs[name]}
            if like is not None:
                numbers = job.options.numbers(leaves, like, dict(job.symmetric)[name])
                insert(tree, (*linear_path(name), "weight"), round_matrix(numbers, like))
        return _losses(job, tree, own_pairs, x, wanted).sum()

    value, gradients = jax.value_and_grad(loss)(trained)
    updates, state = optax.scale_by_adam().update(gradients, state)

    def update(path: Any, leaf: Array, step: Array) -> Array:
        rate, decay = job.options.rates[path[-1].key]
        return leaf - factor * rate * (step + decay * leaf)

    new = jax.tree_util.tree_map_with_path(update, trained, updates)
    return new, state, jnp.stack([value, optax.tree.norm(gradients)])


@functools.partial(jax.jit, static_argnames="job")
def _losses(
    job: Job, base: Tree, pairs: Mapping[str, Params], x: Array, wanted: list[list[Array]]
) -> Float32[Array, " outputs"]:
    """The mean squared error of each output, summed over the kinds of wanted outputs."""
    found = layer_outputs(job, base, pairs, x)

    def error(y: Array, target: Array) -> Array:
        return jnp.mean((y.astype(jnp.float32) - target.astype(jnp.float32)) ** 2)

    errors = [jnp.stack(list(map(error, found, targets))) for targets in wanted]
    return functools.reduce(jnp.add, errors)


@functools.partial(jax.jit, static_argnames="job")
def layer_outputs(
    job: Job, base: Weights, pairs: Mapping[str, Params], x: Float[Array, "batch seq hidden"]
) -> list[Array]:
    """The outputs of the decoder layer that the job compares."""
    adapters: Tree = {}
    for name, pair in pairs.items():
        if pair:
            insert(adapters, linear_path(name), pair)
    base = jax.tree.map(lambda leaf: leaf.astype(x.dtype), base)
    if job.outputs == WHOLE:
        (y, _), _ = apply_alone(job.settings, base, x, adapters)
        return [y]

    def linear(module: nn.Module, method: str) -> bool:
        return isinstance(module, AdaptedLinear)

    # XLA leaves out what no captured output depends on.
    options: dict[str, Any] = {"capture_intermediates": linear, "mutable": ["intermediates"]}
    found = apply_alone(job.settings, base, x, adapters, **options)[1]
    captured = found["intermediates"]
    places = [linear_path(name) for name in job.outputs]
    return [captured[group][name]["__call__"][0] for group, name in places]
