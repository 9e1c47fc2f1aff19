"""Trained scales and pooled adapters through the whole product: a run, its evaluation, a quantized
export, and a second run on it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.base.train_layer import _lora
from irqlora_jax.config import Config
from irqlora_jax.evaluate.tasks import EvalConfig, evaluate_run
from irqlora_jax.export.folder import ExportConfig, export
from irqlora_jax.model.layer import Settings
from irqlora_jax.runs.load import load_run
from irqlora_jax.train.finetune import run
from irqlora_jax.train.initial import check_start
from tests.models import TINY, WORLD
from tests.train.small_runs import (
    StoppedError,
    assert_same_run,
    at_step,
    config_for,
    crash,
    losses_of,
)

pytestmark = pytest.mark.usefixtures("optimizer_promotion", "shared_steps")
CHANGES: dict[str, Any] = {
    "adapter__method": "qalora",
    "adapter__rank": 4,
    "adapter__qalora__group": 64,
    "adapter__scales": 64,
    "adapter__targets": ("q_proj", "down_proj"),
    "adapter__dropout": 0.0,
    "train__learning_rate": 5e-3,
    "train__steps": 4,
    "data__eval": None,
}


def perplexity(folder: Path, output: Path) -> float:
    text = output.with_suffix(".txt")
    text.write_text((WORLD / "data" / "train.jsonl").read_text()[:3000])
    asked = EvalConfig(str(folder), "perplexity", text=str(text), output=str(output))
    return evaluate_run(asked)["perplexity"]


@pytest.mark.long
def test_the_whole_product(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(config_for(base, whole, **CHANGES))
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        at_step(patch, 3, crash)
        run(config_for(base, broken, **CHANGES))
    run(config_for(base, broken, **CHANGES))
    assert_same_run(whole, broken)
    trained = load_run(whole)
    own = trained.variables["params"]["layers"]["mlp"]["down_proj"]
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in own.values())

    merged = tmp_path / "merged"
    export(ExportConfig(str(whole), str(merged), "quantized", progress=False, dtype="float32"))
    plain, tuned, inside = (
        perplexity(folder, tmp_path / f"{name}.json")
        for name, folder in (("plain", base), ("tuned", whole), ("inside", merged))
    )
    assert tuned == pytest.approx(inside, rel=1e-4)
    assert abs(tuned - plain) > 1e-2 * plain

    second = tmp_path / "second"
    run(config_for(merged, second, **CHANGES | {"train__steps": 1}))
    first = jax.eval_shape(lambda: load_run(second).variables["base"])
    weight = first["layers"]["mlp"]["down_proj"]["weight"]
    assert weight.scale_update is not None and weight.shift_update is not None
    assert losses_of(second)[0][1] < losses_of(whole)[0][1]

    other = config_for(whole, tmp_path / "other", **CHANGES | {"adapter__scales": 0})
    adapter = {**vars(other.adapter), "init_from": str(whole)}
    other = Config(**{**vars(other), "adapter": AdapterConfig(**adapter)})
    with pytest.raises(ValueError, match=r"adapter\.scales = 0: the adapter in .* has 64"):
        check_start(other)


def test_a_kernel_that_takes_no_trained_scales_is_refused_before_the_start(
    base: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"train\.matmul"):
        run(config_for(base, tmp_path / "run", **CHANGES, train__matmul="triton"))


def test_a_layer_is_trained_with_the_factor_of_the_run() -> None:
    adapter = AdapterConfig("iec", rank=16, alpha=8.0, scaling="sqrt_rank")
    settings = Settings(TINY, adapter, None, None, True)
    found = _lora(settings).adapter
    assert found is not None and found.method == "lora"
    np.testing.assert_allclose(found.scale, adapter.scale)


def test_what_a_method_cannot_use_is_refused() -> None:
    for settings, message in (
        ({"method": "binary", "init": "loftq"}, "expected default with adapter.method binary"),
        ({"method": "qalora", "init": "cloq"}, "expected default with adapter.method qalora"),
        ({"method": "lokr", "scaling": "sqrt_rank"}, "expected rank with adapter.method lokr"),
        ({"method": "bayesian", "scales": 64}, "expected 0 with adapter.method bayesian"),
    ):
        with pytest.raises(ValueError, match=message):
            AdapterConfig(**settings)  # type: ignore[arg-type]
