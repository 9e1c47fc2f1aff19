"""Chooses one configuration for every matrix, so that the sum of errors is the least for a budget.

LQ-LoRA (arXiv 2311.12023, section 4.2) solves this as an integer program: x_ic is 1 if matrix i has
configuration c, and

    minimize sum_ic error_ic x_ic    with sum_c x_ic = 1 for every i, sum_ic bits_ic x_ic <= budget

A solver has tolerances: the released code exceeds small budgets by up to 0.1 %. Here all sizes are
whole numbers of bits, in units of their greatest common divisor, and the sum is checked.
"""

import dataclasses
import logging
import math
import time

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from irqlora_jax.text import require

logger = logging.getLogger(__name__)
_RANGE = 1e4
"""Sum of the ranges of all errors, as the solver gets them."""


@dataclasses.dataclass(frozen=True)
class Allocation:
    """The choice of a configuration for every matrix.

    Attributes:
        choices: index of the configuration of every matrix.
        error: sum of the errors.
        bits: sum of the sizes; at most the budget.
    """

    choices: tuple[int, ...]
    error: float
    bits: int


def allocate(
    errors: Float[np.ndarray, "matrices configs"],
    bits: Int[np.ndarray, "matrices configs"],
    budget: int,
) -> Allocation:
    """Solves the integer program (`scipy.optimize.milp`).

    The error is the least one, except for 1e-10 of what the choices can change.

    Args:
        errors: of every matrix with every configuration; infinite: not available.
        bits: size of every matrix with every configuration.
        budget: largest sum of the sizes, in bits.

    Raises:
        ValueError: tables of different shapes or without entries, errors that are NaN or negative
            infinity, sizes below 0, a matrix without an available configuration, or a budget below
            the least sum of sizes, which the message states.

    Examples:
        >>> errors = np.array([[9.0, 4.0, 1.0], [5.0, 3.0, 2.5]])
        >>> bits = np.array([[20, 30, 40], [20, 30, 40]])
        >>> allocate(errors, bits, 60)
        Allocation(choices=(2, 0), error=6.0, bits=60)
    """
    _check(errors, bits)
    usable = _undominated(errors, bits)
    least = sum(int(own[may].min()) for own, may in zip(bits, usable, strict=True))
    accepted = f"at least {least:,} bits, which the smallest configurations need"
    require(budget >= least, "budget", budget, accepted)
    matrix, config = np.nonzero(usable)
    each, sizes = errors[usable].astype(np.float64), bits[usable].astype(np.int64)
    # Only differences to the smallest size and the least error of a matrix matter.
    smallest, lowest = (
        np.array([x[matrix == i].min() for i in range(len(errors))]) for x in (sizes, each)
    )
    spans = np.array([each[matrix == i].max() for i in range(len(errors))]) - lowest
    each = (each - lowest[matrix]) * (_RANGE / max(spans.sum(), np.finfo(np.float64).tiny))
    sizes = sizes - smallest[matrix]
    unit = max(math.gcd(*map(int, sizes)), 1)
    room = (budget - least) // unit
    one_each = coo_array((np.ones(matrix.size), (matrix, np.arange(matrix.size)))).tocsr()
    constraints = [
        LinearConstraint(one_each, 1, 1),
        # Half a unit above the limit no sum lies within the solver's tolerance.
        LinearConstraint((sizes // unit).astype(np.float64)[None], -np.inf, room + 0.5),
    ]
    while True:
        started = time.perf_counter()
        found = milp(
            each,
            integrality=np.ones(matrix.size),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0},
        )
        if found.x is None:
            raise RuntimeError(f"scipy.optimize.milp: {found.message}")
        score = np.full(errors.shape, -1.0)
        score[matrix, config] = found.x
        choices = score.argmax(axis=1)
        picked = np.arange(len(errors)), choices
        total = int(bits[picked].sum())
        logger.debug(
            f"scipy.optimize.milp: {matrix.size:,} of {errors.size:,} choices, "
            f"{found.mip_node_count} nodes, gap {found.mip_gap:.1e}, {total:,} of {budget:,} bits, "
            f"{time.perf_counter() - started:.2f} s"
        )
        if total <= budget:
            return Allocation(tuple(map(int, choices)), float(errors[picked].sum()), total)
        # Excludes this choice alone, so the least error of the allowed ones is still found.
        same = (choices[matrix] == config).astype(np.float64)
        constraints.append(LinearConstraint(same[None], -np.inf, len(errors) - 1))


def _check(errors: np.ndarray, bits: np.ndarray) -> None:
    require(errors.shape == bits.shape, "bits", bits.shape, f"shape {errors.shape}, as errors")
    require(errors.size > 0, "errors", errors.shape, "at least one matrix and one configuration")
    fine = not np.isnan(errors).any() and errors.min() > -np.inf
    require(fine, "errors (least)", float(errors.min()), "numbers, or infinity")
    require(int(bits.min()) >= 0, "bits (least)", int(bits.min()), "0 or more")
    empty = np.flatnonzero(~np.isfinite(errors).any(axis=1))
    where = f"errors[{empty[0]}]" if empty.size else "errors"
    require(empty.size == 0, where, "infinite", "a finite error for one configuration")


def _undominated(errors: np.ndarray, bits: np.ndarray) -> Bool[np.ndarray, "matrices configs"]:
    """The configurations that no other one of the matrix beats, with a smaller error for at most
    the same size. Of equal ones the first remains."""
    usable = np.zeros(errors.shape, bool)
    for own, error, size in zip(usable, errors, bits, strict=True):
        best = np.inf
        for config in np.lexsort((error, size)):
            if error[config] < best:
                own[config], best = True, error[config]
    return usable
