"""Second-level quantization against its definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.quant import stats
from tests.arrays import read_arrays


def test_dynamic_map_as_released(golden) -> None:
    published = read_arrays(golden / "icq_nf4.npz")["code2"]
    np.testing.assert_allclose(stats.DYNAMIC_MAP, published, atol=1e-7, rtol=0)
    assert stats.DYNAMIC_MAP.max() == 1.0
    assert stats.DYNAMIC_MAP.min() > -1.0  # so a group whose extreme is negative loses 0.7 %
    assert stats.DYNAMIC_MAP[127] == 0.0


@pytest.mark.parametrize("n", [1, 255, 256, 257, 1000])
@pytest.mark.parametrize("center", [False, True])
def test_every_value_takes_the_nearest_code(n: int, center: bool) -> None:
    values = np.random.default_rng(n).normal(0.3, 1, n).astype(np.float32)
    codes, largest, offset = stats.encode_groups(jnp.asarray(values), center)
    assert largest.shape == (-(-n // 256),)
    assert float(offset) == pytest.approx(values.mean() if center else 0.0, abs=1e-6)
    decoded = np.asarray(stats.decode_groups(codes, largest, offset))
    for i, value in enumerate(values - np.asarray(offset)):
        reachable = stats.DYNAMIC_MAP * np.asarray(largest)[i // 256]
        best = np.abs(reachable - value).min()
        assert abs(decoded[i] - np.asarray(offset) - value) <= best + 1e-6


def test_zeros_stay_zero() -> None:
    codes, largest, offset = stats.encode_groups(jnp.zeros(300), center=True)
    assert not np.asarray(stats.decode_groups(codes, largest, offset)).any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_zero_point_is_exact(bits: int) -> None:
    zeros = jnp.arange(256, dtype=jnp.float32) / 2 ** (8 - bits)
    np.testing.assert_array_equal(stats.decode_zero(stats.encode_zero(zeros, bits), bits), zeros)
