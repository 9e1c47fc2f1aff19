"""Runs and bases that are calibrated with a text, from the settings to the exported folder."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from irqlora_jax.base import layerwise
from irqlora_jax.base.file import BASE_FILE, read_calibrate
from irqlora_jax.base.make import load_fitted
from irqlora_jax.config import Config, QuantizeConfig
from irqlora_jax.data.calibrate import CalibrateConfig, read_calibration
from irqlora_jax.export.folder import ExportConfig, export
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.runs.load import load_run
from irqlora_jax.runs.quantize import quantize_model
from irqlora_jax.train.finetune import run
from tests.models import QUICKSTART, WORLD, assert_same, run_settings

MODEL, TEXT = WORLD / "base-small", WORLD / "data" / "train.jsonl"
GPTQ = QuantConfig(format="nf2", calibration="gptq")


def text_settings(data: Path) -> CalibrateConfig:
    return CalibrateConfig(str(data), format="input_output", rows=8, length=32)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A copy, which can be deleted."""
    file = tmp_path / "text.jsonl"
    file.write_bytes(TEXT.read_bytes())
    return file


def test_a_base_is_the_same_after_an_interruption(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(folder: str) -> QuantizeConfig:
        return QuantizeConfig(str(MODEL), str(tmp_path / folder), GPTQ, text_settings(text), False)

    quantize_model(config("whole"))
    real, made = layerwise._make_layer, []

    def stop(*given: Any) -> Any:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(real(*given))
        return made[-1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(layerwise, "_make_layer", stop)
        quantize_model(config("again"))
    assert len(list((tmp_path / "again" / "calibration").iterdir())) == 2
    quantize_model(config("again"))
    files = [tmp_path / name / BASE_FILE for name in ("whole", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (tmp_path / "again" / "calibration").exists()
    survey = json.loads((tmp_path / "again" / "quantization.json").read_text())
    used = read_calibrate(files[1])
    assert used is not None and used == survey["calibrate"]
    assert used["rows"] == 8 and used["length"] == 32 and used["data"] == str(text)
    for name, errors in used["output_error"]["own"].items():
        plain = used["output_error"]["plain"][name]
        assert len(errors) == len(plain) and sum(errors) < sum(plain)


@pytest.mark.long
@pytest.mark.usefixtures("optimizer_promotion", "shared_steps")
def test_a_run_tells_how_its_base_was_made_and_resumes_without_the_text(
    tmp_path: Path, text: Path
) -> None:
    changes: dict[str, Any] = {
        "quant.format": "nf2",
        "quant.rounding": "feedback",
        "calibrate.data": str(text),
        "calibrate.format": "input_output",
        "calibrate.rows": 8,
        "calibrate.length": 32,
        "adapter.init": "loftq",
        "adapter.rank": 4,
        "train.steps": 2,
        "data.eval": None,
    }
    settings = run_settings(MODEL, tmp_path / "run") | changes
    run(Config.load(QUICKSTART, settings))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Errors of the outputs" in page and "8 rows of 32 tokens" in page
    text.unlink()
    run(Config.load(QUICKSTART, settings | {"train.steps": 3}))
    export(ExportConfig(run=str(tmp_path / "run"), output_dir=str(tmp_path / "out")))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "rounded with error feedback" in card
    assert "(calibrated with 8 rows of 32 tokens of text.jsonl)" in card


@pytest.mark.long
@pytest.mark.usefixtures("optimizer_promotion")
def test_trained_pairs_are_the_start_of_the_run(tmp_path: Path, text: Path) -> None:
    changes: dict[str, Any] = {
        "quant.format": "nf2",
        "quant.calibration": "none",
        "quant.training": "apiq",
        "quant.apiq.epochs": 1,
        "calibrate.data": str(text),
        "calibrate.format": "input_output",
        "calibrate.rows": 4,
        "calibrate.length": 16,
        "adapter.init": "trained",
        "adapter.method": "lora",
        "adapter.rank": 2,
        "adapter.targets": ["q_proj", "down_proj"],
        "train.steps": 1,
        "train.warmup_steps": 0,
    }
    settings = run_settings(MODEL, tmp_path / "run") | changes
    config = Config.load(QUICKSTART, settings)
    run(config)
    text.unlink()
    run(Config.load(QUICKSTART, settings | {"train.steps": 2}))  # goes on without the text
    start, last = (load_run(tmp_path / "run", checkpoint=c).variables["params"] for c in (0, 2))
    text.write_bytes(TEXT.read_bytes())
    rows = read_calibration(config.calibrate, load_run(tmp_path / "run").tokenizer, 4096)
    key = jax.random.key(config.seed)
    base, pairs, _ = load_fitted(MODEL, config.quant, config.adapter, key, calibrate=rows)
    assert_same(start, pairs)
    assert_same(load_run(tmp_path / "run").variables["base"], base)
    for group, name in (("self_attn", "q_proj"), ("mlp", "down_proj")):
        b = [np.asarray(tree["layers"][group][name]["lora_B"]) for tree in (start, last)]
        assert np.abs(b[0]).max() > 0 and (b[0] != b[1]).any()
    # Its base is incomplete without the pairs, so no other run can begin with it.
    other = settings | run_settings(tmp_path / "run", tmp_path / "other")
    other |= {"adapter.init": "default", "train.steps": 1}
    with pytest.raises(ValueError, match="this base was fitted to the adapter of its run"):
        run(Config.load(QUICKSTART, other))


def test_a_missing_text_is_said_before_anything_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    message = r"calibrate.data = None: expected a text, needed by quant \(nf2 \+ GPTQ\)"
    with pytest.raises(ValueError, match=message):
        quantize_model(QuantizeConfig(str(MODEL), str(folder), GPTQ))
    settings = run_settings(MODEL, folder, quant__format="nf2", quant__calibration="gptq")
    with pytest.raises(ValueError, match=message):
        run(Config.load(QUICKSTART, settings))
    wrong = dataclasses.replace(text_settings(TEXT), data=str(tmp_path / "none.txt"))
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        quantize_model(QuantizeConfig(str(MODEL), str(folder), GPTQ, wrong))
    assert not folder.exists()
