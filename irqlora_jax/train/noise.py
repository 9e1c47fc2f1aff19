"""NEFTune: noise on the embeddings of the training tokens (Jain et al. 2023, arXiv 2310.05914).

The noise is uniform in [-1, 1] times alpha / sqrt(L d), with L tokens in an example and d features
of an embedding. Then its length is about alpha / sqrt(3) for each example, short or long. As in the
authors' training code, L does not count padding. (transformers divides by the padded length, so
its noise depends on the longest example of the batch.)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int

from irqlora_jax.sharding import split_activation


def embedding_noise(
    key: Array,
    alpha: float,
    targets: Bool[Array, "batch seq"],
    segment_ids: Int[Array, "batch seq"] | None,
    features: int,
) -> Float32[Array, "batch seq features"]:
    """The noise of a batch, a pure function of the key.

    Args:
        key: random key.
        alpha: `train.neftune_alpha`.
        targets: tokens that count in the loss.
        segment_ids: examples of packed rows.
        features: d, features of an embedding.
    """
    length = example_lengths(targets, segment_ids)
    size = alpha * jax.lax.rsqrt(jnp.maximum(length, 1).astype(jnp.float32) * features)
    noise = jax.random.uniform(key, (*targets.shape, features), jnp.float32, -1, 1)
    return split_activation(noise * size[..., None])


def example_lengths(
    targets: Bool[Array, "batch seq"], segment_ids: Int[Array, "batch seq"] | None
) -> Int[Array, "batch seq"]:
    """Number of tokens in the example of each token.

    A row without segments holds one example. It counts up to its last target, because the loss does
    not depend on later tokens.

    Examples:
        >>> targets = jnp.array([[False, True, True, False]])
        >>> example_lengths(targets, None).tolist()
        [[3, 3, 3, 3]]
        >>> example_lengths(targets, jnp.array([[1, 2, 2, 0]])).tolist()
        [[1, 2, 2, 1]]
    """
    if segment_ids is None:
        place = jnp.arange(1, targets.shape[1] + 1)
        last = jnp.where(targets, place[None, :], 0).max(axis=1, keepdims=True)
        return jnp.broadcast_to(last, targets.shape)
    most = targets.shape[1] + 1
    count = lambda ids: jnp.zeros(most, jnp.int32).at[ids].add(1)[ids]  # noqa: E731
    return jax.vmap(count)(segment_ids)
