"""ICQ against plain NumPy searches, the released code's results, and its own invariances."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from irqlora_jax.quant import entropy
from irqlora_jax.quant.calibrations import icq, icq_integer
from irqlora_jax.quant.formats import get_format
from tests.arrays import read_arrays

SHIFTED = ("nf4", "nf3", "nf2", "fp4")


def make_blocks(block: int, copies: int = 12, seed: int = 0) -> np.ndarray:
    """Blocks of many kinds, `copies` of each."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((copies, block)).astype(np.float32)
    coarse = (normal.view(np.uint32) & 0xFFFF0000).view(np.float32)  # bfloat16: many ties
    outlier = normal * 0.02
    outlier[:, block // 3] = 1e4
    constant = np.broadcast_to(normal[:, :1], normal.shape)
    kinds = [
        *(normal * 0.02, normal * 1e-20, normal * 1e30, normal**3, coarse),
        *(np.round(normal * 3), normal * 1e-5 + 1, normal + 300, outlier, constant),
        *(np.abs(normal), rng.random((copies, block)), np.zeros_like(normal)),
    ]
    return np.concatenate(kinds).astype(np.float32)


def make_partial(blocks: np.ndarray, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The blocks with garbage behind a random number of valid elements."""
    n, block = blocks.shape
    valid = np.random.default_rng(seed).integers(1, block + 1, n)
    rubbish = np.arange(block)[None] >= valid[:, None]
    return np.where(rubbish, np.float32(1e6), blocks), valid.astype(np.int32)


def histogram(codes: np.ndarray, n_levels: int) -> np.ndarray:
    """[..., block] -> [..., levels] counts, each histogram sorted; codes < 0 are left out."""
    counts = np.stack([(codes == level).sum(-1) for level in range(n_levels)], -1)
    return np.sort(counts, -1)


def bits_of(counts: np.ndarray) -> np.ndarray:
    total = counts.sum(-1, keepdims=True)
    share = np.where(counts == 0, 1, counts / total)
    return -(share * np.log2(share)).sum(-1)


def check_choice(index: int, counts: np.ndarray, bits: float) -> None:
    """`index` is the first of the candidates with the highest entropy, `bits` its entropy."""
    exact = bits_of(counts)
    np.testing.assert_allclose(bits, exact[index], rtol=3e-7, atol=0)
    assert exact[index] >= exact.max() - 1e-7 * max(1, exact.max())
    same = (counts == counts[index]).all(-1)
    assert same.argmax() == index


def numpy_shift_search(block: np.ndarray, fmt: str, width: float, steps: int):
    """Shift and sorted histogram of every candidate, in float32."""
    points = get_format(fmt).midpoints
    start = np.sort(block)[(block.size - 1) // 2]
    factors = np.asarray(entropy.spaced(-width / 1.8481308, width / 1.8481308, 2 * steps + 1))
    shifts = factors * np.abs(block - start).max() + start
    centered = block[None] - shifts[:, None]
    scale = np.abs(centered).max(1, keepdims=True)
    unit = centered * (np.float32(1) / np.where(scale == 0, np.float32(1), scale))
    codes = np.searchsorted(points, unit, side="left")  # how many points are < unit
    return shifts, histogram(codes, len(points) + 1)


def search(blocks, fmt, width=0.1, steps=100, valid=None):
    """One way of calling, and few shapes, so that few programs are compiled."""
    valid = None if valid is None else jnp.asarray(valid)
    result = icq.search_shift(jnp.asarray(blocks), fmt, width, steps, valid)
    return tuple(map(np.asarray, result))


def check_shifts(blocks, fmt, width=0.1, steps=100, valid=None):
    found, bits = search(blocks, fmt, width, steps, valid)
    assert np.isfinite(found).all()
    lengths = np.full(len(blocks), blocks.shape[1]) if valid is None else valid
    for block, length, shift, h in zip(blocks, lengths, found, bits, strict=True):
        shifts, counts = numpy_shift_search(block[:length], fmt, width, steps)
        equal = np.flatnonzero(shifts == shift)
        assert equal.size, "not one of the candidates"
        check_choice(equal[0], counts, h)


def test_entropy_is_that_of_the_histogram():
    rng = np.random.default_rng(0)
    for block in (8, 24, 64, 4096):
        codes = rng.integers(0, rng.integers(1, 16, (5, 3, 1)), (5, 3, block), endpoint=True)
        found = np.asarray(entropy.block_entropy(jnp.asarray(codes, jnp.uint8), 16))
        np.testing.assert_allclose(found, bits_of(histogram(codes, 16)), rtol=3e-7)
    assert entropy.block_entropy(jnp.full((1, 24), 3), 16) == 0
    assert entropy.block_entropy(jnp.arange(64)[None] % 16, 16) == 4


@pytest.mark.parametrize(
    ("fmt", "block"), [("nf4", 8), ("nf4", 64), ("nf3", 64), ("nf2", 64), ("fp4", 64), ("nf4", 256)]
)
def test_shift_is_the_first_best_candidate(fmt, block):
    check_shifts(make_blocks(block), fmt)


@pytest.mark.parametrize(("fmt", "block"), [("nf4", 24), ("fp4", 256), ("nf3", 8), ("nf2", 64)])
def test_padding_has_no_influence(fmt, block):
    blocks, valid = make_partial(make_blocks(block, copies=8))
    check_shifts(blocks, fmt, valid=valid)


@pytest.mark.parametrize(("width", "steps"), [(0.7, 60), (0.1, 3), (1e-4, 100)])
def test_other_ranges_and_steps(width, steps):
    check_shifts(make_blocks(64, copies=6), "nf4", width, steps)


def test_large_blocks():
    blocks, valid = make_partial(make_blocks(4096, copies=1))
    check_shifts(blocks, "nf4", steps=20, valid=valid)


def test_chunks_do_not_change_the_shifts():
    blocks = make_blocks(64, copies=100)  # 1300 blocks: more than one chunk, the last one ragged
    shift, bits = search(blocks, "nf3")
    for start in (0, 700, 1144):
        part = slice(start, start + 156)
        one, one_bits = search(blocks[part], "nf3")
        np.testing.assert_array_equal(one, shift[part])
        np.testing.assert_array_equal(one_bits, bits[part])
    assert search(blocks[:0], "nf3")[0].shape == (0,)


@pytest.mark.parametrize("fmt", SHIFTED)
def test_shift_follows_powers_of_two_and_beats_the_median(fmt):
    blocks = np.random.default_rng(2).standard_normal((156, 64)).astype(np.float32)
    shift, bits = search(blocks, fmt)
    scaled, scaled_bits = search(blocks / 1024, fmt)
    np.testing.assert_array_equal(shift, scaled * 1024)
    np.testing.assert_array_equal(bits, scaled_bits)
    for block, h in zip(blocks, bits, strict=True):
        _, counts = numpy_shift_search(block, fmt, 0.1, 100)
        assert h >= bits_of(counts[100]) - 1e-6


def test_half_precision_is_widened():
    half = np.random.default_rng(3).standard_normal((156, 64)).astype(jnp.bfloat16)
    wide = search(half.astype(np.float32), "nf2")
    np.testing.assert_array_equal(search(half, "nf2"), wide)


@pytest.mark.parametrize("fmt", SHIFTED)
def test_extremes_are_finite(fmt):
    limit = np.finfo(np.float32).max
    blocks = np.zeros((156, 64), np.float32)
    blocks[0, :32], blocks[0, 32:] = -limit, limit
    blocks[1, 0] = 1e-40
    blocks[2, :] = limit
    blocks[3, 5] = -limit
    assert np.isfinite(search(blocks, fmt)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: icq.search_shift(w, "int4"), "'int4'"),
        (lambda w: icq.search_shift(w, "nf5"), "'nf5'"),
        (lambda w: icq.search_shift(w, "nf4", 1.0), "search_range = 1.0"),
        (lambda w: icq_integer.search_range(w, 4, False, 0.0), "search_range = 0.0"),
        (lambda w: icq_integer.search_zero_point(w, 4, -0.1), "search_range = -0.1"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((2, 8)))


def test_released_shift_search(golden):
    """Never below the released code, and below the best only where its float sums are noisy."""
    reference = read_arrays(golden / "icq_nf4.npz")
    blocks = reference["w"].reshape(-1, 64)
    packed = reference["packed"]
    codes = np.stack([packed >> 4, packed & 15], -1).reshape(-1, 64)
    released = bits_of(histogram(codes, 16))
    shift, bits = search(blocks, "nf4")
    assert (bits >= released - 1e-6).all()
    assert (np.abs(bits - released) < 1e-6).mean() >= 0.999
    # The rest are permutations of one histogram, which the released float sums tell apart.
    assert (shift == reference["tau_exact"]).mean() > 0.98


# --- integers -------------------------------------------------------------------------------------


def integer_codes(w, scale, zero, bits):
    whole = np.floor(zero)
    codes = np.round(w / scale + (zero - whole)) + whole
    return np.clip(codes, 0, 2**bits - 1)


def numpy_range(block, bits, symmetric, factor=1):
    low, high = min(block.min(), np.float32(0)), max(block.max(), np.float32(0))
    if symmetric:
        high = max(-low, high)
        low = -high if low < 0 else low
    if low == 0 and high == 0:
        low, high = np.float32(-1), np.float32(1)
    low, high = np.float32(factor) * low, np.float32(factor) * high
    scale = (high - low) / np.float32(2**bits - 1)
    return scale, np.float32(2 ** (bits - 1)) if symmetric else np.round(-low / scale)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "block"), [(4, 32), (3, 24), (2, 128)])
def test_range_is_the_first_best_candidate(bits, block, symmetric):
    blocks, valid = make_partial(make_blocks(block, copies=4))
    scale, zero, found = map(
        np.asarray,
        icq_integer.search_range(jnp.asarray(blocks), bits, symmetric, 0.1, 50, jnp.asarray(valid)),
    )
    plain = [
        np.asarray(x)
        for x in icq_integer.plain_range(jnp.asarray(blocks), bits, symmetric, jnp.asarray(valid))
    ]
    up, down = entropy.spaced(1.0, 1.1, 51), entropy.spaced(1.0, 0.9, 51)
    for i, block_ in enumerate(blocks):
        w = block_[: valid[i]]
        ranges = [numpy_range(w, bits, symmetric, f) for f in (*up, *down[1:])]
        assert (plain[0][i], plain[1][i]) == ranges[0]
        assert (scale[i], zero[i]) in ranges
        codes = np.stack([integer_codes(w, *r, bits) for r in ranges])
        index = ranges.index((scale[i], zero[i]))
        check_choice(index, histogram(codes, 2**bits), found[i])


@pytest.mark.parametrize(("bits", "width", "steps"), [(4, 0.1, 50), (3, 0.1, 50), (2, 0.6, 10)])
def test_zero_point_is_the_first_best_representable_one(bits, width, steps):
    blocks, valid = make_partial(make_blocks(32, copies=6))
    scale, zero, found = map(
        np.asarray,
        icq_integer.search_zero_point(jnp.asarray(blocks), bits, width, steps, jnp.asarray(valid)),
    )
    unit = 2 ** (8 - bits)
    np.testing.assert_array_equal(zero * unit, np.round(zero * unit))
    assert ((zero >= 0) & (zero * unit <= 255)).all()
    reach = width * (2**bits - 1) * unit
    if steps > reach:  # every representable number within the range is a candidate
        away = np.arange(1, int(reach) + 1)
    else:
        away = np.floor(reach * np.arange(1, steps + 1) / steps + 1e-9)
    moves = np.concatenate([[0], away, -away]).astype(np.float32) / unit
    for i, block in enumerate(blocks):
        w = block[: valid[i]]
        plain_scale, plain_zero = numpy_range(w, bits, False)
        assert scale[i] == plain_scale
        zeros = np.clip(plain_zero + moves, 0, 255 / unit)
        codes = np.stack([integer_codes(w, plain_scale, z, bits) for z in zeros])
        index = np.flatnonzero(zeros == zero[i])[0]
        check_choice(index, histogram(codes, 2**bits), found[i])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_released_range_search(golden, bits, symmetric):
    reference = read_arrays(golden / "icq_integer.npz")
    prefix = f"int{bits}_{'sym' if symmetric else 'asym'}_"
    blocks = reference["w"].reshape(-1, 32)
    plain = icq_integer.plain_range(jnp.asarray(blocks), bits, symmetric)
    np.testing.assert_array_equal(plain[0], reference[prefix + "plain_scale"].reshape(-1))
    np.testing.assert_array_equal(plain[1], reference[prefix + "plain_zero"].reshape(-1))
    released = bits_of(histogram(reference[prefix + "codes"].reshape(-1, 32), 2**bits))
    scale, _, found = map(
        np.asarray, icq_integer.search_range(jnp.asarray(blocks), bits, symmetric)
    )
    assert (found >= released - 1e-6).all()
    assert (scale == reference[prefix + "scale"].reshape(-1)).mean() > 0.98


# --- the form for parallel devices, run here ------------------------------------------------------


def both_forms(search, *args):
    """What the form for CPUs finds and what the one for other devices finds."""
    on_cpu, chosen = search(*args), []

    def other(*operands, cpu, default):
        chosen.append(default)
        return default(*operands)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lax, "platform_dependent", other)
        elsewhere = search.__wrapped__(*args)
    assert chosen, "a jitted function within still has the program for CPUs"
    return zip(on_cpu, elsewhere, strict=True)


@pytest.mark.parametrize(
    ("fmt", "block"),
    [("nf4", 64), ("nf3", 64), ("nf2", 24), ("fp4", 64), ("nf4", 512)],
)
def test_both_forms_of_the_shift_search_agree(fmt, block):
    blocks, valid = make_partial(make_blocks(block, copies=4))
    args = jnp.asarray(blocks), fmt, 0.1, 100 if block < 512 else 20
    for some in (None, jnp.asarray(valid)):
        for one, other in both_forms(icq.shift_and_ends, *args, some):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_both_forms_of_the_range_search_agree(bits, symmetric):
    blocks, valid = make_partial(make_blocks(32, copies=4))
    ordinary = np.random.default_rng(5).standard_normal((256, 32))
    mirrored = np.concatenate([ordinary[:, :16], -ordinary[:, :16]], axis=1)  # -low = high: ties
    usual = np.concatenate([ordinary, mirrored, np.abs(ordinary)]).astype(jnp.bfloat16)
    cases = [(blocks, None), (blocks, jnp.asarray(valid)), (usual, None)]
    for weights, some in cases:
        args = jnp.asarray(weights), bits, symmetric, 0.1, 50, some
        for one, other in both_forms(icq_integer.search_range, *args):
            np.testing.assert_array_equal(one, other)


def test_both_forms_of_the_zero_point_search_agree():
    blocks, valid = make_partial(make_blocks(32, copies=4))
    args = jnp.asarray(blocks), 3, 0.1, 50, jnp.asarray(valid)
    for one, other in both_forms(icq_integer.search_zero_point, *args):
        np.testing.assert_array_equal(one, other)
