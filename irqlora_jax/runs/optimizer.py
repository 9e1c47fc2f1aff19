"""The optimizer: AdamW with rates for parts of the adapter, and a schedule."""

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from irqlora_jax.adapters.lora import LORA
from irqlora_jax.adapters.method import Method
from irqlora_jax.config import RateRule, TrainConfig
from irqlora_jax.model.tree import matrix_name
from irqlora_jax.runs import moments
from irqlora_jax.text import require


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


def make_optimizer(
    config: TrainConfig, method: Method = LORA
) -> optax.GradientTransformationExtraArgs:
    """AdamW without clipping. `train_step` clips, which needs all gradients.

    The update of a leaf depends on no other leaf and no other layer. So arrays of one layer can be
    updated alone: with `update(..., layer=(index, number of layers))`, arrays have no layer axis.

    With `lora_plus_ratio` (LoRA+, arXiv 2402.12354) the leaves `method.faster` have their own
    learning rate, also in the weight decay, like the groups of PEFT's `create_loraplus_optimizer`.
    PEFT's group for adapters of embeddings has no counterpart here. `rates` gives learning rates
    and weight decays by name. The state is AdamW's in any case.
    """
    adam = optax.scale_by_adam if config.optimizer_bits == 32 else moments.scale_by_adam
    rules = config.rates
    adamw = optax.chain(
        adam(config.beta1, config.beta2, config.eps),
        _add_decay(config) if rules else optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate(config)),
    )
    if config.lora_plus_ratio == 1 and not rules:
        return optax.with_extra_args_support(adamw)

    def factor(rule: RateRule | None, leaf: str) -> float:
        if rule is not None and rule.factor is not None:
            return rule.factor
        return config.lora_plus_ratio if leaf in method.faster else 1.0

    def update(
        updates: Any, state: Any, params: Any = None, *, layer: Any = None
    ) -> tuple[Any, Any]:
        steps, state = adamw.update(updates, state, params, layer=layer)
        scale = lambda step, by: step * by  # noqa: E731
        return _with_values(scale, steps, rules, factor, layer), state

    return optax.GradientTransformationExtraArgs(adamw.init, update)


def check_rates(config: TrainConfig, adapters: Mapping[str, Any]) -> None:
    """Checks that every rule of `train.rates` applies to a leaf.

    Args:
        config: of the training.
        adapters: arrays, or their shapes.

    Raises:
        ValueError: a rule applies to nothing.
    """
    names = [
        _name(path, layer)
        for path, leaf in jax.tree.leaves_with_path(adapters)
        for layer in range(leaf.shape[0])
    ]
    chosen = {_chosen(config.rates, name) for name in names}
    for place, rule in enumerate(config.rates):
        accepted = f"a pattern of names such as {names[0]}"
        if any(fnmatch.fnmatchcase(name, rule.match) for name in names):
            accepted += " that no earlier rule has taken"
        require(rule in chosen, f"train.rates[{place}].match", rule.match, accepted)


def _add_decay(config: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """`optax.add_decayed_weights` with the weight decays of `config.rates`."""

    def decay(rule: RateRule | None, leaf: str) -> float:
        del leaf
        if rule is None or rule.weight_decay is None:
            return config.weight_decay
        return rule.weight_decay

    def update(
        updates: Any, state: Any, params: Any = None, *, layer: Any = None
    ) -> tuple[Any, Any]:
        shares = _with_values(lambda x, by: x * by, params, config.rates, decay, layer)
        return jax.tree.map(jnp.add, updates, shares), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _with_values(
    apply: Callable[[Array, Any], Array],
    tree: Any,
    rules: tuple[RateRule, ...],
    value: Callable[[RateRule | None, str], float],
    layer: tuple[Array, int] | None,
) -> Any:
    """Applies to every leaf its value: a number, or an array if it differs between layers.

    Args:
        apply: (leaf, value) -> new leaf.
        tree: adapters, or what has their structure.
        rules: of the configuration.
        value: (rule that applies or None, name of the leaf in its layer) -> value.
        layer: as for `make_optimizer`.
    """

    def one(path: Any, x: Array) -> Array:
        depth = 1
        if rules:
            depth = x.shape[0] if layer is None else layer[1]
        found = [value(_chosen(rules, _name(path, i)), path[-1].key) for i in range(depth)]
        if len(set(found)) == 1:
            return apply(x, found[0])
        values = jnp.asarray(np.asarray(found), x.dtype)
        if layer is None:
            return apply(x, values.reshape(-1, *(1 for _ in x.shape[1:])))
        return apply(x, values[layer[0]])

    return jax.tree_util.tree_map_with_path(one, tree)


def _chosen(rules: tuple[RateRule, ...], name: str) -> RateRule | None:
    """The first rule that matches."""
    return next((rule for rule in rules if fnmatch.fnmatchcase(name, rule.match)), None)


def _name(path: Any, layer: int) -> str:
    """Name of a leaf in a layer, such as layers.3.self_attn.q_proj.lora_B."""
    return matrix_name(tuple(key.key for key in path[1:]), layer)
