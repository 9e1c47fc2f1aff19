"""DPO: the loss of preference pairs, from the log-probabilities of their answers.

Direct Preference Optimization (arXiv 2305.18290) compares the trained model with a frozen
reference. The reward of an answer is beta * log(p / p_reference), and the loss is small if the
chosen answer of a pair has the larger reward.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from irqlora_jax.text import require

LOSSES = ("sigmoid", "sigmoid_norm", "robust", "ipo")
MARGIN, ACCURACY = "rewards/margins", "rewards/accuracies"
REWARDS = ("rewards/chosen", "rewards/rejected", MARGIN, ACCURACY)
"""Metrics of pairs, under the names that TRL's DPOTrainer gives them."""
SUMS = ("loss", "targets", "pairs", *REWARDS)
"""Results of `pair_sums`."""


@dataclasses.dataclass(frozen=True)
class DpoOptions:
    """DPO, the training on preference pairs (data.format preference). The reference is the base
    without the adapter, or with the adapter that the training starts from, if there is one
    (adapter.from, or a fitted adapter.init such as loftq)."""

    loss: Literal["sigmoid", "sigmoid_norm", "robust", "ipo"] = "sigmoid"
    """With the margin m = log(p / p_reference) of the chosen answer minus that of the rejected one,
    and the names of TRL's loss_type. "sigmoid": -log sigmoid(beta m), as in the paper of DPO.
    "sigmoid_norm": the same, with the log-probabilities divided by the number of tokens of each
    answer. "robust": unbiased if `label_smoothing` is the share of swapped pairs (Robust DPO).
    "ipo": (m - 1 / (2 beta))^2, with log-probabilities per token (IPO)."""
    beta: float = 0.1
    """A larger beta keeps the model closer to the reference. Of IPO: tau."""
    label_smoothing: float = 0.0
    """Assumed share of pairs whose answers are swapped. With "sigmoid" and "sigmoid_norm" the loss
    is the mean over both orders (conservative DPO)."""

    def __post_init__(self) -> None:
        require(self.loss in LOSSES, "train.dpo.loss", self.loss, ", ".join(LOSSES))
        ok = 0 < self.beta < math.inf
        require(ok, "train.dpo.beta", self.beta, "a positive finite number")
        share = self.label_smoothing
        require(0 <= share < 0.5, "train.dpo.label_smoothing", share, "0 <= label_smoothing < 0.5")
        ok = self.loss != "ipo" or share == 0
        require(ok, "train.dpo.label_smoothing", share, "0 with train.dpo.loss ipo")


def pair_losses(
    ratios: Float32[Array, "pairs 2"], counts: Float32[Array, "pairs 2"], options: DpoOptions
) -> Float32[Array, " pairs"]:
    """The loss of each pair.

    Args:
        ratios: log(p / p_reference) of the chosen and the rejected answer, in nats.
        counts: number of tokens of the two answers.
        options: the loss and its constants.

    Examples:
        >>> ratios, counts = jnp.array([[0.0, 0.0], [2.0, -2.0]]), jnp.ones((2, 2))
        >>> print(pair_losses(ratios, counts, DpoOptions(beta=0.5)).round(3))
        [0.693 0.127]
    """
    if options.loss in ("sigmoid_norm", "ipo"):
        ratios = ratios / jnp.maximum(counts, 1)
    margin = ratios[:, 0] - ratios[:, 1]
    if options.loss == "ipo":
        return (margin - 1 / (2 * options.beta)) ** 2
    swapped = options.label_smoothing
    right = -jax.nn.log_sigmoid(options.beta * margin)
    wrong = -jax.nn.log_sigmoid(-options.beta * margin)
    if options.loss == "robust":
        return ((1 - swapped) * right - swapped * wrong) / (1 - 2 * swapped)
    return (1 - swapped) * right + swapped * wrong if swapped else right


def pair_sums(
    nll: Float32[Array, " rows"],
    reference: Float32[Array, " rows"],
    counts: Float32[Array, " rows"],
    options: DpoOptions,
) -> dict[str, Float32[Array, ""]]:
    """Sums the losses and the rewards of pairs. The mean is the sum divided by "pairs".

    The rows are the chosen answer of the first pair, its rejected answer, the chosen answer of the
    second pair, and so on. Pairs without targets, which fill up a batch, do not count.

    Args:
        nll: negative log-likelihood (nats) of the answer in each row, by the trained model.
        reference: the same, by the reference.
        counts: number of tokens of the answers.
        options: the loss and its constants.

    Returns:
        "loss", "targets" (the tokens of both answers), "pairs", and `REWARDS`: the rewards
        beta * log(p / p_reference) of the two answers, their difference, and how often the chosen
        answer has the larger one.
    """
    counts = counts.reshape(-1, 2)
    real = counts[:, 0] > 0
    ratios = (reference - nll).reshape(-1, 2)
    losses = jnp.where(real, pair_losses(ratios, counts, options), 0)
    rewards = jnp.where(real[:, None], options.beta * ratios, 0)
    chosen, rejected = rewards[:, 0], rewards[:, 1]
    values = chosen, rejected, chosen - rejected, (chosen > rejected).astype(jnp.float32)
    found = {name: value.sum() for name, value in zip(REWARDS, values, strict=True)}
    pairs = real.sum().astype(jnp.float32)
    return {"loss": losses.sum(), "targets": counts.sum(), "pairs": pairs} | found
