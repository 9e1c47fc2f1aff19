"""Attention against its formula in float64, its memory, and cuDNN's in its place."""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.model import attention
from irqlora_jax.model.attention import attend
from irqlora_jax.model.llama import Llama
from tests.models import RELATIVES

Arrays = list[Any]


def problem(batch=2, seq=13, heads=4, kv_heads=2, features=6, slots=None) -> Arrays:
    """q, k, v and a gradient of the result."""
    rng = np.random.default_rng(seq)
    shapes = [(batch, n, h, features) for n, h in ((seq, heads), (slots or seq, kv_heads))]
    return [rng.normal(size=shapes[i]) for i in (0, 1, 1, 0)]


def by_definition(q, k, v, g, mask) -> Arrays:
    """softmax(q k^T / sqrt(d)) v and its gradients, head by head."""
    y, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    group = q.shape[2] // k.shape[2]
    for row in range(q.shape[0]):
        for head in range(q.shape[2]):
            own, shared = (row, slice(None), head), (row, slice(None), head // group)
            scores = q[own] @ k[shared].T / np.sqrt(q.shape[-1])
            weights = np.where(mask[row], np.exp(scores - scores.max()), 0)
            weights /= weights.sum(-1, keepdims=True)
            y[own] = weights @ v[shared]
            dweights = g[own] @ v[shared].T
            dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True))
            dscores /= np.sqrt(q.shape[-1])
            dq[own] = dscores @ k[shared]
            dk[shared] += dscores.T @ q[own]
            dv[shared] += weights.T @ g[own]
    return [y, dq, dk, dv]


def check(arrays: Arrays, mask, tolerance: float, dtype=jnp.float32, **arguments: Any) -> None:
    arrays = [jnp.asarray(x, dtype) for x in arrays]
    y, pull = jax.vjp(lambda *x: attend(*x, **arguments), *arrays[:3])
    got = [y, *pull(arrays[3])]
    want = by_definition(*(np.asarray(x, np.float64) for x in arrays), mask)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert np.abs(np.asarray(a, np.float64) - b).max() <= tolerance * np.abs(b).max()


# Chunks of 16 and 3 queries: in one piece, cut evenly, cut with a rest, and one at a time.
@pytest.mark.parametrize(("seq", "chunk"), [(13, 16), (12, 3), (13, 3), (5, 1)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_value_and_gradients_are_those_of_the_formula(seq, chunk, kv_heads) -> None:
    mask = np.broadcast_to(np.tri(seq, dtype=bool), (2, seq, seq))
    check(problem(seq=seq, kv_heads=kv_heads), mask, 2e-6, chunk=chunk)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("chunk", [16, 3])
def test_half_precision_is_close(dtype, chunk) -> None:
    mask = np.broadcast_to(np.tri(13, dtype=bool), (2, 13, 13))
    check(problem(), mask, 2e-2, dtype, chunk=chunk)


@pytest.mark.parametrize("chunk", [16, 3])
def test_segments_do_not_see_each_other(chunk) -> None:
    ids = np.array([[1] * 4 + [2] * 6 + [0] * 3, [3] * 13])
    mask = np.tri(13, dtype=bool) & (ids[:, :, None] == ids[:, None, :])
    check(problem(), mask, 2e-6, segment_ids=jnp.asarray(ids), chunk=chunk)


@pytest.mark.parametrize("chunk", [16, 3])
def test_queries_of_a_cache_see_up_to_their_own_slot(chunk) -> None:
    slots = np.array([[3], [0]]) + np.arange(13)
    mask = np.arange(20) <= slots[:, :, None]
    check(problem(slots=20), mask, 2e-6, slots=jnp.asarray(slots), chunk=chunk)


@pytest.mark.parametrize("chunk", [16, 3])
@pytest.mark.parametrize("traced", [False, True])
def test_a_window_hides_what_is_before_it(chunk, traced) -> None:
    """Three slots for each query, its own included; in packed rows of its own segment alone."""
    ids = jnp.asarray([[0] * 6 + [1] * 7, [0] * 13])
    index = np.arange(13)
    near = index[None, :] > index[:, None] - 3
    window = jnp.int32(3) if traced else 3
    mask = np.broadcast_to((index[None, :] <= index[:, None]) & near, (2, 13, 13))
    check(problem(), mask, 2e-6, chunk=chunk, window=window)
    mask = mask & (np.asarray(ids)[:, :, None] == np.asarray(ids)[:, None, :])
    check(problem(), mask, 2e-6, chunk=chunk, window=window, segment_ids=ids)


def test_a_window_counts_slots_of_a_cache() -> None:
    slots = jnp.asarray([[4, 5, 6], [0, 1, 2]])
    arrays = problem(seq=3, slots=8)
    at = np.asarray(slots)[:, :, None]
    mask = (np.arange(8)[None, None] <= at) & (np.arange(8)[None, None] > at - 2)
    check(arrays, mask, 2e-6, slots=slots, window=2)


def test_scores_that_overflow_without_their_maximum() -> None:
    arrays = problem()
    arrays[0] = arrays[0] * 1e3
    q, k, v = (jnp.asarray(x, jnp.float32) for x in arrays[:3])
    y, pull = jax.vjp(functools.partial(attend, chunk=3), q, k, v)
    assert all(bool(jnp.isfinite(x).all()) for x in (y, *pull(y)))


@pytest.mark.parametrize("packed", [False, True])
def test_memory_grows_with_the_length_not_with_its_square(packed) -> None:
    def temporary(seq: int) -> int:
        def loss(q, k, v, ids):
            return attend(q, k, v, segment_ids=ids if packed else None, chunk=64).sum()

        shapes = [jax.ShapeDtypeStruct((1, seq, h, 16), jnp.float32) for h in (4, 2, 2)]
        ids = jax.ShapeDtypeStruct((1, seq), jnp.int32)
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        return gradient.lower(*shapes, ids).compile().memory_analysis().temp_size_in_bytes

    short, middle, long = (temporary(seq) for seq in (1024, 2048, 4096))
    assert long < 4 * 4096**2  # the scores of one head would take this
    assert long - middle < 2.2 * (middle - short)


def fake_gpu(monkeypatch: pytest.MonkeyPatch, capability: str = "9.0") -> None:
    """A device that cuDNN serves, as far as shapes go."""
    device = types.SimpleNamespace(
        platform="gpu", device_kind="GPU of a test", compute_capability=capability
    )
    monkeypatch.setattr(attention.jax, "devices", lambda: [device])
    from jax._src.cudnn import fused_attention_stablehlo as library

    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(library, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(library, "is_cuda_compute_capability_equal", lambda _: False)


HALF = [jax.ShapeDtypeStruct((2, 64, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]


@pytest.mark.parametrize("implementation", [None, "cudnn"])
def test_cudnn_is_taken_where_it_serves(monkeypatch, implementation) -> None:
    """Also with a sliding window that no row reaches."""
    fake_gpu(monkeypatch)
    gradient = jax.grad(
        lambda *x: attend(*x, implementation=implementation, window=64).astype(jnp.float32).sum(),
        (0, 1, 2),
    )
    text = jax.jit(gradient).trace(*HALF).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text
    assert "stablehlo.exponential" not in text
    gradient = jax.grad(lambda *x: attend(*x, implementation="xla").astype(jnp.float32).sum())
    text = jax.jit(gradient).trace(*HALF).lower(lowering_platforms=("cuda",)).as_text()
    assert "fmha" not in text


IDS = jax.ShapeDtypeStruct((2, 64), jnp.int32)


@pytest.mark.parametrize(
    ("capability", "dtype", "features", "extra", "reason"),
    [
        ("7.5", jnp.float16, 64, {}, "NVIDIA GPU of compute capability 8.0 or more, the device is"),
        ("gfx90a", jnp.float16, 64, {}, "NVIDIA GPU of compute capability 8.0"),
        ("8.0", jnp.float32, 64, {}, "bfloat16 and float16, not float32"),
        ("8.0", jnp.bfloat16, 20, {}, "not 20"),
        ("8.0", jnp.bfloat16, 256, {}, "not 256"),
        ("8.0", jnp.bfloat16, 64, {"slots": IDS}, "key-value cache"),
        ("8.0", jnp.bfloat16, 64, {"segment_ids": IDS}, "packed rows"),
        ("8.0", jnp.bfloat16, 64, {"window": 63}, "rows longer than the sliding window"),
    ],
)
def test_what_cudnn_cannot_serve(monkeypatch, capability, dtype, features, extra, reason) -> None:
    """Asked for, it is an error that says why; not asked for, XLA serves."""
    fake_gpu(monkeypatch, capability)
    q, k, v = (jax.ShapeDtypeStruct((2, 64, heads, features), dtype) for heads in (4, 2, 2))
    with pytest.raises(ValueError, match=f"attention = 'cudnn': .*{reason}.*'xla'"):
        jax.eval_shape(lambda *x, **y: attend(*x, **y, implementation="cudnn"), q, k, v, **extra)
    assert jax.eval_shape(attend, q, k, v, **extra).shape == q.shape


def test_a_refusal_by_the_library_is_a_reason_too(monkeypatch) -> None:
    fake_gpu(monkeypatch)
    from jax._src.cudnn import fused_attention_stablehlo as library

    def missing() -> int:
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(library, "check_cudnn_version", missing)
    with pytest.raises(ValueError, match=r"jax .* says: cuDNN is not detected"):
        jax.eval_shape(lambda *x: attend(*x, implementation="cudnn"), *HALF)
    assert jax.eval_shape(attend, *HALF).dtype == jnp.bfloat16


def test_on_a_cpu_cudnn_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the device is cpu; 'xla' serves here"):
        attend(*(jnp.zeros(x.shape, x.dtype) for x in HALF), implementation="cudnn")


def test_layers_whose_windows_no_row_reaches_are_alike(monkeypatch) -> None:
    """One of two layers has a window of 6."""
    fake_gpu(monkeypatch)
    llama, key = RELATIVES["Qwen2"], jax.random.key(0)
    model = Llama(llama, attention="cudnn", compute_dtype="bfloat16")
    base = jax.eval_shape(Llama(llama).init, key, jnp.zeros((1, 4), jnp.int32))["base"]

    def run(length: int) -> None:
        jax.eval_shape(model.apply, {"base": base}, jnp.zeros((1, length), jnp.int32))

    run(6)
    with pytest.raises(ValueError, match="rows longer than the sliding window"):
        run(8)
