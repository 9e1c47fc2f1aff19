"""Moments of 8 bits against bitsandbytes, and the noise of NEFTune against transformers."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.config import TrainConfig
from irqlora_jax.runs.moments import MAPS, Sign, decode, encode
from irqlora_jax.runs.optimizer import make_optimizer
from irqlora_jax.train.noise import embedding_noise

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    functional = pytest.importorskip("bitsandbytes.functional")

pytestmark = pytest.mark.filterwarnings("ignore")


def theirs(x: np.ndarray, sign: Sign, exact: bool) -> tuple[np.ndarray, np.ndarray]:
    """Codes and maxima. Their CPU kernel for float32 looks codes up in a coarse table; other types
    take the nearest of all 256 numbers."""
    table = functional.create_dynamic_map(sign == "signed")
    given = torch.from_numpy(x.astype(np.float64) if exact else x)
    return tuple(t.numpy() for t in torch.ops.bitsandbytes.quantize_blockwise(given, table, 256))


@pytest.mark.parametrize("sign", ["signed", "unsigned"])
def test_same_map_and_codes(sign: Sign) -> None:
    table = functional.create_dynamic_map(sign == "signed").numpy()
    np.testing.assert_array_equal(MAPS[sign], table)
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(37, 300)) * 10.0 ** rng.uniform(-6, 0, (37, 1))).astype(np.float32)
    x = x if sign == "signed" else x * x
    ours = jax.jit(encode, static_argnums=(1, 2))(jnp.asarray(x), sign, False)
    codes, largest = theirs(x, sign, exact=True)
    np.testing.assert_array_equal(np.asarray(ours.absmax).ravel(), largest)
    apart = np.asarray(ours.codes) != codes
    assert apart.sum() <= 2  # ties
    # Our codes are never farther from the numbers than the codes of their CPU kernel.
    wide = np.asarray(decode(ours, sign, False))
    codes, _ = theirs(x, sign, exact=False)
    coarse = table[codes] * np.repeat(largest, 256)[: x.size].reshape(x.shape)
    assert (np.abs(wide - x) <= np.abs(coarse - x) * (1 + 1e-5) + 1e-12).all()


@pytest.mark.usefixtures("optimizer_promotion")
def test_ten_steps_of_adamw8bit(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = pytest.importorskip("bitsandbytes.backends.cpu.ops")
    if not hasattr(ops, "_quant_blockwise_fp32_direct"):
        pytest.skip("this bitsandbytes has no 8-bit optimizer for CPUs")

    def nearest(x: Any, table: Any, absmax: Any, codes: Any, size: int) -> None:
        found, largest = torch.ops.bitsandbytes.quantize_blockwise(x.double(), table, size)
        codes.copy_(found)
        absmax.copy_(largest)

    monkeypatch.setattr(ops, "_quant_blockwise_fp32_direct", nearest)
    rng = np.random.default_rng(1)
    start = rng.normal(size=(48, 100)).astype(np.float32)
    weight = torch.nn.Parameter(torch.from_numpy(start.copy()))
    settings: dict[str, Any] = {"weight_decay": 0.1, "eps": 1e-6}
    there = bitsandbytes.optim.AdamW8bit([weight], lr=1e-2, betas=(0.9, 0.99), **settings)
    config = TrainConfig(
        learning_rate=1e-2, beta2=0.99, optimizer_bits=8, compute_dtype="float32", **settings
    )
    here = make_optimizer(config)
    params = {"weight": jnp.asarray(start)[None]}
    state: Any = here.init(params)
    update = jax.jit(here.update)
    for _ in range(10):
        gradient = rng.normal(size=start.shape).astype(np.float32)
        weight.grad = torch.from_numpy(gradient)
        there.step()
        steps, state = update({"weight": jnp.asarray(gradient)[None]}, state, params)
        params = jax.tree.map(jnp.add, params, steps)
    moved = weight.detach().numpy()
    found = np.asarray(params["weight"][0])
    assert np.abs(moved - start).mean() > 0.02
    # A number between two codes may take either one, and then its steps differ a little.
    off = np.abs(found - moved)
    assert (off > 1e-5).mean() < 0.01 and off.max() < 1e-2
    codes = there.state[weight]["state1"].numpy()
    assert (codes != np.asarray(state[0].mu["weight"].codes[0])).mean() < 0.01


def test_noise_as_in_transformers() -> None:
    """They divide by the padded length: the sizes are equal for an example without padding."""
    neftune = pytest.importorskip("transformers.integrations.neftune")
    table = torch.nn.Embedding(8, 500)
    table.neftune_noise_alpha = 5.0
    still = torch.zeros(2, 12, 500)
    there = neftune.neftune_post_forward_hook(table, None, still).numpy()
    targets = jnp.arange(12)[None, :] < jnp.array([[12], [3]])
    here = np.asarray(embedding_noise(jax.random.key(0), 5.0, targets, None, 500))
    for noise in (there[0], there[1], here[0], here[1, :3] / 2):
        np.testing.assert_allclose(np.abs(noise).max(), 5 / np.sqrt(12 * 500), rtol=0.01)
        np.testing.assert_allclose((noise**2).mean(), 25 / (12 * 500) / 3, rtol=0.1)
