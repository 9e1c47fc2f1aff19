"""Configuration: what is read, and what is refused with which words."""

import dataclasses
import json
import math
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from irqlora_jax import cli
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.config import Config, TrainConfig, parse_config, parse_flags
from irqlora_jax.quant.config import QuantConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\noutput_dir: o\nquant:\n  format: nf3\ntrain: {steps: 7}\n")
    return path


def test_file_then_overrides(file: Path) -> None:
    config = Config.load(
        file, {"quant.format": "int2", "train.learning_rate": 1e-3, "train.clip_norm": None}
    )
    assert config.quant == QuantConfig(format="int2")
    assert config.train == TrainConfig(steps=7, learning_rate=1e-3, clip_norm=None)
    flags = [f"--config={file}", "--quant.block_size=32", "--adapter.targets=[q_proj, v_proj]"]
    config = parse_config(flags)
    assert config.quant == QuantConfig(format="nf3", block_size=32)
    assert config.adapter.targets == ("q_proj", "v_proj")


def test_a_stored_configuration_is_the_configuration(file: Path, tmp_path: Path) -> None:
    config = Config.load(file)
    stored = tmp_path / "config.json"
    stored.write_text(json.dumps(dataclasses.asdict(config)))
    assert Config.load(stored) == config


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "model: m\noutput_dir: o\ntrain: {clip_norm: .inf}\n"),
        ("a.yaml", "model: m\noutput_dir: o\ntrain: {clip_norm: .inf}\nquant: {search_steps: 3}\n"),
        ("a.json", '{"model": "m", "output_dir": "o", "train": {"clip_norm": Infinity}}'),
    ],
)
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    config = Config.load(tmp_path / name)
    assert (config.model, config.train.clip_norm) == ("m", math.inf)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("quant: {formt: nf4}", ["quant", "formt"]),
        ("trian: {steps: 3}", ["trian"]),
        ("quant: {format: nf5}", ["quant.format", "nf5", "nf4", "int2"]),
        ("quant: {block_size: 7}", ["quant.block_size", "7", "multiple of 8"]),
        ("quant: {block_size: 6.5}", ["quant.block_size", "6.5", "a whole number"]),
        ("quant: {symmetric: true}", ["quant.symmetric", "false with quant.format nf4"]),
        ("quant: {search: zero_point}", ["quant.icq.search", "range with quant.format nf4"]),
        ("quant: {search_range: 2}", ["quant.icq.range", "2", "between 0 and 1"]),
        ("adapter: {from: ''}", ["adapter.init_from = ''", "a folder", "new", "null"]),
        ("adapter: {init_from: ' '}", ["adapter.init_from = ' '", "a folder"]),
        ("adapter: {rank: 0}", ["adapter.rank", "0", "at least 1"]),
        ("adapter: {dropout: 1.0}", ["adapter.dropout", "1.0"]),
        ("adapter: {targets: [query]}", ["adapter.targets", "query", "q_proj"]),
        ("train: {steps: many}", ["train.steps", "many", "a whole number"]),
        ("train: {accumulation: 3}", ["train.accumulation", "3", "train.batch_size = 16"]),
        ("train: {beta2: 1.0}", ["train.beta2", "1.0"]),
        ("evaluate: {max_questions: 0}", ["evaluate.max_questions", "0", "at least 1"]),
        ("seed: one", ["seed", "one", "a whole number"]),
        ("model: [a", ["bad.yaml, line 4: not valid YAML"]),
        ("train: {learning_rate: .inf}", ["train.learning_rate = inf", "positive finite"]),
        ("train: {learning_rate: .nan}", ["train.learning_rate = nan", "positive finite"]),
        ("train: {eps: .inf}", ["train.eps = inf"]),
        ("train: {weight_decay: .inf}", ["train.weight_decay = inf", "finite"]),
        ("adapter: {alpha: .inf}", ["adapter.alpha = inf", "positive finite"]),
        ("adapter: {alpha: .nan}", ["adapter.alpha = nan", "positive finite"]),
        ("train: {steps: 5}\ntrain: {eps: 1}", ["bad.yaml: train appears twice"]),
        ("quant: {icq: {steps: 5, steps: 6}}", ["bad.yaml: quant.icq.steps appears twice"]),
        ("train: 5", ["bad.yaml: train = 5: expected a section with fields"]),
        ("quant: {icq: [1]}", ["bad.yaml: quant.icq = [1]: expected a section with fields"]),
        ("trian: {steps: 3}", ["bad.yaml: trian: unknown field; did you mean train?"]),
        ("quant: {formt: nf4}", ["quant.formt: unknown", "did you mean quant.format?"]),
        ("learning_rate: 1", ["did you mean train.learning_rate?"]),
        ("data: {batch_size: 1}", ["data.batch_size", "did you mean train.batch_size?"]),
        ("1: 2", ["bad.yaml: 1: unknown field", "--help lists every field"]),
        ("quant: {rules: [{match: a, formt: a}]}", ["did you mean quant.rules[0].format?"]),
        ("quant: {rules: [{format: nf3}]}", ["quant.rules[0].match: no value"]),
        (
            "quant: {rules: nf3}",
            ["quant.rules[0] = 'nf3': expected a section with match"],
        ),
        ("train: {remat: 1}", ["train.remat = 1: expected true or false"]),
        ("train: {clip_norm: big}", ["train.clip_norm = 'big': expected a number or null"]),
        ("train: {matmul: c}", ["train.matmul = 'c': expected xla, mosaic, triton or null"]),
        ("train: {steps: 5, epochs: 2}", ["train.steps = 5: expected null, as train.epochs = 2"]),
        ("train: {epochs: 0}", ["train.epochs = 0.0: expected a positive finite number, or null"]),
        ("data: {train: 5}", ["data.train = 5: expected text in quotes"]),
        ("adapter: {targets: [1]}", ["adapter.targets = [1]: expected a list such as [a, b]"]),
        ("train.steps: 5\ntrain: {steps: 6}", ["bad.yaml: train.steps appears twice"]),
        ("model: ''", ["bad.yaml: model appears twice"]),
    ],
)
def test_refusals_name_field_value_and_what_is_accepted(
    tmp_path: Path, line: str, words: list[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(f"model: m\noutput_dir: o\n{line}\n")
    with pytest.raises(ValueError) as error:
        Config.load(path)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_and_missing_field(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.yaml"):
        Config.load(tmp_path / "nowhere.yaml")
    (tmp_path / "short.yaml").write_text("model: m\n")
    with pytest.raises(ValueError, match="output_dir"):
        Config.load(tmp_path / "short.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_is_valid_and_says_its_command(path: Path) -> None:
    config = Config.load(path)
    assert config.train.steps > 0
    head = path.read_text().split("\n\n")[0]
    assert f"python train.py --config configs/{path.name}" in head
    assert "Cost" in head and "Expected" in head


def test_defaults_are_the_papers_for_7b() -> None:
    train, adapter, quant = TrainConfig(), AdapterConfig(), QuantConfig()
    assert (train.steps, train.batch_size, train.learning_rate) == (10_000, 16, 2e-4)
    assert (train.clip_norm, train.beta2, train.weight_decay) == (0.3, 0.999, 0.0)
    assert (adapter.rank, adapter.alpha, len(adapter.targets)) == (64, 16, 7)
    assert (quant.format, quant.block_size, quant.icq.range) == ("nf4", 64, 0.1)


@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
def test_a_file_that_is_nested_too_deep_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=rf"{name}.*(nested too deep|nesting depth)"):
        Config.load(tmp_path / name)


def test_a_switch_may_stand_alone() -> None:
    flags = ["--model=m", "--output_dir=o", "--quant.symmetric", "--quant.format", "int3"]
    assert parse_config(flags).quant == QuantConfig(format="int3", symmetric=True)
    assert parse_config([*flags[:2], "--evaluate.baselines"]).evaluate.baselines
    with pytest.raises(ValueError, match=r"--quant.format: no value follows"):
        parse_config([*flags[:2], "--quant.format", "--evaluate.baselines"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("mesh: {tensor: 0}", ["mesh.tensor", "0", "at least 1"]),
        ("data: {packing: true, group_by_length: true}", ["data.group_by_length", "packing"]),
        ("data: {packing_length: 1}", ["data.packing_length", "1", "at least 2"]),
        ("data: {format: alpacca}", ["data.format", "alpacca", "oasst1", "chat"]),
        ("train: {early_stopping: 2}", ["train.early_stopping", "2", "train.eval_every"]),
        ("evaluate: {sample_tokens: 0}", ["evaluate.sample_tokens", "0"]),
    ],
)
def test_refusals_of_the_trainer(tmp_path: Path, line: str, words: list[str]) -> None:
    test_refusals_name_field_value_and_what_is_accepted(tmp_path, line, words)


def test_a_json_file_with_a_repeated_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text('{"model": "m", "output_dir": "o", "train": {"steps": 5, "steps": 6}}')
    with pytest.raises(ValueError, match=r"bad\.json: steps appears twice"):
        Config.load(path)


def test_a_key_may_be_in_several_sections(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    rules = "[{match: a, format: nf3}, {match: b, format: nf2}]"
    path.write_text(f"model: m\noutput_dir: o\nquant: {{format: nf4, rules: {rules}}}\n")
    assert [rule.match for rule in Config.load(path).quant.rules] == ["a", "b"]


@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
def test_an_empty_section_has_its_defaults(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    sections = [f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)]
    assert len(sections) == 8
    values = {"model": "m", "output_dir": "o"} | dict.fromkeys(sections)
    nested = values | {"quant": {"icq": None, "block_size": 32}, "adapter": {"iec": None}}
    for given, expected in (
        (values, Config("m", "o")),
        (nested, Config("m", "o", quant=QuantConfig(block_size=32))),
    ):
        path.write_text(json.dumps(given) if name == "run.json" else yaml.safe_dump(given))
        assert Config.load(path) == expected
    path.write_text(json.dumps(values))
    assert Config.load(path, {"train.steps": 3}).train == TrainConfig(steps=3)


def test_long_values_are_shortened_in_messages() -> None:
    with pytest.raises(ValueError) as error:
        AdapterConfig(targets=("q_proj", "x" * 10_000))
    assert str(error.value).startswith("adapter.targets = 'xxx")
    assert "xxx...: expected q_proj" in str(error.value) and len(str(error.value)) < 350
    with pytest.raises(ValueError, match=f"= '{'x' * 198}': expected"):
        AdapterConfig(targets=("x" * 198,))


def leaves(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from leaves(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field.type


@pytest.mark.parametrize("command", cli._COMMANDS)
def test_no_text_of_a_parser_reaches_the_user(command: str) -> None:
    """Every field of every command gets wrong values, and a wrong name."""
    kind, _ = cli._COMMANDS[command][1]()
    required = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
    given = [f"--{name}={'generate' if name == 'task' else 'x'}" for name in required]
    seen = 0
    for name, type_ in leaves(kind):
        for value in ("[", "{a: [1]}", "1.5x", "x" * 5000, "9" * 5000, "[[1], [2]]", "\t%"):
            try:
                parse_flags(kind, [*given, f"--{name}={value}"], f"irqlora {command}")
            except ValueError as error:
                seen += 1
                text = str(error)
                assert f"{name} = " in text or f"{name}[0]" in text, text
                assert len(text) < 450 and "\n" not in text, text
                assert not re.search(r"class|typing|Union|Literal|subtype|pars", text), text
            else:
                assert str in (type_, *typing.get_args(type_)), (name, value)
        near = re.escape(f"--{name}_: unknown field; did you mean --")
        with pytest.raises(ValueError, match=near):
            parse_flags(kind, [*given, f"--{name}_=1"], f"irqlora {command}")
    assert seen > 0 or command == "report"


def test_a_single_value_stands_for_a_list_of_one(file: Path) -> None:
    file.write_text("model: m\noutput_dir: o\nadapter: {targets: q_proj}\n")
    rule = "{match: '*.down_proj', format: nf4}"
    flags = [f"--config={file}", "--evaluate.samples=what is: [this]?", f"--quant.rules={rule}"]
    config = parse_config(flags)
    assert config.adapter.targets == ("q_proj",)
    assert config.evaluate.samples == ("what is: [this]?",)
    assert [dataclasses.astuple(one)[:2] for one in config.quant.rules] == [("*.down_proj", "nf4")]
    kind, _ = cli._COMMANDS["eval"][1]()
    flags = ["--run=r", "--task=mmlu", "--subjects=anatomy"]
    assert parse_flags(kind, flags, "irqlora eval").subjects == ("anatomy",)


def test_the_printed_configuration_is_a_configuration(file: Path, tmp_path: Path, capsys) -> None:
    flags = [f"--config={file}", "--train.clip_norm=.inf", "--adapter.targets=q_proj"]
    with pytest.raises(SystemExit, match="0"):
        parse_config([*flags, "--print_config"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert Config.load(printed) == parse_config(flags)
