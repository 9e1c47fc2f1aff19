"""The instructions of the Mosaic products, compiled for absent Hopper GPUs."""

import collections
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from irqlora_jax.kernels import matmul_mosaic
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantized_shape
from irqlora_jax.quant.formats import get_format
from tests import hlo
from tests.cuda import sass
from tests.cuda.conftest import absent

SHAPES = {"q": (4096, 4096), "up": (11008, 4096), "down": (4096, 11008), "65B": (8192, 8192)}
Y, DX = "y", "dX"
# XLA compiles each Mosaic kernel only once in a process, so no two tests may use the same kernel.
CASES = [("h200", Y, "nf4", shape, m) for shape in SHAPES for m in (1, 16, 2048)]
CASES += [("h200", Y, name, "q", m) for name in ("nf3", "nf2", "int4") for m in (1, 2048)]
CASES += [("h200", DX, "nf4", shape, m) for shape in SHAPES for m in (16, 2048)]
CASES += [("h200", DX, name, "q", m) for name in ("nf3", "nf2", "fp4") for m in (1, 2048)]
CASES += [("h100", product, "nf4", "q", m) for product in (Y, DX) for m in (33, 300)]


def compile_(
    device: str, product: str, name: str, shape: str, m: int, folder: Path, dtype=jnp.bfloat16
):
    """The program, and the machine code of its kernel."""
    where = jax.sharding.SingleDeviceSharding(absent(device)[0])
    n, k = SHAPES[shape]
    config = QuantConfig(format=name)  # type: ignore[arg-type]
    weight = jax.eval_shape(lambda w: w.with_layout("fragments"), quantized_shape((n, k), config))
    shapes = jax.ShapeDtypeStruct((m, k if product == Y else n), dtype), weight
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes)
    matmul = matmul_mosaic.matmul if product == Y else matmul_mosaic.matmul_transposed
    compiled, kernels = sass.compile_kernels(jax.jit(matmul).trace(*shapes), folder)
    (kernel,) = (one for key, one in kernels.items() if key.startswith("dequant_matmul"))
    return compiled, kernel


@pytest.mark.parametrize(("device", "product", "name", "shape", "m"), CASES)
def test_machine_code(
    device: str, product: str, name: str, shape: str, m: int, tmp_path: Path
) -> None:
    compiled, kernel = compile_(device, product, name, shape, m, tmp_path)
    (n, k), bits = SHAPES[shape], get_format(name).bits
    tiles = matmul_mosaic.default_tiles(m, n, k, bits, product == DX)
    assert kernel.spills == 0
    # The 3 warp groups of 128 threads start with a third of the registers each. They exchange some
    # later.
    assert kernel.registers == 168
    counts = kernel.counts
    assert counts["LDL"] == counts["STL"] == counts["LDG"] == 0

    steps = -(-(k if product == Y else n) // (64 * tiles.blocks * tiles.splits))
    together = min(tiles.together, steps)
    blocks = tiles.blocks * (together + steps % together)
    # Each product is 64 x batch x 16. A thread makes its 32 weights of a block in pairs. The tensor
    # cores take them from registers, or transposed from shared memory.
    operand = r"R\d+, " if product == Y else r"gdesc\[UR\d+\]\.tnspA, "
    products = re.findall(rf"HGMMA\.64x{tiles.batch}x16\.F32\.BF16 R\d+, {operand}", kernel.code)
    assert len(products) == counts["HGMMA"] == 4 * blocks
    assert counts["HFMA2"] == 16 * blocks
    # A thread loads codes, and scale with shift, for its two rows. One ldmatrix may load both rows.
    # It needs lines of 16 bytes at multiples of 16, so 3-bit codes never use it.
    loads = counts["LDS"] + 2 * counts["LDSM"]
    assert 6 * blocks <= loads <= 8 * blocks if bits == 3 else loads == 4 * blocks
    assert bits != 3 or counts["LDSM"] == 0
    addresses = re.findall(r"LDSM\S* R\d+, \[(.*?)\]", kernel.code)
    assert len(addresses) == counts["LDSM"]
    offsets = [int(one, 16) for one in re.findall(r"0x[0-9a-f]+", " ".join(addresses))]
    assert not any(offset % 16 for offset in offsets)
    if product == DX:  # a thread stores 16 pairs of weights, and later its part of the result
        assert counts["STS"] + 4 * counts["STSM"] == 16 * blocks + tiles.batch // 4
    # Permutes: for each of 2 rows 8 for pairs, 8 to 16 for look-ups, up to 4 for masks, and 2 that
    # duplicate scale and shift; and a few for addresses. A level of FP4 and its negative have the
    # same low byte, so the assembler looks it up once.
    permutes = {4: 2 * (8 + 16 + 4 + 2), 3: 2 * (8 + 8 + 2), 2: 2 * (8 + 8 + 2)}[bits]
    permutes -= 8 if name == "fp4" else 0
    assert permutes * blocks <= counts["PRMT"] <= permutes * blocks + 4 * blocks + 72
    # Shuffles transpose the result, one for each register of pairs; the others choose a thread.
    transposed = 0 if tiles.splits > 1 else tiles.batch // 4
    assert counts["SHFL"] <= transposed + 8

    assert sass.overwritten_operands(kernel) == [] and not kernel.serialized
    if m == 2048 and steps % together == 0:
        # Instructions from one product of 64 x batch x 64 to the next. A scheduler has one warp of
        # each of two warp groups. Their products keep the tensor cores busy for 4 * batch cycles.
        lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(\S.*?);", kernel.code)
        ends = [i for i, line in enumerate(lines) if re.search(r"HGMMA.*gsb0", line)]
        longest = max(end - start for start, end in itertools.pairwise(ends))
        assert 2 * longest <= 0.6 * 4 * tiles.batch
    # XLA stores no dequantized weight and no copy of the codes: the kernel reads them directly.
    stored = [made for one in hlo.stored(hlo.parse(compiled.as_text())) for made in one.types]
    assert {kind for kind, size in stored if size >= n * k} == set()
    assert ("u8", n * k * bits // 8) not in stored


@pytest.mark.parametrize("product", [Y, DX])
def test_float16(product: str, tmp_path: Path) -> None:
    _, kernel = compile_("h200", product, "int4", "q", 4096, tmp_path, jnp.float16)
    assert (kernel.registers, kernel.spills, kernel.serialized) == (168, 0, False)
    assert len(re.findall(r"HGMMA\.64x256x16\.F32 R", kernel.code)) == kernel.counts["HGMMA"]
    assert sass.overwritten_operands(kernel) == []


@pytest.mark.parametrize("product", [Y, DX])
def test_registers_of_products_in_flight_are_found(product: str, tmp_path: Path) -> None:
    """`overwritten_operands` finds the error in code that rounds its sums too early."""
    _, kernel = compile_("h200", product, "nf4", "q", 1000, tmp_path)
    lines = kernel.code.split("WARPGROUP.DEPBAR.LE gsb0, 0x0")
    assert len(lines) > 1
    never = sass.Machine(0, 0, kernel.counts, "WARPGROUP.DEPBAR.LE gsb0, 0x1".join(lines))
    assert any("F2FP" in one for one in sass.overwritten_operands(never))


def test_operands_in_flight_are_found() -> None:
    code = """
        /*0000*/ HGMMA.64x8x16.F32.BF16 R24, R4, gdesc[UR4], R24, gsb0 ;
        /*0010*/ HGMMA.64x8x16.F32.BF16 R24, R8, gdesc[UR4], R24, gsb0 ;
        /*0020*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0030*/ PRMT R7, R9, 0x5140, R3 ;
        /*0040*/ PRMT R11, R9, 0x5140, R3 ;
        /*0050*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/ PRMT R10, R24, 0x5140, R3 ;
        /*0070*/ EXIT ;
    """
    machine = sass.Machine(0, 0, collections.Counter(), code)
    assert sass.overwritten_operands(machine) == ["PRMT R11, R9, 0x5140, R3"]
