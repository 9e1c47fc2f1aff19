"""Binary factors: quantizers and training rules of ProxConnect++ against tests/golden."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.adapters import binary
from irqlora_jax.adapters.config import AdapterConfig
from tests.models import ROOT

GOLDEN = dict(np.load(ROOT / "tests/golden/proxconnect.npz"))
RULES = {"bc": "bc", "bnn": "bnn", "bnn+": "bnn_plus", "bnn++": "bnn_plus_plus"}


@pytest.mark.parametrize("mu", [1, 5, 20])
def test_sign_swish_and_its_slope(mu: int) -> None:
    grid = jnp.asarray(GOLDEN["grid"])
    np.testing.assert_allclose(binary.sign_swish(grid, float(mu)), GOLDEN[f"ss_{mu}"], atol=1e-6)
    slope = binary.sign_swish_slope(grid, float(mu))
    np.testing.assert_allclose(slope, GOLDEN[f"dss_{mu}"], atol=1e-5)
    by_jax = jax.vmap(jax.grad(lambda x: binary.sign_swish(x, float(mu))))(grid)
    np.testing.assert_allclose(slope, by_jax, atol=1e-4)


def train(pair: str, clip: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Gradient descent on half the mean squared error of a linear model with weights F(w)."""
    x, y = jnp.asarray(GOLDEN["X"]), jnp.asarray(GOLDEN["y"])

    def loss(w: Any, mu: Any) -> Any:
        return ((x @ binary.binarize(pair, w, mu) - y) ** 2).mean() / 2

    step = jax.jit(jax.value_and_grad(loss))
    latent, losses = [jnp.asarray(GOLDEN["w0"])], []
    for mu in GOLDEN["mu"]:
        value, slope = step(latent[-1], jnp.asarray(mu))
        new = latent[-1] - jnp.asarray(GOLDEN["eta"]) * slope
        latent.append(jnp.clip(new, -1, 1) if clip else new)
        losses.append(value)
    return np.asarray(latent), np.asarray(losses)


@pytest.mark.parametrize("pair", RULES)
def test_twenty_steps_of_each_rule(pair: str) -> None:
    latent, losses = train(pair)
    np.testing.assert_allclose(latent, GOLDEN[f"{RULES[pair]}_latent"], atol=1e-5)
    np.testing.assert_allclose(losses, GOLDEN[f"{RULES[pair]}_losses"], rtol=1e-5)


def test_clipping_gives_the_usual_form_of_binary_connect() -> None:
    np.testing.assert_allclose(train("bc", clip=True)[0], GOLDEN["bc_clipped_latent"], atol=1e-5)


@pytest.mark.parametrize("pair", RULES)
def test_a_training_step_uses_f_and_evaluation_uses_the_sign(pair: str) -> None:
    options = binary.BinaryOptions(pair, mu_start=2.0, mu_end=6.0)
    params = binary.init(jax.random.key(0), 16, 8, 3) | {"scale_B": jnp.arange(8.0)}
    evaluated = binary.fold(params)
    for name, own in (("lora_A", params["scale_A"]), ("lora_B", params["scale_B"])):
        size = jnp.abs(evaluated[name])
        np.testing.assert_array_equal(size, jnp.broadcast_to(own[:, None], size.shape))
    pair_at = binary.prepare(params, jax.random.key(1), jnp.float32(0.5), options)
    w = params["lora_A"] * 4.0  # in units of the bound 1 / sqrt(16)
    expected = binary.PAIRS[pair][0](w, 4.0) * params["scale_A"][:, None]
    np.testing.assert_allclose(pair_at["lora_A"], expected, rtol=1e-5)
    if pair == "bnn++":  # at a large mu, SignSwish is the sign
        late = binary.BinaryOptions(pair, mu_start=1e5, mu_end=1e5)
        limit = binary.prepare(params, jax.random.key(1), jnp.float32(1), late)
        np.testing.assert_allclose(limit["lora_B"], evaluated["lora_B"], rtol=1e-5)


@pytest.mark.parametrize("pair", RULES)
def test_a_rank_one_update_of_signs_is_learned(pair: str) -> None:
    """The target is itself a binary pair. Adam finds it with every rule."""
    options = binary.BinaryOptions(pair, mu_start=1.0, mu_end=10.0)
    keys = jax.random.split(jax.random.key(3), 4)
    true_a = jnp.where(jax.random.bernoulli(keys[0], 0.5, (1, 16)), 1.0, -1.0)
    true_b = jnp.where(jax.random.bernoulli(keys[1], 0.5, (8, 1)), 1.0, -1.0)
    x = jax.random.normal(keys[2], (64, 16))
    y = x @ (true_b @ true_a).T
    params = binary.init(keys[3], 16, 8, 4)

    def error(own: Any, progress: Any) -> Any:
        pair_now = (
            binary.fold(own)
            if progress is None
            else binary.prepare(own, keys[0], progress, options)
        )
        return ((x @ (pair_now["lora_B"] @ pair_now["lora_A"]).T - y) ** 2).mean()

    @jax.jit
    def step(carry: Any, count: Any) -> Any:
        own, first, second = carry
        slope = jax.grad(error)(own, count / 300)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, slope)
        second = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, second, slope)
        own = jax.tree.map(lambda p, m, v: p - 0.01 * m / (jnp.sqrt(v) + 1e-8), own, first, second)
        return (own, first, second), None

    zero = jax.tree.map(jnp.zeros_like, params)
    before = float(error(params, None))
    (params, _, _), _ = jax.lax.scan(step, (params, zero, zero), jnp.arange(300.0))
    after = float(error(params, None))
    print(pair, before, after)
    assert after < before / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pair": "xnor"}, r"adapter.binary.pair = xnor|'xnor'"),
        ({"mu_start": 0.0}, r"adapter.binary.mu_start = 0.0: expected a positive finite number"),
        ({"mu_end": 0.5}, r"adapter.binary.mu_end = 0.5: expected at least mu_start = 1.0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        binary.BinaryOptions(**options)


def test_options_of_another_method_are_refused() -> None:
    with pytest.raises(ValueError, match=r"adapter.binary = .*adapter.method lora"):
        AdapterConfig(method="lora", binary=binary.BinaryOptions("bc"))
