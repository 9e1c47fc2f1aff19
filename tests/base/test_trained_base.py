"""Layers that are trained while a base is made (`quant.training`)."""

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax import hf
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.data.calibrate import CalibrateConfig, CalibrationRows
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.trained import ApiqOptions, BlockOptions
from irqlora_jax.sharding import MeshConfig, make_mesh
from tests.models import LLAMA, assert_same, long, write_model

pytestmark = pytest.mark.usefixtures("optimizer_promotion")
TOKENS = np.random.default_rng(3).integers(0, LLAMA.vocab_size, (6, 12)).astype(np.int32)
ROWS = CalibrationRows(TOKENS, CalibrateConfig(batch_size=4))
BLOCK = BlockOptions(epochs=6, batch=3, weight_lr=1e-3, scale_lr=1e-3, pair_lr=1e-3)
TRAINED = {
    "apiq": QuantConfig("nf2", calibration="none", training="apiq", apiq=ApiqOptions(epochs=4)),
    "block": QuantConfig("int2", calibration="none", training="block", block=BLOCK),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("trained"), LLAMA)


def last_error(folder: Path, base: Any, pairs: Any = None, adapter: Any = None) -> float:
    """Mean squared change of the last hidden states."""
    whole, model = hf.load_base(folder, None)[0], Llama(LLAMA, adapter)
    params = {} if pairs is None else model.init_adapters(jax.random.key(0), pairs)
    ours, theirs = (
        model.apply({"params": params, "base": base}, jnp.asarray(TOKENS), method="features"),
        Llama(LLAMA).apply({"params": {}, "base": whole}, jnp.asarray(TOKENS), method="features"),
    )
    return float(np.mean((np.asarray(ours) - np.asarray(theirs)) ** 2))


@pytest.mark.parametrize("name", ["block", *long("apiq")])
def test_training_lowers_the_error_of_every_layer_and_of_the_model(
    folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        trained = hf.load_base(folder, TRAINED[name], calibrate=ROWS)[0]
    found = re.findall(r"layer \d: .* (\S+) before its training, (\S+) after", caplog.text)
    assert len(found) == LLAMA.num_hidden_layers
    assert all(float(after) < float(before) for before, after in found)
    plain = hf.load_base(folder, TRAINED[name].plain)[0]
    assert last_error(folder, trained) < last_error(folder, plain)
    stored = [base["layers"]["mlp"]["up_proj"]["weight"] for base in (trained, plain)]
    assert stored[0].nbytes == stored[1].nbytes


@pytest.mark.long
def test_a_mesh_trains_the_layers_too_and_goes_on_where_it_was(
    folder: Path, tmp_path: Path
) -> None:
    mesh = make_mesh(MeshConfig(data=2), 2)
    block = dataclasses.replace(BLOCK, epochs=1)
    quant = dataclasses.replace(TRAINED["block"], calibration="gptq", block=block)
    options: dict[str, Any] = {"calibrate": ROWS, "mesh": mesh, "keep": tmp_path}
    with jax.set_mesh(mesh):
        base = hf.load_base(folder, quant, **options)[0]
        (tmp_path / f"layer_{LLAMA.num_hidden_layers - 1}.safetensors").unlink()
        assert_same(hf.load_base(folder, quant, **options)[0], base)
    plain = hf.load_base(folder, quant.plain, mesh=mesh)[0]
    assert last_error(folder, base) < last_error(folder, plain)


@pytest.mark.long
def test_the_pairs_of_cloq_are_trained_too_and_it_goes_on_where_it_was(
    folder: Path, tmp_path: Path
) -> None:
    adapter, key = AdapterConfig(method="lora", rank=4, init="cloq"), jax.random.key(0)
    block = BlockOptions(epochs=6, batch=3, weight_lr=0.0, scale_lr=0.0, pair_lr=3e-3)
    quant = dataclasses.replace(TRAINED["block"], rounding="feedback", block=block)
    options: dict[str, Any] = {"calibrate": ROWS, "keep": tmp_path}
    base, pairs, _ = hf.load_fitted(folder, quant, adapter, key, **options)
    start = dataclasses.replace(quant, training="none")
    before = hf.load_fitted(folder, start, adapter, key, calibrate=ROWS)
    errors = [last_error(folder, b, p, adapter) for b, p in ((base, pairs), before[:2])]
    assert errors[0] < errors[1]
    (tmp_path / "layer_1.safetensors").unlink()
    assert_same(hf.load_fitted(folder, quant, adapter, key, **options)[:2], (base, pairs))


@pytest.mark.long
def test_pairs_that_start_at_zero_lower_the_error(folder: Path) -> None:
    """With pairs, the ranges start as without them, and the same steps reach less."""
    adapter, key = AdapterConfig(method="lora", rank=4, init="trained"), jax.random.key(0)
    quant = dataclasses.replace(TRAINED["apiq"], apiq=ApiqOptions(epochs=4, pair_lr=5e-3))
    base, pairs, _ = hf.load_fitted(folder, quant, adapter, key, calibrate=ROWS)
    for part in pairs["layers"].values():
        for pair in part.values():
            assert (np.abs(pair["lora_B"]).max((1, 2)) > 0).all()  # in every layer
    alone = last_error(folder, hf.load_base(folder, quant, calibrate=ROWS)[0])
    assert last_error(folder, base, pairs, adapter) < 0.9 * alone


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        (QuantConfig("nf2"), r"quant\.training = 'none': expected apiq or block with .* trained"),
        (
            QuantConfig("nf2", training="apiq", apiq=ApiqOptions(pair_lr=0.0)),
            r"quant\.apiq\.pair_lr = 0\.0: expected a positive number with adapter\.init trained",
        ),
    ],
)
def test_pairs_that_nothing_trains_are_refused(
    folder: Path, quant: QuantConfig, message: str
) -> None:
    adapter = AdapterConfig(method="lora", rank=4, init="trained")
    with pytest.raises(ValueError, match=message):
        hf.load_fitted(folder, quant, adapter, jax.random.key(0), calibrate=ROWS)


def test_gradients_cannot_serve_and_a_text_is_needed(folder: Path) -> None:
    gradients = CalibrationRows(TOKENS, CalibrateConfig(metric="gradients"))
    message = r"calibrate\.metric = 'gradients': expected inputs with quant\.training apiq"
    with pytest.raises(ValueError, match=message):
        hf.load_base(folder, TRAINED["apiq"], calibrate=gradients)
    with pytest.raises(ValueError, match=r"calibrate\.data = None: .*nf2 \+ ApiQ"):
        hf.load_base(folder, TRAINED["apiq"])
