"""dequant_matmul against the product with the dequantized matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from irqlora_jax.config import QuantConfig
from irqlora_jax.quant.matmul import dequant_matmul
from irqlora_jax.quant.qtensor import quantize


def make(name: str = "nf4", out: int = 24, features: int = 100):
    weight = jax.random.normal(jax.random.key(0), (out, features))
    x = jax.random.normal(jax.random.key(1), (2, 3, features))
    return x, quantize(weight, QuantConfig(format=name, search_steps=5))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["nf4", "nf3", "nf2", "fp4", "int4", "int3", "int2"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_value_and_gradient(name: str, dtype) -> None:
    x, weight = make(name)
    x = x.astype(dtype)
    dense = np.asarray(weight.dequantize(), np.float64)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    y, pull = jax.vjp(lambda x: dequant_matmul(x, weight), x)
    assert y.dtype == dtype
    expected = np.asarray(x, np.float64) @ dense.T
    assert np.abs(np.asarray(y, np.float64) - expected).max() <= tolerance * np.abs(expected).max()
    g = jax.random.normal(jax.random.key(2), y.shape).astype(dtype)
    expected = np.asarray(g, np.float64) @ dense
    (dx,) = pull(g)
    assert np.abs(np.asarray(dx, np.float64) - expected).max() <= tolerance * np.abs(expected).max()


def test_backward_keeps_the_packed_weight_only() -> None:
    x, weight = make()
    _, pull = jax.vjp(lambda x: dequant_matmul(x, weight), x)
    kept = {leaf.shape for leaf in jax.tree.leaves(pull)}
    assert weight.packed.shape in kept
    assert weight.shape not in kept


def test_gradient_with_respect_to_packed_codes_is_an_error() -> None:
    x, weight = make()
    with pytest.raises(TypeError):
        jax.grad(lambda w: dequant_matmul(x, w).sum())(weight)


def test_a_plain_array_is_an_ordinary_operand() -> None:
    x, weight = make()
    dense = weight.dequantize()
    gradient = jax.grad(lambda w: (dequant_matmul(x, w) ** 2).sum())(dense)
    expected = jax.grad(lambda w: (jnp.einsum("abi,oi->abo", x, w) ** 2).sum())(dense)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-4)


def test_unknown_implementation_is_refused() -> None:
    # Under the tests' runtime checks the annotation refuses it first.
    with pytest.raises((ValueError, TypeCheckError), match=r"'fast'"):
        dequant_matmul(*make(), implementation="fast")  # type: ignore[arg-type]
