"""Which matrices quantization hurts most: against whole evaluations, one matrix at a time."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax import cli, hf
from irqlora_jax.base.storage import measure_base
from irqlora_jax.config import QuantizeConfig, parse_flags
from irqlora_jax.data import Example
from irqlora_jax.evaluate import evaluation_loss, sensitivity
from irqlora_jax.evaluate.sensitivity import SensitivityConfig, measure_sensitivity
from irqlora_jax.evaluate.suggested import larger_format, suggest
from irqlora_jax.evaluate.swapped import measure_whole, swapped_losses
from irqlora_jax.files.checksums import check_seal
from irqlora_jax.model import alone
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import find_stack, linear_path, matrix_name
from irqlora_jax.quant.config import QuantConfig, QuantRule
from irqlora_jax.quant.encode import quantize
from irqlora_jax.sharding import LINEAR_NAMES
from tests.models import (
    NARROW,
    RELATIVES,
    quantize_base,
    random_base,
    random_tensors,
    word_tokenizer,
    write_model,
)

NF2 = QuantConfig(format="nf2", block_size=32, calibration="none")
MIXED = dataclasses.replace(
    NF2, rules=(QuantRule("layers.0.*", format="nf3"), QuantRule("*.1.*.k_proj", format="none"))
)
PLACES = [(layer, name) for layer in range(2) for name in LINEAR_NAMES]
ROWS = np.random.default_rng(0).integers(3, NARROW.vocab_size, (3, 10)).astype(np.int32)
BATCHES = [ROWS[:2], ROWS[2:]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights are so large that single matrices matter."""
    tensors = {name: 6 * x for name, x in random_tensors(NARROW).items()}
    folder = tmp_path_factory.mktemp("models") / "model"
    return write_model(folder, NARROW, tensors, tokenizer=word_tokenizer(NARROW.vocab_size))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "text.txt"
    file.write_text(" ".join(f"w{i}" for i in ROWS.ravel()))
    return file


def with_matrix(base: Any, place: tuple[int, str], weight: Any) -> Any:
    """A float base with another matrix."""
    layer, name = place
    copy = jax.tree.map(lambda x: x, base)
    group, _ = linear_path(name)
    linear = copy["layers"][group][name]
    linear["weight"] = linear["weight"].at[layer].set(weight)
    return copy


def float_loss(base: Any) -> float:
    examples = [Example(row, np.arange(len(row)) > 0) for row in ROWS]
    return evaluation_loss(Llama(NARROW), {"params": {}, "base": base}, examples, batch_size=3)


def test_losses_are_those_of_whole_evaluations(model: Path) -> None:
    full, _ = hf.load_base(model, None)
    packed, _ = hf.load_base(model, MIXED)

    def matrix(place: tuple[int, str]) -> Any:
        group, name = linear_path(place[1])
        return full["layers"][group][name]["weight"][place[0]]

    quantized, expected, all_quantized = {}, {}, full
    for layer, name in PLACES:
        own = MIXED.for_matrix(matrix_name(linear_path(name), layer))
        if own.format != "none":
            quantized[layer, name] = quantize(matrix((layer, name)), own).dequantize()
    for place, weight in quantized.items():
        expected[place] = float_loss(with_matrix(full, place, weight))
        all_quantized = with_matrix(all_quantized, place, weight)
    bare, places = Llama(NARROW), list(quantized)
    found = {(i, n): x for i, n, x in swapped_losses(bare, full, packed, BATCHES, places)}
    assert found == pytest.approx(expected, abs=1e-5) and len(found) == 13
    assert len({round(loss, 5) for loss in found.values()}) == 13  # no two are alike
    whole = measure_whole(bare, full, BATCHES)
    assert whole.loss == pytest.approx(float_loss(full), abs=1e-5)

    others = {p: float_loss(with_matrix(all_quantized, p, matrix(p))) for p in quantized}
    found = {(i, n): x for i, n, x in swapped_losses(bare, packed, full, BATCHES, places)}
    assert found == pytest.approx(others, abs=1e-5)
    expected_loss = pytest.approx(float_loss(all_quantized), abs=1e-5)
    assert measure_whole(bare, packed, BATCHES).loss == expected_loss

    # Each input channel's mean square, over all tokens of all rows.
    _, stats = bare.apply({"params": {}, "base": full}, jnp.asarray(ROWS), mutable=["stats"])
    for layer, name in PLACES:
        stack, index = find_stack(stats["stats"], layer, 2)
        gram = stack[linear_path(name)[0]][name]["gram"][index]
        expected_moments = np.diagonal(gram) / ROWS.size
        np.testing.assert_allclose(whole.moments[layer][name], expected_moments, rtol=1e-4)


@pytest.mark.long
def test_layers_of_different_kinds() -> None:
    llama = RELATIVES["SmolLM3"]
    model = Llama(llama)
    full, rows = random_base(llama, scale=0.3), ROWS % llama.vocab_size
    packed = quantize_base(full, NF2, ["q_proj"])
    whole = head_loss(model, full, rows)
    assert measure_whole(model, full, [rows]).loss == pytest.approx(whole, abs=1e-5)
    other = packed["layers"]["self_attn"]["q_proj"]["weight"]
    swapped = with_matrix(full, (1, "q_proj"), jax.tree.map(lambda x: x[1], other).dequantize())
    expected = head_loss(model, swapped, rows)
    ((layer, name, loss),) = swapped_losses(model, full, packed, [rows], [(1, "q_proj")])
    assert (layer, name) == (1, "q_proj") and abs(expected - whole) > 1e-3
    assert loss == pytest.approx(expected, abs=1e-5)


def head_loss(model: Llama, base: Any, rows: Any) -> float:
    """Mean loss of the tokens of whole rows but the first."""
    logits = jax.jit(model.apply)({"base": base}, jnp.asarray(rows))
    chosen = jax.nn.log_softmax(logits[:, :-1])
    return -float(jnp.take_along_axis(chosen, jnp.asarray(rows)[:, 1:, None], 2).mean())


def test_one_compiled_layer_serves_all(model: Path, monkeypatch) -> None:
    full, _ = hf.load_base(model, None)
    packed, _ = hf.load_base(model, NF2)
    traced: list[Any] = []
    apply = alone.apply_alone

    def counting(*args: Any, **options: Any) -> Any:
        traced.append(args)
        return apply(*args, **options)

    monkeypatch.setattr(alone, "apply_alone", counting)
    jax.clear_caches()
    for pair in ((full, packed), (packed, full)):
        assert len(list(swapped_losses(Llama(NARROW), *pair, [ROWS], PLACES))) == 14
    assert len(traced) == 1


def asked(model: Path, text: Path, folder: Path, **changes: Any) -> SensitivityConfig:
    settings: dict[str, Any] = {"quant": NF2, "rows": 2, "length": 10, "progress": False}
    return SensitivityConfig(str(model), str(text), str(folder), **(settings | changes))


@pytest.mark.long
def test_an_interrupted_command_continues(model: Path, text: Path, tmp_path: Path, said) -> None:
    """And the result is that of a command without an interruption."""
    whole = measure_sensitivity(asked(model, text, tmp_path / "whole"))
    folder = tmp_path / "parts"
    appended: list[tuple[int, str]] = []

    def append(file: Path, layer: int, name: str, *value: Any) -> None:
        if len(appended) == 5:
            raise KeyboardInterrupt
        appended.append((layer, name))
        original(file, layer, name, *value)

    original = sensitivity.append_value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "append_value", append)
        with pytest.raises(KeyboardInterrupt):
            measure_sensitivity(asked(model, text, folder))
        assert "the same command resumes from there" in said[-1]
        file = folder / "losses.jsonl"
        lines = file.read_text().split("\n")
        lines[2] = lines[2].replace('"loss": ', '"loss": 9')  # damage, and an incomplete line
        file.write_text("\n".join(lines) + '{"layer": 1, "projec')
        assert not (folder / "sensitivity.json").exists()
        appended[:] = []
        patch.setattr(
            sensitivity, "append_value", lambda *a: (appended.append(a[1:3]), original(*a))
        )
        again = measure_sensitivity(asked(model, text, folder))
    assert appended == [PLACES[1], *PLACES[5:]]
    assert again["losses"] == whole["losses"] and again["suggestion"] == whole["suggestion"]
    stored = json.loads((folder / "sensitivity.json").read_text())
    assert check_seal(stored, "losses") == json.loads(json.dumps(again))
    assert [path.name for path in sorted(folder.iterdir())] == ["losses.jsonl", "sensitivity.json"]

    with pytest.raises(ValueError, match=r"quant.format = 'nf2' there, 'nf3' here"):
        measure_sensitivity(
            asked(model, text, folder, quant=dataclasses.replace(NF2, format="nf3"))
        )
    (tmp_path / "losses.jsonl").write_text('{"loss": 3}\n')
    with pytest.raises(ValueError, match="not the losses of irqlora sensitivity"):
        measure_sensitivity(asked(model, text, tmp_path))


@pytest.mark.parametrize("mode", ["one", "all_but_one"])
def test_costs_are_differences_and_rules_are_kept(
    model: Path, text: Path, tmp_path: Path, said: list[str], mode: str
) -> None:
    wide = ("q_proj", "k_proj")
    settings = asked(
        model, text, tmp_path / "out", quant=MIXED, mode=mode, projections=wide, rows=9
    )
    found = measure_sensitivity(settings)
    assert "for 3 of 9 rows" in said[0] and found["tokens"] == 27  # 31 tokens with bos
    assert found["losses"].keys() == {"q_proj", "k_proj"}
    assert found["losses"]["k_proj"][1] is None  # which the rules keep
    full, whole = found["full_precision"], found["quantized"]
    for name in wide:
        for loss, cost in zip(found["losses"][name], found["costs"][name], strict=True):
            if loss is not None:
                assert cost == (loss - full if mode == "one" else whole - loss)
    assert found["survey"]["formats"] == {"nf2": 6, "nf3": 7}
    for name in LINEAR_NAMES:
        one = found["outliers"][name]
        assert min(one["ratio"]) >= 1 and max(one["channel"]) < 40


def test_suggested_rules_parse_and_do_what_they_say(
    model: Path, text: Path, tmp_path: Path, said: list[str]
) -> None:
    folder = tmp_path / "out"
    found = measure_sensitivity(asked(model, text, folder, quant=MIXED, extra_bits=0.3))
    advice = found["suggestion"]
    assert advice["rules"] in said
    file = tmp_path / "rules.yaml"
    file.write_text(advice["rules"])
    flags = [f"--config={file}", f"--model={model}", "--output_dir=x", "--quant.format=nf2"]
    flags += ["--quant.block_size=32", "--quant.calibration=none"]
    quant = parse_flags(QuantizeConfig, flags, "irqlora quantize").quant
    assert quant.rules[-2:] == MIXED.rules and len(quant.rules) == advice["added"] + 2
    for settings, bits in ((MIXED, "bits_before"), (quant, "bits_after")):
        assert measure_base(hf.load_base(model, settings)[0]).bits == pytest.approx(advice[bits])
    assert 0 < advice["bits_after"] - advice["bits_before"] <= 0.3
    costs = {
        matrix_name(linear_path(name), layer): cost
        for name, values in found["costs"].items()
        for layer, cost in enumerate(values)
        if cost is not None
    }
    # All matrices have the same size, so the worst ones come first, and none that costs nothing.
    chosen = [costs[rule.match] for rule in quant.rules[:-2]]
    assert chosen == sorted(chosen, reverse=True) and chosen[0] == max(costs.values())
    assert chosen[-1] > -min(costs.values()) > 0
    for rule in quant.rules[:-2]:
        assert rule.format == larger_format(MIXED.for_matrix(rule.match).format)
        assert quant.for_matrix(rule.match).format == rule.format


def test_rules_within_a_budget() -> None:
    config = QuantConfig(format="nf4", block_size=32, calibration="none")
    costs = {(0, "q_proj"): 0.1, (0, "k_proj"): -0.05, (1, "q_proj"): math.nan}
    # 16 - 4.5 bits for one of 14 matrices.
    nothing = suggest(costs, config, NARROW, 0.5)
    assert (nothing.rules, nothing.after) == ((), nothing.before)
    advice = suggest(costs, config, NARROW, 1.0)
    assert advice.rules == (QuantRule("layers.0.self_attn.q_proj", format="none"),)
    assert advice.after > advice.before
    # Where another matrix seems to gain as much, a cost is noise.
    noise = suggest(costs | {(1, "up_proj"): -0.1}, config, NARROW, 1.0)
    assert (noise.rules, noise.added) == ((), 0) == (suggest({}, config, NARROW, 1.0).rules, 0)
    assert [larger_format(name) for name in ("int2", "nf3", "fp4")] == ["int3", "nf4", "none"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["model and text and output_dir: no value"]),
        (["--text=nowhere.txt"], ["text = 'nowhere.txt': no such file"]),
        (["--text=short.txt"], ["short.txt", "3 tokens", "length of a row, 16 (--length)"]),
        (["--text=empty.txt"], ["empty.txt", "1 tokens"]),
        (["--projections=z_proj"], ["projections = 'z_proj'", "q_proj, k_proj"]),
        (["--mode=two"], ["mode = 'two'", "one or all_but_one"]),
        (["--quant.format=none"], ["quant.format = 'none'", "nf4"]),
        (["--rows=0"], ["rows = 0", "at least 1"]),
        (["--length=1"], ["length = 1", "at least 2"]),
        (["--length=65"], ["length = 65", "max_position_embeddings = 64"]),
        (["--extra_bits=-1"], ["extra_bits = -1.0"]),
        (["--model=base"], ["model = 'base': already quantized"]),
        (["--model=gone"], ["gone", "no such folder"]),
        (["--output_dir=short.txt"], ["output_dir = 'short.txt'"]),
        (["--quant.rules=[{match: x, format: nf3}]"], ["quant.rules[0].match = 'x'", "layers.0"]),
    ],
)
def test_bad_input(
    model: Path, text: Path, tmp_path: Path, monkeypatch, capsys, flags: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("w3 w4")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "base.safetensors").write_text("")
    before = sorted(tmp_path.iterdir())
    given = [f"--model={model}", f"--text={text}", "--output_dir=out", "--length=16"]
    given += ["--quant.calibration=none", "--progress=false"]
    assert cli.main(["sensitivity", *(given + flags if flags else [])]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for word in words:
        assert word in err, err
    assert sorted(tmp_path.iterdir()) == before
