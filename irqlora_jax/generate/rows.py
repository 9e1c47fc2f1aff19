"""A batch whose texts start and end at different times, each in a row of its own.

All rows share one cache and one program a step. The program computes every row, used or not. So
the numbers of a row do not depend on what the other rows hold, or on how many are in use.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, UInt32

from irqlora_jax.generate.decode import sample
from irqlora_jax.model.layer import Cache
from irqlora_jax.model.llama import Llama

_SHORTEST = 32
"""Prompts are padded to this length times a power of 2, so that few lengths are compiled."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the tokens of a text are chosen.

    Attributes:
        temperature: 0: greedy decoding. Else: sample from softmax(logits / temperature).
        top_p: sample only from the smallest set of tokens with a total probability of at least p.
        seed: seed of the sampling, below 2**32.
        choice: texts with the same seed and another number are drawn independently.
    """

    temperature: float = 0.0
    top_p: float | None = None
    seed: int = 0
    choice: int = 0


class Rows:
    """Decodes up to `size` texts at the same time.

    Attributes:
        size: number of rows.
        slots: largest number of tokens of a prompt and its text.
    """

    def __init__(
        self,
        model: Llama,
        variables: Mapping[str, Any],
        size: int,
        slots: int,
        decoding: tuple[Llama, Mapping[str, Any]] | None = None,
    ) -> None:
        """Makes empty rows.

        Args:
            model: the model.
            variables: its collections, {"params": adapters, "base": base}.
            size: number of rows.
            slots: largest number of tokens of a row.
            decoding: the same model and variables in a form that is faster with a single token, for
                what follows the prompt.
        """
        self.size, self.slots = size, min(slots, model.config.max_position_embeddings)
        self._prompts = model, variables
        self._decoding = self._prompts if decoding is None else decoding
        self._cache = model.init_cache(size, self.slots)
        self._tokens, self._lengths, self._steps = (np.zeros(size, np.int32) for _ in range(3))
        self._temperature = np.zeros(size, np.float32)
        self._top_p = np.full(size, np.inf, np.float32)
        self._seeds, self._choices = (np.zeros(size, np.uint32) for _ in range(2))

    @property
    def cache_bytes(self) -> int:
        """Memory of the cache, in bytes."""
        return sum(leaf.nbytes for leaf in self._cache.values())

    def start(self, row: int, prompt: Sequence[int], sampling: Sampling) -> int:
        """Starts a text in a row, over whatever it held, and returns the first new token.

        Args:
            row: number of the row.
            prompt: token ids: at least one, and fewer than `slots`.
            sampling: how to choose the tokens.
        """
        width = _SHORTEST
        while width < len(prompt):
            width *= 2
        tokens = np.zeros((1, min(width, self.slots)), np.int32)
        tokens[0, : len(prompt)] = prompt
        self._temperature[row] = sampling.temperature
        self._top_p[row] = np.inf if sampling.top_p is None else sampling.top_p
        self._seeds[row], self._choices[row] = sampling.seed, sampling.choice
        self._lengths[row], self._steps[row] = len(prompt), 0
        logits, self._cache = _prefill(
            *self._prompts,
            jnp.asarray(tokens),
            self._cache,
            jnp.asarray([len(prompt)], jnp.int32),
            jnp.int32(row),
        )
        only = slice(row, row + 1)
        return self._chosen(_sample_alone(logits, *self._draws(only)), only)[0]

    def step(self) -> list[int]:
        """Extends every text by a token. Returns the next token of each row.

        The tokens of rows without a text mean nothing.
        """
        model, variables = self._decoding
        tokens, self._cache = _step(
            model,
            variables,
            jnp.asarray(self._tokens),
            self._cache,
            jnp.asarray(self._lengths),
            *self._draws(slice(None)),
        )
        # A text that has ended may go on in its row. It must not run out of the cache.
        self._lengths = np.minimum(self._lengths + 1, self.slots - 1)
        return self._chosen(tokens, slice(None))

    def _draws(self, rows: slice) -> tuple[Array, ...]:
        each = self._temperature, self._top_p, self._seeds, self._choices, self._steps
        return tuple(jnp.asarray(values[rows]) for values in each)

    def _chosen(self, tokens: Array, rows: slice) -> list[int]:
        self._tokens[rows] = np.asarray(tokens)
        self._steps[rows] += 1
        return self._tokens[rows].tolist()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _prefill(
    model: Llama,
    variables: Mapping[str, Any],
    tokens: Int[Array, "1 seq"],
    cache: Cache,
    lengths: Int[Array, " 1"],
    row: Int[Array, ""],
) -> tuple[Float32[Array, "1 vocab"], Cache]:
    """Returns the logits after a prompt, and the cache with the prompt at the start of a row."""
    own = model.init_cache(1, tokens.shape[1])
    logits, own = cast(Any, model.apply(variables, tokens, own, lengths, method="decode"))
    # What the row held behind the prompt stays. It is overwritten before a query attends to it.
    place = (0, row, 0, 0, 0)
    new = {name: jax.lax.dynamic_update_slice(cache[name], own[name], place) for name in ("k", "v")}
    return logits, cache | new


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _step(
    model: Llama,
    variables: Mapping[str, Any],
    tokens: Int[Array, " batch"],
    cache: Cache,
    lengths: Int[Array, " batch"],
    *draws: Array,
) -> tuple[Int[Array, " batch"], Cache]:
    """Returns the next token of each row, and the cache extended by the given tokens."""
    cache = cache | {"length": lengths}
    logits, cache = cast(Any, model.apply(variables, tokens[:, None], cache, method="decode"))
    return sample_rows(logits, *draws), cache


def sample_rows(
    logits: Float32[Array, "batch vocab"],
    temperature: Float32[Array, " batch"],
    top_p: Float32[Array, " batch"],
    seeds: UInt32[Array, " batch"],
    choices: UInt32[Array, " batch"],
    steps: Int[Array, " batch"],
) -> Int[Array, " batch"]:
    """Samples one token a row, as `decode.sample` does with settings for each row.

    Args:
        logits: of the next token.
        temperature: 0: greedy decoding.
        top_p: infinite: all tokens.
        seeds: the key of a row is fold_in(fold_in(key(seed), choice), step).
        choices: see `seeds`.
        steps: number of tokens that the text of a row has.
    """

    def draw(nucleus: bool) -> Array:
        def one(logits: Array, t: Array, p: Array, seed: Array, choice: Array, n: Array) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), choice), n)
            divisor = jnp.where(t > 0, t, jnp.ones_like(t))
            return sample(key, logits[None], divisor, None, p if nucleus else None)[0]

        drawn = jax.vmap(one)(logits, temperature, top_p, seeds, choices, steps)
        return jnp.where(temperature > 0, drawn, sample_greedily())

    def sample_greedily() -> Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    # Sorting the vocabulary takes long, so it is left out if no row needs it.
    drawn = temperature > 0
    needs = jnp.any(drawn).astype(jnp.int32) + jnp.any(drawn & (top_p < 1)).astype(jnp.int32)
    return jax.lax.switch(needs, [sample_greedily, lambda: draw(False), lambda: draw(True)])


_sample_alone = jax.jit(sample_rows)
