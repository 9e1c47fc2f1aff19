"""The choice of configurations for a budget: golden problems, brute force, exact budgets."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from irqlora_jax.quant.allocate import Allocation, allocate
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import stored_bits
from tests.arrays import read_arrays

TYPES = {"fp32": 32, "bf16": 16, "fp16": 16}


@pytest.mark.parametrize("table", ["plain", "fisher"])
def test_the_golden_problems(golden: Path, table: str) -> None:
    about = json.loads((golden / "lqlora_allocation.json").read_text())
    costs = read_arrays(golden / "lqlora_allocation.npz")[f"{table}_costs"].astype(np.float64)
    weights = [rows * columns for rows, columns in about["shapes"]]
    each = [b + b0 / B0 + TYPES[b1] / (B0 * B1) for b, b0, b1, B0, B1 in about["configs"]]
    bits = np.outer(weights, each)
    assert (bits == bits.round()).all()
    solved = {name: of for name, of in about["solutions"].items() if name.startswith(table)}
    assert len(solved) == 6
    for of in solved.values():
        budget = int(of["budget"] * sum(weights))
        found = allocate(costs, bits.astype(np.int64), budget)
        assert list(found.choices) == of["assignment"] == of["exact_assignment"]
        assert found.error == pytest.approx(of["exact_optimum_cost"], rel=1e-6)
        assert found.bits / sum(weights) == pytest.approx(of["bits_per_weight"], abs=1e-12)
        assert found.bits <= budget
    # The release, in units of a GiB, exceeds some of the budgets.
    assert max(of["gib_units_bits_per_weight"] - of["budget"] for of in solved.values()) > 1e-4


def brute(errors: np.ndarray, bits: np.ndarray, budget: int) -> float:
    rows = range(len(errors))
    choices = itertools.product(range(errors.shape[1]), repeat=len(errors))
    return min(
        errors[rows, choice].sum() for choice in choices if bits[rows, choice].sum() <= budget
    )


@pytest.mark.parametrize("seed", range(12))
def test_no_other_choice_is_better(seed: int) -> None:
    """With sizes of any kind, budgets that are just enough, and configurations to avoid."""
    random = np.random.default_rng(seed)
    bits = random.integers(1, 10 ** random.integers(1, 10), (5, 4))
    errors = random.exponential(10.0 ** random.integers(-9, 9), (5, 4))
    errors[0, 1] = np.inf
    sums = sorted({int(bits[range(5), c].sum()) for c in itertools.product(range(4), repeat=5)})
    least = int(sum(own[np.isfinite(e)].min() for own, e in zip(bits, errors, strict=True)))
    for budget in (least, *random.choice([s for s in sums if s >= least], 4), sums[-1] * 2):
        found = allocate(errors, bits, int(budget))
        assert found.bits == bits[range(5), found.choices].sum() <= budget
        assert found.error == pytest.approx(brute(errors, bits, int(budget)), rel=1e-9)


def test_a_budget_below_the_least_is_refused_with_the_least() -> None:
    errors, bits = np.array([[2.0, 1.0], [np.inf, 1.0]]), np.array([[2000, 3000], [1, 500]])
    assert allocate(errors, bits, 2500) == Allocation((0, 1), 3.0, 2500)
    with pytest.raises(ValueError, match=r"budget = 2499: expected at least 2,500 bits"):
        allocate(errors, bits, 2499)


def test_a_choice_that_the_solver_lets_exceed_is_excluded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver that ignores the budget until it is told otherwise."""
    from irqlora_jax.quant import allocate as module

    solve, calls = module.milp, []

    def careless(*args: Any, constraints: list[Any], **options: Any) -> Any:
        calls.append(len(constraints))
        return solve(*args, constraints=[constraints[0], *constraints[2:]], **options)

    monkeypatch.setattr(module, "milp", careless)
    errors, bits = np.array([[3.0, 1.0], [2.5, 1.0]]), np.array([[1, 2], [1, 2]])
    assert allocate(errors, bits, 3) == Allocation((1, 0), 3.5, 3)
    assert calls == [2, 3]


unchecked = getattr(allocate, "__wrapped__", allocate)  # without the checks of types
BAD: list[tuple[Any, Any, str]] = [
    ([[1.0, 2.0]], [[1]], "bits = (1, 1): expected shape (1, 2), as errors"),
    (np.zeros((0, 2)), np.zeros((0, 2), int), "errors = (0, 2): expected at least one matrix"),
    ([[np.nan, 1.0]], [[1, 2]], "errors (least) = nan: expected numbers, or infinity"),
    ([[1.0, 2.0]], [[1, -2]], "bits (least) = -2: expected 0 or more"),
    ([[1.0, 2.0], [np.inf, np.inf]], [[1, 2], [1, 2]], "errors[1] = 'infinite': expected a fin"),
]


@pytest.mark.parametrize(("errors", "bits", "message"), BAD)
def test_bad_tables(errors: Any, bits: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        unchecked(np.asarray(errors), np.asarray(bits), 100)


def test_sizes_are_those_of_the_stored_matrix() -> None:
    config = QuantConfig(format="nf3", block_size=32, calibration="none")
    assert stored_bits((64, 256), config) == 64 * 256 * (3 + 8 / 32 + 32 / (32 * 256)) + 32
    padded = stored_bits((3, 40), config)
    assert padded == 8 * (3 * 2 * 12 + 3 * 2 + 4 + 4)
