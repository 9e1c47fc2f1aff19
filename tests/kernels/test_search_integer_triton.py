"""The search kernel for integers against XLA's searches, bit by bit, in Pallas's interpreter."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from irqlora_jax.kernels.search_integer_triton import Tiles, refusal, search
from irqlora_jax.quant.calibrations import icq_integer
from irqlora_jax.quant.calibrations.icq_integer import range_candidates, zero_point_candidates
from tests.cuda.abstract_gpu import abstract_gpu
from tests.kernels.test_search_triton import bits_of, device, weights
from tests.quant.test_icq import both_forms, make_blocks, make_partial

FLOAT_MAX = np.finfo(np.float32).max


@functools.partial(
    jax.jit, static_argnames=("bits", "symmetric", "width", "steps", "tiles", "interpret")
)
def by_kernel(blocks, bits, symmetric, width=0.1, steps=50, valid=None, tiles=None, interpret=True):
    """The kernel's search of the range or, with symmetric = None, of the zero point."""
    if symmetric is None:
        candidates = zero_point_candidates(bits, width, steps)
    else:
        candidates = range_candidates(bits, symmetric, width, steps)
    return search(blocks, candidates, valid, tiles=tiles, interpret=interpret)


def by_xla(bits, symmetric):
    if symmetric is None:
        return icq_integer.search_zero_point, (bits,)
    return icq_integer.search_range, (bits, symmetric)


def check(blocks, bits, symmetric, width=0.1, steps=50, valid=None, tiles=None):
    blocks = jnp.asarray(blocks)
    valid = None if valid is None else jnp.asarray(valid)
    found = by_kernel(blocks, bits, symmetric, width, steps, valid, tiles)
    function, arguments = by_xla(bits, symmetric)
    expected = function(blocks, *arguments, width, steps, valid)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(bits_of(one), bits_of(other))


@pytest.mark.parametrize(
    ("bits", "symmetric", "block", "partial"),
    [
        (4, False, 256, True),
        (4, True, 64, False),
        (3, False, 32, True),
        (2, True, 128, True),
        (4, None, 32, True),
    ],
)
def test_every_kind_of_block(bits, symmetric, block, partial):
    """The last program is not full, and one block has 256 weights with the same code."""
    blocks, valid = make_blocks(block, copies=6)[:-7], None
    if partial:
        blocks, valid = make_partial(blocks)
    check(blocks, bits, symmetric, valid=valid)


def test_ties():
    """Zero points halfway between whole numbers, and weights halfway between codes."""
    ordinary = np.random.default_rng(5).standard_normal((60, 32))
    mirrored = np.concatenate([ordinary[:, :16], -ordinary[:, :16]], axis=1)
    whole = np.round(ordinary * 4) / 2
    check(np.concatenate([mirrored, whole]).astype(jnp.bfloat16), 4, False)


@pytest.mark.parametrize(("symmetric", "width", "steps"), [(False, 0.999, 7), (None, 0.9, 3)])
def test_other_ranges_and_steps(symmetric, width, steps):
    check(make_blocks(16, copies=3), 3, symmetric, width, steps)


@pytest.mark.parametrize("symmetric", [False, True, None])
def test_ends_of_float32(symmetric):
    """Against XLA's form for parallel devices: on a CPU, the code of NaN is undefined."""
    exponents = np.concatenate([np.linspace(127.9, 110, 30), np.linspace(-149, -110, 30)])
    normal = np.random.default_rng(0).standard_normal((60, 16))
    blocks = np.clip(normal * 2.0 ** exponents[:, None], -FLOAT_MAX, FLOAT_MAX).astype(np.float32)
    blocks[:3] = 0
    blocks[0, :8], blocks[0, 8:] = -FLOAT_MAX, FLOAT_MAX
    blocks[1] = FLOAT_MAX
    blocks[2, 5] = -FLOAT_MAX
    blocks[30:33] = 0
    blocks[31, 0] = 1e-40
    blocks[32, :3] = 1e-45, -1e-45, 3e-45
    valid = jnp.asarray(make_partial(blocks)[1])
    found = by_kernel(jnp.asarray(blocks), 4, symmetric, valid=valid)
    function, arguments = by_xla(4, symmetric)
    others = both_forms(function, jnp.asarray(blocks), *arguments, 0.1, 50, valid)
    for one, (_, other) in zip(found, others, strict=True):
        np.testing.assert_array_equal(one, other)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
    arrays.arrays(np.float32, (3, 16), elements=weights, fill=st.nothing()),
    arrays.arrays(np.int32, 3, elements=st.integers(1, 16)),
)
def test_any_blocks(blocks, valid):
    check(blocks, 3, False, valid=valid)


def test_tiles_change_no_result():
    blocks, valid = make_partial(make_blocks(16, copies=5))
    check(blocks, 2, False, valid=valid, tiles=Tiles(blocks=64, warps=2))


def test_no_blocks():
    assert [one.shape for one in by_kernel(jnp.zeros((0, 64)), 4, False)] == [(0,)] * 3


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_it_lowers_to_one_kernel_that_reads_the_weights_as_they_are():
    blocks = jax.ShapeDtypeStruct((1000, 64), jnp.bfloat16)
    with abstract_gpu():
        traced = by_kernel.trace(blocks, 4, False, interpret=False)
        lowered = traced.lower(lowering_platforms=("cuda",))
    lines = [line for line in lowered.as_text().splitlines() if "custom_call" in line]
    (kernel,) = [line for line in lines if "triton" in line]
    operands, results = kernel.rsplit(" : ", 1)[1].split(" -> ")
    assert "tensor<1000x64xbf16>" in operands
    # 32 programs of 32 blocks of 64 weights.
    each = ("i32", "i32", "f32", "f32")
    expected = ", ".join([f"tensor<1024x{dtype}>" for dtype in each] + ["tensor<32x64x32xf32>"])
    assert results.startswith(f"({expected})")


@pytest.mark.parametrize(
    ("shape", "dtype", "bits", "capability", "message"),
    [
        ((8, 64), jnp.float32, 4, "9.0", None),
        ((8, 16), jnp.float16, 2, "8.0", None),
        ((8, 64), jnp.float32, 4, "7.5", "compute capability 8.0 or more, the device is Some"),
        ((8, 64), jnp.float32, 8, "9.0", "integers of 2, 3 and 4 bits, not 8"),
        ((8, 64), jnp.int8, 4, "9.0", "float32, bfloat16 and float16, not int8"),
        ((8, 48), jnp.float32, 4, "9.0", "16, 32, 64, 128, 256 weights, not 48"),
        ((2**25, 64), jnp.float32, 4, "9.0", "fewer than 2**31 weights, not 2147483648"),
    ],
)
def test_refusals_give_the_reason(shape, dtype, bits, capability, message):
    found = refusal(jax.ShapeDtypeStruct(shape, dtype), bits, device(capability, "Some GPU"))
    assert found is None if message is None else found is not None and message in found


def test_asking_for_a_kernel_that_cannot_serve_is_an_error():
    blocks = jnp.ones((2, 32))
    message = "implementation = 'triton': it needs an NVIDIA GPU .*; 'xla' serves here"
    with pytest.raises(ValueError, match=message):
        icq_integer.search_range(blocks, 4, False, implementation="triton")
    with pytest.raises(ValueError, match=message):
        icq_integer.search_zero_point(blocks, 4, implementation="triton")
    with pytest.raises(ValueError, match="bits, not 5"):
        search(blocks, range_candidates(5, False, 0.1, 50), interpret=True)


def test_a_measurement_makes_it_the_default(monkeypatch):
    """Only for the measured format of the range search."""
    from irqlora_jax.kernels import measured, search_integer_triton

    kind = jax.devices()[0].device_kind
    place = "search", "triton", kind, "int4", (0, 32), (0, 0)
    here = measured.Measurement(*place, 2.0, jax.__version__, "2026-11-24")
    monkeypatch.setattr(measured, "read_measurements", lambda: (here,))
    monkeypatch.setattr(search_integer_triton, "refusal", lambda blocks, bits: None)
    called = []

    def search(blocks, candidates, valid):
        called.append(candidates.bits)
        return (jnp.zeros(len(blocks)),) * 3

    monkeypatch.setattr(search_integer_triton, "search", search)

    def call(function, *args, **kwargs):
        blocks = jax.ShapeDtypeStruct((7, 32), jnp.float32)
        jax.eval_shape(lambda blocks: function.__wrapped__(blocks, *args, **kwargs), blocks)

    call(icq_integer.search_zero_point, 4)
    call(icq_integer.search_range, 3, False)
    call(icq_integer.search_range, 4, False, implementation="xla")
    assert not called
    call(icq_integer.search_range, 4, False)
    assert called == [4]
