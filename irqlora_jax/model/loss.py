"""Cross-entropy of the next token, computed without holding the logits of a whole batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from irqlora_jax.model.llama import head_logits


def cross_entropy(
    features: Float[Array, "batch seq hidden"],
    head: Float[Array, "vocab hidden"],
    tokens: Int[Array, "batch seq"],
    targets: Bool[Array, "batch seq"],
    chunk: int = 1024,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Sum of the negative log-likelihoods (nats) of the targets, and their number.

    This is the sum of `row_cross_entropy` over the rows.
    """
    nll, count = row_cross_entropy(features, head, tokens, targets, chunk)
    return nll.sum(), count.sum()


def row_cross_entropy(
    features: Float[Array, "batch seq hidden"],
    head: Float[Array, "vocab hidden"],
    tokens: Int[Array, "batch seq"],
    targets: Bool[Array, "batch seq"],
    chunk: int = 1024,
) -> tuple[Float32[Array, " batch"], Float32[Array, " batch"]]:
    """Sum of the negative log-likelihoods (nats) of each row's targets, and their number.

    The features at position t predict token t + 1, so the first token of a row never counts. The
    logits are always float32. They are in memory for about `chunk` positions at a time, and the
    backward pass recomputes them.

    Args:
        features: hidden states after the last norm.
        head: output matrix.
        tokens: the sequences.
        targets: which tokens count.
        chunk: positions (of all rows together) whose logits are in memory at the same time; at
            least one position of every row.
    """
    batch, seq = tokens.shape
    # Each chunk contains all rows, so a batch that is split over devices stays split.
    width = min(max(1, chunk // batch), seq)
    count = -(-seq // width)
    head = head.astype(features.dtype)

    def chunks(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, count * width - seq)] + [(0, 0)] * (x.ndim - 2))
        return jnp.swapaxes(x.reshape(batch, count, width, *x.shape[2:]), 0, 1)

    @jax.checkpoint
    def add(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        hidden, labels, counts = part
        logits = head_logits(hidden, head)
        # A mask: the gradient of indexing would scatter into another array of all logits.
        chosen = jnp.arange(head.shape[0])[None, None, :] == labels[:, :, None]
        label_logits = jnp.where(chosen, logits, 0).sum(axis=-1)
        nll = jax.nn.logsumexp(logits, axis=-1) - label_logits
        return total + jnp.where(counts, nll, 0).sum(axis=1), None

    labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    counts = jnp.pad(targets[:, 1:], ((0, 0), (0, 1)))
    parts = (chunks(features), chunks(labels), chunks(counts))
    total, _ = jax.lax.scan(add, jnp.zeros(batch, jnp.float32), parts)
    return total, counts.sum(axis=1).astype(jnp.float32)
