"""The training state: everything that changes during the training and is in a checkpoint."""

import dataclasses
from collections.abc import Mapping
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int32, UInt32

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.lora import LORA
from irqlora_jax.adapters.method import Method
from irqlora_jax.config import TrainConfig
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.llama import Llama

_FIRST_LOSS_SCALE = 2.0**15  # float16: halved after an overflow, doubled after many good steps


@no_type_check  # JAX rebuilds pytrees with leaves of any type, which runtime checks would reject
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that changes during the training and is in a checkpoint.

    `step` is also the position in the data, because batches are a function of it. Dropout depends
    on `key` and `step`.
    """

    adapters: dict[str, Any]
    opt_state: Any
    step: Int32[Array, ""]
    key: UInt32[Array, "..."]
    loss_scale: Float32[Array, ""]
    good_steps: Int32[Array, ""]


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Schedule with warmup from 0, then constant or decaying to 0 at the last step.

    Raises:
        ValueError: a decaying schedule, and the number of steps is not known.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, max(config.total_steps - warmup, 1)),
        "cosine": lambda: optax.cosine_decay_schedule(peak, max(config.total_steps - warmup, 1)),
    }[config.schedule]()
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(config: TrainConfig, method: Method = LORA) -> optax.GradientTransformation:
    """AdamW without clipping. It is elementwise; `train_step` clips, which needs all gradients.

    With `lora_plus_ratio` (LoRA+, arXiv 2402.12354) the leaves `method.faster` have their own
    learning rate, also in the weight decay, like the groups of PEFT's `create_loraplus_optimizer`.
    PEFT's group for adapters of embeddings has no counterpart here.
    """
    adamw = optax.adamw(
        learning_rate(config),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    if config.lora_plus_ratio == 1:
        return adamw

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def scaled(path: Any, step: Array) -> Array:
            return step * config.lora_plus_ratio if path[-1].key in method.faster else step

        steps, state = adamw.update(updates, state, params)
        return jax.tree_util.tree_map_with_path(scaled, steps), state

    # The state is AdamW's, so a run may change the ratio when it resumes.
    return optax.GradientTransformation(adamw.init, update)


def make_model(llama: LlamaConfig, adapter: AdapterConfig, train: TrainConfig) -> Llama:
    """The model of a run. `train.compute_dtype` must not be null (`machine.fastest_dtype`)."""
    assert train.compute_dtype is not None
    return Llama(
        llama,
        adapter=adapter,
        compute_dtype=train.compute_dtype,
        remat=train.remat,
        attention=train.attention,
        matmul=train.matmul,
    )


def init_state(
    model: Llama,
    optimizer: optax.GradientTransformation,
    seed: int,
    pairs: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
) -> TrainState:
    """A new optimizer state and new adapters; `pairs` and `base` as for `Llama.init_adapters`."""
    init_key, dropout_key = jax.random.split(jax.random.key(seed))
    adapters = model.init_adapters(init_key, pairs, base)
    return make_state(adapters, optimizer, dropout_key)


def make_state(
    adapters: dict[str, Any], optimizer: optax.GradientTransformation, key: Array
) -> TrainState:
    """A state at step 0 with the given adapters."""
    return TrainState(
        adapters=adapters,
        opt_state=optimizer.init(adapters),
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(key),
        loss_scale=jnp.float32(_FIRST_LOSS_SCALE),
        good_steps=jnp.zeros((), jnp.int32),
    )
