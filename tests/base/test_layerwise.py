"""Calibration with a text, layer by layer, against the same steps written out."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax import hf
from irqlora_jax.adapters.cloq import CloqOptions
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.base import layerwise
from irqlora_jax.data.calibrate import CalibrateConfig, CalibrationRows
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant import inputs
from irqlora_jax.quant.config import QuantConfig, QuantRule
from irqlora_jax.quant.encode import quantize
from irqlora_jax.quant.qtensor import QTensor
from tests.models import LLAMA, assert_same, random_tensors, write_model

SETTINGS = CalibrateConfig(rows=6, length=12, batch_size=4, damping=0.05)
TOKENS = np.random.default_rng(3).integers(0, LLAMA.vocab_size, (6, 12)).astype(np.int32)
ROWS = CalibrationRows(TOKENS, SETTINGS)
NF2 = QuantConfig(format="nf2", calibration="gptq")
GROUPS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj")}
GROUPS |= {"mlp": ("gate_proj", "up_proj", "down_proj")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("layerwise"), LLAMA)


def grams(base: dict[str, Any]) -> dict[str, Any]:
    """X^T X of every linear layer of a whole model, in one pass."""
    variables = {"params": {}, "base": base}
    _, found = Llama(LLAMA).apply(variables, jnp.asarray(TOKENS), mutable=["stats"])  # type: ignore
    return found["stats"]["layers"]


def slow(folder: Path, quant: QuantConfig) -> dict[str, Any]:
    """The base in which each layer was quantized for the inputs that the whole model gives, with
    all layers before it quantized already."""
    base = hf.load_base(folder, None)[0]
    packed: dict[tuple[str, str], list[QTensor]] = {}
    for layer in range(LLAMA.num_hidden_layers):
        moments = grams(base)
        for group, names in GROUPS.items():
            for name in names:
                stack = base["layers"][group][name]["weight"]
                gram = moments[group][name]["gram"][layer]
                made = quantize(stack[layer], quant, gram=gram, damping=0.05)
                packed.setdefault((group, name), []).append(made)
        for (group, name), made in packed.items():
            stack = base["layers"][group][name]["weight"]
            new = stack.at[layer].set(made[layer].dequantize())
            base["layers"][group][name] = {"weight": new}
    for (group, name), made in packed.items():
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *made)
        base["layers"][group][name] = {"weight": stacked}
    return base


@pytest.mark.parametrize("calibration", ["gptq", "importance"])
def test_every_layer_sees_the_inputs_behind_the_quantized_ones(
    folder: Path, calibration: str
) -> None:
    """Codes may differ by rounding of the moments, so nearly all have to be equal."""
    quant = dataclasses.replace(NF2, calibration=calibration)
    found, expected = hf.load_base(folder, quant, calibrate=ROWS)[0], slow(folder, quant)
    plain = hf.load_base(folder, quant.plain)[0]
    for group, names in GROUPS.items():
        for name in names:
            ours, theirs, other = (
                np.asarray(base["layers"][group][name]["weight"].codes())
                for base in (found, expected, plain)
            )
            assert (ours == theirs).mean() > 0.999
            assert (ours == other).mean() < 0.999


def test_the_same_text_gives_the_same_bytes_and_another_text_others(folder: Path) -> None:
    one, two = (hf.load_base(folder, NF2, calibrate=ROWS)[0] for _ in range(2))
    assert_same(one, two)
    other = CalibrationRows((TOKENS + 1) % LLAMA.vocab_size, SETTINGS)
    three = hf.load_base(folder, NF2, calibrate=other)[0]
    packed = [base["layers"]["mlp"]["down_proj"]["weight"].packed for base in (one, three)]
    assert not bool((packed[0] == packed[1]).all())


def mean_error(folder: Path, rows: CalibrationRows) -> float:
    found: list[float] = []
    hf.load_base(folder, NF2, calibrate=rows, watch=lambda *about: found.append(about[-1].own))
    return float(np.mean(found))


def test_batches_and_half_precision_change_little(folder: Path) -> None:
    """Codes near a midpoint change, and feedback passes that on; the errors stay the same."""
    whole = mean_error(folder, ROWS)
    for changes in ({"batch_size": 1}, {"activations": "bfloat16"}):
        other = CalibrationRows(TOKENS, dataclasses.replace(SETTINGS, **changes))
        np.testing.assert_allclose(mean_error(folder, other), whole, rtol=0.03)


def test_the_errors_of_the_outputs_are_those_of_the_definition(folder: Path) -> None:
    """Of the first layer, whose inputs the quantization does not change."""
    seen: dict[tuple[int, str], Any] = {}

    def watch(layer: int, name: str, weight: Any, packed: Any, own: Any, errors: Any) -> None:
        seen[layer, name] = np.asarray(weight, np.float64), packed, errors

    hf.load_base(folder, NF2, calibrate=ROWS, watch=watch)
    assert len(seen) == 7 * LLAMA.num_hidden_layers
    moments = grams(hf.load_base(folder, None)[0])
    for group, names in GROUPS.items():
        for name in names:
            weight, packed, errors = seen[0, name]
            gram = np.asarray(moments[group][name]["gram"][0], np.float64)
            plain = quantize(jnp.asarray(weight, jnp.float32), NF2.plain).dequantize()
            for values, error in ((plain, errors.plain), (packed.dequantize(), errors.own)):
                off = weight - np.asarray(values, np.float64)
                expected = np.trace(off @ gram @ off.T) / np.trace(weight @ gram @ weight.T)
                np.testing.assert_allclose(error, expected, rtol=1e-4)
            assert errors.own < errors.plain


def test_rules_keep_some_matrices_and_calibrate_others_without_the_text(folder: Path) -> None:
    rules = (
        QuantRule("layers.0.*", format="none"),
        QuantRule("*.down_proj", calibration="none", rounding="nearest"),
    )
    quant = QuantConfig(format="nf3", calibration="none", rounding="feedback", rules=rules)
    base, _ = hf.load_base(folder, quant, calibrate=ROWS)
    plain, _ = hf.load_base(folder, quant.plain)
    assert_same(base["layers_0"], plain["layers_0"])
    down, gate = (
        [b["layers_1"]["mlp"][name]["weight"] for b in (base, plain)]
        for name in ("down_proj", "gate_proj")
    )
    assert_same(*down)
    assert not bool((gate[0].packed == gate[1].packed).all())


def test_an_interrupted_calibration_goes_on_behind_its_last_layer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = hf.load_base(folder, NF2, calibrate=ROWS)[0]
    real, made = layerwise._make_layer, []

    def stop(*given: Any) -> Any:
        if made:
            raise KeyboardInterrupt
        made.append(real(*given))
        return made[-1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(layerwise, "_make_layer", stop)
        hf.load_base(folder, NF2, calibrate=ROWS, keep=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["layer_0.safetensors"]
    seen: list[tuple[int, str, Any]] = []

    def watch(layer: int, name: str, weight: Any, packed: Any, own: Any, errors: Any) -> None:
        seen.append((layer, name, errors))

    with monkeypatch.context() as patch:
        layers: list[int] = []

        def counted(*given: Any) -> Any:
            layers.append(given[4])
            return real(*given)

        patch.setattr(layerwise, "_make_layer", counted)
        again = hf.load_base(folder, NF2, calibrate=ROWS, keep=tmp_path, watch=watch)[0]
    assert layers == [1]
    assert_same(whole, again)
    assert {(layer, errors is not None) for layer, _, errors in seen} == {(0, True), (1, True)}


@pytest.mark.long
@pytest.mark.parametrize("change", ["text", "settings"])
def test_layers_of_another_calibration_are_not_used(
    folder: Path, tmp_path: Path, change: str
) -> None:
    hf.load_base(folder, NF2, calibrate=ROWS, keep=tmp_path)
    quant, rows = NF2, ROWS
    if change == "text":
        rows = CalibrationRows((TOKENS + 1) % LLAMA.vocab_size, SETTINGS)
    else:
        quant = dataclasses.replace(NF2, block_size=32)
    again = hf.load_base(folder, quant, calibrate=rows, keep=tmp_path)[0]
    assert_same(again, hf.load_base(folder, quant, calibrate=rows)[0])


def test_a_damaged_layer_is_said_and_made_again(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = hf.load_base(folder, NF2, calibrate=ROWS, keep=tmp_path)[0]
    file = tmp_path / "layer_1.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    assert_same(hf.load_base(folder, NF2, calibrate=ROWS, keep=tmp_path)[0], whole)
    assert re.search(r"layer_1\.safetensors: .* is damaged .*layer 1 is quantized", caplog.text)


@pytest.mark.long
def test_fitted_pairs_lower_the_error_of_the_outputs(folder: Path) -> None:
    """LoftQ fits them to the weights, and CLoQ to the outputs."""
    key, quant = jax.random.key(0), QuantConfig(format="nf2", calibration="none")
    quant = dataclasses.replace(quant, rounding="feedback")
    seen: list[float] = []
    for init in (None, "loftq", "cloq"):
        errors: list[float] = []

        def watch(*about: Any, errors: list[float] = errors) -> None:
            errors.append(about[-1].own)

        if init is None:
            hf.load_base(folder, quant, calibrate=ROWS, watch=watch)
        else:
            adapter = AdapterConfig(method="lora", rank=4, init=init)  # type: ignore[arg-type]
            _, pairs, _ = hf.load_fitted(folder, quant, adapter, key, calibrate=ROWS, watch=watch)
            assert pairs["layers"]["mlp"]["up_proj"]["lora_A"].shape == (2, 4, LLAMA.hidden_size)
        seen.append(float(np.mean(errors)))
    assert seen[0] > seen[1] > seen[2]


@pytest.mark.parametrize("turns", [0, 2])
def test_each_inputs_are_factored_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    """4 kinds of inputs in each of 2 layers. One factor for each matrix and turn would be 14 a
    turn, and 14 roots."""
    counts = {"feedback_factor": 0, "input_root": 0}

    def counted(name: str, real: Any) -> Any:
        def call(*given: Any) -> Any:
            counts[name] += 1
            return real(*given)

        return call

    for name in counts:
        monkeypatch.setattr(inputs, name, counted(name, getattr(inputs, name)))
    if turns:
        fit = {"init": "cloq", "cloq": CloqOptions(iterations=turns)}
        adapter = AdapterConfig(method="lora", rank=2, **fit)  # type: ignore[arg-type]
        hf.load_fitted(folder, NF2, adapter, jax.random.key(0), calibrate=ROWS)
    else:
        hf.load_base(folder, NF2, calibrate=ROWS)
    assert counts == {"feedback_factor": 2 * 4, "input_root": 2 * 4 if turns else 0}


def test_a_fitted_model_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    adapter, key = AdapterConfig(method="lora", rank=4, init="cloq"), jax.random.key(0)
    options: dict[str, Any] = {"calibrate": ROWS, "keep": tmp_path}
    quant = QuantConfig(format="nf2", calibration="none")
    with pytest.raises(ValueError, match=r"calibrate\.data = None: .* by adapter\.init cloq"):
        hf.load_fitted(folder, quant, adapter, key)
    whole = hf.load_fitted(folder, quant, adapter, key, **options)
    (tmp_path / "layer_1.safetensors").unlink()
    again = hf.load_fitted(folder, quant, adapter, key, **options)
    assert_same(whole[:2], again[:2])
    other = hf.load_fitted(folder, quant, adapter, jax.random.key(1), **options)
    assert_same(whole[0], other[0])


@pytest.mark.parametrize(
    ("quant", "named"),
    [
        (NF2, r"quant \(nf2 \+ GPTQ\)"),
        (QuantConfig(rounding="feedback"), r"quant \(nf4 \+ ICQ \+ feedback\)"),
        (QuantConfig(rules=(QuantRule("*", calibration="importance"),)), "quant .*with rules"),
    ],
)
def test_a_missing_text_is_said_before_anything_is_read(
    folder: Path, quant: QuantConfig, named: str
) -> None:
    with pytest.raises(ValueError, match=rf"calibrate.data = None: expected a text, .*{named}"):
        hf.load_base(folder, quant)


def test_text_that_does_not_fit_the_model(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    high = CalibrationRows(np.full((2, 4), LLAMA.vocab_size, np.int32), SETTINGS)
    with pytest.raises(ValueError, match="token 43; expected tokens below vocab_size = 43"):
        hf.load_base(folder, NF2, calibrate=high)
    few = CalibrationRows(TOKENS[:, :6], SETTINGS)
    hf.load_base(folder, NF2, calibrate=few)
    assert "36 tokens are fewer than the 172 inputs of down_proj" in caplog.text


def test_an_infinite_activation_names_the_projection(tmp_path: Path) -> None:
    tensors = random_tensors(LLAMA, np.float32)
    tensors["model.layers.0.mlp.up_proj.weight"] *= np.float32(1e38)
    huge = write_model(tmp_path, LLAMA, tensors)
    with pytest.raises(
        ValueError, match="layer 0: down_proj: an input or gradient is NaN or infinite"
    ):
        hf.load_base(huge, NF2, calibrate=ROWS)
