"""The layout "fragments": its bits, round trips, and QTensors with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from irqlora_jax.quant import packing
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize, quantized_shape
from irqlora_jax.quant.matmul import dequant_matmul
from tests import hlo


def picture(codes: np.ndarray, bits: int) -> bytes:
    """Packs one block as the docstring of `packing` says, bit by bit, with Python's integers."""
    columns = (0, 1, 8, 9, 16, 17, 24, 25)
    cells = [[int(codes[32 * h + 2 * c + k]) for k in columns] for c in range(4) for h in range(2)]
    made = b""
    for cell in cells:
        if bits == 4:
            word = sum((cell[j] & 7) << 4 * j for j in range(8))
            word |= sum((cell[j] >> 3) << 8 * j + 7 for j in range(4))
            word |= sum((cell[j + 4] >> 3) << 8 * j + 3 for j in range(4))
            made += word.to_bytes(4, "little")
        else:
            near = sum((cell[j] & 3) << 4 * j for j in range(4))
            far = sum((cell[j + 4] & 3) << 4 * j + 2 for j in range(4))
            made += (near | far).to_bytes(2, "little")
    for c in range(4 if bits == 3 else 0):
        first, second = cells[2 * c], cells[2 * c + 1]
        order = [(second, 0), (second, 4), (first, 0), (first, 4)]
        word = sum(
            (cell[slot + i] >> 2) << 4 * i + bit
            for i in range(4)
            for bit, (cell, slot) in enumerate(order)
        )
        made += word.to_bytes(2, "little")
    return made


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bit_pictures(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (50, 64)).astype(np.uint8)
    packed = packing.pack(jnp.asarray(codes), bits, "fragments")
    assert packed.dtype == jnp.uint8
    assert [bytes(row) for row in np.asarray(packed)] == [picture(row, bits) for row in codes]


@pytest.mark.parametrize("bits", [2, 3, 4])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_round_trips(bits: int, data: st.DataObject) -> None:
    """Codes to bytes and back, and bytes to codes and back."""
    codes = data.draw(arrays(np.uint8, (2, 3, 64), elements=st.integers(0, 2**bits - 1)))
    packed = packing.pack(jnp.asarray(codes), bits, "fragments")
    assert packed.nbytes * 8 == codes.size * bits
    np.testing.assert_array_equal(packing.unpack(packed, bits, "fragments"), codes)
    raw = data.draw(arrays(np.uint8, (3, 8 * bits)))
    again = packing.pack(packing.unpack(jnp.asarray(raw), bits, "fragments"), bits, "fragments")
    np.testing.assert_array_equal(again, raw)


def make(name: str = "nf4", out: int = 5, features: int = 128, size: int = 64):
    weight = jax.random.normal(jax.random.key(0), (out, features))
    config = QuantConfig(format=name, calibration="none", block_size=size)  # type: ignore[arg-type]
    return quantize(weight, config)


@pytest.mark.parametrize(
    ("name", "features"), [("nf4", 128), ("nf3", 100), ("nf2", 128), ("fp4", 100), ("int3", 128)]
)
def test_a_weight_is_the_same_in_both_layouts(name: str, features: int) -> None:
    planes = make(name, features=features)
    fragments = planes.with_layout("fragments")
    assert fragments.layout == "fragments"
    assert not np.array_equal(fragments.packed, planes.packed)
    np.testing.assert_array_equal(fragments.codes(), planes.codes())
    np.testing.assert_array_equal(fragments.dequantize(), planes.dequantize())
    np.testing.assert_array_equal(fragments.entropy(), planes.entropy())
    back = fragments.with_layout("planes")
    assert back.layout == planes.layout
    np.testing.assert_array_equal(back.packed, planes.packed)


def test_leading_axes_and_scan() -> None:
    layers = [make(), make("nf4", 5, 128)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    moved = stacked.with_layout("fragments")
    one = jax.tree.map(lambda leaf: leaf[1], moved)
    np.testing.assert_array_equal(one.packed, layers[1].with_layout("fragments").packed)
    x = jax.random.normal(jax.random.key(1), (3, 128))

    def sums(weights):
        return jax.lax.scan(lambda _, w: (None, dequant_matmul(x, w).sum()), None, weights)[1]

    np.testing.assert_array_equal(sums(moved), sums(stacked))


def test_other_blocks_and_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'fragments': expected blocks of 64, these have 32"):
        make(size=32).with_layout("fragments")
    with pytest.raises(ValueError, match=r"'rows': expected 'planes' or 'fragments'"):
        make().with_layout("rows")
    with pytest.raises(ValueError, match=r"these have 128"):
        packing.unpack(jnp.zeros((1, 64), jnp.uint8), 4, "fragments")


@pytest.mark.parametrize("name", ["nf4", "nf3", "nf2", "int4"])
def test_one_fusion_makes_the_weight(name: str) -> None:
    """For XLA it costs no more than "planes": no unpacked code is ever stored."""
    config = QuantConfig(format=name)  # type: ignore[arg-type]
    shape = quantized_shape((256, 512), config)
    weight = jax.eval_shape(lambda w: w.with_layout("fragments"), shape)
    x = jax.ShapeDtypeStruct((96, 512), jnp.float32)
    program = hlo.parse(jax.jit(dequant_matmul).lower(x, weight).compile().as_text())
    sizes = [(one.kind, kind, n) for one in hlo.stored(program) for kind, n in one.types]
    assert [found for found in sizes if found[2] > 96 * 512] == [("fusion", "f32", 256 * 512)]
