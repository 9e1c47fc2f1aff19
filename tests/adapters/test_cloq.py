"""CLoQ: against a slow reference in float64, by its properties, and for inputs of every kind."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.adapters import cloq as module
from irqlora_jax.adapters import loftq as loftq_module
from irqlora_jax.adapters.cloq import CLOQ, CloqOptions, cloq
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.loftq import LOFTQ, LoftqOptions, exact_svd, loftq, randomized_svd
from irqlora_jax.quant.calibrations.icq import IcqOptions
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize, quantized_shape
from irqlora_jax.quant.formats import FORMATS
from irqlora_jax.quant.inputs import input_root
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.quant.slabs import rows_of
from tests.models import assert_same

KEY = jax.random.key(0)
SCALING, DAMPING = 16 / 6, 0.01
NF2, NF3 = (QuantConfig(format=name, calibration="none") for name in ("nf2", "nf3"))
ICQ = QuantConfig(format="nf2", icq=IcqOptions(steps=4))
INT3 = QuantConfig(format="int3", block_size=32)


def weights(shape: tuple[int, int], seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(0, 0.02, shape), dtype)


def moments(size: int, seed: int = 1, tokens: int = 0, large: float = 1.0) -> jax.Array:
    """Mean of x x^T over correlated inputs of unequal size. Three channels have `large` times the
    second moment of the others."""
    draw = np.random.default_rng(seed)
    inputs = draw.normal(size=(tokens or 4 * size, size))
    inputs = inputs + inputs @ draw.normal(size=(size, size)) / np.sqrt(size)
    inputs *= np.exp(draw.normal(size=size) / 2)
    inputs[:, :3] *= np.sqrt(large)
    return jnp.asarray(inputs.T @ inputs / len(inputs), jnp.float32)


def metric(gram: jax.Array, damping: float = DAMPING) -> np.ndarray:
    """The damped moments with a mean diagonal of 1, in float64."""
    own = np.asarray(gram, np.float64)
    own = own / (np.diag(own).mean() or 1)
    return (own + damping * np.eye(len(own))) / (1 + damping)


def norm(error: np.ndarray, moments: np.ndarray) -> float:
    """Root of the sum of squared changes of the outputs."""
    return float(np.sqrt(np.einsum("oi,ij,oj", error, moments, error, optimize=True)))


def left(weight: jax.Array, packed: QTensor, a: Any, b: Any, moments: np.ndarray) -> float:
    w, q, a, b = (np.asarray(x, np.float64) for x in (weight, packed.dequantize(), a, b))
    return norm(w - q - SCALING * b @ a, moments)


def alone(weight: jax.Array, packed: QTensor, moments: np.ndarray) -> float:
    rows, columns = weight.shape
    return left(weight, packed, np.zeros((1, columns)), np.zeros((rows, 1)), moments)


def best_update(error: np.ndarray, moments: np.ndarray, rank: int) -> np.ndarray:
    """The closed form, with the symmetric root of H, which is another R than the Cholesky one."""
    values, vectors = np.linalg.eigh(moments)
    root, inverse = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    u, s, v = np.linalg.svd(error @ root, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank] @ inverse


def reference(
    weight: jax.Array, config: QuantConfig, rank: int, turns: int, moments: np.ndarray
) -> list[Any]:
    """Each turn in float64, except for the quantizer: error, Q and s B A."""
    w = np.asarray(weight, np.float64)
    update, found = np.zeros_like(w), []
    for _ in range(turns):
        packed = quantize(jnp.asarray((w - update).astype(np.float32)), config)
        error = w - np.asarray(packed.dequantize(), np.float64)
        update = best_update(error, moments, rank)
        found.append((norm(error - update, moments), packed, update))
    return found


def assert_close(found: Any, expected: Any) -> None:
    """The same up to last bits. The signs of singular vectors do not matter."""
    assert (found[0].codes() == expected[0].codes()).all()
    np.testing.assert_allclose(found[0].dequantize(), expected[0].dequantize(), rtol=1e-5)
    one, other = (b @ a for _, a, b in (found, expected))
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * float(jnp.abs(other).max()))


@pytest.mark.parametrize(
    ("config", "shape", "dtype"),
    [(NF3, (37, 101), jnp.float32), (ICQ, (130, 65), jnp.bfloat16), (INT3, (64, 96), jnp.float32)],
)
def test_the_best_turn_is_that_of_the_reference(
    config: QuantConfig, shape: Any, dtype: Any
) -> None:
    weight, gram = weights(shape, dtype=dtype), moments(shape[1])
    turns = reference(weight, config, 6, 4, metric(gram))
    for count in (1, 4):
        packed, a, b = cloq(weight, config, 6, SCALING, count, gram, DAMPING, KEY)
        least, expected, update = min(turns[:count], key=lambda turn: turn[0])
        # A last bit of W - s B A may move a code that lies on the edge between two.
        np.testing.assert_allclose(left(weight, packed, a, b, metric(gram)), least, rtol=2e-3)
        assert np.mean(np.asarray(packed.codes() != expected.codes())) < 2e-3
        gap = np.abs(SCALING * np.asarray(b, np.float64) @ np.asarray(a, np.float64) - update)
        assert gap.max() < (1e-5 if count == 1 else 0.05) * np.abs(update).max()


def test_no_other_pair_is_better() -> None:
    """Neither a small random change of the pair nor steps of gradient descent lower the error."""
    weight, gram = weights((24, 65)), moments(65)
    packed, *pair = cloq(weight, NF2, 4, SCALING, 1, gram, DAMPING, KEY)
    error = np.asarray(weight, np.float64) - np.asarray(packed.dequantize(), np.float64)
    own, (a, b) = metric(gram), (np.asarray(x, np.float64) for x in pair)
    least = norm(error - SCALING * b @ a, own)
    draw = np.random.default_rng(0)
    for size, _ in itertools.product((1e-4, 1e-2, 0.3), range(20)):
        moved = [x + size * np.abs(x).mean() * draw.normal(size=x.shape) for x in (a, b)]
        assert norm(error - SCALING * moved[1] @ moved[0], own) > least
    # From another start: alternating least squares, where each step is the best for one factor.
    a = draw.normal(size=a.shape)
    for _ in range(300):
        b = error @ own @ a.T @ np.linalg.inv(a @ own @ a.T)
        a = np.linalg.inv(b.T @ b) @ b.T @ error
    assert least * (1 - 1e-6) < norm(error - b @ a, own) < least * 1.01
    # The derivatives at the pair are 0.
    a, b = (np.asarray(x, np.float64) for x in pair)
    remaining = (error - SCALING * b @ a) @ own
    slopes = remaining @ a.T, b.T @ remaining
    assert max(np.abs(x).max() for x in slopes) < 1e-5 * np.abs(error @ own @ a.T).max()


@pytest.mark.long
@pytest.mark.parametrize(
    ("format", "pair"),
    [("nf2", jnp.bfloat16), *((name, jnp.float32) for name in FORMATS if FORMATS[name].bits < 8)],
)
def test_every_format_gains_and_more_turns_never_lose(format: str, pair: Any) -> None:
    """In float32 and bfloat16. LoftQ's pair leaves more of the same error."""
    weight, gram = weights((40, 96)), moments(96, large=20)
    config = QuantConfig(format=format, calibration="none")  # type: ignore[arg-type]
    own = metric(gram)
    errors = [alone(weight, quantize(weight, config), own)]
    for turns in (1, 2, 5):
        packed, a, b = cloq(weight, config, 6, SCALING, turns, gram, DAMPING, KEY, pair)
        assert a.dtype == b.dtype == pair and a.shape == (6, 96) and b.shape == (40, 6)
        errors.append(left(weight, packed, a, b, own))
    assert errors[1] < 0.8 * errors[0]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
    other = loftq(weight, config, 6, SCALING, 1, KEY, pair)
    assert errors[1] < 0.9 * left(weight, *other, own)


@pytest.mark.parametrize("factor", [1.0, 3e4, 1e-12])
def test_equal_uncorrelated_inputs_give_loftq(factor: float) -> None:
    weight = weights((37, 101))
    gram = factor * jnp.eye(101)
    found = cloq(weight, NF3, 6, SCALING, 3, gram, 1e-6, KEY)
    assert_close(found, loftq(weight, NF3, 6, SCALING, 3, KEY))


def test_the_scale_of_the_moments_changes_nothing() -> None:
    """The sum and the mean over tokens give the same pair, each factor as long as the other."""
    weight, gram = weights((37, 101)), moments(101)
    one, other = (
        cloq(weight, NF3, 6, SCALING, 3, factor * gram, DAMPING, KEY) for factor in (1.0, 2.0**20)
    )
    assert_same(one, other)
    lengths = [jnp.linalg.norm(x, axis=axis) for x, axis in ((one[1], 1), (one[2], 0))]
    np.testing.assert_allclose(*lengths, rtol=1e-5)


def test_the_error_never_grows_with_the_rank() -> None:
    weight, gram = weights((24, 65)), moments(65)
    errors = [
        left(weight, *cloq(weight, NF2, rank, SCALING, 1, gram, DAMPING, KEY), metric(gram))
        for rank in (1, 2, 5, 12, 23, 24)
    ]
    assert all(after < before for before, after in itertools.pairwise(errors))
    assert errors[-1] < 1e-5 * errors[0]


def test_the_first_turn_is_kept_where_it_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantizer that becomes worse from call to call: Q and its pair still belong together."""
    calls: list[Any] = []

    def worse(weight: jax.Array, config: QuantConfig, **given: Any) -> QTensor:
        calls.append(quantize(weight * (1.0 + len(calls)), config, minus=given["minus"]))
        return calls[-1]

    monkeypatch.setattr(loftq_module, "quantize", worse)
    weight, gram = weights((37, 101)), moments(101)
    packed, a, b = cloq(weight, NF3, 6, SCALING, 3, gram, DAMPING, KEY)
    assert len(calls) == 3
    assert_same(packed, calls[0])
    expected = reference(weight, NF3, 6, 1, metric(gram))[0][0]
    np.testing.assert_allclose(left(weight, packed, a, b, metric(gram)), expected, rtol=1e-5)


def test_the_best_turn_is_chosen_by_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second turn changes the weights more, but only of inputs that hardly count."""
    weight, first = weights((64, 64)), jnp.arange(64) < 8
    calls: list[Any] = []

    def poor(weight: jax.Array, config: QuantConfig, **given: Any) -> QTensor:
        factors = jnp.where(first, 1.0, 3.0) if calls else jnp.where(first, 1.5, 1.0)
        calls.append(quantize(weight * factors[None, :], config))
        return calls[-1]

    monkeypatch.setattr(loftq_module, "quantize", poor)
    gram = jnp.diag(jnp.where(first, 1.0, 1e-4))
    packed, *_ = cloq(weight, NF3, 4, SCALING, 2, gram, 0.0, KEY)
    assert_same(packed, calls[1])
    one, other = (alone(weight, packed, np.eye(64)) for packed in calls)
    assert one < other


@pytest.mark.parametrize("damping", [0.01, 1e-4, 0.0])
@pytest.mark.parametrize("pair", [jnp.float32, jnp.bfloat16])
def test_inputs_with_a_few_huge_channels(damping: float, pair: Any) -> None:
    """1,400 times the second moment of the others, and correlated with all others."""
    weight, gram = weights((48, 192)), moments(192, large=1400, tokens=2000)
    mixed = gram + 0.9 * jnp.outer(*2 * [jnp.sqrt(jnp.diagonal(gram))])
    own = metric(mixed, damping)
    assert np.linalg.cond(own) > 1e4
    packed, a, b = cloq(weight, NF2, 8, SCALING, 1, mixed, damping, KEY, pair)
    expected = reference(weight, NF2, 8, 1, own)[0][0]
    precise = 1e-5 if pair == jnp.float32 else 2e-3
    np.testing.assert_allclose(left(weight, packed, a, b, own), expected, rtol=precise)
    root = np.asarray(input_root(mixed, damping), np.float64)
    assert np.abs(root @ root.T - own).max() < 1e-6 * np.abs(own).max()
    assert not np.triu(root, 1).any()


def test_fewer_tokens_than_inputs_need_the_damping() -> None:
    weight, gram = weights((24, 96)), moments(96, tokens=10)
    packed, a, b = cloq(weight, NF2, 16, SCALING, 1, gram, DAMPING, KEY)
    assert left(weight, packed, a, b, metric(gram)) < 0.3 * alone(weight, packed, metric(gram))
    with pytest.raises(ValueError, match=r"damping = 0\.0: expected more damping"):
        cloq(weight, NF2, 16, SCALING, 1, gram, 0.0, KEY)


@pytest.mark.parametrize("factor", [1.0, 1e-6])
def test_inputs_that_are_always_zero_take_no_rank_from_the_others(factor: float) -> None:
    """Whatever the scale of the moments is."""
    weight, live = weights((24, 96)), np.arange(96) % 4 != 0
    gram = factor * moments(96) * np.outer(live, live).astype(np.float32)
    packed, a, b = cloq(weight, NF2, 6, SCALING, 1, gram, DAMPING, KEY)
    expected = reference(weight, NF2, 6, 1, metric(gram))[0][0]
    np.testing.assert_allclose(left(weight, packed, a, b, metric(gram)), expected, rtol=1e-5)
    # The outputs are almost as good as if the layer had no such inputs.
    q, a, b = (np.asarray(x, np.float64) for x in (packed.dequantize(), a, b))
    error, seen = np.asarray(weight) - q, metric(gram, 0)
    kept, inner = error[:, live], seen[np.ix_(live, live)]
    found = norm(error - SCALING * b @ a, seen)
    assert found < 1.02 * norm(kept - best_update(kept, inner, 6), inner)


def test_inputs_that_are_all_zero_give_loftq() -> None:
    weight = weights((24, 64))
    found = cloq(weight, NF3, 4, SCALING, 2, jnp.zeros((64, 64)), DAMPING, KEY)
    assert_close(found, loftq(weight, NF3, 4, SCALING, 2, KEY))


def test_a_full_rank_pair_removes_the_whole_error() -> None:
    for shape in ((24, 65), (65, 24)):
        weight, gram = weights(shape), moments(shape[1])
        packed, a, b = cloq(weight, NF2, 33, SCALING, 2, gram, DAMPING, KEY)
        assert a.shape == (33, shape[1]) and b.shape == (shape[0], 33)
        size = float(jnp.linalg.norm(weight))
        assert left(weight, packed, a, b, metric(gram)) < 1e-5 * size
        assert not a[min(shape) :].any() and not b[:, min(shape) :].any()


@pytest.mark.parametrize("shape", [(24, 64), (loftq_module.EXACT_UP_TO + 1, 576)])
def test_without_an_error_the_pair_is_zero(shape: Any) -> None:
    """Weights that the quantizer represents exactly."""
    levels = jnp.asarray([-1.0, 1.0])[jax.random.randint(KEY, shape, 0, 2)]
    for weight in (levels, jnp.zeros(shape)):
        packed, a, b = cloq(weight, NF2, 4, SCALING, 2, moments(shape[1]), DAMPING, KEY)
        assert (packed.dequantize() == weight).all() and not a.any() and not b.any()


# ---------------------------------------------------------------------------------- large layers


@pytest.mark.parametrize("large", [1.0, 1400.0])
def test_random_directions_cost_at_most_a_hundredth(large: float) -> None:
    shape, rank = (1024, 768), 64
    weight, gram = weights(shape), moments(768, tokens=1600, large=large)
    root = input_root(gram, DAMPING)
    error = weight - quantize(weight, NF2).dequantize()

    @jax.jit
    def drawn(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return randomized_svd(lambda start: rows_of(x, start, 97), shape, 97, rank, KEY, root)

    seen = jnp.matmul(error, root, precision="highest")
    exact, other = (
        float(jnp.linalg.norm(seen - (u * s[None, :]) @ v))
        for u, s, v in (exact_svd(seen, rank), drawn(error))
    )
    assert exact * (1 - 1e-4) < other < 1.01 * exact


def test_a_large_layer_is_as_good_as_the_reference_and_repeats() -> None:
    shape = (1024, 768)
    weight, gram = weights(shape), moments(768, tokens=1600)
    one, other, again = (
        cloq(weight, NF2, 16, SCALING, 1, gram, DAMPING, jax.random.key(seed)) for seed in (0, 1, 0)
    )
    assert_same(one, again)
    assert_same(one[0], other[0])
    assert not bool((one[1] == other[1]).all())
    exact = reference(weight, NF2, 16, 1, metric(gram))[0][0]
    for found in (one, other):
        assert exact * (1 - 1e-6) < left(weight, *found, metric(gram)) < 1.01 * exact


def test_the_error_is_never_materialized() -> None:
    """Compiled, not run: the largest matrix of LLaMA-7B, in bfloat16."""
    shape, config = (11008, 4096), QuantConfig(format="nf4", calibration="none")
    weight = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    packed, scale = quantized_shape(shape, config), jnp.float32(1)
    root = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    program = loftq_module._fit.lower(weight, packed, scale, KEY, 64, jnp.float32, root)
    temporary = program.compile().memory_analysis().temp_size_in_bytes
    # At most one copy of R, which the triangular solve may need.
    assert temporary - 4 * 4096**2 < 0.15 * 4 * shape[0] * shape[1]


# --------------------------------------------------------------------------------------- contract


FEEDBACK = QuantConfig(format="nf3", calibration="gptq")


@pytest.mark.parametrize("start", [CLOQ, LOFTQ])
def test_the_quantizer_gets_the_moments_if_it_needs_them(start: Any) -> None:
    weight, gram = weights((37, 101)), moments(101, large=20)
    one, errors = type(start.options)(iterations=1), []
    given = {"gram": gram, "damping": 0.1}
    for config, seen in ((NF3, None), (FEEDBACK, gram)):
        found = start.fit(weight, config, 6, SCALING, one, KEY, jnp.float32, **given)
        assert_same(found[0], quantize(weight, config, gram=seen, damping=0.1))
        errors.append(alone(weight, found[0], metric(gram)))
    assert errors[1] < 0.95 * errors[0]


def test_cloq_needs_inputs_and_loftq_does_not() -> None:
    assert (CLOQ.needs(None), LOFTQ.needs(None)) == ("inputs", "nothing")
    assert AdapterConfig(init="cloq").start is CLOQ
    assert AdapterConfig(init="cloq").cloq == CloqOptions(iterations=3)
    weight, options = weights((8, 64)), LoftqOptions(iterations=1)
    found = LOFTQ.fit(weight, NF3, 4, 1.0, options, KEY, jnp.float32)  # type: ignore[misc]
    assert_same(found, loftq(weight, NF3, 4, 1.0, 1, KEY))
    with pytest.raises(ValueError, match=r"adapter\.init = 'cloq': needs the inputs of the layer"):
        CLOQ.fit(weight, NF3, 4, 1.0, CloqOptions(), KEY, jnp.float32)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "damping", "message"),
    [
        (lambda gram: gram.at[3, 4].set(jnp.nan), 0.01, "gram = .*NaN"),
        (lambda gram: -gram, 0.01, "gram = .*negative"),
        (lambda gram: gram.at[0, 1].set(9e9).at[1, 0].set(9e9), 0.01, "damping = 0.01: expected"),
        (lambda gram: gram, -0.5, "damping = -0.5: expected 0 or more"),
    ],
)
def test_moments_that_cannot_be_are_refused(change: Any, damping: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cloq(weights((8, 64)), NF3, 4, 1.0, 1, change(moments(64)), damping, KEY)


def test_moments_of_another_layer_are_refused() -> None:
    """Without the type checks of these tests, which users do not have."""
    bare = getattr(module.cloq, "__wrapped__", module.cloq)
    with pytest.raises(ValueError, match=r"gram = \(63, 63\): expected shape \(64, 64\)"):
        bare(weights((8, 64)), NF3, 4, 1.0, 1, moments(63), 0.01, KEY)


@pytest.mark.parametrize(("name", "value"), [("iterations", 0), ("rank", 0)])
def test_zero_iterations_and_zero_rank_are_refused(name: str, value: int) -> None:
    settings: dict[str, Any] = {"rank": 4, "iterations": 1} | {name: value}
    with pytest.raises(ValueError, match=f"{name} = 0: expected a whole number of at least 1"):
        cloq(
            weights((8, 64)), NF3, scaling=1.0, gram=moments(64), damping=0.01, key=KEY, **settings
        )
    with pytest.raises(ValueError, match=r"adapter.cloq.iterations = 0: expected a whole"):
        CloqOptions(iterations=0)
