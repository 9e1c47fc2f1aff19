"""LQ-LoRA's decomposition against the released code, and what the weights of the error do."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax import hf
from irqlora_jax.adapters import lqlora as module
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.lqlora import LQLORA, Decomposition, LqloraOptions, lqlora
from irqlora_jax.data.calibrate import CalibrateConfig, CalibrationRows
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.quant.formats import FORMATS, Format
from tests.arrays import read_arrays
from tests.models import LLAMA, assert_same, write_model

NF3 = QuantConfig(format="nf3", calibration="none", scale_rule="uniform")
KEY = jax.random.key(0)


def draw(shape: tuple[int, int], seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def remaining(weight: jax.Array, found: Decomposition, scaling: float) -> np.ndarray:
    update = np.asarray(found.lora_b) @ np.asarray(found.lora_a)
    return np.asarray(weight - found.quantized.dequantize()) - scaling * update


@pytest.mark.parametrize(
    ("run", "sides"),
    [("plain", None), ("fisher", "both"), ("fisher_row", "rows"), ("fisher_col", "columns")],
)
def test_every_turn_has_the_error_of_the_released_code(golden: Path, run: str, sides: Any) -> None:
    released = read_arrays(golden / "lqlora_decomposition.npz")
    weight, fisher = (jnp.asarray(released[name]) for name in ("w", "fisher"))
    given: dict[str, Any] = {} if sides is None else {"fisher": fisher, "sides": sides}
    last = lqlora(weight, NF3, 16, 0.25, 100, KEY, keep_last=True, **given)
    best = lqlora(weight, NF3, 16, 0.25, 100, KEY, **given)
    unit = 1 if sides is None else np.sqrt(released["fisher"].mean())
    expected = released[f"{run}_errors"]
    errors = np.array(last.errors) * unit
    assert len(errors) == len(expected)
    np.testing.assert_allclose(errors[:8], expected[:8], rtol=3e-5)
    np.testing.assert_allclose(errors, expected, rtol=0.01)  # codes flip on rounding
    if run != "fisher":
        update = 0.25 * last.lora_b @ last.lora_a
        theirs = released[f"{run}_L1"] @ released[f"{run}_L2"]
        np.testing.assert_allclose(update, theirs, atol=2e-6 * np.abs(theirs).max())
    # The released code returns the last turn, which is worse than the one before.
    assert best.errors == last.errors
    assert last.errors[-1] > last.errors[-2] == min(last.errors)
    each = 1 if sides is None else released["fisher"] / released["fisher"].mean()
    for found, turn in ((last, -1), (best, -2)):
        error = np.sqrt((each * remaining(weight, found, 0.25) ** 2).sum())
        assert error == pytest.approx(found.errors[turn], rel=1e-5)


def test_two_bits_stop_where_the_released_code_stops(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its 2-bit code book has a level at 0."""
    levels = read_arrays(golden / "lqlora_quant.npz")["c2_levels"]
    monkeypatch.setitem(FORMATS, "nf2", Format("nf2", 2, tuple(map(float, levels))))
    config = dataclasses.replace(
        NF3, format="nf2", block_size=16, scale_bits=2, scale_group=16, scale_dtype="bfloat16"
    )
    weight = jnp.asarray(read_arrays(golden / "lqlora_decomposition.npz")["w"])
    found = lqlora(weight, config, 16, 1.0, 100, KEY)
    assert len(found.errors) == 11
    assert found.errors[-2:] == pytest.approx((1.7515566, 1.7551866), rel=3e-4)


def test_a_large_layer_is_decomposed_as_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the 1 % of the randomized decomposition, with weights and with rows in slabs."""
    weight = draw((96, 80)) + draw((96, 4), 2) @ draw((4, 80), 3)
    fisher = draw((96, 80), 1) ** 2
    exact = lqlora(weight, NF3, 4, 1.0, 3, KEY, fisher=fisher)
    monkeypatch.setattr(module, "EXACT_UP_TO", 0)
    monkeypatch.setattr(module, "slab_rows", lambda shape: 40)
    jax.clear_caches()
    near = lqlora(weight, NF3, 4, 1.0, 3, KEY, fisher=fisher)
    jax.clear_caches()
    np.testing.assert_allclose(near.errors, exact.errors, rtol=0.01)
    assert not bool((near.lora_a == exact.lora_a).all())


def test_the_pair_follows_the_weights_and_not_their_scale() -> None:
    """Errors move to where F is small, and each row of A is as long as its column of B."""
    weight = draw((24, 64))
    fisher = jnp.ones((24, 64)).at[:, :8].set(400.0)
    plain, found = (lqlora(weight, NF3, 6, 2.0, 20, KEY, fisher=given) for given in (None, fisher))
    first, rest = (np.abs(remaining(weight, found, 2.0)[:, part]).mean() for part in COLUMNS)
    before = np.abs(remaining(weight, plain, 2.0)[:, :8]).mean()
    assert first < 0.7 * before and first < 0.7 * rest
    np.testing.assert_allclose(
        jnp.linalg.norm(found.lora_a, axis=1), jnp.linalg.norm(found.lora_b, axis=0), rtol=1e-4
    )
    scaled = lqlora(weight, NF3, 6, 2.0, 20, KEY, fisher=fisher * 1024)
    assert_same(scaled[:3], found[:3])
    equal = lqlora(weight, NF3, 6, 2.0, 20, KEY, fisher=jnp.full((24, 64), 7.0))
    np.testing.assert_allclose(equal.errors, plain.errors, rtol=1e-5)


COLUMNS = slice(None, 8), slice(8, None)


def test_less_remains_than_of_the_quantizer_alone_and_of_each_turn_before() -> None:
    weight = draw((32, 96)).astype(jnp.bfloat16)
    alone = quantize(weight, NF3).dequantize() - weight.astype(jnp.float32)
    found = lqlora(weight, NF3, 8, 2.0, 30, KEY, jnp.bfloat16)
    assert found.lora_a.dtype == found.lora_b.dtype == jnp.bfloat16
    error = float(np.linalg.norm(remaining(weight.astype(jnp.float32), found, 2.0)))
    assert error == pytest.approx(min(found.errors), rel=1e-3)
    assert error < 0.9 * float(jnp.linalg.norm(alone))
    falling = np.diff(found.errors[:-1])
    assert (falling <= 0).all()
    one = lqlora(weight, NF3, 8, 2.0, 1, KEY, keep_last=True)
    assert one.errors == pytest.approx(found.errors[:1], rel=1e-3)  # the pair is not rounded


def test_ranks_beyond_the_layer_and_matrices_of_zeros() -> None:
    found = lqlora(draw((4, 16)), NF3, 6, 1.0, 4, KEY)
    assert found.lora_a.shape == (6, 16) and not found.lora_a[4:].any()
    assert found.errors[0] < 1e-4
    zero = lqlora(jnp.zeros((4, 16)), NF3, 2, 1.0, 4, KEY, fisher=jnp.zeros((4, 16)), damping=0.1)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(zero[1:3]))
    assert zero.errors[0] == 0


BAD: list[tuple[dict[str, Any], str]] = [
    ({"iterations": 0}, "iterations = 0: expected a whole number of at least 1"),
    ({"rank": 0}, "rank = 0: expected"),
    ({"fisher": -jnp.ones((4, 16))}, "fisher (least, largest) = (-1.0, -1.0): expected finite"),
    ({"fisher": jnp.full((4, 16), jnp.nan)}, "fisher (least, largest) = (nan, nan)"),
    ({"fisher": jnp.ones((4, 16)).at[:, 3].set(0)}, "damping = 0.0: expected more than 0, because"),
    ({"fisher": jnp.ones((4, 16)), "damping": -1.0}, "damping = -1.0: expected 0 or more"),
    ({"fisher": jnp.ones((4, 16)), "sides": "none"}, "sides = 'none': expected rows, columns, bo"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"rank": 2, "scaling": 1.0, "iterations": 2, "key": KEY}
    with pytest.raises(ValueError, match=re.escape(message)):
        lqlora(draw((4, 16)), NF3, **(given | change))


def test_options_say_what_the_layer_needs() -> None:
    weighed = AdapterConfig(init="lqlora", lqlora=LqloraOptions(weights="rows"))
    assert (AdapterConfig(init="lqlora").needs, weighed.needs) == ("nothing", "fisher")
    with pytest.raises(ValueError, match=r"adapter\.lqlora\.iterations = 0: expected a whole"):
        LqloraOptions(iterations=0)
    assert LQLORA.fit is not None
    with pytest.raises(ValueError, match=r"adapter\.lqlora\.weights = 'rows': needs the gradients"):
        LQLORA.fit(draw((4, 16)), NF3, 2, 1.0, weighed.lqlora, KEY, jnp.float32)


@pytest.mark.long
def test_a_model_is_decomposed_with_the_gradients_of_a_text(tmp_path: Path) -> None:
    folder = write_model(tmp_path, LLAMA)
    options = LqloraOptions(iterations=4, weights="both")
    adapter = AdapterConfig(rank=4, init="lqlora", lqlora=options, targets=("o_proj", "up_proj"))
    tokens = np.random.default_rng(3).integers(0, LLAMA.vocab_size, (5, 9)).astype(np.int32)
    rows = CalibrationRows(tokens, CalibrateConfig(metric="gradients", batch_size=5))
    whole = hf.load_fitted(folder, NF3, adapter, KEY, calibrate=rows, keep=tmp_path / "keep")
    (tmp_path / "keep" / "layer_0.safetensors").unlink()  # the last one that was made
    again = hf.load_fitted(folder, NF3, adapter, KEY, calibrate=rows, keep=tmp_path / "keep")
    assert_same(again[:2], whole[:2])
    plain = hf.load_fitted(
        folder, NF3, dataclasses.replace(adapter, lqlora=LqloraOptions(iterations=4)), KEY
    )
    group = lambda tree: tree["layers"]["mlp"]["up_proj"]["lora_A"]  # noqa: E731
    assert group(whole[1]).shape == group(plain[1]).shape == (2, 4, LLAMA.hidden_size)
    assert not np.allclose(group(whole[1]), group(plain[1]))
    with pytest.raises(ValueError, match=r"calibrate\.data = None: expected a text, needed by ada"):
        hf.load_fitted(folder, NF3, adapter, KEY)
    inputs = dataclasses.replace(rows, config=CalibrateConfig())
    with pytest.raises(ValueError, match=r"calibrate\.metric = 'inputs': expected gradients, whi"):
        hf.load_fitted(folder, NF3, adapter, KEY, calibrate=inputs)
