"""The parts of the Triton products: fields, byte permutations, lowering, refusals, tiles."""

import dataclasses
import itertools
import re
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.kernels import matmul_triton, triton_backend
from irqlora_jax.kernels.matmul_triton_dequantize import Blocks, ptx
from irqlora_jax.kernels.matmul_triton_tiles import Tiles, default_tiles
from irqlora_jax.quant import packing
from irqlora_jax.quant.choose import choose
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantized_shape
from irqlora_jax.quant.formats import FORMATS, get_format
from irqlora_jax.quant.matmul import TRITON, XLA
from irqlora_jax.quant.qtensor import QTensor
from tests.kernels.kernel_shapes import MODELS, ROWS

FEW_BITS = [name for name in FORMATS if FORMATS[name].bits < 8]

ignore_notice = pytest.mark.filterwarnings("ignore:jax .* deprecates the Triton:FutureWarning")


def run_ptx(text: str, operands: list[np.ndarray]) -> list[np.ndarray]:
    """Runs PTX without branches on arrays of 32-bit words; returns its two results."""
    names = {f"${i + 2}": operand.view(np.uint32) for i, operand in enumerate(operands)}

    def value(name: str) -> np.ndarray:
        return names[name] if name in names else np.uint32(int(name, 0))

    def halves(x: np.ndarray) -> np.ndarray:
        return np.stack([x & 0xFFFF, x >> 16]).astype(np.uint16).view(np.float16)

    def permute(a, b, selector) -> np.ndarray:
        a, b, selector = np.broadcast_arrays(a, b, selector)
        source = np.stack([(x >> (8 * i)) & 255 for x in (a, b) for i in range(4)])
        picks = [(selector >> (4 * i)) & 15 for i in range(4)]
        assert (np.stack(picks) < 8).all()  # from 8 on, a selector repeats a sign bit
        found = [np.take_along_axis(source, pick[None].astype(int), 0)[0] for pick in picks]
        return sum(x << (8 * i) for i, x in enumerate(found))

    def pair(kind: str, top, bottom) -> np.ndarray:
        dtype = {"bf16x2": jnp.bfloat16, "f16x2": np.float16}[kind]
        bits = [x.view(np.float32).astype(dtype).view(np.uint16).astype(np.uint32)
                for x in (top, bottom)]  # fmt: skip
        return bits[0] << 16 | bits[1]

    def multiply_add(a, b, c=None) -> np.ndarray:
        exact = a.view(np.float32).astype(np.float64) * b.view(np.float32)
        exact = exact if c is None else exact + c.view(np.float32)
        return exact.astype(np.float32).view(np.uint32)

    operations: dict[str, Callable] = {
        "shr.u32": lambda a, n: a >> n,
        "shl.b32": lambda a, n: a << n,
        "and.b32": np.bitwise_and,
        "or.b32": np.bitwise_or,
        "prmt.b32": permute,
        "cvt.f32.f16": lambda a: a.astype(np.float32).view(np.uint32),
        "mul.rn.f32": multiply_add,
        "fma.rn.f32": multiply_add,
    }
    for line in text.strip("{ }").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        operation, rest = line.split(None, 1)
        parts = re.findall(r"\$?\w+", rest)
        target, sources = parts[0], parts[1:]
        if operation == "mov.b32":
            low, high, source = parts
            names[low], names[high] = halves(value(source))
        elif operation == "lop3.b32":
            assert sources.pop() == "0xca"
            mask, a, b = map(value, sources)
            names[target] = (mask & a) | (~mask & b)
        elif operation.startswith("cvt.rn."):
            names[target] = pair(operation.split(".")[2], *map(value, sources))
        else:
            names[target] = operations[operation](*map(value, sources))
    return [names["$0"], names["$1"]]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("name", FEW_BITS)
def test_byte_permutations_find_every_level(name: str, shifted: bool) -> None:
    fmt = get_format(name)
    random = np.random.default_rng(0)
    words = random.integers(0, 2**32, (2, 4000), dtype=np.uint32)
    scales, shifts = random.integers(1, 64, (2, 4, 4000)).astype(np.float32) / 8
    bytes_ = words.view(np.uint8).reshape(2, 4000, 4)
    blocks = Blocks(fmt, 64)
    for field in blocks.fields:
        low, high = bytes_
        codes = (low >> field.shift) & (15 if fmt.bits == 4 else 3)
        if field.high_plane is not None:
            codes = codes | ((high >> field.high_shift) & 1) << 2
        assert set(codes.reshape(-1)) == set(range(2**fmt.bits))
        expected = fmt.table.astype(np.float16)[codes].astype(np.float32) * scales.T
        expected = expected + shifts.T if shifted else expected  # adding 0 would change -0
        operands = [*words[: 1 if field.high_plane is None else 2], *scales]
        operands += [*shifts] if shifted else []
        for dtype in (jnp.bfloat16, jnp.float16):
            text = ptx(fmt, field, shifted, dtype)
            found = np.stack(run_ptx(text, operands), axis=-1).view(np.uint16)
            np.testing.assert_array_equal(found, expected.astype(dtype).view(np.uint16))


@pytest.mark.parametrize("name", FEW_BITS)
def test_fields_cover_a_block_once(name: str) -> None:
    """Every code of a packed block is in exactly one field, at the input that it belongs to."""
    fmt = get_format(name)
    for size in matmul_triton.BLOCK_SIZES:
        blocks = Blocks(fmt, size)
        codes = np.random.default_rng(0).integers(0, 2**fmt.bits, size).astype(np.uint8)
        packed = np.asarray(packing.pack(jnp.asarray(codes), fmt.bits))
        runs = packed.reshape(blocks.planes, blocks.width)
        found = np.full(size, 255)
        for field in blocks.fields:
            values = (runs[field.plane] >> field.shift) & (15 if fmt.bits == 4 else 3)
            if field.high_plane is not None:
                values |= ((runs[field.high_plane] >> field.high_shift) & 1) << 2
            found[field.start : field.start + blocks.width] = values
        np.testing.assert_array_equal(found, codes)


def lower(product: Callable, rows: int, weight: QTensor) -> str:
    """Lowers for an absent NVIDIA GPU, without the CUDA plugin."""
    features = weight.shape[1] if product is matmul_triton.matmul else weight.shape[0]
    x = jax.ShapeDtypeStruct((rows, features), jnp.bfloat16)
    device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("all",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(product).trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()


@ignore_notice
@pytest.mark.parametrize("product", [matmul_triton.matmul, matmul_triton.matmul_transposed])
@pytest.mark.parametrize("name", FEW_BITS)
def test_lowers_for_cuda_and_holds_no_weight(name: str, product: Callable) -> None:
    weight = quantized_shape((640, 768), QuantConfig(format=name))  # type: ignore[arg-type]
    text = lower(product, 33, weight)
    assert text.count("__gpu$xla.gpu.triton") == 1
    sizes = re.findall(r"tensor<([\dx]+)x(?:f32|bf16|i32)>", text)
    largest = max(np.prod([int(n) for n in size.split("x")]) for size in sizes)
    splits = default_tiles(33, 640, 768, 4, product is matmul_triton.matmul_transposed).splits
    assert largest <= max(splits, 2) * 33 * 768 < 640 * 768


def test_the_deprecation_is_announced_once() -> None:
    weight = quantized_shape((64, 64), QuantConfig())
    triton_backend._notice.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rows in (16, 32):
            lower(matmul_triton.matmul, rows, weight)
            lower(matmul_triton.matmul_transposed, rows, weight)
    expected = [FutureWarning] if jax.__version_info__ >= (0, 11) else []
    assert [one.category for one in caught] == expected
    assert all("'xla' serves instead" in str(one.message) for one in caught)


def ampere(monkeypatch: pytest.MonkeyPatch, capability: str = "8.0") -> None:
    device = SimpleNamespace(device_kind="NVIDIA Something", compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])


def refusals() -> dict[str, tuple[jax.ShapeDtypeStruct, QTensor, str]]:
    x, weight = jnp.zeros((5, 128), jnp.bfloat16), quantized_shape((64, 128), QuantConfig())
    stack = jax.eval_shape(lambda w: jax.tree.map(lambda a: jnp.stack([a, a]), w), weight)
    wide = jnp.zeros((5, 128), jnp.float32)
    forty = quantized_shape((64, 128), QuantConfig(block_size=40))
    other = dataclasses.replace(weight, layout="other")
    bytes_ = quantized_shape((64, 128), QuantConfig(format="nf8", calibration="none"))
    return {
        "type": (wide, weight, "it takes bfloat16 and float16, not float32"),
        "blocks": (x, forty, "it takes blocks of 32, 64, 128, 256 weights, not 40"),
        "layout": (x, other, "it takes layout 'planes', not 'other'"),
        "bits": (x, bytes_, "it takes codes of 2, 3 and 4 bits, not 8"),
        "stack": (x, stack, "it takes one matrix, not (2,) of them"),
        "scales": (x, with_scales(weight), "it takes no weights with updates of their scales"),
    }


def with_scales(weight: QTensor) -> QTensor:
    return dataclasses.replace(weight, scale_update=jnp.zeros(weight.scale_codes.shape))


def test_a_product_with_trained_scales_falls_back_to_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    ampere(monkeypatch)
    x, weight = jnp.zeros((5, 128), jnp.bfloat16), quantized_shape((64, 128), QuantConfig())
    faster = dataclasses.replace(TRITON, is_faster=lambda *_: True)
    for updated, name in ((weight, "triton"), (with_scales(weight), "xla")):
        assert choose(None, (faster, XLA), x, updated).name == name


@pytest.mark.parametrize("case", ["type", "blocks", "layout", "bits", "stack", "scales"])
def test_refuses_operands_without_a_kernel(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    ampere(monkeypatch)
    x, weight, words = refusals()[case]
    assert matmul_triton.refusal(x, weight) == words
    for product in (matmul_triton.matmul, matmul_triton.matmul_transposed):
        with pytest.raises(ValueError, match=re.escape(f"implementation = 'triton': {words}")):
            jax.eval_shape(product, x, weight)


def test_refuses_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = refusals()["layout"]
    weight = dataclasses.replace(weight, layout="planes")
    needs = "it needs an NVIDIA GPU of compute capability 8.0 or more, the device is"
    assert matmul_triton.refusal(x, weight) == f"{needs} cpu"
    for capability in ("7.5", "gfx90a"):
        ampere(monkeypatch, capability)
        assert matmul_triton.refusal(x, weight) == f"{needs} NVIDIA Something"
    ampere(monkeypatch, "8.9")
    assert matmul_triton.refusal(x, weight) is None
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2, 4), ("data", "fsdp"))):
        assert matmul_triton.refusal(x, weight) == "it serves one device, not a mesh of 8"
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1, 1), ("data", "fsdp"))):
        assert matmul_triton.refusal(x, weight) is None


def test_refuses_a_jax_without_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    ampere(monkeypatch)
    x, weight, _ = refusals()["type"]
    assert triton_backend.backend() is not None
    monkeypatch.delattr(sys.modules["jax.experimental.pallas"], "triton")
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    words = f"jax {jax.__version__} no longer has the Triton backend of Pallas"
    assert matmul_triton.refusal(x, weight) == words


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_m", 8),
        ("block_n", 48),
        ("block_k", 0),
        ("num_warps", 3),
        ("splits", 0),
        ("decode", "x"),
    ],
)
def test_tiles_name_the_field_they_refuse(field: str, value: int | str) -> None:
    with pytest.raises(ValueError, match=f"{field} = {value!r}: expected "):
        Tiles(**{field: value})


def test_default_tiles_fill_a_large_gpu_while_partial_sums_are_small() -> None:
    for shape in itertools.chain.from_iterable(one.values() for one in MODELS.values()):
        for rows, bits, transposed in itertools.product(ROWS, (2, 3, 4), (False, True)):
            tiles = default_tiles(rows, shape.out, shape.features, bits, transposed)
            summed = shape.out if transposed else shape.features
            apart = shape.features if transposed else shape.out
            width = tiles.block_k if transposed else tiles.block_n
            programs = -(-rows // tiles.block_m) * -(-apart // width) * tiles.splits
            assert tiles.decode == ("kernel" if rows <= 64 else "xla")
            assert tiles.splits == 1 or programs <= 256
            assert tiles.splits == 1 or tiles.splits * rows * 8 <= summed * bits / 8
            if rows <= 16:
                assert programs >= (64 if transposed else 128)
            if rows >= 2048:
                assert (tiles.splits, tiles.block_m) == (1, 128)
