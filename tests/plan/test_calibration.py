"""The plan of a calibration with a text."""

import dataclasses
from pathlib import Path

import jax
import pytest

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.lqlora import LqloraOptions
from irqlora_jax.cli import main
from irqlora_jax.config import Config
from irqlora_jax.data.calibrate import CalibrateConfig
from irqlora_jax.plan.calibration import measure_calibration
from irqlora_jax.plan.measure import PlanDevice
from irqlora_jax.quant.config import QuantConfig
from tests.models import LLAMA, write_config

TEXT = CalibrateConfig("text.txt", rows=16, length=32, batch_size=4)
CONFIG = Config("model", "folder", calibrate=TEXT)


@pytest.mark.parametrize("metric", ["inputs", "gradients"])
def test_memory_holds_a_layer_and_grows_as_it_should(metric: str) -> None:
    target = PlanDevice("a device", jax.devices(), 2**30, 2**30)

    def need(**changes: object):
        text = dataclasses.replace(TEXT, metric=metric, **changes)  # type: ignore[arg-type]
        return measure_calibration(dataclasses.replace(CONFIG, calibrate=text), LLAMA, target)

    first = need()
    layer = 4 * sum(rows * columns for rows, columns in LLAMA.linear_shapes.values())
    assert first.device > 2 * layer
    states = 16 * 32 * LLAMA.hidden_size * 4
    # For gradients: the states in front of all layers and behind the last, and two of gradients.
    assert first.host == states * (1 if metric == "inputs" else LLAMA.num_hidden_layers + 3)
    twice = need(rows=32)
    assert (twice.device, twice.host) == (first.device, 2 * first.host)
    assert 1.5 * first.work < twice.work < 2 * first.work
    assert need(activations="bfloat16").host == states * (1 if metric == "inputs" else 7) // 2
    assert need(batch_size=512).device > first.device


def test_squared_gradients_need_their_memory() -> None:
    target = PlanDevice("a device", jax.devices(), 2**30, 2**30)
    config = dataclasses.replace(CONFIG, calibrate=dataclasses.replace(TEXT, metric="gradients"))
    weighed = AdapterConfig(init="lqlora", lqlora=LqloraOptions(weights="rows"))
    plain, more = (
        measure_calibration(dataclasses.replace(config, adapter=adapter), LLAMA, target).device
        for adapter in (AdapterConfig(init="lqlora"), weighed)
    )
    layer = 4 * sum(rows * columns for rows, columns in LLAMA.linear_shapes.values())
    assert more >= plain + layer


@pytest.mark.usefixtures("optimizer_promotion")
def test_the_command_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_config(tmp_path, LLAMA)
    flags = ["train", "--plan", "--model", str(model), "--output_dir", str(tmp_path / "new")]
    assert main([*flags, "--calibrate.data", "text.txt", "--calibrate.length", "32"]) == 0
    said = capsys.readouterr().out
    assert "calibration with a text, before the training: " in said and "on the host" in said


def test_training_keeps_more_on_the_host_and_takes_longer() -> None:
    target = PlanDevice("a device", jax.devices(), 2**30, 2**30)
    trained = dataclasses.replace(CONFIG, quant=QuantConfig(training="block"))
    alone, both = (measure_calibration(c, LLAMA, target) for c in (CONFIG, trained))
    assert (both.host, both.device) == (3 * alone.host, alone.device)
    assert both.work > 2 * alone.work


def test_a_plan_without_the_text_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_config(tmp_path, LLAMA)
    flags = ["train", "--plan", "--model", str(model), "--output_dir", str(tmp_path / "new")]
    assert main([*flags, "--quant.calibration", "gptq"]) == 2
    assert "calibrate.data = None: expected a text" in capsys.readouterr().err
