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
from irqlora_jax.plan.gpus import DEVICES
from irqlora_jax.plan.measure import PlanDevice
from irqlora_jax.quant.config import QuantConfig, QuantRule
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
    assert twice.work == pytest.approx(2 * first.work)  # no feedback, which rows do not change
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


@pytest.mark.long
@pytest.mark.usefixtures("optimizer_promotion")
def test_the_command_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_config(tmp_path, LLAMA)
    flags = ["train", "--plan", "--model", str(model), "--output_dir", str(tmp_path / "new")]
    assert main([*flags, "--calibrate.data", "text.txt", "--calibrate.length", "32"]) == 0
    said = capsys.readouterr().out
    assert "calibration with a text, before the training: " in said and "on the host" in said


@pytest.mark.usefixtures("optimizer_promotion")
def test_training_keeps_more_and_takes_longer() -> None:
    target = PlanDevice("a device", jax.devices(), 2**30, 2**30)
    trained = dataclasses.replace(CONFIG, quant=QuantConfig(training="block"))
    pairs = dataclasses.replace(trained, adapter=AdapterConfig(rank=16, init="trained"))
    alone, both, more = (measure_calibration(c, LLAMA, target) for c in (CONFIG, trained, pairs))
    assert both.host == 3 * alone.host and both.work > 2 * alone.work
    layer = 4 * sum(rows * columns for rows, columns in LLAMA.linear_shapes.values())
    # The weights, a copy that is trained, two moments of Adam and the gradient; the rest depends
    # on the compiler, and is large beside such small matrices.
    assert 5 * layer < both.device < 25 * layer
    rank = 4 * 16 * sum(rows + columns for rows, columns in LLAMA.linear_shapes.values())
    assert both.device + 4 * rank < more.device < both.device + 8 * rank


IMPORTANCE = QuantConfig("nf3", calibration="importance")
FEEDBACK = QuantConfig("nf3", calibration="importance", rounding="feedback")
RULE = QuantConfig(rules=(QuantRule("*.up_proj", rounding="feedback"),))
NEEDS = {  # factors of a matrix at a time, whether there is feedback
    "importance": (IMPORTANCE, "default", 1, False),
    "feedback": (FEEDBACK, "default", 6, True),
    "rule": (RULE, "default", 6, True),
    "cloq": (IMPORTANCE, "cloq", 7, False),
}


@pytest.mark.parametrize("name", NEEDS)
def test_memory_and_work_by_hand(name: str) -> None:
    """Few tokens, so that rounding the widest matrix needs more than the statistics."""
    quant, init, factors, feedback = NEEDS[name]
    text = dataclasses.replace(TEXT, rows=2, length=4, batch_size=1)
    config = dataclasses.replace(CONFIG, quant=quant, calibrate=text)
    config = dataclasses.replace(config, adapter=AdapterConfig(init=init))  # type: ignore[arg-type]
    target = PlanDevice("a device", jax.devices(), 2**30, 2**30)
    found = measure_calibration(config, LLAMA, target)
    # q [56, 40], k and v [28, 40], o [40, 56], gate and up [172, 40], down [40, 172]
    weights = 56 * 40 + 2 * 28 * 40 + 40 * 56 + 2 * 172 * 40 + 40 * 172
    kinds = 40, 56, 40, 172  # the inputs of q, o, gate and down
    statistics = 4 * sum(n**2 for n in kinds)
    rounding = 4 * (factors * 172**2 + 3 * 40 * 172)
    norms = 2 * 40
    assert found.device == 2 * 4 * (weights + norms) + statistics + rounding
    tokens = 2 * 4
    work = 2 * (2 * tokens * weights) + tokens * sum(2 * n**2 for n in kinds)
    if feedback:
        columns = [(56, 40), (28, 40), (28, 40), (40, 56), (172, 40), (172, 40), (40, 172)]
        work += sum(2 * rows * n**2 for rows, n in columns) + 8 / 3 * sum(n**3 for n in kinds)
    assert found.work == pytest.approx(LLAMA.num_hidden_layers * work, rel=1e-12)


def test_the_rates_are_those_of_the_data_sheets() -> None:
    rates = {"t4": 8.1, "a100-80": 19.5, "4090": 82.6, "h100": 66.9}
    assert {name: round(DEVICES[name].flops / 1e12, 1) for name in rates} == rates


def test_a_plan_without_the_text_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_config(tmp_path, LLAMA)
    flags = ["train", "--plan", "--model", str(model), "--output_dir", str(tmp_path / "new")]
    assert main([*flags, "--quant.calibration", "gptq"]) == 2
    assert "calibrate.data = None: expected a text" in capsys.readouterr().err
