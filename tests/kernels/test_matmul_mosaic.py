"""The Mosaic products without a GPU: byte table, data of each thread, loops, tiles, refusals."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from irqlora_jax.kernels import matmul_mosaic
from irqlora_jax.kernels.matmul_mosaic_byte_table import Half, dequantize_row
from irqlora_jax.kernels.matmul_mosaic_fragments import byte_layouts
from irqlora_jax.quant import packing
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantized_shape
from irqlora_jax.quant.formats import FORMATS, get_format
from tests.kernels.mosaic_interpreter import HALVES, interpreted

FEW_BITS = [name for name in FORMATS if FORMATS[name].bits < 8]

Tiles = matmul_mosaic.Tiles
HOPPER = SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="H200")


# --- PTX as its manual defines it, on arrays of 32-bit words --------------------------------------


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    whole = a | (b << np.uint64(32))
    made = np.zeros_like(whole)
    for i in range(4):
        nibble = (selector >> np.uint64(4 * i)) & np.uint64(15)
        byte = (whole >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte >> np.uint64(7), np.uint64(255), np.uint64(0))
        made |= np.where(nibble >> np.uint64(3), sign, byte) << np.uint64(8 * i)
    return made


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    made = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            terms = (
                value if row >> place & 1 else ~value for value, place in ((a, 2), (b, 1), (c, 0))
            )
            made |= np.bitwise_and.reduce(list(terms))
    return made


def rounded(exact: np.ndarray, kind: type) -> np.ndarray:
    """Rounds float64 once to half precision, to nearest even. Values are far from its limits."""
    bits = 8 if kind is ml_dtypes.bfloat16 else 11
    mantissa, exponent = np.frexp(exact)
    least = -1000 if kind is ml_dtypes.bfloat16 else -13
    scale = bits - np.maximum(exponent, least)
    return np.ldexp(np.rint(np.ldexp(mantissa, exponent + scale)), -scale).astype(kind)


def fma2(kind: type, *operands: np.ndarray) -> np.ndarray:
    halves = []
    for shift in (0, 16):
        a, b, c = (
            ((one >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.uint16).view(kind)
            for one in operands
        )
        exact = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
        halves.append(rounded(exact, kind).view(np.uint16).astype(np.uint64) << np.uint64(shift))
    return halves[0] | halves[1]


def execute(text: str, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Runs a text in PTX. The inputs are arrays of words; returns the 8 outputs."""
    values: dict[str, np.ndarray] = {
        f"${8 + i}": one.astype(np.uint64) for i, one in enumerate(inputs)
    }
    declared: set[str] = set()

    def read(name: str) -> np.ndarray:
        if re.fullmatch(r"0x[0-9a-f]+|\d+", name):
            return np.full(inputs[0].shape, int(name, 0), np.uint64)
        return values[name]

    assert text.startswith("{") and text.endswith("}")
    for line in filter(None, (part.strip() for part in text[1:-1].split(";"))):
        operation, rest = line.split(None, 1)
        names = [name.strip() for name in rest.split(",")]
        if operation == ".reg":
            declared |= {names[0].split()[1], *names[1:]}
            continue
        target, *sources = names
        assert target in declared or re.fullmatch(r"\$[0-7]", target)
        if operation == "lop3.b32":
            made = lop3(*map(read, sources[:3]), int(sources[3], 16))
        else:
            made = {
                "prmt.b32": prmt,
                "and.b32": np.bitwise_and,
                "shl.b32": np.left_shift,
                "shr.u32": np.right_shift,
                "mad.lo.u32": lambda a, b, c: a * b + c,
                "fma.rn.bf16x2": lambda *o: fma2(ml_dtypes.bfloat16, *o),
                "fma.rn.f16x2": lambda *o: fma2(np.float16, *o),
            }[operation](*map(read, sources))
        values[target] = made & np.uint64(0xFFFFFFFF)
    return [values[f"${i}"] for i in range(8)]


def held(packed: np.ndarray, bits: int, c: int) -> list[np.ndarray]:
    """The words that thread c of four loads of each packed row."""
    if bits == 4:
        return list(packed[:, 8 * c : 8 * c + 8].copy().view("<u4").T)
    words = [packed[:, 4 * c : 4 * c + 4].copy().view("<u4")[:, 0]]
    if bits == 3:
        words.append(packed[:, 16 + 2 * c : 18 + 2 * c].copy().view("<u2")[:, 0].astype(np.uint32))
    return words


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", FEW_BITS)
def test_byte_table(name: str, dtype: Half) -> None:
    """Rows with every byte in every place, and random rows.

    The results are exactly the rounded levels, and level * scale + shift rounded once.
    """
    fmt, kind = get_format(name), HALVES[dtype]
    rng = np.random.default_rng(0)
    same = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 8 * fmt.bits, axis=1)
    packed = np.concatenate([same, rng.integers(0, 256, (200, 8 * fmt.bits), np.uint8)])
    codes = np.asarray(packing.unpack(jnp.asarray(packed), fmt.bits, "fragments"))
    levels = fmt.table.astype(kind).astype(np.float64)[codes]
    text = dequantize_row(fmt.levels, fmt.bits, dtype)
    ones = (np.ones(len(packed)), np.zeros(len(packed)))
    spread = (rng.uniform(0.01, 0.2, len(packed)), rng.normal(0, 0.01, len(packed)))
    for scale, shift in (ones, spread):
        scale, shift = scale.astype(kind), shift.astype(kind)
        affine = scale.view(np.uint16) | (shift.view(np.uint16).astype(np.uint32) << 16)
        exact = levels * scale.astype(np.float64)[:, None] + shift.astype(np.float64)[:, None]
        expected = rounded(exact, kind)
        for c in range(4):
            pairs = execute(text, [*held(packed, fmt.bits, c), affine])
            for i, pair in enumerate(pairs):
                k = 32 * (i // 4) + 8 * (i % 4) + 2 * c
                for e in range(2):
                    half = (pair >> np.uint64(16 * e)).astype(np.uint16).view(kind)
                    np.testing.assert_array_equal(half, expected[:, k + e])


def test_number_of_instructions() -> None:
    for bits, count in ((4, 42), (3, 25), (2, 21)):
        levels = tuple(float(i) for i in range(2**bits))
        text = dequantize_row(levels, bits, "bfloat16")
        every = re.findall(r"\b(?:prmt|lop3|and|shl|shr|mad)\.", text)
        free = len(re.findall(r"shr\.u32 \w+, \S+, 0;", text))  # the assembler removes these
        assert len(every) - free - 2 == count
    with pytest.raises(ValueError, match="bits = 3 with 4 levels"):
        dequantize_row((0.0,) * 4, 3, "bfloat16")


# --- the data of each thread ----------------------------------------------------------------------


def elements(layout, rows: int, columns: int) -> np.ndarray:
    """Element numbers [warp, lane, register, place in the register] of one of Mosaic's layouts."""
    numbers = np.arange(rows * columns).reshape(rows, columns)
    for tile in layout.tiling.tiles:
        # Cuts the last axes into tiles. The axes that count tiles go before the axes inside them.
        rank = len(tile)
        kept, cut = numbers.shape[: numbers.ndim - rank], numbers.shape[numbers.ndim - rank :]
        parts = [n for size, part in zip(cut, tile, strict=True) for n in (size // part, part)]
        order = [len(kept) + 2 * i for i in range(rank)]
        order += [len(kept) + 2 * i + 1 for i in range(rank)]
        numbers = numbers.reshape(*kept, *parts).transpose(*range(len(kept)), *order)
    axes = [*layout.warp_dims, *layout.lane_dims, layout.vector_dim]
    axes = [axis % numbers.ndim for axis in axes]
    rest = [axis for axis in range(numbers.ndim) if axis not in axes]
    warps = len(layout.warp_dims)
    order = [*axes[:warps], *axes[warps:-1], *rest, axes[-1]]
    return numbers.transpose(order).reshape(4, 32, -1, layout.vector_length)


def test_a_thread_loads_the_codes_of_its_operand() -> None:
    """Mosaic's layouts agree with the PTX manual's figure of A in registers.

    For wgmma.m64nNk16 with 16-bit types, value i of 8 is in row 16 * warp + lane // 4 (+ 8 for
    i = 2, 3, 6, 7) and column 2 * (lane % 4) + i % 2 (+ 8 for i >= 4). A thread loads the bytes of
    exactly these codes, and passes its pairs on in this order.
    """
    mgpu = pytest.importorskip("jax.experimental.mosaic.gpu")
    result = elements(mgpu.WGMMA_LAYOUT, 64, 64)
    sizes = {4: (8,), 3: (4, 2), 2: (4,)}  # bytes of a row that a thread loads, for each plane
    loads = [
        (size, elements(layout.to_mgpu(), 64, 4 * size))
        for bits, planes in sizes.items()
        for size, layout in zip(planes, byte_layouts(bits), strict=True)
    ]
    for warp in range(4):
        for lane in range(32):
            group, c = divmod(lane, 4)
            for i in range(8):
                row = 16 * warp + group + (8 if i in (2, 3, 6, 7) else 0)
                column = 2 * c + i % 2 + (8 if i >= 4 else 0)
                for step in range(4):
                    # wgmma takes registers 4 * step to 4 * step + 3, two values each.
                    assert result[warp, lane, 4 * step + i // 2, i % 2] == (
                        64 * row + 16 * step + column
                    )
            for size, bytes_ in loads:
                # `_inline` takes the rows one by one.
                for half, found in enumerate(bytes_[warp, lane].reshape(2, size)):
                    row = 16 * warp + group + 8 * half
                    expected = 4 * size * row + size * c + np.arange(size)
                    np.testing.assert_array_equal(found, expected)


# --- the loops ------------------------------------------------------------------------------------


def make(name: str, n: int, k: int):
    """A weight of random bytes, with all possible codes, scales and shifts."""
    shape = quantized_shape((n, k), QuantConfig(format=name))  # type: ignore[arg-type]
    rng = np.random.default_rng(0)

    def fill(leaf):
        if leaf.dtype == jnp.uint8:
            return jnp.asarray(rng.integers(0, 256, leaf.shape, np.uint8))
        return jnp.full(leaf.shape, 0.05, leaf.dtype)

    filled = jax.tree.map(fill, shape)
    return dataclasses.replace(
        filled, layout="fragments", scale_offset=filled.scale_offset + jnp.float32(0.1)
    )


CASES = {
    # Rows and columns of x and W do not fill tiles; a block has several tiles and reuses slots.
    "edges": ("nf4", 20, 136, 192, Tiles(16, grid=2, together=2, stages=2)),
    "one row": ("nf4", 1, 72, 320, Tiles(8, grid=3, blocks=2, together=1, stages=2, splits=2)),
    "chunks": ("nf3", 70, 64, 192, Tiles(128, grid=1, blocks=2, stages=2)),
    # One block of the grid has no work, and one split of the inputs is empty.
    "idle": ("int2", 9, 64, 192, Tiles(16, grid=4, warp_groups=1, blocks=2, splits=3, stages=2)),
}


@pytest.mark.parametrize("case", list(CASES))
def test_loops(case: str) -> None:
    """Both products against float64, over all tiles, steps, splits and edges."""
    name, m, n, k, tiles = CASES[case]
    weight = make(name, n, k)
    dense = np.asarray(weight.dequantize(), np.float64)
    for product, factor in (
        (matmul_mosaic.matmul, dense.T),
        (matmul_mosaic.matmul_transposed, dense),
    ):
        x = jax.random.normal(jax.random.key(1), (m, len(factor))).astype(jnp.bfloat16)
        with interpreted():
            found = np.asarray(product(x, weight, tiles), np.float64)
        assert found.shape == (m, factor.shape[1])
        expected = np.asarray(x, np.float64) @ factor
        # Not `not (error > ..).any()`, which NaN would pass.
        assert np.abs(found - expected).max() <= 8e-3 * np.abs(expected).max()


# --- operands, tiles, refusals --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["nf4", "int3"])
def test_affine(name: str, dtype) -> None:
    weight = make(name, 7, 128)
    both = np.asarray(matmul_mosaic.affine(weight, dtype))
    assert both.shape == (2, 8) and not both[:, 7:].any()
    kind = HALVES[jnp.dtype(dtype).name]
    low = (both[:, :7] & 0xFFFF).astype(np.uint16).view(kind)
    high = (both[:, :7] >> 16).astype(np.uint16).view(kind)
    np.testing.assert_array_equal(low, np.asarray(weight.scale().astype(dtype)).T)
    np.testing.assert_array_equal(high, np.asarray(weight.shift().astype(dtype)).T)


@pytest.mark.parametrize("transposed", [False, True], ids=["y", "dX"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_default_tiles_fit_and_keep_the_multiprocessors_busy(bits: int, transposed: bool) -> None:
    for m in (1, 5, 16, 33, 64, 100, 256, 2048, 8192):
        for n, k in ((4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (32000, 6656)):
            tiles = matmul_mosaic.default_tiles(m, n, k, bits, transposed)
            assert tiles.shared_memory(bits, transposed) + (3 << 10) <= 227 << 10
            assert tiles.stages * tiles.blocks >= (3 if transposed else 4)
            out, terms = (k, n) if transposed else (n, k)
            tasks = -(-m // tiles.batch) * -(-out // tiles.width) * tiles.splits
            rounds = -(-tasks // tiles.grid)
            assert tasks / (rounds * tiles.grid) >= 0.6, (m, n, k, tiles)
            steps = -(-terms // (64 * tiles.blocks))
            assert tiles.splits <= steps
            # No split is empty.
            assert (tiles.splits - 1) * -(-steps // tiles.splits) < steps


def test_tiles_are_checked() -> None:
    with pytest.raises(ValueError, match="batch = 24: expected 8, 16"):
        Tiles(24)
    with pytest.raises(ValueError, match="stages = 1: expected 2"):
        Tiles(8, stages=1)
    with pytest.raises(ValueError, match="splits = 0: expected 1"):
        Tiles(8, splits=0)
    weight, x = make("nf3", 128, 128), jnp.zeros((8, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="blocks = 1: expected a multiple of 2 with 3 bits"):
        matmul_mosaic.matmul(x, weight, Tiles(8))
    with pytest.raises(ValueError, match="warp_groups = 1: expected a multiple"):
        matmul_mosaic.matmul_transposed(x, weight, Tiles(8, warp_groups=1))


def test_refusals_give_the_reason() -> None:
    weight, x = make("nf4", 8, 128), jnp.zeros((2, 128), jnp.bfloat16)

    def refused(x=x, device=HOPPER, **changes):
        return matmul_mosaic.refusal(x, dataclasses.replace(weight, **changes), device) or ""

    assert refused() == ""
    assert "compute capability 9.0, cpu has none" in (matmul_mosaic.refusal(x, weight) or "")
    older = SimpleNamespace(platform="gpu", compute_capability="8.0", device_kind="A100")
    assert "9.0, A100 has 8.0" in refused(device=older)
    assert "this one is float32" in refused(x=jnp.zeros((2, 128)))
    assert "weight.with_layout('fragments')" in refused(layout="planes")
    assert "2, 3 and 4 bits, not 8" in refused(format="nf8")
    assert "block_size = 32" in refused(block_size=32)
    assert "updates of their scales" in refused(scale_update=jnp.zeros((8, 2)))
    assert "leading axes (3,)" in refused(packed=jnp.zeros((3, 8, 2, 32), jnp.uint8))
    kinds = (jax.sharding.AxisType.Auto,)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=kinds)):
        assert "one device, the mesh has 2" in refused()

        def inside(x):
            assert refused() == ""
            return x

        rows = jax.sharding.PartitionSpec("data")
        jax.eval_shape(jax.shard_map(inside, in_specs=rows, out_specs=rows), x)


@pytest.mark.parametrize(
    ("name", "m", "dtype"),
    [
        ("nf4", 17, jnp.bfloat16),
        ("nf3", 200, jnp.float16),
        ("nf2", 1, jnp.float16),
        ("int4", 300, jnp.bfloat16),
    ],
)
def test_lowers_for_cuda(name: str, m: int, dtype) -> None:
    """Each product is one kernel call, and has the shape and type of x @ W^T or g @ W."""
    n, k = 200, 388
    weight = make(name, n, k)
    for product, columns, out in (
        (matmul_mosaic.matmul, k, n),
        (matmul_mosaic.matmul_transposed, n, k),
    ):
        x = jax.ShapeDtypeStruct((2, m, columns), dtype)
        lowered = jax.jit(product).trace(x, weight).lower(lowering_platforms=("cuda",))
        assert lowered.as_text().count("@mosaic_gpu") == 1
        (found,) = jax.tree.leaves(lowered.out_info)
        assert (found.shape, found.dtype) == ((2, m, out), dtype)
