"""The tiny model of a file, its `MODEL`, and what a slow, plain computation makes of it."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from tests.models import random_variables


@pytest.fixture(scope="module")
def variables(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Random weights, large enough that the model has opinions."""
    return random_variables(request.module.MODEL, 0.2)


@pytest.fixture(scope="module")
def log_probs(
    request: pytest.FixtureRequest, variables: dict[str, Any]
) -> Callable[[Any], np.ndarray]:
    """log_probs(tokens)[t]: float64 log-probabilities of the token that follows tokens[t]."""
    apply = jax.jit(request.module.MODEL.apply)

    def log_probs(tokens: Any) -> np.ndarray:
        padded = np.zeros(256, np.int32)  # one shape
        padded[: len(tokens)] = tokens
        logits = np.asarray(apply(variables, padded[None]))[0, : len(tokens)].astype(np.float64)
        shifted = logits - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    return log_probs
