"""Attention compiled for absent GPUs, by cuDNN and by XLA."""

import jax
import jax.numpy as jnp
import pytest

from irqlora_jax.model import attention
from irqlora_jax.plan.gpus import OPTIONS

HEADS, LENGTH = 32, 2048
SCORES = 4 * HEADS * LENGTH**2  # bytes of the scores of one row


def compiled(gpu, function, dtype):
    """The gradients of a function of q, k and v."""
    where = jax.sharding.SingleDeviceSharding(gpu)
    shapes = [
        jax.ShapeDtypeStruct((1, LENGTH, heads, 128), dtype, sharding=where)
        for heads in (HEADS, 8, 8)
    ]
    gradient = jax.grad(lambda *x: function(*x).astype(jnp.float32).sum(), (0, 1, 2))
    return jax.jit(gradient).trace(*shapes).lower().compile(compiler_options=OPTIONS)


def test_cudnn_compiles_from_ampere_on(gpu) -> None:
    if gpu.compute_capability == "7.5":
        pytest.skip("cuDNN's flash attention needs compute capability 8.0")
    try:
        program = compiled(gpu, attention._cudnn, jnp.bfloat16)
    except RuntimeError as error:
        if not str(error).startswith(("cuDNN is not detected", "cuDNN not found")):
            raise
        pytest.skip("needs cuDNN")
    text = program.as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in text and "exponential" not in text
    assert program.memory_analysis().temp_size_in_bytes < SCORES / 4


def test_xla_holds_only_the_scores_of_a_chunk(gpu) -> None:
    half = jnp.float16 if gpu.compute_capability == "7.5" else jnp.bfloat16
    program = compiled(gpu, attention.attend, half)
    assert program.memory_analysis().temp_size_in_bytes < SCORES / 2
