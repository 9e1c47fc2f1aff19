"""Second moments of the inputs of a layer, with their factors.

Linear layers with the same inputs, and the turns of LoftQ and CLoQ, need the same factor. Its cost
grows with the third power of the number of inputs, so it is computed once.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from irqlora_jax.quant.codes import Feedback
from irqlora_jax.quant.feedback import check_factor, check_moments, feedback_factor
from irqlora_jax.text import require


@dataclasses.dataclass(frozen=True, eq=False)
class InputMoments:
    """X^T X of inputs X [tokens, in]. Each factor is computed when it is first used, and kept.

    Attributes:
        gram: the sum or the mean of x x^T over the inputs x.
        damping: this fraction of the mean diagonal is added to the diagonal for the factors.

    Examples:
        >>> inputs = InputMoments(4 * jnp.eye(3), damping=0.0)
        >>> inputs.feedback.factor.diagonal().tolist()
        [0.5, 0.5, 0.5]
        >>> inputs.feedback is inputs.feedback
        True
    """

    gram: Float[Array, "in in"]
    damping: float = 0.01

    @functools.cached_property
    def diagonal(self) -> Float32[Array, " in"]:
        """The second moment of each input.

        Raises:
            ValueError: as `check_moments`.
        """
        return check_moments(self.gram)

    @functools.cached_property
    def feedback(self) -> Feedback:
        """For rounding with error feedback, the columns with the largest moments first.

        Raises:
            ValueError: as `feedback_factor`.
        """
        order = jnp.argsort(-jnp.diagonal(self.gram))
        return Feedback(order, feedback_factor(self.gram[order][:, order], self.damping))

    @functools.cached_property
    def root(self) -> Float32[Array, "in in"]:
        """As `input_root`.

        Raises:
            ValueError: as `input_root`.
        """
        return input_root(self.gram, self.damping)


def as_moments(gram: Float[Array, "in in"] | InputMoments, damping: float) -> InputMoments:
    """The moments, which share their factors if `gram` has them already."""
    return gram if isinstance(gram, InputMoments) else InputMoments(gram, damping)


def input_root(gram: Float[Array, "in in"], damping: float) -> Float32[Array, "in in"]:
    """Lower Cholesky factor R of the damped second moments: R R^T = (H / m + d I) / (1 + d), where
    m is the mean diagonal of H, and d the damping.

    The factor 1 / (m (1 + d)) makes the mean diagonal 1. It changes no pair, and the error has the
    size of the Frobenius norm. An input that is always 0 has the weight of the damping alone. If
    all inputs are 0, all have the same weight.

    Raises:
        ValueError: as `feedback_factor`.
    """
    require(damping >= 0, "damping", damping, "0 or more")
    check_moments(gram)
    root = _root(gram, jnp.float32(damping))
    check_factor(root, damping)
    return root


@jax.jit
def _root(gram: Array, damping: Array) -> Array:
    gram = gram.astype(jnp.float32)
    mean = jnp.diagonal(gram).mean()
    gram = gram / jnp.where(mean == 0, 1, mean)
    damped = gram + damping * jnp.eye(len(gram), dtype=jnp.float32)
    return jnp.linalg.cholesky(damped / (1 + damping))
