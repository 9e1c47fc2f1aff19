"""Computes the loss of held-out examples and the perplexity of a text."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jaxtyping import Array, Float32, Int

from irqlora_jax.data.batches import eval_batches
from irqlora_jax.data.examples import Example, encode_source
from irqlora_jax.messages import progress_bar
from irqlora_jax.model.llama import Llama, head_weight
from irqlora_jax.model.loss import row_cross_entropy
from irqlora_jax.processes import fetch


@functools.partial(jax.jit, static_argnames=("model", "chunk"))
def row_nll(
    model: Llama, variables: Any, batch: Mapping[str, Any], chunk: int = 1024
) -> tuple[Float32[Array, " batch"], Float32[Array, " batch"]]:
    """Sums the negative log-likelihoods (nats) of the targets of each row; also their number."""
    tokens, targets = batch["tokens"], batch["targets"]
    features = cast(Array, model.apply(variables, tokens, method="features"))
    return row_cross_entropy(features, head_weight(variables["base"]), tokens, targets, chunk)


def nll(
    model: Llama, variables: Any, batch: Mapping[str, Any], chunk: int = 1024
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Sums the negative log-likelihoods (nats) of the targets of a batch; also their number."""
    total, count = row_nll(model, variables, batch, chunk)
    return total.sum(), count.sum()


def evaluation_loss(
    model: Llama,
    variables: Any,
    examples: Sequence[Example],
    batch_size: int = 8,
    chunk: int = 1024,
) -> float:
    """Computes the mean negative log-likelihood (nats) over the targets of all examples.

    Args:
        model: the architecture.
        variables: {"params": adapters, "base": base}.
        examples: their weight in the mean is their number of targets.
        batch_size: rows of a forward pass.
        chunk: positions whose logits are in memory at the same time.

    Raises:
        ValueError: no examples, or no targets.
    """
    total, count = _sums(model, variables, examples, batch_size, chunk)
    return total / count


def _sums(
    model: Llama,
    variables: Any,
    examples: Sequence[Example],
    batch_size: int,
    chunk: int,
    done: Callable[[int], Any] | None = None,
) -> tuple[float, int]:
    """Sums the negative log-likelihoods (nats) of all targets; also their number."""
    if not examples:
        raise ValueError("there are no examples to evaluate")
    total, count = 0.0, 0.0
    pending: list[Any] = []
    parts = eval_batches(examples, batch_size)
    for part in (*parts, None):
        if part is not None:
            pending.append(row_nll(model, variables, part, chunk))
        # Read results two batches late, so that the device never waits for the host.
        while pending and (part is None or len(pending) > 2):
            values, counts = (fetch(x).astype(np.float64) for x in pending.pop(0))
            total, count = total + values.sum(), count + counts.sum()
            if done is not None:
                done(int(counts.sum()))
    if count == 0:
        raise ValueError("none of the examples to evaluate has a target")
    return float(total), int(count)


@dataclasses.dataclass(frozen=True)
class TextScores:
    """Scores of a text."""

    perplexity: float
    """exp(nll)."""
    nll: float
    """Mean negative log-likelihood of a token, in nats."""
    bits_per_byte: float
    """Negative log-likelihood of the text in bits, divided by its length in UTF-8 bytes. It can be
    compared between tokenizers."""
    tokens: int
    """Number of tokens that were scored."""
    bytes: int
    window: int
    """Length of a window, in tokens."""
    stride: int
    """Tokens from the start of one window to the start of the next."""


def score_text(
    model: Llama,
    variables: Any,
    text: str,
    tokenizer: Any,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
    chunk: int = 1024,
    progress: bool = False,
) -> TextScores:
    """Computes the perplexity of a text, and related scores.

    The text gets one bos and is cut into windows that start every `stride` tokens. Each token
    except the first is scored exactly once, in the first window where another token precedes it.

    With the default stride, window - 1, a window starts at the last token of the previous one.
    Tokens then have 1 to window - 1 tokens of context, as usual for language models. With a
    smaller stride, all tokens after the first window have at least window - stride tokens of
    context, but the computation takes longer.

    Args:
        model: the architecture.
        variables: {"params": adapters, "base": base}.
        text: used unchanged.
        tokenizer: a transformers tokenizer.
        window: length of a window in tokens (default: context of the model, at most 2048).
        stride: tokens from one window to the next, 1 to window - 1.
        batch_size: windows of a forward pass.
        chunk: positions whose logits are in memory at the same time.
        progress: show a progress bar.

    Raises:
        ValueError: the text has no token to score, or an invalid window or stride.
    """
    context = model.config.max_position_embeddings
    window = min(context, 2048) if window is None else window
    if window > context:
        raise ValueError(f"window = {window}: expected at most max_position_embeddings = {context}")
    tokens = np.array(encode_source(tokenizer, [text])[0], np.int32)
    examples = text_windows(tokens, window, stride)
    size = len(text.encode())
    with progress_bar("Perplexity", len(tokens) - 1, "tok", show=progress) as bar:
        total, count = _sums(model, variables, examples, batch_size, chunk, bar.update)
    nll = total / count
    return TextScores(
        # exp overflows above 709.
        perplexity=math.exp(nll) if nll < 700 else math.inf,
        nll=nll,
        bits_per_byte=total / math.log(2) / size,
        tokens=count,
        bytes=size,
        window=window,
        stride=window - 1 if stride is None else stride,
    )


def perplexity(
    model: Llama,
    variables: Any,
    text: str,
    tokenizer: Any,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
    chunk: int = 1024,
) -> float:
    """Computes exp(mean negative log-likelihood per token) of a text; see `score_text`."""
    scores = score_text(
        model,
        variables,
        text,
        tokenizer,
        window=window,
        stride=stride,
        batch_size=batch_size,
        chunk=chunk,
    )
    return scores.perplexity


def text_windows(
    tokens: Int[np.ndarray, " seq"], window: int, stride: int | None = None
) -> list[Example]:
    """Cuts tokens into the windows of `perplexity`. Targets are the tokens that a window scores."""
    if window < 2:
        raise ValueError(f"window = {window}: expected a whole number of at least 2")
    stride = window - 1 if stride is None else stride
    if not 1 <= stride < window:
        raise ValueError(f"stride = {stride}: expected 1 to window - 1 = {window - 1}")
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} tokens: expected 2 or more")
    examples, scored = [], 1
    for start in range(0, len(tokens), stride):
        part = tokens[start : start + window]
        examples.append(Example(part, np.arange(start, start + len(part)) >= scored))
        scored = start + len(part)
        if scored == len(tokens):
            break
    return examples
