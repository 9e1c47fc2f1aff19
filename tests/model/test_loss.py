"""The chunked cross-entropy against all logits at once in float64."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.model.loss import cross_entropy, row_cross_entropy


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def random_problem(batch=3, seq=13, hidden=6, vocab=11, seed=0):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(batch, seq, hidden)).astype(np.float32)
    head = rng.normal(size=(vocab, hidden)).astype(np.float32)
    tokens = rng.integers(0, vocab, (batch, seq)).astype(np.int32)
    targets = rng.random((batch, seq)) < 0.6
    return features, head, tokens, targets


def plain_loss(features, head, tokens, targets):
    """Value, count, and the gradients to features and head; all logits at once, in float64."""
    features, head = features.astype(np.float64), head.astype(np.float64)
    logs = log_softmax(features[:, :-1] @ head.T)
    hot = np.eye(len(head))[tokens[:, 1:]]
    mask = targets[:, 1:, None]
    slope = np.zeros((*tokens.shape, len(head)))
    slope[:, :-1] = (np.exp(logs) - hot) * mask
    d_head = np.einsum("btv,bth->vh", slope, features)
    return -(logs * hot * mask).sum(), mask.sum(), slope @ head, d_head


@pytest.mark.parametrize("chunk", [1, 15, 1000])  # 13, 3 (ragged) and 1 part
def test_cross_entropy_and_gradients_are_those_of_all_logits(chunk):
    problem = random_problem()
    arrays = [jnp.asarray(x) for x in problem]
    (value, count), slopes = jax.value_and_grad(cross_entropy, argnums=(0, 1), has_aux=True)(
        *arrays, chunk
    )
    want_value, want_count, *want_slopes = plain_loss(*problem)
    assert value.dtype == count.dtype == jnp.float32
    np.testing.assert_allclose(value, want_value, rtol=1e-6)
    assert float(count) == want_count
    for slope, want in zip(slopes, want_slopes, strict=True):
        np.testing.assert_allclose(slope, want, rtol=1e-5, atol=1e-6)


def test_cross_entropy_by_row_sums_to_the_whole():
    problem = [jnp.asarray(x) for x in random_problem()]
    values, counts = row_cross_entropy(*problem, chunk=6)
    for row in range(3):
        alone = [x if x.shape[0] == 11 else x[row : row + 1] for x in problem]
        value, count = cross_entropy(*alone, chunk=6)
        np.testing.assert_allclose(values[row], value, rtol=1e-6)
        assert counts[row] == count


def test_no_targets_give_zero_and_no_gradient():
    features, head, tokens, targets = (jnp.asarray(x) for x in random_problem())
    only_first = jnp.zeros_like(targets).at[:, 0].set(True)  # which nothing predicts
    for none in (jnp.zeros_like(targets), only_first):
        gradient = jax.value_and_grad(cross_entropy, argnums=(0, 1), has_aux=True)
        (value, count), slopes = gradient(features, head, tokens, none, 5)
        assert value == 0 and count == 0
        assert all((slope == 0).all() for slope in slopes)


def test_bfloat16_features_have_float32_logits():
    features, head, tokens, targets = random_problem(hidden=64)
    rounded = [jnp.asarray(x).astype(jnp.bfloat16) for x in (features / 8, head)]
    value, _ = cross_entropy(*rounded, jnp.asarray(tokens), jnp.asarray(targets), 7)
    exact = [np.asarray(x).astype(np.float64) for x in rounded]
    # Logits rounded to bfloat16 would be off by 1e-3.
    np.testing.assert_allclose(value, plain_loss(*exact, tokens, targets)[0], rtol=2e-6)


def test_huge_logits_are_no_overflow():
    features, head, tokens, targets = random_problem()
    problem = (features * 1e3, head * 1e3, tokens, targets)
    value, _ = cross_entropy(*(jnp.asarray(x) for x in problem), 7)
    np.testing.assert_allclose(value, plain_loss(*problem)[0], rtol=1e-6)


def test_neither_pass_holds_all_logits():
    batch, seq, hidden, vocab, chunk = 2, 64, 4, 1000, 16
    arrays = [jnp.asarray(x) for x in random_problem(batch, seq, hidden, vocab)]
    gradient = jax.grad(lambda f, *rest: cross_entropy(f, *rest, chunk)[0])
    sizes = [
        math.prod(int(n) for n in shape.split(","))
        for shape in re.findall(r"\[([\d,]+)\]", str(jax.make_jaxpr(gradient)(*arrays)))
    ]
    assert max(sizes) == chunk * vocab


def test_a_batch_spread_over_devices_stays_spread():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    problem = [jnp.asarray(x) for x in random_problem(batch=8)]
    spread = [jax.device_put(x, whole if i == 1 else rows) for i, x in enumerate(problem)]
    compiled = jax.jit(cross_entropy, static_argnums=4).lower(*spread, 24).compile()
    np.testing.assert_allclose(compiled(*spread)[0], cross_entropy(*problem, 24)[0], rtol=1e-6)
    text = compiled.as_text()
    assert "all-reduce" in text
    assert not re.search("all-gather|all-to-all|collective-permute", text)
