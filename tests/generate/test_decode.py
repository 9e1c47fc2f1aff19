"""Generation: the cache against the full forward pass, ragged batches, sampling, published text."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.generate.decode import generate, sample, stream
from irqlora_jax.model.config import LlamaConfig, RopeScaling
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import by_layer
from tests.models import (
    RELATIVES,
    STORIES,
    needs_stories,
    random_variables,
    stack_tensors,
    tiny_llama,
)

CONFIG = tiny_llama(
    vocab_size=31,
    rope_scaling=RopeScaling("llama3", 4.0, 1.0, 4.0, 8),
    max_position_embeddings=64,
)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8]]


@pytest.fixture(scope="module")
def tiny():
    model = Llama(CONFIG, AdapterConfig(method="iec", rank=2))
    return model, random_variables(model, 0.3)


def full_pass(model, variables, tokens):
    return jax.jit(model.apply)(variables, jnp.asarray(tokens, jnp.int32))


def draw_tokens(*shape):
    rng = np.random.default_rng(2)
    return jnp.asarray(rng.integers(0, CONFIG.vocab_size, shape), jnp.int32)


def test_every_step_equals_the_full_pass(tiny):
    model, variables = tiny
    tokens = draw_tokens(2, 14)
    full = full_pass(model, variables, tokens)
    decode = jax.jit(lambda t, c: model.apply(variables, t, c, method="decode"))
    logits, cache = decode(tokens[:, :5], model.init_cache(2, 16))
    np.testing.assert_allclose(logits, full[:, 4], rtol=1e-5, atol=1e-5)
    for t in range(5, 14):
        logits, cache = decode(tokens[:, t : t + 1], cache)
        np.testing.assert_allclose(logits, full[:, t], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(cache["length"], [14, 14])


@pytest.mark.parametrize("name", ["Qwen3", "SmolLM3"])
def test_a_cache_keeps_windows_and_rotations_of_layers(name):
    model = Llama(RELATIVES[name])
    variables = random_variables(model, 0.3)
    tokens = draw_tokens(2, 14)
    full = full_pass(model, variables, tokens)
    decode = jax.jit(lambda t, c: model.apply(variables, t, c, method="decode"))
    logits, cache = decode(tokens[:, :12], model.init_cache(2, 16))
    np.testing.assert_allclose(logits, full[:, 11], rtol=1e-5, atol=1e-5)
    for t in (12, 13):
        logits, cache = decode(tokens[:, t : t + 1], cache)
        np.testing.assert_allclose(logits, full[:, t], rtol=1e-5, atol=1e-5)
    layers = variables | {"base": by_layer(variables["base"], model.config.num_hidden_layers)}
    np.testing.assert_allclose(full_pass(model, layers, tokens), full, rtol=1e-5, atol=1e-5)


def test_a_prompt_in_parts_equals_the_prompt_at_once(tiny):
    model, variables = tiny
    tokens = draw_tokens(2, 9)
    whole = full_pass(model, variables, tokens)[:, -1]
    # Row 0 has 2 + 7 tokens, row 1 has 6 + 3; the rest is padding.
    first = jnp.asarray([2, 6])
    rest = np.stack([np.roll(row, -n)[:7] for row, n in zip(tokens, (2, 6), strict=True)])
    decode = jax.jit(lambda t, c, n: model.apply(variables, t, c, n, method="decode"))
    _, cache = decode(tokens[:, :6], model.init_cache(2, 13), first)
    logits, cache = decode(jnp.asarray(rest), cache, 9 - first)
    np.testing.assert_allclose(logits, whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(cache["length"], [9, 9])


def test_greedy_is_the_argmax_of_the_full_pass(tiny):
    model, variables = tiny
    rows = generate(model, variables, PROMPTS, 12)
    padded = [(prompt + new + [0] * 12)[:19] for prompt, new in zip(PROMPTS, rows, strict=True)]
    best = np.argmax(full_pass(model, variables, padded), -1)
    for row, prompt, new in zip(best, PROMPTS, rows, strict=True):
        assert new == row[len(prompt) - 1 :][:12].tolist()
        assert len(set(new)) > 2


def test_ragged_batch_equals_one_by_one(tiny):
    model, variables = tiny
    alone = [generate(model, variables, [prompt], 12)[0] for prompt in PROMPTS]
    assert generate(model, variables, PROMPTS, 12) == alone
    assert generate(model, variables, [], 12) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_its_type(tiny, dtype):
    model, variables = tiny
    half = Llama(CONFIG, model.adapter, compute_dtype=dtype)
    decode = jax.jit(lambda t, c: half.apply(variables, t, c, method="decode"))
    logits, cache = decode(jnp.asarray([PROMPTS[0]]), half.init_cache(1, 8))
    assert cache["k"].dtype == jnp.dtype(dtype)
    expected = full_pass(model, variables, [PROMPTS[0]])[:, -1]
    assert np.linalg.norm(logits - expected) < 0.05 * np.linalg.norm(expected)


def test_eos_ends_its_row_only(tiny):
    model, variables = tiny
    free = generate(model, variables, PROMPTS, 12)
    eos = free[0][3]
    stopped = generate(model, variables, PROMPTS, 12, eos_token_ids=(eos, 30))
    for row, whole in zip(stopped, free, strict=True):
        ends = [i for i, token in enumerate(whole) if token in (eos, 30)]
        assert row == (whole[: ends[0] + 1] if ends else whole)
    assert len(stopped[0]) <= 4


def test_one_candidate_is_greedy(tiny):
    model, variables = tiny
    settings = {"temperature": 2.0, "top_k": 1, "top_p": 0.9, "key": jax.random.key(5)}
    greedy = generate(model, variables, PROMPTS, 12)
    assert generate(model, variables, PROMPTS, 12, **settings) == greedy


@pytest.mark.parametrize("limits", [(1.0, 1, None), (1.0, None, 1e-6), (1e-4, None, None)])
def test_narrow_limits_are_greedy(limits):
    temperature, top_k, top_p = limits
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((50, 9)), jnp.float32)
    top_p = None if top_p is None else jnp.float32(top_p)
    drawn = sample(jax.random.key(0), logits, jnp.float32(temperature), top_k, top_p)
    np.testing.assert_array_equal(drawn, np.argmax(logits, -1))


def test_sampling_follows_the_key(tiny):
    model, variables = tiny
    draw = lambda key: generate(  # noqa: E731
        model, variables, PROMPTS, 10, temperature=1.5, top_k=40, key=jax.random.key(key)
    )
    assert draw(0) == draw(0) != draw(1)


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (None, None, [0, 1, 2, 3, 4]),
        (3, None, [0, 1, 3]),
        (None, 0.75, [1, 3]),
        (None, 0.85, [0, 1, 3]),
        (None, 1.0, [0, 1, 2, 3, 4]),
        # Of the 3 likeliest, 0.5 : 0.3 : 0.1, the first two make 0.889.
        (3, 0.85, [1, 3]),
    ],
)
def test_sample_distribution(top_k, top_p, kept):
    p = np.asarray([0.1, 0.5, 0.06, 0.3, 0.04], np.float32)
    temperature = 0.5
    # Softmax at this temperature squares and renormalizes: undo it, so that p comes out.
    logits = jnp.broadcast_to(jnp.log(p)[None, :] * temperature, (20000, 5))
    top_p = None if top_p is None else jnp.float32(top_p)
    drawn = sample(jax.random.key(0), logits, jnp.float32(temperature), top_k, top_p)
    counts = np.bincount(np.asarray(drawn), minlength=5)
    expected = np.where(np.isin(np.arange(5), kept), p, 0)
    np.testing.assert_allclose(counts / 20000, expected / expected.sum(), atol=0.015)
    assert np.all((counts > 0) == (expected > 0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 58}, "has 7 tokens, and 65 with max_new_tokens = 58: expected"
                                 " at most max_position_embeddings = 64"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": 1.0}, "key = None"),
        ({"top_p": 0.0}, "top_p = 0.0: expected 0 < top_p <= 1"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"top_k": 0}, "top_k = 0"),
        ({"prompts": [[1], []]}, "prompts[1] = []"),
        ({"prompts": [[1, 31]]}, "token of prompts[0] = 31: expected 0 <= token < 31"),
        ({"prompts": [[-1]]}, "token of prompts[0] = -1"),
    ],
)  # fmt: skip
def test_faults(tiny, arguments, message):
    with pytest.raises(ValueError) as error:
        generate(*tiny, **({"prompts": PROMPTS, "max_new_tokens": 4} | arguments))
    assert message in str(error.value)


def test_the_last_position_can_be_reached(tiny):
    new = generate(*tiny, PROMPTS, 57)
    assert [len(row) for row in new] == [57, 57, 57]


def test_model_without_adapters(tiny):
    model, variables = tiny
    silent = jax.tree.map(jnp.zeros_like, variables["params"])
    adapted = generate(model, {"params": silent, "base": variables["base"]}, PROMPTS, 5)
    alone = dataclasses.replace(model, adapter=None)
    assert generate(alone, {"base": variables["base"]}, PROMPTS, 5) == adapted


@pytest.mark.parametrize(
    "drawing",
    [{}, {"temperature": 1.5, "top_k": 20, "top_p": 0.95}],
)
def test_a_stream_is_generate_token_by_token(tiny, drawing):
    if drawing:
        drawing = drawing | {"key": jax.random.key(3)}
    for prompt in (PROMPTS[0], [*range(1, 31), 5, 6, 7]):
        whole = generate(*tiny, [prompt], 12, **drawing)[0]
        assert list(stream(*tiny, prompt, 12, **drawing)) == whole
        eos = whole[4]
        stopped = list(stream(*tiny, prompt, 12, eos_token_ids=(eos,), **drawing))
        assert stopped == whole[: whole.index(eos) + 1]


def test_a_stream_reaches_the_last_position(tiny):
    model, variables = tiny
    layers = by_layer(variables["base"], model.config.num_hidden_layers)
    other = list(stream(*tiny, PROMPTS[0], 57, decoding=(model, {**variables, "base": layers})))
    assert other == list(stream(*tiny, PROMPTS[0], 57)) == generate(*tiny, PROMPTS[:1], 57)[0]


def test_a_stream_says_what_is_wrong_at_once(tiny):
    with pytest.raises(ValueError, match="expected at most max_position_embeddings = 64"):
        stream(*tiny, PROMPTS[0], 58)
    with pytest.raises(ValueError, match="key = None"):
        stream(*tiny, PROMPTS[0], 5, temperature=1.0)


@needs_stories
def test_published_text_of_stories260k():
    """A trained model writes what its author published, token for token."""
    tokenizers = pytest.importorskip("tokenizers")
    config = LlamaConfig.from_dict(json.loads((STORIES / "config.json").read_text()))
    tensors = load_file(STORIES / "model.safetensors")

    base = stack_tensors(tensors, config)
    published = (STORIES / "SOURCE.md").read_text().split("-t 0.0\n")[1].split("```")[0]
    tokenizer = tokenizers.Tokenizer.from_file(str(STORIES / "tokenizer.json"))
    new = generate(Llama(config), {"base": base}, [[config.bos_token_id]], 220)[0]
    text = tokenizer.decode(new)
    assert len(new) == 220 and len(text) > 400
    assert published.startswith(text)
