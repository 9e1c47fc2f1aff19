"""Our searches against the released procedure, as the benchmarks have it."""

import importlib.util
from pathlib import Path
from types import ModuleType

import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.quant.calibrations import icq, icq_integer
from irqlora_jax.quant.entropy import block_entropy

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")
LEVELS = {"nf4": 16, "nf3": 8, "nf2": 4, "fp4": 16}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def released() -> ModuleType:
    file = Path(__file__).parents[2] / "benchmarks" / "released.py"
    spec = importlib.util.spec_from_file_location("released", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(block: int) -> np.ndarray:
    rng = np.random.default_rng(block)
    normal = rng.normal(0, 0.02, (256, block)).astype(np.float32)
    return np.concatenate([normal, normal[:128] ** 3, np.abs(normal[128:])])


@pytest.mark.parametrize("name", ["nf4", "nf3", "nf2", "fp4"])
def test_shift_has_at_least_the_entropy_of_the_released_one(
    released: ModuleType, name: str
) -> None:
    weights = blocks(64)
    codes, theirs = released.search_shift(torch.from_numpy(weights), name)
    shift, bits = icq.search_shift(jnp.asarray(weights), name)
    exact = np.asarray(block_entropy(jnp.asarray(codes.numpy()), LEVELS[name]))
    assert (np.asarray(bits) >= exact - 1e-6).all()
    assert (np.abs(bits - exact) < 1e-6).mean() > 0.99
    # Other choices have the same counts in another order: the float sums tell those apart.
    same = np.isclose(shift, theirs.numpy(), rtol=1e-5, atol=1e-8)
    assert same.mean() > 0.9


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_range_has_at_least_the_entropy_of_the_released_one(
    released: ModuleType, bits: int, symmetric: bool
) -> None:
    weights = blocks(32)
    codes, theirs = released.search_range(torch.from_numpy(weights), bits, symmetric)
    scale, _, found = icq_integer.search_range(jnp.asarray(weights), bits, symmetric)
    exact = np.asarray(block_entropy(jnp.asarray(codes.numpy()), 2**bits))
    assert (np.asarray(found) >= exact - 1e-6).all()
    assert (np.abs(found - exact) < 1e-6).mean() > 0.99
    assert np.isclose(scale, theirs.numpy(), rtol=1e-6).mean() > 0.9
