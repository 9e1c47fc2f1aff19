"""dequant_matmul against the product with the dequantized matrix."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from irqlora_jax.quant.calibrations.icq import IcqOptions
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize, quantized_shape
from irqlora_jax.quant.matmul import XLA, Implementation, dequant_matmul
from irqlora_jax.quant.qtensor import QTensor
from tests import hlo


def make(name: str = "nf4", out: int = 24, features: int = 100):
    weight = jax.random.normal(jax.random.key(0), (out, features))
    x = jax.random.normal(jax.random.key(1), (2, 3, features))
    return x, quantize(weight, QuantConfig(format=name, icq=IcqOptions(steps=5)))  # type: ignore[arg-type]


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


@pytest.mark.parametrize("features", [512, 488])  # whole blocks, and a broken one
@pytest.mark.parametrize("name", ["nf4", "nf3", "nf2", "fp4", "int4", "int3", "int2"])
def test_one_fusion_makes_the_weight(name: str, features: int) -> None:
    weight = quantized_shape((256, features), QuantConfig(format=name))  # type: ignore[arg-type]
    x = jax.ShapeDtypeStruct((96, features), jnp.float32)
    g = jax.ShapeDtypeStruct((96, 256), jnp.float32)

    def backward(g, weight):
        return jax.vjp(lambda x: dequant_matmul(x, weight), jnp.zeros((96, features)))[1](g)

    for function, operand in ((dequant_matmul, x), (backward, g)):
        program = hlo.parse(jax.jit(function).lower(operand, weight).compile().as_text())
        sizes = [(one.kind, kind, n) for one in hlo.stored(program) for kind, n in one.types]
        # Scales and shifts are decoded on their own (1/64 of the elements); nothing else is large.
        large = [found for found in sizes if found[2] > 96 * 512]
        assert large == [("fusion", "f32", 256 * features)]


def fake(name: str, reason: str | None, faster: bool = True) -> Implementation:
    """One that serves or refuses, and computes something of its own."""
    return Implementation(
        name,
        lambda x, weight: reason,
        lambda x, weight: x @ weight.dequantize(x.dtype).T * 2,
        lambda g, weight: g @ weight.dequantize(g.dtype) * 3,
        lambda operation, x, weight: faster,
    )


def test_the_first_usable_implementation_is_chosen() -> None:
    x, weight = make()
    expected = dequant_matmul(x, weight)
    refuses, serves = fake("mosaic", "it needs another device"), fake("triton", None)
    y, pull = jax.vjp(lambda x: dequant_matmul(x, weight, None, (refuses, serves, XLA)), x)
    np.testing.assert_allclose(y, 2 * expected, rtol=1e-6)
    g = jnp.ones_like(y)
    np.testing.assert_allclose(pull(g)[0], 3 * (g @ weight.dequantize()), rtol=1e-6)
    y = dequant_matmul(x, weight, None, (refuses, XLA))
    np.testing.assert_array_equal(y, expected)
    # One that was not measured to be faster has to be asked for.
    slow = fake("triton", None, faster=False)
    y = dequant_matmul(x, weight, None, (refuses, slow, XLA))
    np.testing.assert_array_equal(y, expected)
    y = dequant_matmul(x, weight, "triton", (refuses, slow, XLA))
    np.testing.assert_allclose(y, 2 * expected, rtol=1e-6)


def test_a_refused_implementation_says_why_and_names_another() -> None:
    x, weight = make()
    there = (fake("mosaic", "it needs blocks of 64 on cpu"), fake("triton", None), XLA)
    with pytest.raises(ValueError, match=r"'mosaic': it needs blocks of 64 on cpu; 'triton' or 'x"):
        dequant_matmul(x, weight, "mosaic", there)
    np.testing.assert_array_equal(
        dequant_matmul(x, weight, "xla", there), dequant_matmul(x, weight)
    )


@pytest.mark.parametrize("name", ["mosaic", "triton"])
def test_kernels_are_refused_on_a_cpu(name: str) -> None:
    serves = r"'xla' serves nf4 of \[out, in\] = \[24, 100\] on cpu"
    message = rf"'{name}': .* compute capability .*cpu.*{serves}"
    with pytest.raises(ValueError, match=message):
        dequant_matmul(*make(), implementation=name)  # type: ignore[arg-type]
    x, weight = make()
    with pytest.raises(ValueError, match="takes packed weights, this one is float32"):
        dequant_matmul(x, weight.dequantize(), implementation=name)  # type: ignore[arg-type]


def test_unknown_implementation_is_refused() -> None:
    # Under the tests' runtime checks the annotation refuses it first.
    with pytest.raises((ValueError, TypeCheckError), match=r"'fast'"):
        dequant_matmul(*make(), implementation="fast")  # type: ignore[arg-type]


# --- updates of scales and shifts -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["nf3", "int2"])
@pytest.mark.parametrize("calibration", ["none", "icq"])
@pytest.mark.parametrize("whole", [True, False], ids=["xla", "sums over blocks"])
def test_updates_of_scales_and_shifts(name: Any, calibration: Any, whole: bool) -> None:
    """Values and gradients of the dense weight, also from a product that knows no updates."""
    config = QuantConfig(format=name, calibration=calibration, icq=IcqOptions(steps=3))
    keys = jax.random.split(jax.random.key(0), 5)
    weight = quantize(jax.random.normal(keys[0], (16, 100)), config)
    given = (
        jax.random.normal(keys[1], (2, 5, 100)),
        *(0.1 * jax.random.normal(key, (16, 2)) for key in keys[2:4]),
    )
    cotangent = jax.random.normal(keys[4], (2, 5, 16))
    one = dataclasses.replace(XLA, takes_updates=whole)

    def updated(u: jax.Array, v: jax.Array) -> QTensor:
        return dataclasses.replace(weight, scale_update=u, shift_update=v)

    def dense(x: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
        return ((x @ updated(u, v).dequantize().T) * cotangent).sum()

    def ours(x: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
        return (dequant_matmul(x, updated(u, v), implementations=(one,)) * cotangent).sum()

    wanted, found = (jax.value_and_grad(f, (0, 1, 2))(*given) for f in (dense, ours))
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5 * float(jnp.abs(a).max()))


def test_without_updates_the_inputs_are_not_kept() -> None:
    x, weight = make()
    _, pull = jax.vjp(lambda x: dequant_matmul(x, weight), x)
    assert x.shape not in {leaf.shape for leaf in jax.tree.leaves(pull)}
