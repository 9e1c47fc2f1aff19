"""The search kernel against XLA's search, bit by bit, in Pallas's interpreter."""

import types

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from irqlora_jax.kernels.search_triton import Tiles, refusal, search_shift
from irqlora_jax.kernels.search_triton_sort import bitonic_pairs, odd_even_pairs
from irqlora_jax.quant.calibrations import icq
from tests.arrays import read_arrays
from tests.cuda.abstract_gpu import abstract_gpu
from tests.quant.test_icq import both_forms, make_blocks, make_partial

FLOAT_MAX = np.finfo(np.float32).max


def bits_of(x) -> np.ndarray:
    """The bits of floats: -0 differs from 0, and NaN equals NaN."""
    return np.asarray(x).view(np.int32)


def check(blocks, fmt, width=0.1, steps=100, valid=None, tiles=None) -> np.ndarray:
    """Checks the kernel against XLA and returns the shifts."""
    args = jnp.asarray(blocks), fmt, width, steps, None if valid is None else jnp.asarray(valid)
    found = search_shift(*args, tiles=tiles, interpret=True)
    expected = icq.shift_and_ends(*args)
    for one, other in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(bits_of(one), bits_of(other))
    inside = np.arange(blocks.shape[1]) < (blocks.shape[1] if valid is None else valid[:, None])
    weights = np.asarray(blocks, np.float32)
    low, high = (np.where(inside, weights, end) for end in (np.inf, -np.inf))
    exact = np.array([low.min(1), high.max(1)])
    np.testing.assert_array_equal(found[2:], exact)  # with -0 and 0, either may be the least
    # On a CPU, XLA may take subnormal numbers for 0.
    np.testing.assert_allclose(expected[2:], exact, rtol=0, atol=np.finfo(np.float32).tiny)
    return np.asarray(found[0])


@pytest.mark.parametrize(
    ("fmt", "block", "partial"),
    [("fp4", 32, True), ("nf3", 256, True), ("nf2", 128, False)],
)
def test_every_kind_of_block(fmt, block, partial):
    """64 blocks of each kind: some programs have a single kind, and so take every path.

    The last program is not full.
    """
    blocks, valid = make_blocks(block, copies=64)[:-7], None
    if partial:
        blocks, valid = make_partial(blocks)
    check(blocks, fmt, valid=valid)


@pytest.mark.parametrize(("width", "steps"), [(0.7, 60), (1e-4, 100), (0.99, 1)])
def test_other_ranges_and_steps(width, steps):
    check(make_blocks(16, copies=6), "nf2", width, steps)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    """Weights with few bits, so that many are equal."""
    blocks = np.random.default_rng(3).standard_normal((100, 16)).astype(np.float32)
    check(jnp.asarray(np.concatenate([blocks, blocks * 1e-7])).astype(dtype), "nf2")


def test_ends_of_float32():
    """Against XLA's form for parallel devices: the form for CPUs differs if a scale overflows."""
    # One program has the large numbers, another the small ones.
    exponents = np.concatenate([np.linspace(127, 60, 32), np.linspace(-149, -60, 32)])
    normal = np.random.default_rng(0).standard_normal((64, 16))
    blocks = np.clip(normal * 2.0 ** exponents[:, None], -FLOAT_MAX, FLOAT_MAX).astype(np.float32)
    blocks[:3] = 0
    blocks[0, :8], blocks[0, 8:] = -FLOAT_MAX, FLOAT_MAX
    blocks[1] = FLOAT_MAX
    blocks[2, 5] = -FLOAT_MAX
    blocks[32:36] = 0
    blocks[32, 0] = 1e-40
    blocks[33] = -0.0
    blocks[34, ::2] = -0.0
    blocks[35, :3] = 1e-45, -1e-45, 3e-45
    # Some candidates have scales that are subnormal or have an infinite reciprocal, others do not.
    sample = normal[36:64]
    spread = np.abs(sample - np.sort(sample)[:, 7:8]).max(1, keepdims=True)
    edges = np.finfo(np.float32).tiny * np.array([1, 0.25])
    blocks[36:64] = sample / spread * np.outer(np.linspace(0.95, 1.06, 14), edges).reshape(-1, 1)
    args = jnp.asarray(blocks), "fp4", 0.1, 100, None
    found = search_shift(*args, interpret=True)
    others = list(both_forms(icq.shift_and_ends, *args))
    for one, (_, other) in zip(found[:2], others[:2], strict=True):
        np.testing.assert_array_equal(bits_of(one), bits_of(other))


def test_golden_weights(golden):
    """Together with every kind of block. The last program is not full."""
    reference = read_arrays(golden / "icq_nf4.npz")
    weights = reference["w"].reshape(-1, 64)
    shift = check(np.concatenate([weights, make_blocks(64, copies=64)[:-7]]), "nf4")
    assert (shift[: len(weights)] == reference["tau_exact"]).mean() > 0.98


finite = {"allow_nan": False, "allow_infinity": False, "width": 32}
weights = st.one_of(
    st.floats(-1, 1, width=32),
    st.floats(-(2.0**100), 2.0**100, **finite),
    st.sampled_from([0.0, -0.0, 0.5, 1.0, -1.0, 3.0]),
)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(
    arrays.arrays(np.float32, (3, 16), elements=weights, fill=st.nothing()),
    arrays.arrays(np.int32, 3, elements=st.integers(1, 16)),
)
def test_any_blocks(blocks, valid):
    check(blocks, "nf2", valid=valid)


def test_tiles_change_no_result():
    blocks, valid = make_partial(make_blocks(32, copies=5))
    for tiles in (Tiles(blocks=64, warps=2, chunk=4), Tiles(blocks=16, chunk=2)):
        check(blocks, "nf2", valid=valid, tiles=tiles)


def test_no_blocks():
    found = search_shift(jnp.zeros((0, 64)), "nf4", interpret=True)
    assert [one.shape for one in found] == [(0,)] * 4


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_networks_sort(n):
    """On all sequences of 0 and 1, and so, by the 0-1 principle, on all sequences."""
    everything = (np.arange(2**n)[None] >> np.arange(n)[:, None]) & 1
    # A sequence is bitonic with at most one change, or with two if it ends as it began.
    turns = np.abs(np.diff(everything, axis=0)).sum(0)
    bitonic = everything[:, (turns <= 1) | ((turns == 2) & (everything[0] == everything[-1]))]
    cases = (
        (odd_even_pairs(n), everything),
        (bitonic_pairs(n), bitonic),
    )
    for pairs, rows in cases:
        rows = rows.copy()
        for i, j in pairs:
            rows[i], rows[j] = np.minimum(rows[i], rows[j]), np.maximum(rows[i], rows[j])
        assert (np.diff(rows, axis=0) >= 0).all()


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_lowers_to_one_kernel_that_reads_the_weights_as_they_are(dtype):
    blocks = jax.ShapeDtypeStruct((1000, 64), dtype)
    with abstract_gpu():
        lowered = search_shift.trace(blocks, "nf4").lower(lowering_platforms=("cuda",))
    lines = [line for line in lowered.as_text().splitlines() if "custom_call" in line]
    (kernel,) = [line for line in lines if "triton" in line]
    name = {"float32": "f32", "bfloat16": "bf16"}[jnp.dtype(dtype).name]
    operands, results = kernel.rsplit(" : ", 1)[1].split(" -> ")
    assert f"tensor<1000x64x{name}>" in operands
    # 32 programs of 32 blocks; a column has 64 weights and an end.
    each = ("f32", "i32", "f32", "f32")
    expected = ", ".join([f"tensor<1024x{one}>" for one in each] + ["tensor<32x65x32xf32>"])
    assert results.startswith(f"({expected})")


def device(capability: str, kind: str):
    return types.SimpleNamespace(platform="gpu", compute_capability=capability, device_kind=kind)


@pytest.mark.parametrize(
    ("shape", "dtype", "fmt", "capability", "message"),
    [
        ((8, 64), jnp.float32, "nf4", "9.0", None),
        ((8, 16), jnp.float16, "fp4", "8.0", None),
        ((8, 256), jnp.bfloat16, "nf2", "8.9", None),
        ((8, 64), jnp.float32, "nf4", "7.5", "compute capability 8.0 or more, the device is Some"),
        ((8, 64), jnp.float32, "nf4", "gfx90a", "NVIDIA GPU"),
        ((8, 64), jnp.float32, "int4", "9.0", "NormalFloat and FP4 formats, not int4"),
        ((8, 64), jnp.int8, "nf4", "9.0", "float32, bfloat16 and float16, not int8"),
        ((8, 8), jnp.float32, "nf4", "9.0", "16, 32, 64, 128, 256 weights, not 8"),
        ((8, 48), jnp.float32, "nf4", "9.0", "not 48"),
        ((2**25, 64), jnp.float32, "nf4", "9.0", "fewer than 2\\*\\*31 weights, not 2147483648"),
    ],
)
def test_refusals_give_the_reason(shape, dtype, fmt, capability, message):
    found = refusal(jax.ShapeDtypeStruct(shape, dtype), fmt, device(capability, "Some GPU"))
    if message is None:
        assert found is None
    else:
        assert found is not None
        with pytest.raises(ValueError, match=message):
            raise ValueError(found)


def test_a_cpu_is_refused():
    assert "the device is cpu" in refusal(jnp.zeros((8, 64)), "nf4")


@pytest.mark.parametrize(
    ("shape", "fmt", "width", "message"),
    [
        ((2, 64), "int4", 0.1, "int4"),
        ((2, 64), "nf5", 0.1, "nf5"),
        ((2, 24), "nf4", 0.1, "not 24"),
        ((2, 64), "nf4", 1.0, "search_range = 1.0"),
    ],
)
def test_bad_arguments_are_named(shape, fmt, width, message):
    with pytest.raises(ValueError, match=message):
        search_shift(jnp.ones(shape), fmt, width, interpret=True)
