"""Every implementation of the product with packed weights, against float64.

Kernels are interpreted here; tests/cuda compiles them.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from irqlora_jax.kernels import matmul_mosaic, matmul_triton
from irqlora_jax.kernels.matmul_triton import Tiles
from irqlora_jax.quant.calibrations.icq import IcqOptions
from irqlora_jax.quant.choose import Implementation, serves_all
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize, quantized_shape
from irqlora_jax.quant.formats import FORMATS, get_format
from irqlora_jax.quant.matmul import XLA, dequant_matmul
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.quant.stats import DYNAMIC_MAP
from tests.kernels.mosaic_interpreter import interpreted

FEW_BITS = [name for name in FORMATS if FORMATS[name].bits < 8]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An implementation in the form that runs on a CPU."""

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


def mosaic() -> Adapter:
    """In the interpreter of jax 0.12; with another jax its tests are skipped."""

    def product(function: Callable, x: jax.Array, weight: QTensor) -> jax.Array:
        if x.dtype == jnp.float32:
            pytest.skip("it takes x in bfloat16 or float16")
        with interpreted(detect_races=False):
            tiles = matmul_mosaic.Tiles(32, grid=2, together=1, stages=2, blocks=2)
            return function(x, weight.with_layout("fragments"), tiles)

    products = matmul_mosaic.matmul, matmul_mosaic.matmul_transposed
    return Adapter("mosaic", *(functools.partial(product, one) for one in products))


ADAPTERS = (Adapter("xla", XLA.forward, XLA.backward), triton("triton"), mosaic())
BATCHES = (1, 5, 16, 33)
SHAPES = ((24, 100), (96, 488), (130, 192), (64, 256))
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
# The types have 8, 11 and 24 bits. W and the result are rounded to them.
TOLERANCES = {jnp.bfloat16: 2**-7, jnp.float16: 2**-10, jnp.float32: 2**-20}
# Every format has cases with every number of rows, shape and type, with and without a shift.
CASES = [
    (name, BATCHES[(i + j) % 4], SHAPES[j], DTYPES[(i + j) % 3], (i + j) % 2 == 0)
    for (i, name), j in itertools.product(enumerate(FEW_BITS), range(4))
]


def random_weight(
    name: str, shape: tuple[int, int], shifted: bool = True, size: int = 64
) -> tuple[QTensor, np.ndarray]:
    """A QTensor of random bytes (padding too), and the matrix that it represents."""
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
    """Codes of packed blocks, from the picture in `packing.py`."""

    def plane(part: np.ndarray, bits: int) -> np.ndarray:
        ones = np.unpackbits(part[..., None], axis=-1, bitorder="little")
        ones = ones.reshape(*part.shape, 8 // bits, bits)
        return np.moveaxis(ones @ (1 << np.arange(bits)), -1, -2).reshape(*part.shape[:-1], -1)

    if bits != 3:
        return plane(packed, bits)
    end = packed.shape[-1] * 2 // 3
    return plane(packed[..., :end], 2) + 4 * plane(packed[..., end:], 1)


def check(adapter: Adapter, rows: int, weight: QTensor, dense: np.ndarray, dtype) -> None:
    """Checks both products against float64, with two batch axes."""
    for product, factor in ((adapter.forward, dense.T), (adapter.backward, dense)):
        normal = np.random.default_rng(rows).standard_normal((1, rows, len(factor)))
        x = normal.astype(dtype)
        # Less optimization: compiling takes longer than running.
        options = {"xla_backend_optimization_level": 0}
        y = jax.jit(product).lower(x, weight).compile(compiler_options=options)(x, weight)
        assert (y.dtype, y.shape) == (dtype, (1, rows, factor.shape[1]))
        terms = np.abs(x.astype(np.float64)) @ np.abs(factor)
        error = np.abs(np.asarray(y, np.float64) - x.astype(np.float64) @ factor)
        # Not `not (error > ..).any()`, which NaN would pass.
        assert (error <= TOLERANCES[dtype] * terms).all()
        assert np.sqrt((error**2).mean() / (terms**2).mean()) <= TOLERANCES[dtype] / 4


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda one: one.name)
def test_scales_in_few_bits(adapter: Adapter) -> None:
    """The kernels do not decode them, so XLA does it before."""
    few: Any = {"scale_rule": "uniform", "scale_bits": 3, "scale_group": 16}
    config = QuantConfig(format="nf3", icq=IcqOptions(steps=4), **few)
    weight = quantize(jax.random.normal(jax.random.key(0), (40, 128)), config)
    check(adapter, 5, weight, np.asarray(weight.dequantize(), np.float64), jnp.bfloat16)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda one: one.name)
@pytest.mark.parametrize(("name", "rows", "shape", "dtype", "shifted"), CASES)
def test_products(adapter: Adapter, name, rows, shape, dtype, shifted) -> None:
    check(adapter, rows, *random_weight(name, shape, shifted), dtype)


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("name", ["nf4", "int3"])
@pytest.mark.parametrize("adapter", ADAPTERS[1:], ids=lambda one: one.name)
def test_trained_shifts_are_added_to_the_product_of_a_kernel(
    adapter: Adapter, name: str, shifted: bool
) -> None:
    """A kernel gets the weight without `shift_update`."""
    weight, dense = random_weight(name, (24, 100), shifted)
    update = np.random.default_rng(0).standard_normal((24, 2)).astype(np.float32)
    trained = dataclasses.replace(weight, shift_update=jnp.asarray(update))
    kernel = Implementation(adapter.name, serves_all, adapter.forward, adapter.backward)

    def product(x: jax.Array, weight: QTensor) -> jax.Array:
        return dequant_matmul(x, weight, implementations=(kernel,))

    def gradient(g: jax.Array, weight: QTensor) -> jax.Array:
        x = jnp.zeros((*g.shape[:-1], 100), g.dtype)
        return jax.vjp(lambda x: product(x, weight), x)[1](g)[0]

    dtype = jnp.float32 if adapter.name == "triton" else jnp.bfloat16
    whole = dense + np.repeat(update.astype(np.float64), 64, axis=1)[:, :100]
    check(Adapter(adapter.name, product, gradient), 5, trained, whole, dtype)


COARSE, FINE = Tiles(16, 64, 256, splits=2), Tiles(32, 16, 64, splits=3, decode="xla")


@pytest.mark.parametrize(
    ("name", "tiles"),
    [("nf4", COARSE), ("nf4", FINE), ("nf3", FINE), ("int2", COARSE)],
    ids=["nf4-coarse", "nf4-fine", "nf3-fine", "int2-coarse"],
)
def test_tiles_and_splits_that_do_not_divide(name: str, tiles: Tiles) -> None:
    """130 rows are 9 tiles of 16 or 3 of 64. 3 blocks do not fill a tile of 4, or are 3 splits."""
    check(triton("triton", tiles), 33, *random_weight(name, (130, 190)), jnp.float32)


@pytest.mark.parametrize(("name", "size"), [("fp4", 128), ("nf3", 32), ("nf3", 256), ("nf2", 32)])
def test_other_block_sizes(name: str, size: int) -> None:
    check(triton("triton"), 5, *random_weight(name, (24, 300), size=size), jnp.bfloat16)


@pytest.mark.parametrize("name", ["nf4", "nf3", "int4"])
def test_no_read_is_outside_an_array(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """On a GPU such a read returns foreign memory; the interpreter returns the nearest element."""
    load = matmul_triton._load

    def strict(at, mask=None):
        (where,) = at.transforms
        outside = jnp.zeros(at.shape, bool)
        for size, index in zip(at.ref.shape, where.indices, strict=True):
            outside |= jnp.broadcast_to((index < 0) | (index >= size), at.shape)
        value = load(at, mask)
        outside = outside if mask is None else outside & mask
        wrong = ~value if value.dtype == jnp.uint8 else jnp.nan
        # The whole load is wrong: a wrong row of x alone would not show in the rows that count.
        return jnp.where(jnp.any(outside), wrong, value)

    monkeypatch.setattr(matmul_triton, "_load", strict)
    # Neither the rows of x, nor the rows or the blocks of W fill their tiles.
    check(triton("strict", COARSE), 5, *random_weight(name, (130, 190)), jnp.float32)


def test_unwritten_results_are_nan() -> None:
    """So the finite results above prove that the kernels write all of their results."""

    def kernel(x_ref, out_ref) -> None:
        out_ref[0, :] = x_ref[0, :]

    out = jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)
    y = pl.pallas_call(kernel, out_shape=out, interpret=True)(jnp.ones((2, 3), jnp.bfloat16))
    np.testing.assert_array_equal(np.isnan(np.asarray(y, np.float32)), [[False] * 3, [True] * 3])
