"""The gated quantizer and the layer of B-LoRA, against the released code (tests/golden)."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from irqlora_jax.adapters import gates
from tests.models import ROOT

GOLDEN = dict(np.load(ROOT / "tests/golden/blora.npz"))
CASES = sorted({"_".join(k.split("_")[1:-1]) for k in GOLDEN if k.startswith("quantizer_")})
TRAINED = ("train_signed", "train_partial", "train_off", "train_unsigned", "rank_train")
EVALUATED = ("eval_16", "eval_4", "eval_2", "eval_unsigned_8", "rank_eval")


def case(name: str) -> dict[str, jax.Array]:
    start = f"quantizer_{name}_"
    return {k.removeprefix(start): jnp.asarray(v) for k, v in GOLDEN.items() if k.startswith(start)}


def assert_near(found: Any, expected: Any, share: float = 1e-5) -> None:
    """The largest difference is below a share of the largest magnitude."""
    expected = np.asarray(expected)
    limit = share * max(float(np.abs(expected).max()), 1e-30)
    np.testing.assert_allclose(found, expected, rtol=0, atol=limit)


def through(x: Any, phi: Any, rank_phi: Any, ends: Any, uniform: Any) -> Any:
    """One tensor through its gated quantizer, and then through rank gates, if it has some."""

    def z(phi: Any) -> Any:
        nonlocal uniform
        if uniform is None:
            return gates.is_open(phi).astype(phi.dtype)
        own, uniform = uniform[: phi.size], uniform[phi.size :]
        return gates.draw(phi, own)

    kept = None if rank_phi is None else gates.nested(z(rank_phi))  # drawn first
    q = gates.quantize(x, z(phi), *ends)
    return q if kept is None else q * kept[:, None]


@pytest.mark.parametrize("name", TRAINED)
def test_training_of_a_quantizer(name: str) -> None:
    own = case(name)
    ends, rank_phi = (own["x_min"][0], own["x_max"][0]), own.get("rank_phi")

    def value(x: Any, phi: Any, rank_phi: Any) -> Any:
        y = through(x, phi, rank_phi, ends, own["u"])
        return (y * own["cotangent"]).sum(), y

    def cost(phi: Any, rank_phi: Any) -> Any:
        return gates.bits_cost(phi) if rank_phi is None else gates.rank_cost(rank_phi, phi)

    where = (0, 1) if rank_phi is None else (0, 1, 2)
    slopes, y = jax.grad(value, where, has_aux=True)(own["x"], own["phi"], rank_phi)
    assert_near(y, own["y"])
    names = ("x", "phi", "rank_phi")[: len(where)]
    for leaf, slope in zip(names, slopes, strict=True):
        assert_near(slope, own[f"grad_{leaf}"])
    assert_near(cost(own["phi"], rank_phi), own["regularizer"])
    slopes = jax.grad(cost, tuple(range(len(where) - 1)))(own["phi"], rank_phi)
    for leaf, slope in zip(names[1:], slopes, strict=True):
        assert_near(slope, own[f"reg_grad_{leaf}"])


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_of_a_quantizer(name: str) -> None:
    own = case(name)
    ends = own["x_min"][0], own["x_max"][0]
    assert_near(through(own["x"], own["phi"], own.get("rank_phi"), ends, None), own["y"])


# The released layer (BLoraSVDLayer). The adapter of this package uses three of its nine quantizers.

NAMES = ("weight", "A", "B", "E", "base", "A_out", "E_out", "B_out", "sum")


def released_layer(params: Any, given: Any, uniform: Any) -> Any:
    """y = q(q(x Wq^T + bq) + (alpha / r) q(q(q(x Aq^T) * Eq^T) Bq^T)), in the released order."""
    phi = dict(zip(NAMES, params["phi"], strict=True))
    ends = dict(zip(NAMES, given["ranges"], strict=True))
    numbers: Iterator[Any] = iter([]) if uniform is None else iter(_drawn(uniform))

    def q(name: str, x: Any, rank_phi: Any = None) -> Any:
        own = None if uniform is None else next(numbers)
        # The largest value defined the range, so x / step is 1.5, a tie of the rounding. A product
        # with another last bit would round to the other side.
        high = ends[name][1]
        x = x + jax.lax.stop_gradient(jnp.where(jnp.abs(x - high) < 2e-6 * high, high - x, 0.0))
        return through(x, phi[name], rank_phi, ends[name], own)

    weight, bias = q("weight", given["weight"]), q("weight", given["bias"])
    a, b = q("A", params["lora_A"]), q("B", params["lora_B"])
    e = q("E", params["lora_E"], params["rank_phi"])
    base = q("base", given["x"] @ weight.T + bias[None, None])
    u = q("A_out", given["x"] @ a.T)
    update = q("B_out", q("E_out", u * e[None, None, :, 0]) @ b.T)
    return q("sum", base + 2.0 * update)  # alpha / r = 16 / 8


def _drawn(uniform: Any) -> list[Any]:
    sizes = (4, 4, 4, 4, 11, 4, 4, 4, 4, 4)
    return jnp.split(uniform, np.cumsum(sizes)[:-1])


def released_cost(params: Any) -> Any:
    own = [gates.bits_cost(phi) for phi in params["phi"]]
    own[3] = gates.rank_cost(params["rank_phi"], params["phi"][3])
    return jnp.stack(own).sum()


TRAINABLE = ("phi", "rank_phi", "lora_A", "lora_B", "lora_E")


def layer() -> tuple[dict[str, Any], dict[str, Any]]:
    own = {
        k.removeprefix("layer_"): jnp.asarray(v)
        for k, v in GOLDEN.items()
        if k.startswith("layer_")
    }
    return {k: own[k] for k in TRAINABLE}, own


def test_the_released_layer() -> None:
    params, given = layer()

    def value(params: Any, x: Any) -> Any:
        y = released_layer(params, given | {"x": x}, given["u"])
        return (y * given["cotangent"]).sum(), y

    with jax.default_matmul_precision("highest"):
        (slopes, slope_x), y = jax.grad(value, (0, 1), has_aux=True)(params, given["x"])
        assert_near(y, given["y"])
        assert_near(slope_x, given["grad_x"])
        for name in TRAINABLE:
            assert_near(slopes[name], given[f"grad_{name}"])
        assert_near(released_layer(params, given, None), given["y_eval"])
    cost, slopes = jax.value_and_grad(released_cost)(params)
    assert_near(cost, given["regularizer"])
    for name in ("phi", "rank_phi"):
        assert_near(slopes[name], given[f"reg_grad_{name}"])


def test_ten_steps_of_the_released_layer() -> None:
    params, given = layer()
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params: Any, state: Any, uniform: Any) -> Any:
        def loss(params: Any) -> Any:
            error = ((released_layer(params, given, uniform) - given["target"]) ** 2).mean()
            return error + 0.001 * released_cost(params), (error, released_cost(params))

        slopes, seen = jax.grad(loss, has_aux=True)(params)
        change, state = optimizer.update(slopes, state, params)
        return optax.apply_updates(params, change), state, seen

    own, seen = params, []
    with jax.numpy_dtype_promotion("standard"):  # for optax
        state = optimizer.init(own)
        for uniform in GOLDEN["train_u"]:
            own, state, figures = step(own, state, jnp.asarray(uniform))
            seen.append(figures)
    losses, costs = np.asarray(seen).T
    assert_near(losses, GOLDEN["train_losses"])
    assert_near(costs, GOLDEN["train_regularizers"])
    for name in TRAINABLE:
        assert_near(own[name], GOLDEN[f"train_final_{name}"], 6e-5 if "phi" in name else 1e-5)
