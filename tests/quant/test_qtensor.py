"""QTensor: parity with the released code, error figures, and shapes and weights of every kind."""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.quant import encode, stats
from irqlora_jax.quant.calibrations import CALIBRATIONS
from irqlora_jax.quant.calibrations.icq import IcqOptions
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize, quantized_shape
from irqlora_jax.quant.entropy import block_entropy
from irqlora_jax.quant.formats import FORMATS
from irqlora_jax.quant.qtensor import QTensor
from tests.arrays import read_arrays
from tests.models import assert_same

EVERY_FORMAT = list(FORMATS)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape) * scale


def nibbles(q: QTensor) -> np.ndarray:
    """Codes as bitsandbytes packs them: the even element in the high nibble."""
    pairs = np.asarray(q.codes()).reshape(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]


def test_codes_and_bytes_of_the_released_code(golden) -> None:
    """Golden shifts, codes from the exact statistics: everything stored is identical."""
    released = read_arrays(golden / "icq_nf4.npz")
    weight = jnp.asarray(released["w"])
    exact = QuantConfig(codes_from="exact")
    q = quantize(weight, exact, shift=jnp.asarray(released["tau_exact"].reshape(256, 8)))
    np.testing.assert_array_equal(nibbles(q), released["packed"])
    assert q.shift_codes is not None and q.shift_max is not None
    np.testing.assert_array_equal(q.shift_codes.reshape(-1), released["tau1"].reshape(-1))
    np.testing.assert_array_equal(q.shift_max, released["tau2"][:, 0])
    steps = q.scale_codes.reshape(-1).astype(int) - released["absmax_q"].astype(int)
    assert np.abs(steps).max() <= 1
    assert (steps != 0).mean() <= 0.005  # ties in bitsandbytes' 8-bit rounding
    np.testing.assert_allclose(q.scale_max, released["absmax2"], rtol=1e-6)
    np.testing.assert_allclose(q.scale_offset, released["offset"], rtol=1e-6)

    plain = quantize(weight, QuantConfig(codes_from="exact", calibration="none"))
    np.testing.assert_array_equal(nibbles(plain), released["vanilla_packed"])
    assert float(plain.entropy().mean()) == pytest.approx(3.6861, abs=1e-4)
    assert float(q.entropy().mean()) == pytest.approx(3.7618, abs=1e-4)


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("kind", ["asym", "sym"])
def test_integer_codes_of_the_released_code(golden, bits: int, kind: str) -> None:
    """Codes of the range search, from exact statistics: identical wherever the same of several
    equally good ranges was chosen, and of the same entropy everywhere."""
    released = read_arrays(golden / "icq_integer.npz")
    config = QuantConfig(
        format=f"int{bits}",  # type: ignore[arg-type]
        block_size=32,
        symmetric=kind == "sym",
        codes_from="exact",
    )
    q = quantize(jnp.asarray(released["w"]), config)
    codes = released[f"int{bits}_{kind}_codes"].reshape(-1, 32)
    ours = np.asarray(q.codes()).reshape(-1, 32)
    assert (ours == codes).all(1).mean() >= 0.985
    assert q.shift_codes is not None
    zeros = stats.decode_zero(q.shift_codes, bits).reshape(-1)
    np.testing.assert_array_equal(zeros, released[f"int{bits}_{kind}_zero"].reshape(-1))
    entropy = np.asarray(block_entropy(jnp.asarray(codes, jnp.uint8), 2**bits))
    np.testing.assert_allclose(np.asarray(q.entropy()).reshape(-1), entropy, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "block_size"),
    [("nf4", 2**k) for k in range(5, 13)] + [("fp4", 32), ("fp4", 64), ("fp4", 128)],
)
def test_error_of_bitsandbytes(golden, name: str, block_size: int) -> None:
    """Within 4 deviations, one for the second level, of the mean over 200 matrices.

    Our blocks end with their row, so the same numbers are laid out in rows of at least one block.
    """
    published = json.loads((golden / "bitsandbytes_error_stats.json").read_text())[name]
    weight = normal(1024, 1024, seed=block_size).reshape(-1, max(block_size, 1024))
    config = QuantConfig(format=name, block_size=block_size, calibration="none")  # type: ignore[arg-type]
    error = jnp.abs(weight - quantize(weight, config).dequantize())
    mean, deviation = published["err"][str(block_size)]
    assert abs(float(error.mean()) - mean) < 4 * deviation
    mean, deviation = published["rel_err"][str(block_size)]
    assert abs(float((error / (jnp.abs(weight) + 1e-8)).mean()) - mean) < 4 * deviation


@pytest.mark.parametrize("calibration", ["none", "icq"])
@pytest.mark.parametrize(
    ("rows", "columns", "name", "block_size"),
    [
        (1, 1, "nf4", 64),
        (1, 200, "nf3", 64),
        (9, 172, "nf4", 64),
        (7, 63, "nf2", 8),
        (5, 65, "fp4", 24),
        (3, 172, "int4", 32),
        (2, 7, "int3", 64),
        (300, 9, "int2", 8),
    ],
)
def test_shapes_that_divide_nothing(
    rows: int, columns: int, name: str, block_size: int, calibration: str
) -> None:
    weight = normal(rows, columns, seed=rows * 211 + columns)
    config = QuantConfig(
        format=name,  # type: ignore[arg-type]
        block_size=block_size,
        calibration=calibration,  # type: ignore[arg-type]
        icq=IcqOptions(steps=5),
    )
    q = quantize(weight, config)
    assert q.shape == (rows, columns)
    blocks = -(-columns // block_size)
    assert q.scale().shape == q.entropy().shape == (rows, blocks)
    assert q.packed.shape == (rows, blocks, block_size * FORMATS[name].bits // 8)
    restored = q.dequantize()
    assert restored.shape == weight.shape
    # Every weight lands within half the widest gap of its block's levels (and the second level's
    # rounding of its scale and shift).
    levels = np.sort(FORMATS[name].table)
    gap = np.diff(levels).max() / 2 + 0.15
    room = jnp.repeat(q.scale(), block_size, axis=1)[:, :columns] * gap
    room = room + jnp.abs(weight).max() * 0.05
    assert bool((jnp.abs(restored - weight) <= room).all())


@pytest.mark.parametrize("name", ["nf4", "fp4", "int3", "nf2"])  # both searches, all bits
@pytest.mark.parametrize("calibration", ["none", "icq"])
def test_padding_counts_nowhere(name: str, calibration: str) -> None:
    """A short last block is the block of its own weights, whatever lies beyond the row."""
    config = QuantConfig(format=name, block_size=64, calibration=calibration)  # type: ignore[arg-type]
    weight = normal(300, 40) + 3.0  # far from the zeros of the padding
    short = quantize(weight, config)
    exact = quantize(weight, QuantConfig(**(config.__dict__ | {"block_size": 40})))
    np.testing.assert_array_equal(short.codes(), exact.codes())
    np.testing.assert_array_equal(short.scale(), exact.scale())
    np.testing.assert_allclose(short.entropy(), exact.entropy(), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "calibration"),
    [(n, c) for n in EVERY_FORMAT for c in ("none", "icq") if c == "none" or FORMATS[n].bits < 8],
)
def test_degenerate_blocks(name: str, calibration: str) -> None:
    """Zeros, a constant, and one huge outlier: finite, and the constant is kept."""
    weight = np.zeros((4, 64), np.float32)
    weight[1] = 0.7
    weight[2] = np.random.default_rng(0).normal(0, 0.02, 64)
    weight[2, 5] = 1e4
    weight[3] = -0.3
    config = QuantConfig(format=name, calibration=calibration)  # type: ignore[arg-type]
    restored = np.asarray(quantize(jnp.asarray(weight), config).dequantize())
    assert np.isfinite(restored).all()
    assert abs(restored[2, 5] - 1e4) < 1e4 * 0.5
    alone = np.asarray(quantize(jnp.zeros((4, 64)), config).dequantize())
    assert np.abs(alone).max() == 0 or (FORMATS[name].integer and np.abs(alone).max() < 1e-6)
    constant = np.full((4, 64), 0.7, np.float32)
    restored = np.asarray(quantize(jnp.asarray(constant), config).dequantize())
    np.testing.assert_allclose(restored, constant, rtol=0.02)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_input_is_taken_as_it_is(dtype) -> None:
    weight = normal(8, 128).astype(dtype)
    half, full = (
        quantize(weight, QuantConfig()),
        quantize(weight.astype(jnp.float32), QuantConfig()),
    )
    np.testing.assert_array_equal(half.packed, full.packed)
    assert half.dequantize(dtype).dtype == dtype


def in_slabs(monkeypatch: pytest.MonkeyPatch, rows: int, *args: Any) -> QTensor:
    """`quantize`, a number of rows at a time."""
    with monkeypatch.context() as patch:
        patch.setattr(encode, "slab_rows", lambda shape: min(rows, shape[0]))
        return jax.jit(encode._quantize.__wrapped__, static_argnums=2)(*args)


@pytest.mark.parametrize("name", ["nf3", "int2"])
@pytest.mark.parametrize("calibration", ["none", "icq", "joint"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_slabs_do_not_change_the_result(
    monkeypatch: pytest.MonkeyPatch, name: str, calibration: str, dtype: Any
) -> None:
    """Bit by bit, with a last slab that begins early and with blocks that are padded."""
    config = QuantConfig(format=name, calibration=calibration, icq=IcqOptions(steps=4))  # type: ignore[arg-type]
    weight = normal(41, 150).astype(dtype)
    whole = in_slabs(monkeypatch, 41, weight, None, config)
    assert_same(in_slabs(monkeypatch, 16, weight, None, config), whole)
    some = whole.dequantize_rows()
    np.testing.assert_array_equal(some(25, 16), whole.dequantize()[25:])
    np.testing.assert_array_equal(some(0, 41), whole.dequantize())


def test_given_shifts_stay_with_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, shift = normal(41, 150), normal(41, 3, seed=1, scale=0.1)
    whole = in_slabs(monkeypatch, 41, weight, shift, QuantConfig())
    assert_same(in_slabs(monkeypatch, 16, weight, shift, QuantConfig()), whole)
    np.testing.assert_allclose(whole.shift(), shift, atol=0.01)


@pytest.mark.parametrize("name", ["nf4", "int3"])
def test_quantize_subtracts_a_low_rank_product(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As the difference is; products of whole numbers are exact in any order."""
    config = QuantConfig(format=name, icq=IcqOptions(steps=4))  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    b, a = (jnp.asarray(rng.integers(-3, 4, n), jnp.float32) for n in ((41, 5), (5, 150)))
    weight = (normal(41, 150) * 256).astype(jnp.bfloat16)
    expected = quantize(weight.astype(jnp.float32) - b @ a, config)
    assert_same(quantize(weight, config, minus=(b, a)), expected)
    assert_same(in_slabs(monkeypatch, 16, weight, None, config, (b, a)), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused(bad: float) -> None:
    for place in range(3):
        parts = [normal(2, 64), normal(2, 3), normal(3, 64)]
        parts[place] = parts[place].at[1, 2].set(bad)
        name = ("weight", "minus[0]", "minus[1]")[place]
        expected = f"{name}[1, 2] = {bad}: expected finite values (1 of {parts[place].size} are"
        with pytest.raises(ValueError, match=re.escape(expected)):
            quantize(parts[0], QuantConfig(), minus=(parts[1], parts[2]))
    weight = normal(2, 64).at[[0, 1], [60, 3]].set(bad).astype(jnp.bfloat16)
    with pytest.raises(ValueError, match=re.escape(f"weight[0, 60] = {bad}: expected finite val")):
        quantize(weight, QuantConfig())
    with pytest.raises(ValueError, match=r"2 of 128 are NaN or infinite"):
        quantize(weight, QuantConfig())
    with pytest.raises(ValueError, match=re.escape(f"shift[1, 0] = {bad}")):
        quantize(normal(2, 64), QuantConfig(), shift=jnp.zeros((2, 1)).at[1, 0].set(bad))


@pytest.mark.parametrize("name", ["nf4", "int3"])
def test_quantize_works_under_jit(name: str) -> None:
    config = QuantConfig(format=name, icq=IcqOptions(steps=4))
    weight, b, a = normal(5, 150), normal(5, 2, seed=1), normal(2, 150, seed=2)
    assert_same(jax.jit(lambda w: quantize(w, config))(weight), quantize(weight, config))
    minus = jax.jit(lambda b, a: quantize(weight, config, minus=(b, a)))(b, a)
    assert_same(minus, quantize(weight, config, minus=(b, a)))


def test_shift_of_an_integer_format_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shift: not accepted with quant.format int4"):
        quantize(normal(2, 64), QuantConfig(format="int4"), shift=jnp.zeros((2, 1)))


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_storage_is_what_the_arithmetic_says(name: str) -> None:
    """bits a weight = code + 8/64 for the scale, 8/64 for shift or zero, float32 every 256."""
    fmt = FORMATS[name]
    calibration = "icq" if fmt.bits < 8 else "none"
    config = QuantConfig(format=name, calibration=calibration)  # type: ignore[arg-type]
    arrays = jax.tree.leaves(quantized_shape((256, 512), config))
    nbytes = sum(array.size * array.dtype.itemsize for array in arrays)
    shifted = calibration == "icq" and not fmt.integer
    expected = fmt.bits + (16 if shifted or fmt.integer else 8) / 64
    expected += 32 / (64 * 256) * (2 if shifted else 1)
    assert nbytes * 8 / (256 * 512) == pytest.approx(expected, abs=32 / (256 * 512))


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_entropy_is_that_of_the_codes(name: str) -> None:
    config = QuantConfig(format=name, block_size=64, calibration="none")  # type: ignore[arg-type]
    q = quantize(normal(6, 150), config)
    codes, entropy = np.asarray(q.codes()), np.asarray(q.entropy())
    for row in range(6):
        for block in range(3):
            part = codes[row, block * 64 : (block + 1) * 64]
            share = np.bincount(part) / len(part)
            share = share[share > 0]
            assert entropy[row, block] == pytest.approx(-(share * np.log2(share)).sum(), abs=1e-5)


def test_stacked_matrices_are_the_matrices_one_by_one() -> None:
    parts = [quantize(normal(24, 100, seed=i), QuantConfig(block_size=64)) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    assert stacked.shape == (24, 100)
    for i, part in enumerate(parts):
        np.testing.assert_array_equal(stacked.dequantize()[i], part.dequantize())
        np.testing.assert_array_equal(stacked.codes()[i], part.codes())
        np.testing.assert_allclose(stacked.entropy()[i], part.entropy(), atol=1e-6)


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_codes_are_the_nearest_levels_of_the_stored_statistics(name: str) -> None:
    """So no other codes would restore the weights better, whatever rounding did to the scales."""
    fmt = FORMATS[name]
    weight = np.asarray(normal(64, 256, seed=3))
    q = quantize(jnp.asarray(weight), QuantConfig(format=name, calibration="none"))  # type: ignore[arg-type]
    scale, shift = np.asarray(q.scale()), q.shift()
    shift = np.zeros_like(scale) if shift is None else np.asarray(shift)
    reachable = scale[..., None] * fmt.table + shift[..., None]
    distance = np.abs(weight.reshape(64, 4, 64, 1) - reachable[:, :, None, :])
    got = np.take_along_axis(distance, np.asarray(q.codes()).reshape(64, 4, 64, 1), -1)[..., 0]
    np.testing.assert_allclose(got, distance.min(-1), atol=1e-5)


@pytest.mark.parametrize("name", ["nf4", "int4"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_matrix_of_a_65b_model_needs_little_more_than_itself(name: str, dtype: Any) -> None:
    """Compiled, not run: [22016, 8192], 0.7 GB in float32."""
    weight = jax.ShapeDtypeStruct((22016, 8192), dtype)
    config = QuantConfig(format=name)  # type: ignore[arg-type]
    memory = encode._quantize.lower(weight, None, config).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.2 * 22016 * 8192 * 4


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("format", ["nf3", "int2"])
def test_the_shape_is_that_of_the_result(format: str, calibration: str) -> None:
    config = QuantConfig(format=format, block_size=16, calibration=calibration, outliers=0.02)
    gram = jnp.eye(40) if config.needs_inputs else None
    made = jax.eval_shape(lambda w: quantize(w, config, gram=gram), jnp.zeros((6, 40)))
    assert quantized_shape((6, 40), config) == made
