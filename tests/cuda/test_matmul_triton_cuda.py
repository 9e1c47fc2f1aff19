"""Registers, spills and tensor cores of the Triton products, compiled for absent GPUs."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from irqlora_jax.kernels.matmul_triton import matmul, matmul_transposed, refusal
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantized_shape
from tests import hlo
from tests.cuda import sass
from tests.cuda.conftest import absent
from tests.kernels.kernel_shapes import MODELS

pytestmark = [
    pytest.mark.filterwarnings("ignore:jax .* deprecates the Triton:FutureWarning"),
    # The filter that a trace adds is gone in the next test, but the trace is still cached.
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning"),
]

# The names in tests/cuda/conftest.py, and jax's names.
GPUS = {"a100-80": "NVIDIA A100", "l4": "NVIDIA L4", "h200": "NVIDIA H200"}
FORMATS = ("nf4", "nf3", "nf2", "int4")
PRODUCTS = (matmul, matmul_transposed)
SHAPES = [MODELS["llama-7b"][name] for name in ("q, k, v, o", "gate, up")]
# Every format in both directions for every GPU; rows and shapes alternate.
CASES = [
    (gpu, name, product, (16, 2048)[(i + j + k) % 2], SHAPES[(j + k // 2 + i // 2) % 2])
    for (i, gpu), (j, name), (k, product) in itertools.product(
        enumerate(GPUS), enumerate(FORMATS), enumerate(PRODUCTS)
    )
]


def compiled(folder: Any, gpu: str, name: str, product: Any, rows: int, shape: Any) -> Any:
    """Compiles one product; returns the program and its kernels."""
    where = jax.sharding.SingleDeviceSharding(absent(gpu)[0])
    weight = quantized_shape((shape.out, shape.features), QuantConfig(format=name))
    features = shape.features if product is matmul else shape.out
    x = jax.ShapeDtypeStruct((rows, features), jnp.bfloat16)
    operands = jax.tree.map(
        lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=where), (x, weight)
    )
    device = jax.sharding.AbstractDevice(GPUS.get(gpu, "NVIDIA L4"), None, "gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("all",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return sass.compile_kernels(jax.jit(product).trace(*operands), folder)


@pytest.mark.parametrize(("gpu", "name", "product", "rows", "shape"), CASES)
def test_tensor_cores_and_no_spills(tmp_path, gpu, name, product, rows, shape) -> None:
    program, kernels = compiled(tmp_path, gpu, name, product, rows, shape)
    (machine,) = (one for name, one in kernels.items() if name.endswith("_kernel"))
    assert machine.spills == 0
    assert machine.registers < 255
    # wgmma needs at least 64 rows of the left operand. In dX these are rows of the activations.
    warpgroups = gpu == "h200" and (rows > 16 or product is matmul)
    words = {word for word in ("HMMA", "HGMMA") if machine.counts[word]}
    assert words == {"HGMMA" if warpgroups else "HMMA"}
    # Tiles of activations are loaded ahead, past the registers.
    assert machine.counts["LDGSTS"] > 0
    # Permutations look levels up, without a table in memory or a tree of selects.
    assert machine.counts["PRMT"] > 0
    assert machine.counts["FSEL"] == 0
    # Besides operands and result, the program holds partial sums and, for many rows, decoded scales
    # and shifts. For few rows the kernel decodes them.
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < shape.out * shape.features
    fusions = [one for one in hlo.parse(program.as_text()) if one.kind == "fusion"]
    scales = ("f32", shape.out * shape.features // 64)
    assert any(scales in one.types for one in fusions) is (rows == 2048)


def test_every_warp_dequantizes_its_own_share(tmp_path) -> None:
    """In `matmul_transposed`, a step of 64 x 128 weights for 8 warps is 32 for each thread.

    The code has it twice, in the loop and before it.
    """
    for gpu in GPUS:
        folder = tmp_path / gpu
        folder.mkdir()
        _, kernels = compiled(folder, gpu, "nf4", matmul_transposed, 2048, SHAPES[0])
        (machine,) = (one for name, one in kernels.items() if name.endswith("_kernel"))
        assert machine.counts["FFMA"] == 2 * 32


def test_t4_is_refused(tmp_path, t4, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler would refuse it too."""
    with pytest.raises(jax.errors.JaxRuntimeError, match="Ampere"):
        compiled(tmp_path, "t4", "nf4", matmul, 16, SHAPES[0])
    monkeypatch.setattr(jax, "devices", lambda: [t4])
    x = jnp.zeros((16, 4096), jnp.bfloat16)
    words = refusal(x, quantized_shape((4096, 4096), QuantConfig()))
    assert words is not None and words.startswith("it needs an NVIDIA GPU of compute capability 8")
