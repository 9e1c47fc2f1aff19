"""The training step: a pure function of (state, base, batch)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int32, UInt32

from irqlora_jax.checkpoint import Base
from irqlora_jax.config import TrainConfig
from irqlora_jax.llama import Llama, head_weight
from irqlora_jax.loss import cross_entropy
from irqlora_jax.sharding import tree_shardings

Batch = dict[str, Array]
"""tokens int32 [batch, seq], targets bool [batch, seq]: the tokens that count in the loss; packed
batches also have segment_ids int32 [batch, seq]."""

_FIRST_LOSS_SCALE = 2.0**15  # float16: halved at every overflow, doubled after so many good steps
_GOOD_STEPS = 1000


@no_type_check  # JAX rebuilds pytrees with leaves of any kind, which runtime checks would refuse
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes while training, and so all that a checkpoint holds.

    The position in the data is `step`: batches are a function of it. Dropout draws from `key` and
    `step`.
    """

    adapters: dict[str, Any]
    opt_state: Any
    step: Int32[Array, ""]
    key: UInt32[Array, "..."]
    loss_scale: Float32[Array, ""]
    good_steps: Int32[Array, ""]


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Warmup from 0, then constant or down to 0 at the last step."""
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = max(config.steps - warmup, 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
    }[config.schedule]()
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW."""
    adamw = optax.adamw(
        learning_rate(config),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    if config.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def init_state(model: Llama, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """New adapters and an empty optimizer."""
    init_key, dropout_key = jax.random.split(jax.random.key(seed))
    adapters = model.init_adapters(init_key)
    return make_state(adapters, optimizer, dropout_key)


def make_state(
    adapters: dict[str, Any], optimizer: optax.GradientTransformation, key: Array
) -> TrainState:
    """A state at step 0 that starts from given adapters."""
    return TrainState(
        adapters=adapters,
        opt_state=optimizer.init(adapters),
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(key),
        loss_scale=jnp.float32(_FIRST_LOSS_SCALE),
        good_steps=jnp.zeros((), jnp.int32),
    )


def sharded_state(mesh: Mesh, init: Callable[[], TrainState]) -> TrainState:
    """A new state, each part made where it belongs."""
    shardings = tree_shardings(mesh, jax.eval_shape(init))
    return jax.jit(init, out_shardings=shardings)()


def loss_sum(
    adapters: dict[str, Any],
    base: Base,
    batch: Batch,
    dropout_key: Array,
    *,
    model: Llama,
    chunk: int,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Summed negative log-likelihood of the targets in nats, and their number."""
    features: Any = model.apply(
        {"params": adapters, "base": base},
        batch["tokens"],
        segment_ids=batch.get("segment_ids"),
        deterministic=False,
        rngs={"dropout": dropout_key},
        method="features",
    )
    return cross_entropy(features, head_weight(base), batch["tokens"], batch["targets"], chunk)


def train_step(
    state: TrainState,
    base: Base,
    batch: Batch,
    *,
    model: Llama,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step; gradients for the adapters only.

    The loss is the mean over all targets of the batch, however it is cut by `config.accumulation`.
    With float16 the loss is scaled, and a step that overflows changes nothing but the scale.

    Returns:
        The next state, and the loss (nats per target), the norm of the gradient before clipping,
        the number of targets and, with float16, the loss scale.
    """
    scaled = config.compute_dtype == "float16"
    scale = state.loss_scale if scaled else jnp.float32(1)
    step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    parts = jax.tree.map(lambda x: x.reshape(config.accumulation, -1, *x.shape[1:]), batch)
    keys = jax.random.split(step_key, config.accumulation)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def scaled_loss(adapters: dict[str, Any], part: Batch, key: Array) -> tuple[Array, tuple]:
        nll, count = loss_sum(adapters, base, part, key, model=model, chunk=config.loss_chunk)
        return nll * (scale / total), (nll, count)

    # The scaling by 1 / targets comes before the backward pass: in float16 the sum would overflow.
    total = jnp.maximum(batch["targets"][:, 1:].sum(), 1).astype(jnp.float32)
    if config.accumulation == 1:
        (_, (nll, count)), grads = scaled_loss(
            state.adapters, jax.tree.map(lambda x: x[0], parts), keys[0]
        )
    else:

        def add(carry: Any, inputs: tuple[Batch, Array]) -> tuple[Any, None]:
            (_, sums), grads = scaled_loss(state.adapters, *inputs)
            return jax.tree.map(jnp.add, carry, (sums, grads)), None

        zeros = (jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, state.adapters)
        ((nll, count), grads), _ = jax.lax.scan(add, zeros, (parts, keys))
    grads = jax.tree.map(lambda g: g / scale.astype(g.dtype), grads)
    norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.adapters)
    new = dataclasses.replace(
        state,
        adapters=optax.apply_updates(state.adapters, updates),
        opt_state=opt_state,
        step=state.step + 1,
    )
    metrics = {"loss": nll / total, "grad_norm": norm, "targets": count}
    if scaled:
        new = _after_scaling(state, new, jnp.isfinite(norm))
        metrics["loss_scale"] = scale
    return new, metrics


def _after_scaling(old: TrainState, new: TrainState, finite: Array) -> TrainState:
    good = jnp.where(finite, old.good_steps + 1, 0)
    double = good >= _GOOD_STEPS
    scale = jnp.where(
        finite, jnp.where(double, old.loss_scale * 2, old.loss_scale), old.loss_scale / 2
    )
    keep = lambda a, b: jnp.where(finite, a, b)  # noqa: E731
    return dataclasses.replace(
        new,
        adapters=jax.tree.map(keep, new.adapters, old.adapters),
        opt_state=jax.tree.map(keep, new.opt_state, old.opt_state),
        loss_scale=jnp.clip(scale, 1, 2.0**24),
        good_steps=jnp.where(double, 0, good),
    )
