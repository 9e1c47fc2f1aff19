"""Packing is exact, and as small as it says."""

import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.quant import packing


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("block_size", [8, 24, 64, 128])
def test_round_trip(bits: int, block_size: int) -> None:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (3, 5, block_size)).astype(np.uint8)
    packed = packing.pack(jnp.asarray(codes), bits)
    assert packed.shape == (3, 5, packing.packed_size(block_size, bits))
    assert packed.nbytes * 8 == codes.size * bits
    np.testing.assert_array_equal(packing.unpack(packed, bits), codes)


def test_bit_pictures() -> None:
    """The layouts of the module's docstring, bit by bit."""
    codes = np.arange(8, dtype=np.uint8)
    four = packing.pack(jnp.asarray(codes), 4)
    assert four.tolist() == [0x40, 0x51, 0x62, 0x73]
    two = packing.pack(jnp.asarray(codes % 4), 2)  # byte 0: codes 0, 2, 4 and 6
    assert two.tolist() == [0b10_00_10_00, 0b11_01_11_01]
    three = packing.pack(jnp.asarray(codes), 3)
    assert three.tolist() == [*two.tolist(), 0b1111_0000]
