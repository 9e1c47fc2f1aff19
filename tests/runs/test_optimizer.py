"""The optimizer: rates for parts of the adapter, and moments of 8 bits."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from irqlora_jax.config import Config, RateRule, TrainConfig, read_stored_config
from irqlora_jax.runs import moments
from irqlora_jax.runs.moments import MAPS, SMALLEST, Moment, decode, encode, grid
from irqlora_jax.runs.optimizer import check_rates, make_optimizer
from irqlora_jax.sharding import MeshConfig, make_mesh, tree_shardings
from tests.models import QUICKSTART, assert_same

pytestmark = pytest.mark.usefixtures("optimizer_promotion")

TRAIN = TrainConfig(learning_rate=1e-2, weight_decay=0.1, compute_dtype="float32", steps=4)


def tree(seed: int, rank: int = 4, width: int = 16) -> dict[str, Any]:
    """Arrays in the shapes of adapters of two layers."""
    rng = np.random.default_rng(seed)

    def pair() -> dict[str, Any]:
        shapes = {"lora_A": (2, rank, width), "lora_B": (2, width, rank)}
        return {
            leaf: jnp.asarray(rng.normal(size=shape), "float32") for leaf, shape in shapes.items()
        }

    return {"layers": {"self_attn": {"q_proj": pair()}, "mlp": {"up_proj": pair()}}}


def after(settings: TrainConfig, steps: int = 3, by_layer: bool = False) -> Any:
    """Adapters after a few steps with the same gradients."""
    optimizer, params = make_optimizer(settings), tree(0)

    @jax.jit
    def advance(params: Any, state: Any, grads: Any) -> Any:
        if not by_layer:
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state
        parts = []
        for layer in range(2):
            part = lambda x, at=layer: x[at] if x.ndim else x  # noqa: E731
            one = [jax.tree.map(part, tree) for tree in (grads, state, params)]
            updates, own = optimizer.update(*one, layer=(jnp.int32(layer), 2))
            parts.append((optax.apply_updates(one[2], updates), own))
        stack = lambda a, b: jnp.stack([a, b]) if a.ndim else a  # noqa: E731
        return jax.tree.map(stack, *parts)

    state = optimizer.init(params)
    for step in range(steps):
        params, state = advance(params, state, tree(1 + step))
    return params


def layer_of(params: Any, layer: int) -> Any:
    return jax.tree.map(lambda x: x[layer], params)


def with_rates(*rules: RateRule, **more: Any) -> TrainConfig:
    return dataclasses.replace(TRAIN, rates=rules, **more)


def test_a_factor_is_another_learning_rate() -> None:
    plain, fast = after(TRAIN), after(dataclasses.replace(TRAIN, learning_rate=5e-2))
    found = after(with_rates(RateRule("layers.1.*.lora_B", 5.0), RateRule("layers.1.*", 0.0)))
    assert_same(layer_of(found, 0), layer_of(plain, 0))
    for group, name in (("self_attn", "q_proj"), ("mlp", "up_proj")):
        one, start = found["layers"][group][name], tree(0)["layers"][group][name]
        np.testing.assert_array_equal(one["lora_A"][1], start["lora_A"][1])
        wanted = fast["layers"][group][name]["lora_B"][1]
        np.testing.assert_allclose(one["lora_B"][1], wanted, atol=1e-6)
        assert (wanted != start["lora_B"][1]).all()


def test_a_weight_decay_is_another_optimizer() -> None:
    plain, none = after(TRAIN), after(dataclasses.replace(TRAIN, weight_decay=0.0))
    found = after(with_rates(RateRule("*.q_proj.*", weight_decay=0.0)))
    assert_same(found["layers"]["mlp"], plain["layers"]["mlp"])
    assert_same(found["layers"]["self_attn"], none["layers"]["self_attn"])
    kept = none["layers"]["self_attn"]["q_proj"]["lora_A"]
    assert (kept != plain["layers"]["self_attn"]["q_proj"]["lora_A"]).any()


def test_lora_plus_is_a_last_rule() -> None:
    ratio = dataclasses.replace(TRAIN, lora_plus_ratio=16.0)
    assert_same(after(with_rates(RateRule("*.lora_B", 16.0))), after(ratio))
    # A rule of its own for some, and a rule without a factor.
    rules = RateRule("layers.0.*", 1.0), RateRule("*.up_proj.*", weight_decay=0.1)
    found = after(with_rates(*rules, lora_plus_ratio=16.0))
    assert_same(layer_of(found, 0), layer_of(after(TRAIN), 0))
    close = functools.partial(np.testing.assert_allclose, atol=1e-6)
    jax.tree.map(close, layer_of(found, 1), layer_of(after(ratio), 1))


def test_layers_are_updated_alone_as_together() -> None:
    rules = RateRule("layers.1.*.lora_B", 5.0), RateRule("layers.0.mlp.*", 0.5, 0.3)
    found, wanted = (after(with_rates(*rules), by_layer=alone) for alone in (True, False))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, wanted)


def test_a_rule_that_applies_to_nothing_is_refused() -> None:
    shapes = tree(0)
    check_rates(with_rates(RateRule("layers.[01].mlp.*", 2.0)), shapes)
    with pytest.raises(ValueError, match=r"rates\[0\]\.match = 'layers\.2\.\*': expected a"):
        check_rates(with_rates(RateRule("layers.2.*", 2.0)), shapes)
    shadowed = RateRule("layers.*", 2.0), RateRule("*.lora_A", 3.0)
    with pytest.raises(ValueError, match=r"rates\[1\].*that no earlier rule has taken"):
        check_rates(with_rates(*shadowed), shapes)


def test_rates_in_a_file(tmp_path: Path) -> None:
    rules = '[{match: "*.lora_A", factor: 0}, {match: "layers.0.*", weight_decay: 0.5}]'
    config = Config.load(QUICKSTART, {"train.rates": rules, "train.optimizer_bits": "8"})
    assert config.train.rates == (RateRule("*.lora_A", 0.0), RateRule("layers.0.*", None, 0.5))
    assert config.train.optimizer_bits == 8
    stored = tmp_path / "config.json"
    stored.write_text(json.dumps(dataclasses.asdict(config)))
    assert read_stored_config(stored) == config
    refused = {
        "train.rates": [
            ("[{match: a}]", r"train\.rates\[0\] = 'a': expected a rule with a factor or"),
            ("[{match: a, factor: -1}]", r"train\.rates\[0\]\.factor = -1\.0: expected a finite"),
            ("[{match: a, weight_decay: .inf}]", r"rates\[0\]\.weight_decay = inf: expected"),
            ("3", r"train\.rates\[0\] = 3: expected a section with match or factor"),
            ("[", r"train\.rates = '\[': expected a list such as \[\{match: PATTERN, factor: 0"),
        ],
        "train.optimizer_bits": [("16", r"optimizer_bits = '?16'?: expected 8 or 32")],
        "train.neftune_alpha": [("-1", r"neftune_alpha = -1\.0: expected a finite number")],
    }
    for name, cases in refused.items():
        for value, message in cases:
            with pytest.raises(ValueError, match=message):
                Config.load(QUICKSTART, {name: value})


# ------------------------------------------------------------------------------------------ 8 bits


def values(shape: tuple[int, ...], sign: str, seed: int = 0) -> np.ndarray:
    """Numbers of very different sizes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 10.0 ** rng.uniform(-6, 0, (*shape[:-1], 1))
    return (x if sign == "signed" else x * x).astype(np.float32)


@pytest.mark.parametrize("shape", [(8, 512), (64, 32), (512,), (37, 100), (3, 5, 7), (100,)])
@pytest.mark.parametrize("stacked", [False, True])
def test_codes_are_the_nearest_of_each_block(shape: tuple[int, ...], stacked: bool) -> None:
    """Against NumPy, which looks at all 256 numbers of the table."""
    x = values((2, *shape) if stacked else shape, "signed")
    moment = jax.jit(encode, static_argnums=(1, 2))(jnp.asarray(x), "signed", stacked)
    wide = jax.jit(decode, static_argnums=(1, 2))(moment, "signed", stacked)
    assert moment.codes.shape == x.shape and moment.codes.dtype == np.uint8
    assert moment.absmax.shape == x.shape[:stacked] + grid(shape)
    for layer in range(2) if stacked else [...]:
        flat = x[layer].ravel()
        codes, largest = (np.asarray(of)[layer].ravel() for of in moment)
        dense = np.asarray(wide)[layer].ravel()
        for block, most in enumerate(largest):
            own = slice(256 * block, 256 * block + 256)
            assert most == np.abs(flat[own]).max()
            distances = np.abs(flat[own, None] / most - MAPS["signed"])
            chosen = np.take_along_axis(distances, codes[own, None].astype(int), 1)[:, 0]
            assert (chosen <= distances.min(1) + 1e-7).all()
            np.testing.assert_allclose(dense[own], MAPS["signed"][codes[own]] * most, rtol=1e-6)


def test_zeros_and_nan() -> None:
    """A block of zeros has no scale; a number that is not finite shows in the maximum."""

    @jax.jit
    def both(x: Any) -> Any:
        moment = encode(x, "unsigned")
        return moment, decode(moment, "unsigned")

    moment, dense = both(jnp.zeros((1, 300)))
    assert (dense == 0).all() and (moment.absmax == 0).all()
    for bad in (np.nan, np.inf):
        moment, _ = both(jnp.zeros((1, 300)).at[0, 7].set(bad))
        assert not np.isfinite(moment.absmax[0, 0]) and moment.absmax[0, 1] == 0


def big(seed: int) -> dict[str, Any]:
    return tree(seed, rank=16, width=256)


def test_small_leaves_and_all_else_are_as_in_optax() -> None:
    """One step from nothing has no rounding: only the moments that it leaves are rounded."""
    ours: Any = moments.scale_by_adam(0.9, 0.99, 1e-8)
    theirs: Any = optax.scale_by_adam(0.9, 0.99, 1e-8)
    params = big(0) | tree(0)
    params["layers"]["mlp"] = big(0)["layers"]["mlp"]
    state, wide = ours.init(params), theirs.init(params)
    assert isinstance(state.mu["layers"]["mlp"]["up_proj"]["lora_A"], Moment)
    small = state.mu["layers"]["self_attn"]["q_proj"]["lora_A"]
    assert small.size // 2 < SMALLEST and small.dtype == np.float32
    grads = jax.tree.map(lambda x: 0.1 * x, params)
    our_update, their_update = jax.jit(ours.update), jax.jit(theirs.update)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    updates, state = our_update(grads, state, params)
    wanted, wide = their_update(grads, wide, params)
    jax.tree.map(close, updates, wanted)
    updates, state = our_update(grads, state, params)
    wanted, wide = their_update(grads, wide, params)
    jax.tree.map(close, updates["layers"]["self_attn"], wanted["layers"]["self_attn"])
    found, exact = (of["layers"]["mlp"]["up_proj"]["lora_B"] for of in (updates, wanted))
    assert (np.abs(found / exact - 1) > 1e-3).any()
    # A block has 256 normal numbers: the second moment of the smallest ones may round to 0.
    np.testing.assert_allclose(np.median(found / exact), 1, atol=0.02)


def test_moments_are_split_like_their_leaves() -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=2), 2)
    params = tree(0, rank=16, width=1024)
    state = jax.eval_shape(moments.scale_by_adam(0.9, 0.99, 1e-8).init, params)
    where = tree_shardings(mesh, {"params": params, "mu": state.mu})
    for group, name in (("self_attn", "q_proj"), ("mlp", "up_proj")):
        for leaf, axis in (("lora_A", 2), ("lora_B", 1)):
            own = where["params"]["layers"][group][name][leaf]
            moment = where["mu"]["layers"][group][name][leaf]
            assert own.spec[axis] is not None
            assert moment.codes.spec == moment.absmax.spec == own.spec


def test_a_mesh_computes_blocks_where_they_are() -> None:
    optimizer = moments.scale_by_adam(0.9, 0.99, 1e-8)
    params = tree(0, rank=16, width=1024)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2), 2)
    state = optimizer.init(params)
    _, alone = jax.jit(optimizer.update)(params, state)
    given = jax.device_put((params, state), tree_shardings(mesh, (params, state)))
    places = tree_shardings(mesh, jax.eval_shape(optimizer.update, params, state))
    step = jax.jit(optimizer.update, out_shardings=places).lower(*given).compile()
    text = step.as_text() or ""
    assert "fusion" in text and "all-" not in text and "collective" not in text
    assert_same(step(*given)[1], alone)


def test_200_steps_lose_little() -> None:
    """A pair of rank 64 learns a matrix from noisy gradients, with 8 bits as with 32."""
    rng = np.random.default_rng(0)
    aim = jnp.asarray(rng.normal(size=(64, 64)) @ rng.normal(size=(64, 64)) / 8, "float32")
    start = {"lora_A": rng.normal(size=(1, 64, 64)) / 8, "lora_B": np.zeros((1, 64, 64))}
    params = {leaf: jnp.asarray(value, "float32") for leaf, value in start.items()}

    def loss(params: Any, rows: Any) -> Any:
        off = params["lora_B"][0] @ params["lora_A"][0] - aim
        return ((rows @ off) ** 2).mean()

    def losses(bits: Any) -> np.ndarray:
        settings = TrainConfig(learning_rate=1e-2, optimizer_bits=bits, compute_dtype="float32")
        optimizer = make_optimizer(settings)

        def step(carry: Any, key: Any) -> Any:
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, jax.random.normal(key, (8, 64)))
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        keys = jax.random.split(jax.random.key(0), 200)
        run = jax.jit(lambda: jax.lax.scan(step, (params, optimizer.init(params)), keys)[1])
        return np.asarray(run())

    short, wide = losses(8), losses(32)
    assert (short != wide).any() and wide[-20:].mean() < 0.5 * wide[:20].mean()
    assert abs(short[-20:].mean() / wide[-20:].mean() - 1) < 0.05
