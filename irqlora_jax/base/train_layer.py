"""Trains a quantized decoder layer so that its outputs come close to those in full precision.

The layers in front of it are quantized already. Its inputs are the outputs of this quantized
prefix, and the outputs to reach are those of the full-precision layer behind the full-precision
prefix. So a layer also corrects errors of the layers in front of it. What is trained is in
`quant/trained.py`: ApiQ (arXiv 2402.05147) or EfficientQAT's block training (arXiv 2407.11062).

Training uses scales and shifts in float32. Storage rounds them, so the result is measured after
storing, and a result that is worse than its start is dropped.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.method import Params
from irqlora_jax.model.attention import rope_rotations
from irqlora_jax.model.layer import AdaptedLinear, Context, Layer, Settings
from irqlora_jax.model.tree import LAYERS, Tree, insert, linear_path, matrix_name
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import encode_with
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.quant.trained import ApiqOptions, BlockOptions, Leaves, round_matrix
from irqlora_jax.sharding import LINEAR_NAMES
from irqlora_jax.text import require

Rows = Float[np.ndarray | Array, "rows seq hidden"]
Weights = Mapping[str, Any]
"""The weights of a layer: `norm: {"weight"}` and `group: {projection: {"weight"}}`."""
_GROUPS = ("self_attn", "mlp")
_WHOLE = ("",)
"""Stands for the output of the decoder layer."""
_ORDER = (LINEAR_NAMES[:3], LINEAR_NAMES[3:4], LINEAR_NAMES[4:6], LINEAR_NAMES[6:])
"""ApiQ-lw's order. Linear layers with the same inputs do not affect each other."""


class StoredLinear(NamedTuple):
    """A linear layer of the quantized model.

    Attributes:
        weight: the packed weight; None: the weight stays in full precision.
        pair: lora_A [rank, in] and lora_B [out, rank]; empty: the layer has no adapter.
    """

    weight: QTensor | None
    pair: Params


class TrainedLayer(NamedTuple):
    """The result of `train_layer`.

    Attributes:
        linears: the linear layers by projection.
        loss_before: mean squared error of the layer's output for the start, over all rows.
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


@dataclasses.dataclass(frozen=True)
class Job:
    """What a compiled step depends on, besides shapes.

    Attributes:
        settings: of the layer.
        options: the method.
        symmetric: by projection, the setting of its quantizer.
        outputs: the outputs to compare: projections, or `_WHOLE`.
    """

    settings: Settings
    options: ApiqOptions | BlockOptions
    symmetric: tuple[tuple[str, bool], ...]
    outputs: tuple[str, ...]


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

    The pairs are trained as LoRA's, with the factor alpha / rank of `settings.adapter`. Equal
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
    name = f"{LAYERS}.{layer}"
    shape = f"shape {full_inputs.shape} as in full precision"
    require(inputs.shape == full_inputs.shape, f"{name}: inputs", inputs.shape, shape)
    require(len(inputs) > 0, f"{name}: inputs", inputs.shape, "at least one row")
    require(set(start) == set(LINEAR_NAMES), f"{name}: start", sorted(start), str(LINEAR_NAMES))
    symmetric = tuple(
        (one, quant.for_matrix(matrix_name(linear_path(one), layer)).symmetric)
        for one in LINEAR_NAMES
    )
    whole = Job(_lora(settings), options, symmetric, _WHOLE)
    groups = [(whole, LINEAR_NAMES)]
    if options.match == "linear":
        groups = [(dataclasses.replace(whole, outputs=each), each) for each in _ORDER]
    data = Data(inputs, full_inputs, options.batch)
    wanted = data.wanted(whole, weights)
    before = _mean_losses(whole, weights, start, data, wanted)
    accepted = "a finite number; check the inputs and the weights"
    require(bool(np.isfinite(before).all()), f"{name}: loss before training", before, accepted)
    linears, kept, curves = dict(start), [], []
    for job, names in groups:
        targets = wanted if job is whole else data.wanted(job, weights)
        losses = _mean_losses(job, weights, linears, data, targets)
        leaves, curve = fit(job, weights, linears, names, data, targets, name)
        curves.append(curve)
        new = dict(linears)
        for one in names:
            config = quant.for_matrix(matrix_name(linear_path(one), layer))
            new[one] = _store(job, config, one, leaves[one], linears[one])
        better = _mean_losses(job, weights, new, data, targets) < losses
        for one, wins in zip(names, np.broadcast_to(better, len(names)), strict=True):
            if wins:
                linears[one] = new[one]
            else:
                kept.append(one)
    after = _mean_losses(whole, weights, linears, data, wanted)
    if not after[0] <= before[0]:  # each linear layer gained, but all of them together lost
        linears, after, kept = dict(start), before, list(LINEAR_NAMES)
    losses, norms = np.concatenate(curves).T
    return TrainedLayer(linears, float(before[0]), float(after[0]), tuple(kept), losses, norms)


def _lora(settings: Settings) -> Settings:
    """The settings for training: plain LoRA, and float weights instead of packed ones."""
    own = settings.adapter
    adapter = own and AdapterConfig(method="lora", rank=own.rank, alpha=own.alpha)
    return dataclasses.replace(settings, adapter=adapter, matmul=None, deterministic=True)


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
                [np.asarray(y) for y in _outputs(job, weights, {}, jnp.asarray(x[rows]))]
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
        leaves = _start(job, linears[one], _weight(weights, one))
        ours = [leaf for leaf in leaves if options.rates.get(leaf, (0.0, 0.0))[0] > 0]
        # Copies, because a step overwrites the arrays that it gets.
        trained[one] = {leaf: jnp.array(leaves[leaf]) for leaf in ours}
        fixed[one] = {leaf: leaves[leaf] for leaf in leaves if leaf not in ours}
    packed = {one: linears[one].weight for one in names}
    others = {one: linear for one, linear in linears.items() if packed.get(one) is None}
    base, pairs = _dense(weights, others), {one: linear.pair for one, linear in linears.items()}
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
                accepted = "finite numbers; try lower learning rates"
                require(False, field, done[bad[0]].tolist(), accepted)
    return {one: trained[one] | fixed[one] for one in names}, np.asarray(jnp.stack(curve))


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
    return job.options.start(weight, linear.weight) | pair


def _store(
    job: Job, config: QuantConfig, name: str, leaves: Leaves, start: StoredLinear
) -> StoredLinear:
    """A trained linear layer in the form of its start."""
    pair = {leaf: leaves[leaf].astype(array.dtype) for leaf, array in start.pair.items()}
    if start.weight is None:
        return StoredLinear(None, pair)
    numbers = job.options.numbers(leaves, start.weight, dict(job.symmetric)[name])
    packed = encode_with(numbers.weight, config, numbers.scale, numbers.place)
    return StoredLinear(packed.with_layout(start.weight.layout), pair)


def _dense(weights: Weights, linears: Mapping[str, StoredLinear]) -> Tree:
    """The norms, and the matrices of these linear layers as they are in the quantized model."""
    tree: Tree = {name: part for name, part in weights.items() if name not in _GROUPS}
    for name, linear in linears.items():
        packed = linear.weight
        dense = _weight(weights, name) if packed is None else packed.dequantize()
        insert(tree, (*linear_path(name), "weight"), dense)
    return tree


def _mean_losses(
    job: Job,
    weights: Weights,
    linears: Mapping[str, StoredLinear],
    data: Data,
    wanted: Wanted,
) -> Float32[np.ndarray, " outputs"]:
    """The loss of each output over all rows, with the linear layers as they are stored."""
    base, pairs = _dense(weights, linears), {one: linear.pair for one, linear in linears.items()}
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
    found = _outputs(job, base, pairs, x)

    def error(y: Array, target: Array) -> Array:
        return jnp.mean((y.astype(jnp.float32) - target.astype(jnp.float32)) ** 2)

    errors = [jnp.stack(list(map(error, found, targets))) for targets in wanted]
    return functools.reduce(jnp.add, errors)


@functools.partial(jax.jit, static_argnames="job")
def _outputs(
    job: Job, base: Weights, pairs: Mapping[str, Params], x: Float[Array, "batch seq hidden"]
) -> list[Array]:
    """The outputs of the decoder layer that the job compares."""
    adapters: Tree = {}
    for name, pair in pairs.items():
        if pair:
            insert(adapters, linear_path(name), pair)
    base = jax.tree.map(lambda leaf: leaf.astype(x.dtype), base)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None, :], x.shape[:2])
    context = Context(rope_rotations(job.settings.config, positions), None, None)
    given = (x, None), (jnp.int32(0), adapters), context
    if job.outputs == _WHOLE:
        (y, _), _ = Layer(job.settings).apply({"base": base}, *given)
        return [y]

    def linear(module: nn.Module, method: str) -> bool:
        return isinstance(module, AdaptedLinear)

    # XLA leaves out what no captured output depends on.
    options: dict[str, Any] = {"capture_intermediates": linear, "mutable": ["intermediates"]}
    _, found = Layer(job.settings).apply({"base": base}, *given, **options)
    captured = found["intermediates"]
    places = [linear_path(name) for name in job.outputs]
    return [captured[group][name]["__call__"][0] for group, name in places]
