"""Every way to multiply with packed weights, against float64. Kernels run interpreted here;
tests/cuda compiles them."""

import dataclasses
import functools
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
from irqlora_jax.kernels.matmul_triton import TRITON, Tiles, default_tiles
from jax.experimental import pallas as pl
from kernel_shapes import MODELS, ROWS

from irqlora_jax.config import QuantConfig
from irqlora_jax.kernels import backend_triton, dequantize_triton, matmul_triton
from irqlora_jax.quant.formats import FORMATS, get_format
from irqlora_jax.quant.matmul import XLA
from irqlora_jax.quant.qtensor import QTensor, quantized_shape
from irqlora_jax.quant.stats import DYNAMIC_MAP

ignore_notice = pytest.mark.filterwarnings("ignore:jax .* deprecates the Triton:FutureWarning")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An implementation as it can run here."""

    name: str
    forward: Callable
    backward: Callable


def triton(name: str, tiles: Tiles | None = None) -> Adapter:
    options = {"tiles": tiles, "interpret": True}
    return Adapter(
        name,
        functools.partial(matmul_triton.matmul, **options),
        functools.partial(matmul_triton.matmul_transposed, **options),
    )


ADAPTERS = (Adapter("xla", XLA.forward, XLA.backward), triton("triton"))
BATCHES = (1, 5, 16, 33)
SHAPES = ((24, 100), (96, 488), (130, 192), (64, 256))
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
# Rounded once, to 8, 11 and 24 bits; and in the sum as a whole.
TOLERANCES = {jnp.bfloat16: 2**-7, jnp.float16: 2**-10, jnp.float32: 2**-20}
# Each format meets every number of rows, every shape, every type, with and without a shift.
CASES = [
    (name, BATCHES[(i + j) % 4], SHAPES[j], DTYPES[(i + j) % 3], (i + j) % 2 == 0)
    for (i, name), j in itertools.product(enumerate(FORMATS), range(4))
]


def random_weight(
    name: str, shape: tuple[int, int], shifted: bool = True, size: int = 64
) -> tuple[QTensor, np.ndarray]:
    """Random bytes as a QTensor, padding included, and the matrix that they stand for."""
    fmt, random = get_format(name), np.random.default_rng(shape)
    calibration = "icq" if shifted and not fmt.integer else "none"
    config = QuantConfig(format=name, block_size=size, calibration=calibration)  # type: ignore[arg-type]
    weight = quantized_shape(shape, config)
    if fmt.integer and not shifted:
        weight = dataclasses.replace(weight, shift_codes=None)

    def fill(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if leaf.dtype == np.uint8:
            return random.integers(0, 256, leaf.shape, dtype=np.uint8)
        return random.uniform(1, 2, leaf.shape).astype(np.float32)

    weight = jax.tree.map(fill, weight)

    def decode(codes: np.ndarray, largest: np.ndarray) -> np.ndarray:
        groups = np.repeat(largest.astype(np.float64), 256)[: codes.size]
        return DYNAMIC_MAP[codes] * groups.reshape(codes.shape)

    scale = decode(weight.scale_codes, weight.scale_max) + np.float64(weight.scale_offset)
    shift = np.zeros_like(scale)
    if weight.shift_max is not None:
        shift = decode(weight.shift_codes, weight.shift_max)
    elif weight.shift_codes is not None:
        shift = weight.shift_codes / -(2.0 ** (8 - fmt.bits)) * scale
    levels = fmt.table.astype(np.float64)[unpack(weight.packed, fmt.bits)]
    dense = levels * scale[..., None] + shift[..., None]
    return weight, dense.reshape(shape[0], -1)[:, : shape[1]]


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes of blocks, by bits and bytes as `packing.py` draws them."""

    def plane(part: np.ndarray, bits: int) -> np.ndarray:
        ones = np.unpackbits(part[..., None], axis=-1, bitorder="little")
        ones = ones.reshape(*part.shape, 8 // bits, bits)
        return np.moveaxis(ones @ (1 << np.arange(bits)), -1, -2).reshape(*part.shape[:-1], -1)

    if bits != 3:
        return plane(packed, bits)
    end = packed.shape[-1] * 2 // 3
    return plane(packed[..., :end], 2) + 4 * plane(packed[..., end:], 1)


def check(adapter: Adapter, rows: int, weight: QTensor, dense: np.ndarray, dtype) -> None:
    """Both products against float64, in two batch axes."""
    for product, factor in ((adapter.forward, dense.T), (adapter.backward, dense)):
        normal = np.random.default_rng(rows).standard_normal((1, rows, len(factor)))
        x = normal.astype(dtype)
        # It is compiled for longer than it runs.
        options = {"xla_backend_optimization_level": 0}
        y = jax.jit(product).lower(x, weight).compile(compiler_options=options)(x, weight)
        assert (y.dtype, y.shape) == (dtype, (1, rows, factor.shape[1]))
        terms = np.abs(x.astype(np.float64)) @ np.abs(factor)
        error = np.abs(np.asarray(y, np.float64) - x.astype(np.float64) @ factor)
        # W and the result are rounded. Not `error > ..`, which NaN would pass.
        assert (error <= TOLERANCES[dtype] * terms).all()
        assert np.sqrt((error**2).mean() / (terms**2).mean()) <= TOLERANCES[dtype] / 4


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda one: one.name)
@pytest.mark.parametrize(("name", "rows", "shape", "dtype", "shifted"), CASES)
def test_products(adapter: Adapter, name, rows, shape, dtype, shifted) -> None:
    check(adapter, rows, *random_weight(name, shape, shifted), dtype)


COARSE, FINE = Tiles(16, 64, 256, splits=2), Tiles(32, 16, 64, splits=3)


@pytest.mark.parametrize(
    ("name", "tiles"),
    [("nf4", COARSE), ("nf4", FINE), ("nf3", FINE), ("int2", COARSE)],
    ids=["nf4-coarse", "nf4-fine", "nf3-fine", "int2-coarse"],
)
def test_tiles_and_splits_that_do_not_divide(name: str, tiles: Tiles) -> None:
    """130 rows are 9 tiles of 16 or 3 of 64; 3 blocks are a broken tile of 4 or 3 splits."""
    check(triton("triton", tiles), 33, *random_weight(name, (130, 190)), jnp.float32)


@pytest.mark.parametrize(("name", "size"), [("fp4", 128), ("nf3", 32), ("nf3", 256), ("nf2", 32)])
def test_other_block_sizes(name: str, size: int) -> None:
    check(triton("triton"), 5, *random_weight(name, (24, 300), size=size), jnp.bfloat16)


@pytest.mark.parametrize("name", ["nf4", "nf3"])
def test_nothing_is_read_outside_of_an_array(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """On a GPU that is memory of others; interpreted it would be the nearest element."""
    load = matmul_triton._load

    def strict(at, mask=None):
        (where,) = at.transforms
        outside = jnp.zeros(at.shape, bool)
        for size, index in zip(at.ref.shape, where.indices, strict=True):
            outside |= jnp.broadcast_to((index < 0) | (index >= size), at.shape)
        value = load(at, mask)
        if value.dtype == jnp.uint8:
            return value  # bytes are read where their scales are
        outside = outside if mask is None else outside & mask
        return jnp.where(jnp.any(outside), jnp.nan, value)  # rows of x alone would not be seen

    monkeypatch.setattr(matmul_triton, "_load", strict)
    # Rows of x, rows of W and blocks of W: none of them fills its tiles.
    check(triton("strict", COARSE), 5, *random_weight(name, (130, 190)), jnp.float32)


def test_what_a_kernel_does_not_write_is_nan() -> None:
    """So the finite results above are written as a whole."""

    def kernel(x_ref, out_ref) -> None:
        out_ref[0, :] = x_ref[0, :]

    out = jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)
    y = pl.pallas_call(kernel, out_shape=out, interpret=True)(jnp.ones((2, 3), jnp.bfloat16))
    np.testing.assert_array_equal(np.isnan(np.asarray(y, np.float32)), [[False] * 3, [True] * 3])


def run_ptx(text: str, operands: list[np.ndarray]) -> list[np.ndarray]:
    """The two results of a piece of PTX without branches; operands as arrays of 32-bit words."""
    names = {f"${i + 2}": operand.view(np.uint32) for i, operand in enumerate(operands)}

    def value(name: str) -> np.ndarray:
        return names[name] if name in names else np.uint32(int(name, 0))

    def halves(x: np.ndarray) -> np.ndarray:
        return np.stack([x & 0xFFFF, x >> 16]).astype(np.uint16).view(np.float16)

    def permute(a, b, selector) -> np.ndarray:
        a, b, selector = np.broadcast_arrays(a, b, selector)
        source = np.stack([(x >> (8 * i)) & 255 for x in (a, b) for i in range(4)])
        picks = [(selector >> (4 * i)) & 15 for i in range(4)]
        assert (np.stack(picks) < 8).all()  # 8 and more repeat a sign
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
@pytest.mark.parametrize("name", FORMATS)
def test_byte_permutations_find_every_level(name: str, shifted: bool) -> None:
    fmt = get_format(name)
    random = np.random.default_rng(0)
    words = random.integers(0, 2**32, (2, 4000), dtype=np.uint32)
    scales, shifts = random.integers(1, 64, (2, 4, 4000)).astype(np.float32) / 8
    bytes_ = words.view(np.uint8).reshape(2, 4000, 4)
    blocks = dequantize_triton.Blocks(fmt, 64)
    for field in blocks.fields:
        low, high = bytes_
        codes = (low >> field.shift) & (15 if fmt.bits == 4 else 3)
        if field.high_plane is not None:
            codes = codes | ((high >> field.high_shift) & 1) << 2
        assert set(codes.reshape(-1)) == set(range(2**fmt.bits))
        expected = fmt.table.astype(np.float16)[codes].astype(np.float32) * scales.T
        expected = expected + shifts.T if shifted else expected  # -0 + 0 would be 0
        operands = [*words[: 1 if field.high_plane is None else 2], *scales]
        operands += [*shifts] if shifted else []
        for dtype in (jnp.bfloat16, jnp.float16):
            text = dequantize_triton.ptx(fmt, field, shifted, dtype)
            found = np.stack(run_ptx(text, operands), axis=-1).view(np.uint16)
            np.testing.assert_array_equal(found, expected.astype(dtype).view(np.uint16))


@pytest.mark.parametrize("name", FORMATS)
def test_fields_cover_a_block_once(name: str) -> None:
    """Each code of a packed block is found in one field, at the input that it belongs to."""
    fmt = get_format(name)
    for size in matmul_triton.BLOCK_SIZES:
        blocks = dequantize_triton.Blocks(fmt, size)
        codes = np.random.default_rng(0).integers(0, 2**fmt.bits, size).astype(np.uint8)
        packed = np.asarray(matmul_triton.packing.pack(jnp.asarray(codes), fmt.bits))
        runs = packed.reshape(blocks.planes, blocks.width)
        found = np.full(size, 255)
        for field in blocks.fields:
            values = (runs[field.plane] >> field.shift) & (15 if fmt.bits == 4 else 3)
            if field.high_plane is not None:
                values |= ((runs[field.high_plane] >> field.high_shift) & 1) << 2
            found[field.start : field.start + blocks.width] = values
        np.testing.assert_array_equal(found, codes)


def lower(product: Callable, rows: int, weight: QTensor) -> str:
    """For an NVIDIA GPU that is not there, without a plugin."""
    features = weight.shape[1] if product is matmul_triton.matmul else weight.shape[0]
    x = jax.ShapeDtypeStruct((rows, features), jnp.bfloat16)
    device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("all",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(product).trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()


@ignore_notice
@pytest.mark.parametrize("product", [matmul_triton.matmul, matmul_triton.matmul_transposed])
@pytest.mark.parametrize("name", FORMATS)
def test_lowers_for_cuda_and_holds_no_weight(name: str, product: Callable) -> None:
    weight = quantized_shape((640, 768), QuantConfig(format=name))  # type: ignore[arg-type]
    text = lower(product, 33, weight)
    assert text.count("__gpu$xla.gpu.triton") == 1
    sizes = re.findall(r"tensor<([\dx]+)x(?:f32|bf16|i32)>", text)
    largest = max(np.prod([int(n) for n in size.split("x")]) for size in sizes)
    splits = default_tiles(33, 640, 768, 4, product is matmul_triton.matmul_transposed).splits
    assert largest <= max(splits, 2) * 33 * 768 < 640 * 768


def test_one_notice_where_the_backend_is_deprecated() -> None:
    weight = quantized_shape((64, 64), QuantConfig())
    backend_triton._notice.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rows in (16, 32):
            lower(matmul_triton.matmul, rows, weight)
            lower(matmul_triton.matmul_transposed, rows, weight)
    expected = [FutureWarning] if jax.__version_info__ >= (0, 11) else []
    assert [one.category for one in caught] == expected
    assert all("'xla' serves in its place" in str(one.message) for one in caught)


def ampere(monkeypatch: pytest.MonkeyPatch, capability: str = "8.0") -> None:
    device = SimpleNamespace(device_kind="NVIDIA Something", compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])


def refusals() -> dict[str, tuple[jax.ShapeDtypeStruct, QTensor, str]]:
    x, weight = jnp.zeros((5, 128), jnp.bfloat16), quantized_shape((64, 128), QuantConfig())
    stack = jax.eval_shape(lambda w: jax.tree.map(lambda a: jnp.stack([a, a]), w), weight)
    wide = jnp.zeros((5, 128), jnp.float32)
    forty = quantized_shape((64, 128), QuantConfig(block_size=40))
    other = dataclasses.replace(weight, layout="other")
    return {
        "type": (wide, weight, "it takes bfloat16 and float16, not float32"),
        "blocks": (x, forty, "it takes blocks of 32, 64, 128, 256 weights, not 40"),
        "layout": (x, other, "it takes layout 'planes', not 'other'"),
        "stack": (x, stack, "it takes one matrix, not (2,) of them"),
    }


@pytest.mark.parametrize("case", ["type", "blocks", "layout", "stack"])
def test_refuses_what_there_is_no_kernel_for(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    ampere(monkeypatch)
    x, weight, words = refusals()[case]
    assert TRITON.refusal(x, weight) == words
    for product in (matmul_triton.matmul, matmul_triton.matmul_transposed):
        with pytest.raises(ValueError, match=re.escape(f"implementation = 'triton': {words}")):
            jax.eval_shape(product, x, weight)


def test_refuses_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = refusals()["layout"]
    weight = dataclasses.replace(weight, layout="planes")
    needs = "it needs an NVIDIA GPU of compute capability 8.0 or more, the device is"
    assert TRITON.refusal(x, weight) == f"{needs} cpu"
    for capability in ("7.5", "gfx90a"):
        ampere(monkeypatch, capability)
        assert TRITON.refusal(x, weight) == f"{needs} NVIDIA Something"
    ampere(monkeypatch, "8.9")
    assert TRITON.refusal(x, weight) is None
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2, 4), ("data", "fsdp"))):
        assert TRITON.refusal(x, weight) == "it serves one device, not a mesh of 8"
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1, 1), ("data", "fsdp"))):
        assert TRITON.refusal(x, weight) is None


def test_refuses_a_jax_without_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    ampere(monkeypatch)
    x, weight, _ = refusals()["type"]
    assert backend_triton.backend() is not None
    monkeypatch.delattr(sys.modules["jax.experimental.pallas"], "triton")
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    words = f"jax {jax.__version__} has no Triton backend of Pallas any more"
    assert TRITON.refusal(x, weight) == words


@pytest.mark.parametrize(
    ("field", "value"),
    [("block_m", 8), ("block_n", 48), ("block_k", 0), ("num_warps", 3), ("splits", 0)],
)
def test_tiles_name_what_they_do_not_accept(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field} = {value}: accepted is "):
        Tiles(**{field: value})


def test_default_tiles_fill_a_large_gpu_where_partial_sums_are_small() -> None:
    for shape in itertools.chain.from_iterable(one.values() for one in MODELS.values()):
        for rows, bits, transposed in itertools.product(ROWS, (2, 3, 4), (False, True)):
            tiles = default_tiles(rows, shape.out, shape.features, bits, transposed)
            summed = shape.out if transposed else shape.features
            apart = shape.features if transposed else shape.out
            width = tiles.block_k if transposed else tiles.block_n
            programs = -(-rows // tiles.block_m) * -(-apart // width) * tiles.splits
            assert tiles.splits == 1 or programs <= 256
            assert tiles.splits == 1 or tiles.splits * rows * 8 <= summed * bits / 8
            if rows <= 16:
                assert programs >= (64 if transposed else 128)
            if rows >= 2048:
                assert (tiles.splits, tiles.block_m) == (1, 128)
