"""dequant_matmul and the training step, compiled for absent GPUs."""

import jax
import jax.numpy as jnp
import pytest

from irqlora_jax.plan.gpus import OPTIONS
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantized_shape
from irqlora_jax.quant.matmul import dequant_matmul
from tests import hlo
from tests.cuda.abstract_gpu import abstract_gpu
from tests.train.small_step import LAYERS, SHAPES, step_and_shapes


def compile_for(gpu, function, *shapes):
    """The instructions of the program for a device."""
    where = jax.sharding.SingleDeviceSharding(gpu)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes)
    lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
    compiled = lowered.compile(compiler_options=OPTIONS)
    return hlo.parse(compiled.as_text())


@pytest.mark.parametrize("features", [512, 488])  # whole blocks, and a broken one
@pytest.mark.parametrize("name", ["nf4", "nf3", "nf2", "fp4", "int4", "int3", "int2"])
def test_one_fusion_makes_the_weight(gpu, name: str, features: int) -> None:
    """That fusion decodes the second-level scales and shifts too."""
    weight = quantized_shape((256, features), QuantConfig(format=name))  # type: ignore[arg-type]
    half, kind = (jnp.float16, "f16") if gpu.compute_capability == "7.5" else (jnp.bfloat16, "bf16")
    x, g = (jax.ShapeDtypeStruct((96, n), half) for n in (features, 256))

    def backward(g, weight):
        x = jnp.zeros((96, features), g.dtype)
        return jax.vjp(lambda x: dequant_matmul(x, weight), x)[1](g)

    for function, operand in ((dequant_matmul, x), (backward, g)):
        program = hlo.stored(compile_for(gpu, function, operand, weight))
        fusions = [one.types for one in program if one.kind == "fusion"]
        assert fusions == [((kind, 256 * features),)]
        # The product reads it directly: the other arrays are the result and cuBLAS's workspace.
        (product,) = (one for one in program if one.kind == "custom-call")
        assert [n for made, n in product.types if made in hlo.FLOATS] == [
            96 * (256 if operand is x else features)
        ]


@pytest.mark.filterwarnings("ignore:jax .* deprecates the Triton:FutureWarning")
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.usefixtures("optimizer_promotion")
@pytest.mark.parametrize("name", ["triton", "mosaic"])
def test_with_a_kernel_no_dequantized_weight_is_stored(
    h200, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the whole step, with scan, rematerialization and gradients."""
    step = step_and_shapes("bfloat16", matmul=name)  # type: ignore[arg-type]
    monkeypatch.setattr(jax, "devices", lambda: [h200])
    with abstract_gpu():
        program = compile_for(h200, *step)
    calls = [one for one in program if one.kind == "custom-call"]
    assert len(calls) >= 7
    assert hlo.dequantized(program, LAYERS) == {}
    assert not hlo.stacked_floats(program, LAYERS, SHAPES)


@pytest.mark.usefixtures("optimizer_promotion")
def test_the_backward_scan_dequantizes_each_weight_once(h200) -> None:
    """The rematerialized forward pass and the gradient of the input share the weight."""
    program = compile_for(h200, *step_and_shapes("bfloat16"))
    assert sorted(hlo.dequantized(program, LAYERS).values()) == [7, 7]
    assert not hlo.stacked_floats(program, LAYERS, SHAPES)
