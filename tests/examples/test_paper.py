"""The paper's tables as commands: the printed figures, the rows, resuming, and what is printed."""

import csv
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.iec import IecOptions
from irqlora_jax.config import Config
from irqlora_jax.evaluate.mmlu_files import SUBCATEGORIES
from irqlora_jax.model.layer import AdaptedLinear, Settings
from irqlora_jax.quant.config import QuantConfig
from tests.data.small_data import make_tokenizer, write_file
from tests.examples.scripts import scripts
from tests.models import ROOT, tiny_llama, write_model

pytestmark = pytest.mark.usefixtures("optimizer_promotion")

COUNTS = {"Humanities": 4705, "STEM": 3018, "Social": 3077, "Other": 3242}  # questions of MMLU


@pytest.fixture(scope="module")
def modules():
    with scripts(ROOT / "examples" / "paper", "rows", "costs", "reproduce") as found:
        yield found


@pytest.fixture(scope="module")
def rows(modules):
    return modules["rows"]


@pytest.fixture(scope="module")
def reproduce(modules):
    return modules["reproduce"]


# ------------------------------------------------------------------------------ printed figures


def test_printed_averages_are_those_of_the_columns(rows) -> None:
    """MMLU's over questions, commonsense's over tasks; but for three rows, which notes name."""
    odd, weights = [], np.array(list(COUNTS.values()))
    for number, table in rows.tables().items():
        for row in table.rows:
            assert len(row.figures) == len(table.columns)
            if table.columns[:4] == tuple(COUNTS):
                mean = float(weights @ row.figures[:4]) / weights.sum()
                # Half a unit of the last digit, of the columns and of the average.
                if abs(mean - row.figures[4]) > 0.1 + 1e-9:
                    odd.append((number, row.size, row.data, row.bits, row.method))
                    assert "average" in row.notes
            elif number == 8:
                assert abs(np.mean(row.figures[:-1]) - row.figures[-1]) <= 0.05 + 0.05
    assert odd == [
        (1, "7b", "alpaca", 4, "PEQA"),
        (1, "13b", "alpaca", 4, "PEQA"),
        (9, "7b", "alpaca", 2, "QLoRA"),
    ]


def test_the_notes_match_the_printed_tables(rows) -> None:
    found = {
        (number, row.size, row.data, row.bits, row.method): row.figures
        for number, table in rows.tables().items()
        for row in table.rows
    }
    printed = lambda number, *key: found[number, *key]  # noqa: E731
    for size in ("13b", "30b"):
        assert printed(1, size, "alpaca", 4, "QLoRA w/ GPTQ") == printed(
            *(1, size, "alpaca", 4, "QA-LoRA")
        )
    average = lambda *key: printed(3, *key)[4]  # noqa: E731
    gains = [
        average(size, "alpaca", 4, "IR-QLoRA") - average(size, "alpaca", 4, "QA-LoRA")
        for size in ("llama2-7b", "llama2-13b")
    ]
    assert np.allclose(gains, [2.3, 2.7])
    # Rows that several tables print are the same everywhere.
    full = printed(1, "7b", "alpaca", 4, "IR-QLoRA")
    assert full == printed(4, "7b", "alpaca", 4, "IR-QLoRA")
    assert printed(1, "7b", "alpaca", 4, "QLoRA") == printed(4, "7b", "alpaca", 4, "Vanilla")
    assert printed(1, "7b", "-", 4, "NormalFloat") == printed(5, "7b", "-", 4, "NormalFloat")[:5]
    for table in rows.tables().values():
        used = {note for row in table.rows for note in row.notes}
        assert used == set(table.notes), "a note without a row, or the other way round"


def test_storage_is_the_papers_in_16_bits_and_what_the_note_says_in_4(modules) -> None:
    rows, costs = modules["rows"], modules["costs"]
    ours = {}
    for row in rows.tables()[6].rows:
        gib = costs.storage(row, rows.architecture(row.size)) / 2**30
        ours[row.size, row.method] = gib
        if row.bits == 16:
            assert abs(gib - row.figures[0]) < 0.005
        else:
            assert "half" in row.notes and gib > 1.5 * row.figures[0]
    for size in ("7b", "13b", "30b", "65b"):
        printed = {row.method: row.figures[0] for row in rows.tables()[6].rows if row.size == size}
        icq, plain = "ICQ without finetune", "NormalFloat"
        ratio = (printed[icq] - printed[plain]) / (ours[size, icq] - ours[size, plain])
        assert abs(ratio - 0.5) < 0.05


# ------------------------------------------------------------------------------------- the rows


def test_the_rows_are_the_papers_settings(rows) -> None:
    """Each is one configuration: quantizer, adapter, recipe and size."""
    asked = rows.Asked(model="model", output=Path("out"), data={"flan_v2": "f.jsonl"})
    seen: dict[str, Config] = {}
    for number, table in rows.tables().items():
        for row in table.rows:
            if row.method not in rows.METHODS or number == 6:
                continue
            if rows.METHODS[row.method].adapter is None or (number == 9 and row.bits == 3):
                continue
            config = rows.config_of(row, table, asked)
            large = row.size in ("30b", "65b")
            assert config.train.learning_rate == (1e-4 if large else 2e-4)
            assert config.adapter.dropout == (0.05 if large else 0.1)
            assert config.train.steps == (20_000 if row.data == "flan_v2" else 10_000)
            assert (config.data.format, config.train.batch_size) == (row.data, 16)
            assert (config.adapter.rank, config.adapter.alpha) == (64, 16)
            if not large and row.data == "alpaca":
                # One name, one configuration, in whatever table.
                assert seen.setdefault(row.name, config) == config
    plain = QuantConfig(calibration="none")
    assert seen["alpaca-nf4-lora"].quant == plain
    assert seen["alpaca-nf4-lora"].adapter.method == "lora"
    assert seen["alpaca-nf4-icq-iec"].quant == QuantConfig()
    assert seen["alpaca-nf4-iec-u1"].adapter.iec.connections == "u1"
    assert seen["alpaca-nf2-icq-iec"].quant == QuantConfig(format="nf2")
    assert seen["alpaca-int4-icq-iec"].quant == QuantConfig(format="int4", block_size=32)


@pytest.mark.long
def test_one_connection_is_learned_and_the_other_is_not() -> None:
    rng = np.random.default_rng(0)
    random = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    x, base = random(1, 2, 8), {"weight": random(6, 8)}
    params = {"lora_A": random(4, 8), "lora_B": random(6, 4), "beta1": random(), "beta2": random()}
    found = {}
    for connections in ("both", "u1", "u2"):
        adapter = AdapterConfig(rank=4, iec=IecOptions(connections))
        settings = Settings(tiny_llama(), adapter, None, "xla", deterministic=True)
        layer = AdaptedLinear((6, 8), settings, name="q_proj")

        def loss(params, layer=layer):
            return (layer.apply({"base": base}, x, params) ** 2).sum()

        found[connections] = jax.value_and_grad(loss)(params)
    value, full = found["both"]
    assert all(gradient.any() for gradient in full.values())
    for connections, frozen in (("u1", "beta2"), ("u2", "beta1")):
        own_value, own = found[connections]
        assert own_value == value and own[frozen] == 0
        for name in params.keys() - {frozen}:
            np.testing.assert_allclose(own[name], full[name], rtol=1e-6)
    with pytest.raises(ValueError, match=r"adapter\.iec = .*u1.*expected the default"):
        AdapterConfig(method="lora", iec=IecOptions("u1"))


# --------------------------------------------------------------------------- running and printing


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> list[str]:
    """Options for a tiny model, and files that it can be finetuned and examined with."""
    folder = tmp_path_factory.mktemp("paper")
    tokenizer = make_tokenizer("byte")
    # All linear layers have the same shape, which is compiled once.
    llama = tiny_llama(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=32,
        max_position_embeddings=64,
    )
    model = write_model(folder / "tiny", llama, tokenizer=tokenizer, dtype="float32")
    row = {"instruction": "Name a color.", "input": "", "output": "red"}
    data = write_file(folder, "alpaca.jsonl", [row] * 4)
    subjects = ("anatomy", "astronomy", "philosophy", "sociology")  # one of every category
    assert set(subjects) < {s for names in SUBCATEGORIES.values() for s in names}
    for split in ("dev", "test"):
        (folder / "mmlu" / split).mkdir(parents=True)
        for subject in subjects:
            with (folder / "mmlu" / split / f"{subject}_{split}.csv").open("w") as file:
                csv.writer(file).writerows([[f"is {i}", *"abcd", "ABCD"[i % 4]] for i in range(5)])
    return [
        f"--model={model}",
        f"--output={folder / 'out'}",
        f"--data=alpaca={data}",
        f"--mmlu={folder / 'mmlu'}",
        *("--steps=1", "--max_questions=3", "--train.batch_size=2", "--mesh.data=1"),
        "--log.progress=false",
    ]


def output(asked: list[str]) -> Path:
    return Path(asked[1].removeprefix("--output=")) / "tiny"


@pytest.fixture
def commands(reproduce, monkeypatch) -> list[str]:
    """Names of the commands as they are run."""
    run, seen = reproduce.irqlora, []

    def irqlora(argv):
        seen.append(argv[0])
        return run(argv)

    monkeypatch.setattr(reproduce, "irqlora", irqlora)
    return seen


@pytest.mark.long
def test_a_table_runs_once_and_shows_both(reproduce, asked, commands, capsys) -> None:
    both = [*asked, "--table", "5"]
    assert reproduce.main(both) == 0
    assert commands == ["quantize", "eval"] * 2
    scores = json.loads((output(asked) / "bases" / "nf4-icq" / "eval-mmlu.json").read_text())
    survey = json.loads((output(asked) / "bases" / "nf4-icq" / "quantization.json").read_text())
    capsys.readouterr()
    assert reproduce.main([*asked, "--table", "5", "4", "--rows", "1"]) == 0
    assert commands == [*["quantize", "eval"] * 2, "train", "eval"]  # of the base that is there
    assert reproduce.main(both) == 0
    assert len(commands) == 6
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    order = ("humanities", "STEM", "social sciences", "other")
    own = [f"{100 * scores['by_category'][name]:.1f}" for name in order]
    own += [f"{100 * scores['accuracy']:.1f}", f"{survey['calibrated']['mean_entropy']:.2f}"]
    place = printed.index(["here", *own])
    assert printed[place - 1][-7:] == ["paper", "33.6", "31.7", "39.6", "38.2", "35.6", "3.74"]
    assert any(line[:1] == ["Vanilla"] and line[-1] == "38.4" for line in printed)

    # The seconds of the finetune are those of table 7, in proportion to its steps.
    file = output(asked) / "seconds.json"
    seconds = json.loads(file.read_text())
    seconds |= {"quantize nf4": 360.0, "train alpaca-nf4-lora": 3.6}
    file.write_text(json.dumps(seconds))
    assert reproduce.main([*asked, "--table", "7", "--report"]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["here", "10.10"] in printed and ["not", "run", "here"] in printed
    assert len(commands) == 6

    changed = ["--steps=2" if flag == "--steps=1" else flag for flag in both]
    assert reproduce.main(changed) == 2
    assert "was begun with steps = 1, not 2: expected" in capsys.readouterr().err


def test_an_interrupted_command_starts_again(
    reproduce, asked, tmp_path, monkeypatch, capsys
) -> None:
    """Of the fake commands, quantize breaks off once, then eval fails once."""
    options = [f"--output={tmp_path}" if "--output=" in flag else flag for flag in asked]
    options += ["--table", "5", "--rows", "1"]
    base, seen = tmp_path / "tiny" / "bases" / "nf4", []

    def irqlora(argv):
        seen.append(argv[0])
        if argv[0] == "quantize":
            base.mkdir(parents=True)  # fails where it is there already
            if len(seen) == 1:
                raise SystemExit(143)
            (base / "base.safetensors").touch()
        return 2 * (argv[0] == "eval")

    monkeypatch.setattr(reproduce, "irqlora", irqlora)
    for code in (143, 2, 2):
        with pytest.raises(SystemExit) as ended:
            reproduce.main(options)
        assert ended.value.code == code
    assert seen == ["quantize", "quantize", "eval", "eval"]


def test_a_dry_run_runs_nothing(reproduce, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(reproduce, "irqlora", None)
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(["--table", "1", "9", "10", "--dry-run", "--rows", "QA-LoRA"]) == 0
    out = capsys.readouterr().out
    assert out.count("not available here") == 12 and "irqlora quantize" not in out
    assert reproduce.main(["--table", "2", "--size", "65b", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "needs --data flan_v2=FILE, --mmlu FOLDER" in out
    assert "[alpaca] The printed rows of QLoRA w/ GPTQ" in out
    assert out.count("irqlora quantize") == 3  # 16-bit, nf4, nf4 with ICQ: for all rows
    assert "large.yaml" in out
    assert not list(tmp_path.iterdir())


def test_costs_are_proportional_and_shared_once(modules) -> None:
    rows, costs = modules["rows"], modules["costs"]
    table, llama = rows.tables()[1], rows.architecture("7b")
    asked = rows.Asked(model="model", output=Path("nowhere"), mmlu="mmlu")
    own = {row: costs.cost(row, table, asked, llama, None) for row in table.rows[-1:]}
    (row,) = own
    small = next(r for r in table.rows if (r.size, r.method) == ("7b", "IR-QLoRA"))
    full = costs.cost(small, table, asked, llama, None)
    assert full.paper == pytest.approx(15.40)
    # 6 FLOP for each of 6.6e9 weights, and 8 for each of 1.6e8 of the adapter.
    flops = 10_000 * 16 * 512 * (6 * 6.607e9 + 8 * 1.599e8)
    assert full.derived == pytest.approx(flops / (0.4 * 312e12) / 3600, rel=1e-3)
    assert costs.cost(row, table, asked, rows.architecture("65b"), None).paper == 119.38
    twice = costs.total([small, small], {small: full}, table, asked)
    assert (twice.paper, twice.evaluation) == (full.paper, full.evaluation)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--table", "4", "--dry-run", "--rows", "LoRA"], "rows = 'LoRA': expected 1 to 6"),
        (["--table", "4", "--dry-run", "--size", "13b"], "size = '13b': table 4 has 7b"),
        (["--table", "4"], "model = None: expected"),
        (["--table", "4", "--dry-run", "--quant.format=nf3"], "the rows set it"),
        (["--table", "4", "--dry-run", "--data", "oasst=x"], "data = 'oasst=...': expected"),
    ],
)
def test_bad_input_is_one_sentence(reproduce, capsys, flags, message) -> None:
    assert reproduce.main(flags) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
