"""Our quantizer without calibration against bitsandbytes' 4-bit quantization."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.quant.formats import FORMATS

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    functional = pytest.importorskip("bitsandbytes.functional")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block_size", [64, 128, 256])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_same_codes_and_weights(name: str, block_size: int) -> None:
    weight = np.random.default_rng(block_size).normal(0, 0.02, (128, 512)).astype(np.float32)
    packed, state = functional.quantize_4bit(
        torch.from_numpy(weight), blocksize=block_size, quant_type=name, compress_statistics=True
    )
    theirs = packed.numpy().reshape(-1)
    config = QuantConfig(
        format=name,  # type: ignore[arg-type]
        block_size=block_size,
        calibration="none",
        codes_from="exact",
    )
    q = quantize(jnp.asarray(weight), config)
    codes = np.asarray(q.codes()).reshape(-1, 2)
    ours = codes[:, 0] << 4 | codes[:, 1]
    # FP4 has two zeros, told apart by the sign of what they stand for; their CPU code has one.
    table = FORMATS[name].table
    for shift in (4, 0):
        np.testing.assert_array_equal(table[ours >> shift & 15], table[theirs >> shift & 15])
    restored = functional.dequantize_4bit(packed, state).numpy()
    off = np.abs(np.asarray(q.dequantize()) - restored).reshape(-1, block_size).max(1)
    # Their rounding of the scales to 8 bits takes either neighbor within 1e-5 of a decision point.
    assert (off > 1e-7).mean() <= 0.01
    assert off.max() <= 0.02 * np.abs(weight).max()
