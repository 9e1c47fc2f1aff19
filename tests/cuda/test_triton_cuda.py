"""The Triton kernels, compiled for GPUs that are not there: registers, spills, tensor cores."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from irqlora_jax.kernels.matmul_triton import TRITON, matmul, matmul_transposed
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantized_shape
from tests import hlo
from tests.cuda import sass
from tests.cuda.conftest import absent
from tests.kernels.kernel_shapes import MODELS

pytestmark = [
    pytest.mark.filterwarnings("ignore:jax .* deprecates the Triton:FutureWarning"),
    # pytest forgets what a trace that is still cached asked to be ignored.
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning"),
]

# By the names of tests/cuda/conftest.py: as jax knows them, and their tensor cores' instruction.
GPUS = {"a100-80": "NVIDIA A100", "l4": "NVIDIA L4", "h200": "NVIDIA H200"}
FORMATS = ("nf4", "nf3", "nf2", "int4")
PRODUCTS = (matmul, matmul_transposed)
SHAPES = [MODELS["llama-7b"][name] for name in ("q, k, v, o", "gate, up")]
# Every GPU compiles every format in both directions; rows and shapes take turns.
CASES = [
    (gpu, name, product, (16, 2048)[(i + j + k) % 2], SHAPES[(j + k // 2 + i // 2) % 2])
    for (i, gpu), (j, name), (k, product) in itertools.product(
        enumerate(GPUS), enumerate(FORMATS), enumerate(PRODUCTS)
    )
]


def compiled(folder: Any, gpu: str, name: str, product: Any, rows: int, shape: Any) -> Any:
    """The program and the kernels of one product."""
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
    # wgmma takes 64 rows at least; where those of the activations lead, 16 are too few for it.
    warpgroups = gpu == "h200" and (rows > 16 or product is matmul)
    words = {word for word in ("HMMA", "HGMMA") if machine.counts[word]}
    assert words == {"HGMMA" if warpgroups else "HMMA"}
    # Tiles of activations are loaded ahead, without a register in between.
    assert machine.counts["LDGSTS"] > 0
    # Levels are found by permutations: no load of a table, and no tree of selects.
    assert machine.counts["PRMT"] > 0
    assert machine.counts["FSEL"] == 0
    # Besides its operands and its result the program holds partial sums, and for many rows scales
    # and shifts; for few of them the kernel decodes those itself.
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < shape.out * shape.features
    fusions = [one for one in hlo.parse(program.as_text()) if one.kind == "fusion"]
    scales = ("f32", shape.out * shape.features // 64)
    assert any(scales in one.types for one in fusions) is (rows == 2048)


def test_every_warp_dequantizes_its_own_share(tmp_path) -> None:
    """A step of 64 x 128 weights of `matmul_transposed` for 8 warps is 32 for each thread. It is
    written twice, in the loop and in front of it."""
    for gpu in GPUS:
        folder = tmp_path / gpu
        folder.mkdir()
        _, kernels = compiled(folder, gpu, "nf4", matmul_transposed, 2048, SHAPES[0])
        (machine,) = (one for name, one in kernels.items() if name.endswith("_kernel"))
        assert machine.counts["FFMA"] == 2 * 32


def test_t4_is_refused(tmp_path, t4, monkeypatch: pytest.MonkeyPatch) -> None:
    """By us, and by the compiler were it asked."""
    with pytest.raises(jax.errors.JaxRuntimeError, match="Ampere"):
        compiled(tmp_path, "t4", "nf4", matmul, 16, SHAPES[0])
    monkeypatch.setattr(jax, "devices", lambda: [t4])
    x = jnp.zeros((16, 4096), jnp.bfloat16)
    words = TRITON.refusal(x, quantized_shape((4096, 4096), QuantConfig()))
    assert words is not None and words.startswith("it needs an NVIDIA GPU of compute capability 8")
