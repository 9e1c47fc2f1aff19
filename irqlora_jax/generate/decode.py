"""Decodes tokens: one prefill of the prompts, then one token a step with a key-value cache.

Prompts of different lengths share a batch. Rows are padded on the right, and each row keeps its
own length. So the result of a row does not depend on the other rows.
"""

import contextlib
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray

from irqlora_jax.messages import progress_bar
from irqlora_jax.model.layer import Cache
from irqlora_jax.model.llama import Llama
from irqlora_jax.processes import fetch
from irqlora_jax.text import require

# Prompts are padded to a multiple of this length, so that few lengths are compiled.
_PROMPT_STEP = 32
# The slots of the cache of a stream are a multiple of this, for the same reason.
_CACHE_STEP = 256


def generate(
    model: Llama,
    variables: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: PRNGKeyArray | None = None,
    eos_token_ids: Collection[int] = (),
) -> list[list[int]]:
    """Continues each prompt.

    Args:
        model: the model.
        variables: its collections, {"params": adapters, "base": base}.
        prompts: token ids, at least one for each prompt.
        max_new_tokens: maximum number of new tokens.
        temperature: 0: greedy decoding. Else: sample tokens from softmax(logits / temperature).
        top_k: sample only from the k most likely tokens.
        top_p: sample only from the smallest set of tokens with a total probability of at least p.
        key: random key of the sampling; the same key gives the same text.
        eos_token_ids: a row ends with the first of these tokens, which is included.

    Returns:
        The new tokens of each prompt.

    Raises:
        ValueError: an invalid argument, or more tokens than positions of the model.
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p, key)
    if not prompts:
        return []
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    width = -(-int(lengths.max()) // _PROMPT_STEP) * _PROMPT_STEP
    width = min(width, model.config.max_position_embeddings)
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    new = _loop(
        model,
        variables,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        max_new_tokens,
        jnp.float32(temperature) if temperature > 0 else None,
        top_k,
        None if top_p is None else jnp.float32(top_p),
        jax.random.key(0) if key is None else key,
        tuple(sorted(eos_token_ids)),
    )
    return [_cut_after_eos(row, eos_token_ids) for row in fetch(new).tolist()]


def stream(
    model: Llama,
    variables: Mapping[str, Any],
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: PRNGKeyArray | None = None,
    eos_token_ids: Collection[int] = (),
    decoding: tuple[Llama, Mapping[str, Any]] | None = None,
) -> Iterator[int]:
    """Yields the tokens of `generate` for one prompt, one by one.

    It has the same arguments and errors as `generate`, and `decoding`: the same model and variables
    in a form that is faster with a single token, for what follows the prompt.
    """
    _check(model, [prompt], max_new_tokens, temperature, top_k, top_p, key)
    return _stream(
        model,
        variables,
        (model, variables) if decoding is None else decoding,
        prompt,
        max_new_tokens,
        jnp.float32(temperature) if temperature > 0 else None,
        top_k,
        None if top_p is None else jnp.float32(top_p),
        jax.random.key(0) if key is None else key,
        eos_token_ids,
    )


def _stream(
    model: Llama,
    variables: Mapping[str, Any],
    decoding: tuple[Llama, Mapping[str, Any]],
    prompt: Sequence[int],
    max_new_tokens: int,
    temperature: Float32[Array, ""] | None,
    top_k: int | None,
    top_p: Float32[Array, ""] | None,
    key: PRNGKeyArray,
    eos_token_ids: Collection[int],
) -> Iterator[int]:
    limit = model.config.max_position_embeddings
    width = min(-(-len(prompt) // _PROMPT_STEP) * _PROMPT_STEP, limit)
    slots = min(-(-(len(prompt) + max_new_tokens) // _CACHE_STEP) * _CACHE_STEP, limit)
    tokens = np.zeros((1, width), np.int32)
    tokens[0, : len(prompt)] = prompt
    lengths = jnp.asarray([len(prompt)], jnp.int32)
    cache = model.init_cache(1, slots)
    token = jnp.asarray(tokens)
    for step in range(max_new_tokens):
        # The first two tokens compile a program each.
        with progress_bar("Compiling the decoder") if step < 2 else contextlib.nullcontext():
            token, cache = _advance(
                *((model, variables) if step == 0 else decoding),
                token,
                cache,
                lengths if step == 0 else None,
                temperature,
                top_k,
                top_p,
                key,
                jnp.int32(step),
            )
            new = int(np.asarray(token)[0, 0])
        yield new
        if new in eos_token_ids:
            return


@functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=3)
def _advance(
    model: Llama,
    variables: Mapping[str, Any],
    tokens: Int[Array, "1 seq"],
    cache: Cache,
    lengths: Int[Array, " 1"] | None,
    temperature: Float32[Array, ""] | None,
    top_k: int | None,
    top_p: Float32[Array, ""] | None,
    key: PRNGKeyArray,
    step: Int[Array, ""],
) -> tuple[Int[Array, "1 1"], Cache]:
    """Returns the next token, and the cache extended by the given tokens."""
    logits, after = cast(Any, model.apply(variables, tokens, cache, lengths, method="decode"))
    token = sample(jax.random.fold_in(key, step), logits, temperature, top_k, top_p)
    return token[:, None], after


def sample(
    key: PRNGKeyArray,
    logits: Float32[Array, "batch vocab"],
    temperature: Float32[Array, ""] | None,
    top_k: int | None = None,
    top_p: Float32[Array, ""] | None = None,
) -> Int[Array, " batch"]:
    """Samples one token a row; greedy if temperature is None. `top_k` is applied before `top_p`."""
    if temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if top_k is not None:
        ranked = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0]
        logits = jnp.where(logits < ranked[:, -1:], -jnp.inf, logits)
    if top_p is not None:
        logits = jnp.where(_nucleus(logits, top_p), logits, -jnp.inf)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def _nucleus(
    logits: Float[Array, "batch vocab"], top_p: Float32[Array, ""]
) -> Bool[Array, "batch vocab"]:
    """Marks the smallest set of tokens with a total probability of at least `top_p`."""
    order = jnp.argsort(logits, axis=-1, descending=True)
    ranked = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    # Keep a token if the more likely ones have less than p in total. The first is always kept.
    before = jnp.cumsum(ranked, axis=-1) - ranked
    rank = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(before < top_p, rank, axis=-1)


@functools.partial(jax.jit, static_argnums=(0, 4, 6, 9))
def _loop(
    model: Llama,
    variables: Mapping[str, Any],
    tokens: Int[Array, "batch seq"],
    lengths: Int[Array, " batch"],
    max_new_tokens: int,
    temperature: Float32[Array, ""] | None,
    top_k: int | None,
    top_p: Float32[Array, ""] | None,
    key: PRNGKeyArray,
    eos_token_ids: tuple[int, ...],
) -> Int[Array, "batch new"]:
    """Returns the new tokens. Values after the eos of a row are undefined."""
    batch, width = tokens.shape
    eos = jnp.asarray(eos_token_ids, jnp.int32)

    def pick(step: Any, logits: Array, new: Array, done: Array) -> tuple[Array, Array, Array]:
        token = sample(jax.random.fold_in(key, step), logits, temperature, top_k, top_p)
        return token, new.at[:, step].set(token), done | jnp.isin(token, eos)

    def more(state: tuple) -> Array:
        step, *_, done = state
        return (step < max_new_tokens) & ~jnp.all(done)

    def advance(state: tuple) -> tuple:
        step, cache, token, new, done = state
        logits, cache = model.apply(variables, token[:, None], cache, method="decode")
        return step + 1, cache, *pick(step, logits, new, done)

    cache = model.init_cache(batch, width + max_new_tokens)
    logits, cache = model.apply(variables, tokens, cache, lengths, method="decode")
    new = jnp.zeros((batch, max_new_tokens), jnp.int32)
    first = pick(0, logits, new, jnp.zeros((batch,), bool))
    return jax.lax.while_loop(more, advance, (jnp.int32(1), cache, *first))[3]


def _cut_after_eos(tokens: list[int], eos_token_ids: Collection[int]) -> list[int]:
    ends = (i for i, token in enumerate(tokens) if token in eos_token_ids)
    return tokens[: next(ends, len(tokens)) + 1]


def _check(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    key: PRNGKeyArray | None,
) -> None:
    ok = max_new_tokens >= 1
    require(ok, "max_new_tokens", max_new_tokens, "a whole number of at least 1")
    # This form also rejects nan.
    ok = 0 <= temperature < float("inf")
    require(ok, "temperature", temperature, "0 or a positive number")
    ok = top_k is None or top_k >= 1
    require(ok, "top_k", top_k, "a whole number of at least 1, or None")
    require(top_p is None or 0 < top_p <= 1, "top_p", top_p, "0 < top_p <= 1, or None")
    require(temperature == 0 or key is not None, "key", key, "a random key with temperature > 0")
    vocab, limit = model.config.vocab_size, model.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        require(len(prompt) > 0, f"prompts[{i}]", prompt, "at least one token")
        bad = next((token for token in prompt if not 0 <= token < vocab), None)
        require(bad is None, f"token of prompts[{i}]", bad, f"0 <= token < {vocab}")
        if len(prompt) + max_new_tokens > limit:
            raise ValueError(
                f"prompts[{i}] has {len(prompt)} tokens, and {len(prompt) + max_new_tokens} with "
                f"max_new_tokens = {max_new_tokens}: expected at most "
                f"max_position_embeddings = {limit}"
            )
