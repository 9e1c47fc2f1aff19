"""Loss of held-out examples, and perplexity of a text."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jaxtyping import Array, Float32, Int

from irqlora_jax.data.batches import eval_batches
from irqlora_jax.data.examples import Example, encode_source
from irqlora_jax.llama import Llama, head_weight
from irqlora_jax.loss import row_cross_entropy


@functools.partial(jax.jit, static_argnames=("model", "chunk"))
def row_nll(
    model: Llama, variables: Any, batch: Mapping[str, Any], chunk: int = 1024
) -> tuple[Float32[Array, " batch"], Float32[Array, " batch"]]:
    """Sum of the negative log-likelihoods (nats) of each row's targets, and their number."""
    tokens, targets = batch["tokens"], batch["targets"]
    features = cast(Array, model.apply(variables, tokens, method="features"))
    return row_cross_entropy(features, head_weight(variables["base"]), tokens, targets, chunk)


def nll(
    model: Llama, variables: Any, batch: Mapping[str, Any], chunk: int = 1024
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Sum of the negative log-likelihoods (nats) of the targets of a batch, and their number."""
    total, count = row_nll(model, variables, batch, chunk)
    return total.sum(), count.sum()


def evaluation_loss(
    model: Llama,
    variables: Any,
    examples: Sequence[Example],
    batch_size: int = 8,
    chunk: int = 1024,
) -> float:
    """Mean negative log-likelihood (nats) per target of all examples.

    Args:
        model: the architecture.
        variables: {"params": adapters, "base": base}.
        examples: each counts with the number of its targets.
        batch_size: rows computed at one time.
        chunk: positions whose logits exist at one time.

    Raises:
        ValueError: no examples, or none with a target.
    """
    if not examples:
        raise ValueError("there are no examples to evaluate")
    # Read at the end only, so that the device never waits for Python.
    sums = [row_nll(model, variables, part, chunk) for part in eval_batches(examples, batch_size)]
    total = sum(float(np.asarray(values, np.float64).sum()) for values, _ in sums)
    count = sum(float(np.asarray(values, np.float64).sum()) for _, values in sums)
    if count == 0:
        raise ValueError("none of the examples to evaluate has a target")
    return total / count


def perplexity(
    model: Llama,
    variables: Any,
    text: str,
    tokenizer: Any,
    *,
    window: int = 2048,
    stride: int | None = None,
    batch_size: int = 1,
    chunk: int = 1024,
) -> float:
    """exp of the mean negative log-likelihood per token of a text.

    The tokens (bos in front, once) are read through windows that start every `stride` tokens. All
    tokens but the very first are scored, each exactly once, in the first window that holds it in
    its second place or later. With the default stride, window - 1, a window starts at the last
    token of the one before, and a token sees between 1 and window - 1 tokens of context: the usual
    figure for language models. With a smaller stride all but the first window's tokens see at
    least window - stride tokens, at the price of more computation.

    Args:
        model: the architecture.
        variables: {"params": adapters, "base": base}.
        text: taken as it is.
        tokenizer: of transformers.
        window: tokens that the model sees at one time.
        stride: tokens from one window to the next, 1 to window - 1.
        batch_size: windows computed at one time.
        chunk: positions whose logits exist at one time.

    Raises:
        ValueError: the text has no token to score, or a bad window or stride.
    """
    tokens = np.array(encode_source(tokenizer, [text])[0], np.int32)
    examples = text_windows(tokens, window, stride)
    return math.exp(evaluation_loss(model, variables, examples, batch_size, chunk))


def text_windows(
    tokens: Int[np.ndarray, " seq"], window: int, stride: int | None = None
) -> list[Example]:
    """The windows of `perplexity`; targets are the tokens that a window scores."""
    if window < 2:
        raise ValueError(f"window = {window}: accepted is a whole number of at least 2")
    stride = window - 1 if stride is None else stride
    if not 1 <= stride < window:
        raise ValueError(f"stride = {stride}: accepted is 1 to window - 1 = {window - 1}")
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} tokens: accepted are 2 or more")
    examples, scored = [], 1
    for start in range(0, len(tokens), stride):
        part = tokens[start : start + window]
        examples.append(Example(part, np.arange(start, start + len(part)) >= scored))
        scored = start + len(part)
        if scored == len(tokens):
            break
    return examples
