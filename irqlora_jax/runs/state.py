"""The training state: everything that changes during the training and is in a checkpoint."""

import dataclasses
from collections.abc import Mapping
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int32, UInt32

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.config import TrainConfig
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.llama import Llama
from irqlora_jax.runs.optimizer import learning_rate as learning_rate
from irqlora_jax.runs.optimizer import make_optimizer as make_optimizer

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
