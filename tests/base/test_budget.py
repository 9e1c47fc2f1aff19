"""Formats for a budget: the table of errors, the choice, its rules, and the bytes in the file."""

import dataclasses
import fnmatch
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax import cli, hf
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.base import error_table
from irqlora_jax.base.budget import choose_rules, planned_rules, read_budget
from irqlora_jax.base.error_table import ERRORS_FILE, make_errors, read_costs
from irqlora_jax.base.file import read_base, read_base_config
from irqlora_jax.base.rule_patterns import ANY, find_patterns
from irqlora_jax.base.storage import abstract_base, bits_by_layer, measure_base
from irqlora_jax.config import Config, QuantizeConfig
from irqlora_jax.data.calibrate import CalibrateConfig, CalibrationRows
from irqlora_jax.files.checksums import seal
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import find_stack, linear_path, matrix_name
from irqlora_jax.quant.budget import AllocationOptions
from irqlora_jax.quant.config import QuantConfig, QuantRule
from irqlora_jax.quant.encode import quantize
from irqlora_jax.runs.quantize import quantize_model
from irqlora_jax.sharding import LINEAR_NAMES
from tests.models import NARROW, random_tensors, word_tokenizer, write_model

LLAMA = dataclasses.replace(NARROW, num_hidden_layers=3)
FEW = AllocationOptions(("nf2", "nf3", "nf4"), (16,), (8,))
QUANT = QuantConfig(calibration="none", budget=3.9, allocation=FEW)
PLACES = [(layer, name) for layer in range(3) for name in LINEAR_NAMES]
TOKENS = np.random.default_rng(3).integers(0, LLAMA.vocab_size, (5, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matrices of very different sizes, so that the choice matters."""
    rng = np.random.default_rng(1)
    tensors = {name: x * rng.uniform(0.3, 9) for name, x in random_tensors(LLAMA).items()}
    tensors = {name: x.astype(np.float32) for name, x in tensors.items()}
    folder = tmp_path_factory.mktemp("budget") / "model"
    return write_model(folder, LLAMA, tensors, tokenizer=word_tokenizer(LLAMA.vocab_size))


@pytest.fixture(scope="module")
def float_base(model: Path) -> dict[str, Any]:
    return hf.load_base(model, None)[0]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, str]]]:
    """The matrices whose errors are computed; stops before the count in `computed.stop`."""
    places: list[tuple[int, str]] = []
    append = error_table.append_value

    def watch(file: Path, layer: int, name: str, *value: Any) -> None:
        if len(places) == 5:
            raise KeyboardInterrupt
        places.append((layer, name))
        append(file, layer, name, *value)

    monkeypatch.setattr(error_table, "append_value", watch)
    yield places


def matrix(base: dict[str, Any], place: tuple[int, str]) -> Any:
    group, name = linear_path(place[1])
    stack, index = find_stack(base, place[0], 3)
    return jax.tree.map(lambda x: x[index], stack[group][name]["weight"])


# ---------------------------------------------------------------------------------------- patterns


@pytest.mark.parametrize(("depth", "kinds"), [(1, 2), (3, 3), (12, 2), (34, 3), (112, 2)])
def test_patterns_give_every_matrix_its_choice(depth: int, kinds: int) -> None:
    rng = np.random.default_rng(depth)
    choices = np.repeat(rng.integers(0, kinds, (-(-depth // 4), 7)), 4, axis=0)[:depth]
    choices[rng.random(choices.shape) < 0.05] = ANY
    choices[rng.random(choices.shape) < 0.05] = 0
    found = find_patterns(choices, 0)
    for layer, row in enumerate(choices.tolist()):
        for name, choice in zip(LINEAR_NAMES, row, strict=True):
            whole = matrix_name(linear_path(name), layer)
            own = next((one for match, one in found if fnmatch.fnmatchcase(whole, match)), 0)
            assert choice in (ANY, own)
    assert len(found) <= (choices > 0).sum()


def test_few_patterns_where_few_are_enough() -> None:
    choices = np.zeros((32, 7), int)
    choices[:, 6], choices[[0, 1, 31]], choices[10:20, 2] = 1, 2, 3
    assert find_patterns(choices, 0) == [
        ("layers.31.*", 2),
        ("layers.1[0-9].self_attn.v_proj", 3),
        ("layers.[01].*", 2),
        ("*.down_proj", 1),
    ]
    assert find_patterns(np.zeros((5, 7), int), 0) == []


# ------------------------------------------------------------------------------------------- table


def slow_errors(base: dict[str, Any], kind: str) -> np.ndarray:
    """In float64, with statistics of the whole model."""
    bare, layers = Llama(LLAMA), base["layers"]
    found = bare.apply({"params": {}, "base": base}, jnp.asarray(TOKENS), mutable=["stats"])[1]
    grams = found["stats"]["layers"]  # type: ignore[index]

    def loss(layers: Any, row: jax.Array) -> jax.Array:
        logits = bare.apply({"params": {}, "base": base | {"layers": layers}}, row[None])
        chosen = jax.nn.log_softmax(logits[0, :-1])  # type: ignore[index]
        return -jnp.take_along_axis(chosen, row[1:, None], 1).sum()

    gradient = jax.jit(jax.grad(loss))
    gradients = [gradient(layers, jnp.asarray(row)) for row in TOKENS if kind == "fisher"]
    table = []
    for place in PLACES:
        (group, name), weight = linear_path(place[1]), matrix(base, place)
        errors = []
        for one in QUANT.candidates:
            w = np.asarray(weight, np.float64)
            off = w - np.asarray(quantize(weight, one).dequantize(), np.float64)
            if kind == "inputs":
                gram = np.asarray(grams[group][name]["gram"][place[0]], np.float64)
                errors.append(np.trace(off @ gram @ off.T) / np.trace(w @ gram @ w.T))
                continue
            each = [np.asarray(g[group][name]["weight"][place[0]], np.float64) for g in gradients]
            fisher = sum(g**2 for g in each) if each else 1.0
            errors.append((fisher * off**2).sum())
        table.append(errors)
    return np.array(table)


@pytest.mark.parametrize("kind", ["weights", "inputs", "fisher"])
def test_the_table_equals_a_slow_one(
    model: Path, float_base: dict[str, Any], tmp_path: Path, kind: Any
) -> None:
    quant = dataclasses.replace(QUANT, allocation=dataclasses.replace(FEW, errors=kind))
    metric: Any = "gradients" if kind == "fisher" else "inputs"
    rows = CalibrationRows(TOKENS, CalibrateConfig(metric=metric, batch_size=3))
    found = make_errors(model, quant, PLACES, tmp_path / "table", calibrate=rows)
    expected = slow_errors(float_base, kind)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert expected.shape == (21, 3) and (np.diff(expected) < 0).all()


@pytest.mark.parametrize(("init", "kind"), [("lqlora", "weights"), ("cloq", "inputs")])
def test_errors_are_of_what_a_pair_leaves(
    model: Path, float_base: dict[str, Any], tmp_path: Path, init: Any, kind: Any
) -> None:
    turns: Any = {init: dataclasses.replace(getattr(AdapterConfig(), init), iterations=1)}
    pair = AdapterConfig(method="lora", rank=5, alpha=7.0, init=init, targets=("q_proj",), **turns)
    quant = dataclasses.replace(QUANT, allocation=dataclasses.replace(FEW, errors=kind))
    rows = CalibrationRows(TOKENS)
    places = [(layer, name) for layer in range(3) for name in ("q_proj", "k_proj")]
    both: Any = {"calibrate": rows, "adapter": pair}
    found = make_errors(model, quant, places, tmp_path / "table", **both)
    file = tmp_path / "alone"
    alone = make_errors(model, quant, places, file, calibrate=rows)
    np.testing.assert_array_equal(found[1::2], alone[1::2])  # k_proj has no pair
    assert (found[::2] < alone[::2]).all()
    bare, q = Llama(LLAMA), float_base["layers"]["self_attn"]["q_proj"]["weight"]
    stats = bare.apply({"params": {}, "base": float_base}, jnp.asarray(TOKENS), mutable=["stats"])
    gram = stats[1]["stats"]["layers"]["self_attn"]["q_proj"]["gram"]  # type: ignore[index]
    expected = np.empty((3, 3))
    for column, one in enumerate(QUANT.candidates):
        for layer, weight in enumerate(q):
            assert pair.start.fit is not None
            given = {"gram": gram[layer], "damping": rows.config.damping}
            fixed = 5, 7 / 5, turns[init], jax.random.key(9), jnp.float32
            packed, a, b = pair.start.fit(weight, one, *fixed, **given)
            off = np.asarray(weight - packed.dequantize(), np.float64) - 7 / 5 * np.asarray(b @ a)
            g = np.eye(40) if kind == "weights" else np.asarray(gram[layer], np.float64)
            w = np.asarray(weight, np.float64)
            whole = 1 if kind == "weights" else np.trace(w @ g @ w.T)
            expected[layer, column] = np.trace(off @ g @ off.T) / whole
    np.testing.assert_allclose(found[::2], expected, rtol=2e-3)
    with pytest.raises(ValueError, match="other settings"):
        make_errors(model, quant, places, file, **both)


def test_an_interrupted_table_goes_on(
    model: Path, tmp_path: Path, computed: list[Any], said: list[str]
) -> None:
    file = tmp_path / ERRORS_FILE
    with pytest.raises(KeyboardInterrupt):
        choose_rules(model, QUANT, tmp_path)
    assert "the same command resumes from there" in said[-1] and computed == PLACES[:5]
    assert not (tmp_path / "budget.json").exists()
    lines = file.read_text().split("\n")
    lines[2] = lines[2].replace("e", "f", 1)  # damaged
    file.write_text("\n".join(lines) + '{"layer": 1, "projec')
    computed[:] = [(-1, "")] * 6
    parts = choose_rules(model, QUANT, tmp_path)
    assert computed[6:] == [PLACES[1], *PLACES[5:]]
    computed[:] = [(-1, "")] * 6
    assert choose_rules(model, QUANT, tmp_path / "whole") == parts and len(computed) == 6 + 21
    assert (tmp_path / "whole" / ERRORS_FILE).read_text().count("\n") == 22

    # Another budget needs no new table; other candidates do.
    other = choose_rules(model, dataclasses.replace(QUANT, budget="33KB"), tmp_path)
    assert other != parts and len(computed) == 6 + 21
    changed = dataclasses.replace(FEW, formats=("nf2", "nf3"))
    with pytest.raises(ValueError, match=r"holds the errors for quant\.budget with other settings"):
        choose_rules(model, dataclasses.replace(QUANT, allocation=changed), tmp_path)


def write_costs(file: Path, costs: np.ndarray) -> Path:
    by_name = {name: costs[:, i].tolist() for i, name in enumerate(LINEAR_NAMES)}
    quant = QuantConfig(format="nf2", block_size=16, calibration="none")
    settings = {"quant": dataclasses.asdict(quant)}
    file.write_text(json.dumps(seal({"settings": settings, "costs": by_name})))
    return file


def test_a_measured_sensitivity_scales_the_errors(model: Path, tmp_path: Path) -> None:
    costs = np.random.default_rng(0).uniform(0.01, 0.2, (3, 7))
    costs[0, :2] = -0.02, 0.001  # noise, and less than the noise
    file = write_costs(tmp_path / "sensitivity.json", costs)
    asked = dataclasses.replace(FEW, errors="sensitivity", sensitivity=str(file))
    found = make_errors(
        model, dataclasses.replace(QUANT, allocation=asked), PLACES, tmp_path / "table"
    )
    expected = make_errors(model, QUANT, PLACES, tmp_path / "weights")
    expected *= np.maximum(costs, 0.02).reshape(-1, 1) / expected[:, :1]  # nf2 was measured
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"layers\.3\.self_attn\.q_proj is missing"):
        make_errors(
            model, dataclasses.replace(QUANT, allocation=asked), [(3, "q_proj")], tmp_path / "x"
        )
    file.write_text("{}")
    with pytest.raises(ValueError, match="not the results of irqlora sensitivity"):
        read_costs(file)


# ------------------------------------------------------------------------------------ budget, rules


def formats_of(base: dict[str, Any]) -> list[str]:
    return [getattr(matrix(base, place), "format", "none") for place in PLACES]


def error_of(folder: Path, formats: list[str]) -> float:
    rows = [json.loads(line) for line in (folder / ERRORS_FILE).read_text().splitlines()[1:]]
    table = {(row["layer"], row["projection"]): row["errors"] for row in rows}
    names = list(FEW.formats)
    return sum(table[p][names.index(f)] for p, f in zip(PLACES, formats, strict=True))


@pytest.mark.parametrize("size", [3.5, "30KB", "31KiB"])
def test_the_budget_holds_to_the_byte_and_is_used(model: Path, tmp_path: Path, size: Any) -> None:
    quant = dataclasses.replace(QUANT, budget=size)
    quantize_model(QuantizeConfig(str(model), str(tmp_path / "base"), quant, progress=False))
    base, llama = read_base(tmp_path / "base" / "base.safetensors")
    stored = measure_base(base)
    whole, bits = {"30KB": (30000, 0.0), "31KiB": (31744, 0.0)}.get(size, (0, size))
    spare = (
        8 * (whole - stored.total)
        if whole
        else bits * stored.weights - 8 * (stored.total - stored.rest)
    )
    # Matrices have the same shape, and a larger format always has a smaller error.
    assert 0 <= spare < 40 * 48
    about = json.loads((tmp_path / "base" / "budget.json").read_text())
    assert about["error"] == pytest.approx(error_of(tmp_path / "base", formats_of(base)))
    known = read_budget(tmp_path / "base")
    assert known is not None and known[0] == quant
    chosen = known[1]
    assert (chosen.budget, chosen.allocation) == (None, AllocationOptions())
    assert read_base_config(tmp_path / "base" / "base.safetensors") == (llama, chosen)
    names = [matrix_name(linear_path(name), layer) for layer, name in PLACES]
    assert formats_of(base) == [chosen.for_matrix(name).format for name in names]
    assert stored == measure_base(abstract_base(llama, chosen, "float32"))
    by_layer = bits_by_layer(base, 3)
    mean = np.mean([by_layer[name] for name in LINEAR_NAMES])
    assert mean == pytest.approx(stored.bits) and about["bits"] == pytest.approx(stored.bits)


def test_rules_that_are_given_stay_and_count(model: Path, tmp_path: Path) -> None:
    given = (
        QuantRule("layers.1.*.v_proj", format="none"),
        QuantRule("*.v_proj", format="nf8"),
        QuantRule("layers.2.mlp.*", scale_bits=4, scale_rule="uniform"),
    )
    quant = dataclasses.replace(QUANT, rules=given, block_size=24, budget=5.6)
    chosen = choose_rules(model, quant, tmp_path)
    for layer, name in PLACES:
        full = matrix_name(linear_path(name), layer)
        own, asked = chosen.for_matrix(full), quant.for_matrix(full)
        if name == "v_proj" or (layer == 2 and name in LINEAR_NAMES[4:]):
            same = dataclasses.replace(asked, budget=None, allocation=AllocationOptions())
            assert own == same or own.format == asked.format == "none"
        else:
            assert own.block_size == 16 and own.format in FEW.formats
    stored = measure_base(abstract_base(LLAMA, chosen, "float32"))
    assert stored.bits <= 5.6 and len({chosen.for_matrix(r.match).format for r in given[:2]}) == 2
    assert (tmp_path / ERRORS_FILE).read_text().count("\n") == 1 + 21 - 3 - 3
    everything = dataclasses.replace(QUANT, rules=(QuantRule("*", format="nf3"),))
    with pytest.raises(ValueError, match=r"quant\.rules = \['\*'\]: expected rules that leave"):
        choose_rules(model, everything, tmp_path)


def test_tied_layers_are_stored_alike(model: Path, tmp_path: Path) -> None:
    free = choose_rules(model, QUANT, tmp_path)
    tied = dataclasses.replace(QUANT, allocation=dataclasses.replace(FEW, tie=2))
    chosen = choose_rules(model, tied, tmp_path)
    for name in LINEAR_NAMES:
        full = [matrix_name(linear_path(name), layer) for layer in range(3)]
        assert chosen.for_matrix(full[0]) == chosen.for_matrix(full[1])
    errors = [
        error_of(tmp_path, [c.for_matrix(matrix_name(linear_path(n), i)).format for i, n in PLACES])
        for c in (free, chosen)
    ]
    assert errors[0] < errors[1]
    assert measure_base(abstract_base(LLAMA, chosen)).bits <= 3.9


def test_planned_rules_have_the_size_of_the_budget(model: Path) -> None:
    most = measure_base(abstract_base(LLAMA, QUANT.candidates[-1])).bits
    for size in (3.1, 3.6, 4.24, 4.3, 9.0):
        planned = planned_rules(model, LLAMA, dataclasses.replace(QUANT, budget=size))
        bits = measure_base(abstract_base(LLAMA, planned)).bits
        assert min(size, most) <= bits < size + 0.41  # one of three layers: 48 / 40 / 3 bits
    assert planned_rules(model, LLAMA, QuantConfig()) == QuantConfig()


def test_a_budget_is_known_again(model: Path, tmp_path: Path) -> None:
    """A file with the budget goes with the base that was made for it."""
    base = tmp_path / "base"
    quantize_model(QuantizeConfig(str(model), str(base), QUANT, progress=False))
    _, chosen = read_budget(base) or (None, None)
    file = tmp_path / "run.yaml"
    flags = {"model": str(base), "output_dir": "new", "quant.calibration": "none"}
    few = {f"quant.allocation.{k}": v for k, v in dataclasses.asdict(FEW).items()}
    file.write_text(json.dumps(flags | few | {"quant.budget": 3.9}))
    assert Config.load(file).quant == chosen
    with pytest.raises(ValueError, match=r"quant\.budget = 3\.0: .*quant\.budget = 3\.9"):
        Config.load(file, {"quant.budget": 3})
    (base / "budget.json").write_text("{}")
    with pytest.raises(ValueError, match=r"budget\.json: damaged"):
        Config.load(file)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--quant.budget=2.1"],
            ["quant.budget = 2.1", "at least 3.04", "bits a weight", "smallest"],
        ),
        (["--quant.budget=9KB"], ["quant.budget = '9KB'", "at least", "bytes"]),
        (["--quant.budget=27TB"], ["quant.budget = '27TB'", '"27GB"', '"fit"']),
        (["--quant.budget=-1"], ["quant.budget = -1.0"]),
        (["--quant.budget=0"], ["quant.budget = 0.0"]),
        (["--quant.budget=much"], ["quant.budget = 'much'"]),
        (["--quant.budget=fit"], ["quant.budget = 'fit'", "irqlora train"]),
        (["--quant.budget=3", "--quant.allocation.formats=[nf5]"], ["formats = 'nf5'", "nf4"]),
        (["--quant.budget=3", "--quant.allocation.formats=[]"], ["formats = ()"]),
        (["--quant.budget=3", "--quant.allocation.block_sizes=[12]"], ["nf2", "block_size = 12"]),
        (["--quant.budget=3", "--quant.allocation.scale_bits=[1]"], ["scale_bits = 1", "2 to 8"]),
        (["--quant.budget=3", "--quant.allocation.formats=nf8"], ["calibration", "nf8"]),
        (["--quant.budget=3", "--quant.allocation.scale_bits=[a]"], ["a list such as [1, 2]"]),
        (["--quant.budget=3", "--quant.allocation.tie=0"], ["tie = 0"]),
        (["--quant.budget=3", "--quant.allocation.errors=loss"], ["errors = 'loss'", "fisher"]),
        (["--quant.budget=3", "--quant.allocation.errors=sensitivity"], ["sensitivity = None"]),
        (["--quant.budget=5", "--quant.allocation.errors=inputs"], ["calibrate.data = None"]),
        (
            ["--quant.budget=5", "--quant.allocation.errors=fisher", "--calibrate.data=x"],
            ["calibrate.metric = 'inputs'", "gradients"],
        ),
        (
            ["--quant.budget=3", "--quant.rules=[{match: x, format: nf3}]"],
            ["quant.rules[0].match = 'x'"],
        ),
    ],
)
def test_bad_input(model: Path, tmp_path: Path, capsys, flags: list[str], words: list[str]) -> None:
    command = ["quantize", f"--model={model}", f"--output_dir={tmp_path / 'new'}"]
    command += ["--quant.calibration=none"] * ("--quant.allocation.formats=nf8" not in flags)
    command += ["--quant.allocation.block_sizes=16", "--quant.allocation.scale_bits=8"]
    assert cli.main([*command, *flags, "--progress=false"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for word in words:
        assert word in err, err
    assert not (tmp_path / "new").exists()


def test_a_budget_is_no_rule_yet(model: Path) -> None:
    with pytest.raises(ValueError, match=r"quant\.budget = 3\.9: expected null here"):
        hf.load_base(model, QUANT)
