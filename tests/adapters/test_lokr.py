"""LoKr against figures that PEFT computed, and KronA's formula (tests/golden/README.md)."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from irqlora_jax.adapters import lokr
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.lokr import LOKR, LokrOptions

pytestmark = pytest.mark.usefixtures("optimizer_promotion")
CASES = ("low_both", "factor8", "odd")


@functools.cache
def figures(golden: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with np.load(golden / "lokr.npz") as file:
        return dict(file), json.loads((golden / "lokr.json").read_text())


def options_of(about: dict[str, Any]) -> LokrOptions:
    return LokrOptions(about.get("decompose_both", False), about.get("decompose_factor", -1))


def close(found: Any, expected: np.ndarray, tolerance: float) -> None:
    largest = float(np.abs(expected).max())
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=tolerance * largest)


def test_sizes_split_as_peft_splits_them(golden: Path) -> None:
    known = figures(golden)[1]["factorization"]
    assert len(known) == 26 * 6
    for name, expected in known.items():
        assert lokr.factorize(*map(int, name.split(","))) == tuple(expected), name


@pytest.mark.parametrize("case", CASES)
def test_leaves_output_and_gradients_are_those_of_peft(golden: Path, case: str) -> None:
    arrays, about = figures(golden)
    own, options = about[case], options_of(about[case])
    shape = own["out"], own["inn"]
    assert lokr.shapes(shape, own["r"], options) == {k: tuple(v) for k, v in own["shapes"].items()}
    params = {leaf: jnp.asarray(arrays[f"{case}_{leaf}"]) for leaf in own["shapes"]}
    weight, x = (jnp.asarray(arrays[f"{case}_{name}"]) for name in ("weight", "x"))
    scale = own["alpha"] / own["r"]

    def output(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return x @ weight.T + LOKR.apply(params, x, x, scale, weight)

    y, pull = jax.vjp(output, params, x)
    close(y, arrays[f"{case}_y"], 1e-6)
    grads, grad_x = pull(jnp.asarray(arrays[f"{case}_cotangent"]))
    close(grad_x, arrays[f"{case}_grad_x"], 1e-6)
    for leaf in params:
        close(grads[leaf], arrays[f"{case}_grad_{leaf}"], 1e-6)
    merged = weight + scale * LOKR.weight_update(params, shape)
    close(x @ merged.T, arrays[f"{case}_y"], 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_of_adamw_are_those_of_peft(golden: Path, case: str) -> None:
    arrays, about = figures(golden)
    own = about[case]
    params = {leaf: jnp.asarray(arrays[f"{case}_init_{leaf}"]) for leaf in own["shapes"]}
    weight, x, target = (jnp.asarray(arrays[f"{case}_{n}"]) for n in ("weight", "x", "target"))
    optimizer = optax.adamw(1e-2, weight_decay=0.0)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> jax.Array:
            update = LOKR.apply(params, x, x, own["alpha"] / own["r"], weight)
            return jnp.mean((x @ weight.T + update - target) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        steps, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, steps), state, value

    losses = []
    for _ in range(10):
        params, state, value = step(params, state)
        losses.append(float(value))
    close(losses, arrays[f"{case}_losses"], 1e-6)
    for leaf, value in params.items():
        close(value, arrays[f"{case}_final_{leaf}"], 1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("start", ["default", "lycoris"])
def test_starts_are_those_of_peft(golden: Path, case: str, start: Any) -> None:
    own = figures(golden)[1][case]
    options = LokrOptions(own.get("decompose_both", False), own.get("decompose_factor", -1), start)
    params = lokr.init(jax.random.key(0), (own["out"], own["inn"]), own["r"], options)
    zero = {"default": ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b")}[start]
    for leaf, value in params.items():
        bound = 0.0 if leaf in zero else 1 / math.sqrt(value.shape[1])
        largest = float(jnp.abs(value).max())
        assert 0.8 * bound <= largest <= bound
        if start == "default":
            assert (largest == 0) == (own["init_absmax"][leaf] == 0)
            assert own["init_absmax"][leaf] <= bound


def test_two_full_factors_are_krona(golden: Path) -> None:
    arrays = {k.removeprefix("krona_"): v for k, v in figures(golden)[0].items() if "krona_" in k}
    weight, x = jnp.asarray(arrays["weight"]), jnp.asarray(arrays["x"])
    scale = float(arrays["scale"])
    params = {"lokr_w1": jnp.asarray(arrays["A"]), "lokr_w2": jnp.asarray(arrays["B"])}

    def output(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return x @ weight.T + LOKR.apply(params, x, x, scale, weight)

    y, pull = jax.vjp(output, params, x)
    close(y, arrays["krona_y"], 1e-6)
    grads, grad_x = pull(jnp.asarray(arrays["cotangent"]))
    close(grads["lokr_w1"], arrays["krona_grad_A"], 1e-6)
    close(grads["lokr_w2"], arrays["krona_grad_B"], 1e-6)
    close(grad_x, arrays["krona_grad_x"], 1e-6)
    close(weight + scale * LOKR.weight_update(params, (64, 64)), arrays["krona_merged"], 1e-6)


def test_the_kronecker_product_is_not_built() -> None:
    shape = (4096, 4096)
    params = jax.eval_shape(lambda: lokr.init(jax.random.key(0), shape, 4, LokrOptions()))
    x = jax.ShapeDtypeStruct((2, 4096), jnp.float32)
    made = jax.make_jaxpr(jax.grad(lambda p, x: lokr.apply(p, x).sum()))(params, x)
    sizes = [math.prod(v.aval.shape) for e in made.jaxpr.eqns for v in e.outvars]
    assert max(sizes) < 4096 * 64


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LokrOptions(decompose_factor=0), "adapter.lokr.decompose_factor = 0: expected -1"),
        (lambda: LokrOptions(decompose_factor=-2), "decompose_factor = -2: expected -1 or a whole"),
        (
            lambda: AdapterConfig(method="lokr", init="loftq"),
            "adapter.init = 'loftq': expected default with adapter.method lokr",
        ),
        (
            lambda: AdapterConfig(method="lokr", init="cloq"),
            "adapter.init = 'cloq': expected default with adapter.method lokr",
        ),
        (
            lambda: AdapterConfig(method="lokr", scaling="sqrt_rank"),
            "adapter.scaling = 'sqrt_rank': expected rank with adapter.method lokr",
        ),
        (
            lambda: AdapterConfig(method="lora", lokr=LokrOptions(decompose_both=True)),
            "adapter.lokr = ",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match="adapter") as raised:
        make()
    assert words in str(raised.value)
