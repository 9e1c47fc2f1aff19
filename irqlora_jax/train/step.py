"""The training step, a pure function of (state, base, batch)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float32

from irqlora_jax.adapters.lora import LORA
from irqlora_jax.base.file import Base
from irqlora_jax.config import TrainConfig
from irqlora_jax.model.dpo import REWARDS, SUMS, pair_sums
from irqlora_jax.model.llama import Llama, head_weight
from irqlora_jax.model.loss import cross_entropy, row_cross_entropy
from irqlora_jax.model.tree import LAYERS
from irqlora_jax.runs.state import TrainState, learning_rate
from irqlora_jax.sharding import OVERLAP, PAIR, Splits, tree_shardings
from irqlora_jax.train.noise import embedding_noise

Batch = dict[str, Array]
"""tokens int32 [batch, seq]; targets bool [batch, seq], true for tokens that count in the loss;
packed batches also have segment_ids int32 [batch, seq]. Of preference pairs: the rows of a pair
are one after the other, chosen and rejected."""

_GOOD_STEPS = 1000
_NOISE = 0x4E4546  # folded into the key of the dropout, for another stream of numbers


def state_shardings(
    mesh: Mesh | AbstractMesh, state: TrainState, offload: bool, splits: Splits = PAIR
) -> TrainState:
    """The sharding of each array of a state.

    Args:
        mesh: from `make_mesh`.
        state: arrays or their shapes.
        offload: keep the moments of the optimizer in pinned memory of the host.
        splits: of the adapter method.
    """
    shardings: TrainState = tree_shardings(mesh, state, splits)
    if not offload:
        return shardings
    host = jax.tree.map(
        lambda x, where: where.with_memory_kind("pinned_host") if _is_offloaded(x) else where,
        state.opt_state,
        shardings.opt_state,
    )
    return dataclasses.replace(shardings, opt_state=host)


def sharded_state(
    mesh: Mesh,
    init: Callable[..., TrainState],
    offload: bool = False,
    *arrays: Any,
    splits: Splits = PAIR,
) -> TrainState:
    """Makes a new state `init(*arrays)`, already sharded (`state_shardings`)."""
    shardings = state_shardings(mesh, jax.eval_shape(init, *arrays), offload, splits)
    return jax.jit(init, out_shardings=shardings)(*arrays)


def loss_sum(
    adapters: dict[str, Any],
    base: Base,
    batch: Batch,
    dropout_key: Array,
    *,
    model: Llama,
    chunk: int,
    neftune_alpha: float = 0.0,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Sums the negative log-likelihoods of the targets (nats); also returns their number."""
    noise = None
    if neftune_alpha:
        key, size = jax.random.fold_in(dropout_key, _NOISE), model.config.hidden_size
        segments = batch.get("segment_ids")
        noise = embedding_noise(key, neftune_alpha, batch["targets"], segments, size)
    features: Any = model.apply(
        {"params": adapters, "base": base},
        batch["tokens"],
        segment_ids=batch.get("segment_ids"),
        deterministic=False,
        noise=noise,
        rngs={"dropout": dropout_key},
        method="features",
    )
    return cross_entropy(features, head_weight(base), batch["tokens"], batch["targets"], chunk)


def preference_sums(
    adapters: dict[str, Any],
    base: Base,
    batch: Batch,
    dropout_key: Array,
    *,
    model: Llama,
    reference: tuple[Llama, dict[str, Any]],
    config: TrainConfig,
) -> dict[str, Float32[Array, ""]]:
    """Sums the DPO losses and the rewards of the pairs of a batch (`pair_sums`).

    Args:
        adapters, base, batch, dropout_key: as for `loss_sum`.
        model: the trained model.
        reference: the model of the reference and its adapters. It has no dropout and no gradient.
        config: `dpo` and `loss_chunk`.
    """

    def nll(model: Llama, adapters: dict[str, Any], **how: Any) -> tuple[Array, Array]:
        tokens, targets = batch["tokens"], batch["targets"]
        variables = {"params": adapters, "base": base}
        features: Any = model.apply(variables, tokens, method="features", **how)
        return row_cross_entropy(features, head_weight(base), tokens, targets, config.loss_chunk)

    # First the reference: its activations are gone before the gradient needs memory.
    frozen = jax.lax.stop_gradient(nll(*reference)[0])
    own, counts = nll(model, adapters, deterministic=False, rngs={"dropout": dropout_key})
    return pair_sums(own, frozen, counts, config.dpo)


def prepared_model(model: Llama) -> Llama:
    """The model of a training step: with LoRA if the method prepares pairs (`Method.prepare`)."""
    adapter = model.adapter
    if adapter is None or adapter.chosen.prepare is None:
        return model
    unused = {adapter.method: adapter.chosen.options}
    return model.clone(adapter=dataclasses.replace(adapter, method=LORA.name, **unused))


def prepare(model: Llama, adapters: dict[str, Any], key: Array, progress: Array) -> dict[str, Any]:
    """The adapters of a training step, for `prepared_model`: prepared pairs, else the adapters.

    Args:
        model: the model.
        adapters: its adapters.
        key: random key of the step.
        progress: share of the steps that are done, from 0 to 1.
    """
    adapter = model.adapter
    if adapter is None or adapter.chosen.prepare is None:
        return adapters
    one, options = adapter.chosen.prepare, adapter.options
    linears = [(group, name) for group, own in adapters[LAYERS].items() for name in own]
    layers = jax.tree.leaves(adapters)[0].shape[0]
    tree: dict[str, Any] = {}
    # One split for all layers compiles faster than one for each.
    for (group, name), keys in zip(
        linears, jax.random.split(key, (len(linears), layers)), strict=True
    ):
        leaves = adapters[LAYERS][group][name]
        pairs = jax.vmap(lambda params, key: one(params, key, progress, options))(leaves, keys)
        tree.setdefault(group, {})[name] = pairs
    return {LAYERS: tree}


def penalty(model: Llama, adapters: dict[str, Any]) -> Float32[Array, ""]:
    """What the adapters add to the loss (`Method.penalty`), summed over all layers."""
    total, adapter = jnp.float32(0), model.adapter
    if adapter is None or adapter.chosen.penalty is None:
        return total
    one, options = adapter.chosen.penalty, adapter.options
    for linears in adapters[LAYERS].values():
        for leaves in linears.values():
            total += jax.vmap(lambda params: one(params, options))(leaves).sum()
    return total


def train_step(
    state: TrainState,
    base: Base,
    batch: Batch,
    reference: dict[str, Any] | None = None,
    *,
    model: Llama,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    preference: bool = False,
) -> tuple[TrainState, dict[str, Array]]:
    """Computes one optimizer step with gradients for the adapters only.

    The loss is the mean over all targets of the batch, for any `config.accumulation`, plus the
    penalty of the adapter, which the returned loss does not contain. With float16
    the loss is scaled. If a step overflows, only the loss scale changes. It still counts as a step,
    also for the learning rate, so that the schedule ends at the last step.

    With preference pairs the loss is the mean of DPO's over all pairs. The reference runs in the
    same step, without a gradient. So nothing has to be computed before the training or stored for
    a resumed run, and a step takes one forward pass more.

    Args:
        state: the state before the step. Only its adapters are trained.
        base: the frozen weights.
        batch: as `Batch` says.
        reference: adapters of the reference; None: the base without adapters.
        model, optimizer, config: of the run.
        preference: whether the batch has preference pairs.

    Returns:
        The next state; and the loss (nats per target, or DPO's), the norm of the gradient before
        clipping, the number of targets, the learning rate, with float16 the loss scale, and with
        pairs `REWARDS`.
    """
    scaled = config.compute_dtype == "float16"
    scale = state.loss_scale if scaled else jnp.float32(1)
    step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    parts = jax.tree.map(lambda x: x.reshape(config.accumulation, -1, *x.shape[1:]), batch)
    keys = jax.random.split(step_key, config.accumulation)
    # Once a step: all parts of the batch share the pairs, and their gradients are summed first.
    prepare_key = jax.random.fold_in(step_key, 1)
    progress = state.step.astype(jnp.float32) / max(config.total_steps - 1, 1)
    pairs, pull = jax.vjp(
        lambda adapters: prepare(model, adapters, prepare_key, progress), state.adapters
    )
    own = prepared_model(model)

    frozen = model.clone(adapter=None), {}
    if reference is not None:
        frozen = model, reference

    def summed(pairs: dict[str, Any], part: Batch, key: Array) -> dict[str, Array]:
        if preference:
            how: Any = {"model": own, "reference": frozen, "config": config}
            return preference_sums(pairs, base, part, key, **how)
        options: Any = {"chunk": config.loss_chunk, "neftune_alpha": config.neftune_alpha}
        nll, count = loss_sum(pairs, base, part, key, model=own, **options)
        return {"loss": nll, "targets": count}

    @functools.partial(jax.value_and_grad, has_aux=True)
    def scaled_loss(pairs: dict[str, Any], part: Batch, key: Array) -> tuple[Array, dict]:
        sums = summed(pairs, part, key)
        return sums["loss"] * (scale / total), sums

    # Divide by the number of targets before the backward pass: in float16 the sum would overflow.
    if preference:
        total = jnp.float32(batch["targets"].shape[0] / 2)
    else:
        total = jnp.maximum(batch["targets"][:, 1:].sum(), 1).astype(jnp.float32)
    if config.accumulation == 1:
        (_, sums), grads = scaled_loss(pairs, jax.tree.map(lambda x: x[0], parts), keys[0])
    else:

        def add(carry: Any, inputs: tuple[Batch, Array]) -> tuple[Any, None]:
            (_, sums), grads = scaled_loss(pairs, *inputs)
            return jax.tree.map(jnp.add, carry, (sums, grads)), None

        names = SUMS if preference else ("loss", "targets")
        zeros = dict.fromkeys(names, jnp.float32(0)), jax.tree.map(jnp.zeros_like, pairs)
        (sums, grads), _ = jax.lax.scan(add, zeros, (parts, keys))
    (grads,) = pull(grads)
    grads = jax.tree.map(lambda g: g / scale.astype(g.dtype), grads)
    if model.adapter is not None and model.adapter.chosen.penalty is not None:
        added = jax.grad(lambda adapters: penalty(model, adapters))(state.adapters)
        grads = jax.tree.map(jnp.add, grads, added)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) if scaled else None

    by_leaf = optax.with_extra_args_support(optimizer)

    def update(grads: Any, opt_state: Any, adapters: Any, layer: Any = None) -> tuple[Any, Any]:
        if config.clip_norm is not None:
            grads = _clip(grads, norm, config.clip_norm)
        updates, new = by_leaf.update(grads, opt_state, adapters, layer=layer)
        pair = optax.apply_updates(adapters, updates), new
        if finite is None:
            return pair
        return jax.tree.map(functools.partial(jnp.where, finite), pair, (adapters, opt_state))

    advance = functools.partial(_update_by_layer, update) if config.offload_optimizer else update
    opt_state = _with_schedule_at(state.opt_state, state.step) if scaled else state.opt_state
    adapters, opt_state = advance(grads, opt_state, state.adapters)
    new = dataclasses.replace(state, adapters=adapters, opt_state=opt_state, step=state.step + 1)
    rate = jnp.asarray(learning_rate(config)(state.step), jnp.float32)
    metrics = {"grad_norm": norm, "targets": sums["targets"], "learning_rate": rate}
    metrics |= {name: sums[name] / total for name in ("loss", *REWARDS) if name in sums}
    if finite is not None:
        new = _adapt_scale(new, finite)
        metrics["loss_scale"] = scale
    return new, metrics


def make_step(
    mesh: Mesh | AbstractMesh,
    state: TrainState,
    *,
    model: Llama,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    preference: bool = False,
) -> Any:
    """Compiles `train_step` as a function of (state, base, batch), and with preference pairs of the
    adapters of the reference, if there are any. It donates the old state.

    Args:
        mesh: from `make_mesh`.
        state: arrays or their shapes.
        model, optimizer, config, preference: as for `train_step`.
    """
    splits = PAIR if model.adapter is None else model.adapter.splits
    shardings = state_shardings(mesh, state, config.offload_optimizer, splits)
    # An abstract mesh has no platform: who plans passes the options when compiling.
    on_gpu = isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "gpu"
    options = OVERLAP if on_gpu and mesh.shape["fsdp"] > 1 else None
    return jax.jit(
        functools.partial(
            train_step, model=model, optimizer=optimizer, config=config, preference=preference
        ),
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=options,
    )


def _with_schedule_at(opt_state: Any, step: Array) -> Any:
    """Sets the step of the schedule: the optimizer does not count the steps that overflowed."""
    is_schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)  # noqa: E731
    return jax.tree.map(
        lambda x: x._replace(count=step) if is_schedule(x) else x, opt_state, is_leaf=is_schedule
    )


def _clip(grads: Any, norm: Array, largest: float) -> Any:
    """Clips gradients (possibly a subset) by the global norm of all of them."""
    clip = lambda g: jnp.where(norm < largest, g, g / norm.astype(g.dtype) * largest)  # noqa: E731
    return jax.tree.map(clip, grads)


def _update_by_layer(
    update: Callable[..., tuple[Any, Any]], grads: Any, opt_state: Any, adapters: Any
) -> tuple[Any, Any]:
    """Applies `update` with moments in the memory of the host (`state_shardings`).

    The moments are copied to the device layer by layer and written back in place, so they are never
    all on the device. AdamW is elementwise, so the result is the same except for rounding: the
    compiler may fuse either product of b1 mu + (1 - b1) g with the sum.
    """

    def advance(layer: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        def read(x: Array) -> Array:
            return jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)

        def write(x: Array, y: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(x, y, layer, 0)

        def fetch(x: Array, first: Array) -> Array:
            # All layers use the same step count: the value before this step.
            return jax.device_put(read(x), jax.memory.Space.Device) if x.ndim else first

        def store(x: Array, y: Array) -> Array:
            y = jax.device_put(y, jax.memory.Space.Host) if _is_offloaded(x) else y
            return write(x, y) if x.ndim else y

        old = [jax.tree.map(read, tree) for tree in (grads, carry[0])]
        state = jax.tree.map(fetch, carry[1], opt_state)
        new, new_state = update(old[0], state, old[1], (layer, layers))
        return jax.tree.map(write, carry[0], new), jax.tree.map(store, carry[1], new_state)

    layers = jax.tree.leaves(adapters)[0].shape[0]
    return jax.lax.fori_loop(0, layers, advance, (adapters, opt_state))


def _is_offloaded(leaf: Any) -> bool:
    """Whether an array of the optimizer's state is offloaded: only the moments of matrices."""
    return leaf.ndim > 1


def _adapt_scale(new: TrainState, finite: Array) -> TrainState:
    """Updates the loss scale: halved after an overflow, doubled after many steps without one."""
    good = jnp.where(finite, new.good_steps + 1, 0)
    double = good >= _GOOD_STEPS
    grown = jnp.where(double, new.loss_scale * 2, new.loss_scale)
    return dataclasses.replace(
        new,
        loss_scale=jnp.clip(jnp.where(finite, grown, new.loss_scale / 2), 1, 2.0**24),
        good_steps=jnp.where(double, 0, good),
    )
