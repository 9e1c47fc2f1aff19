"""The commands of `irqlora`, one after the other, on the base that ships with the project."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from irqlora_jax import cli, hf
from irqlora_jax.base.file import read_base
from irqlora_jax.config import Config, with_base_settings
from irqlora_jax.quant.calibrations.icq import IcqOptions
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.runs.folder import save_config
from tests.models import QUICKSTART, WORLD, as_flags, run_settings

pytestmark = pytest.mark.usefixtures("optimizer_promotion", "shared_steps")

QUANT = ["--quant.format=nf3", "--quant.calibration=icq", "--quant.icq.steps=5"]


def succeed(*flags: object) -> None:
    assert cli.main([str(flag) for flag in flags]) == 0


def fail(capsys, *flags: object) -> str:
    assert cli.main([str(flag) for flag in flags]) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1
    return err


def train_flags(model: Path, output: Path) -> list[str]:
    settings = run_settings(model, output, train__steps=4, train__batch_size=8)
    del settings["quant.calibration"]
    return [f"--config={QUICKSTART}", *as_flags(settings), *QUANT]


def flags_without_quant(model: Path, output: Path, folder: Path) -> list[str]:
    """As `train_flags`, but nothing sets a field of `quant`."""
    values = yaml.safe_load(QUICKSTART.read_text())
    del values["quant"]
    file = folder / "unset.yaml"
    file.write_text(yaml.safe_dump(values))
    flags = [flag for flag in train_flags(model, output)[1:] if not flag.startswith("--quant.")]
    return [f"--config={file}", *flags]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "nf3"
    model = WORLD / "base-small"
    succeed("quantize", f"--model={model}", f"--output_dir={folder}", *QUANT, "--progress", "false")
    return folder


def test_a_base_is_quantized_once_and_shared(base: Path, tmp_path: Path, capsys) -> None:
    stored, llama = read_base(base / "base.safetensors")
    quant = QuantConfig(format="nf3", icq=IcqOptions(steps=5))
    fresh, expected = hf.load_base(WORLD / "base-small", quant)
    assert llama == expected
    for ours, theirs in zip(
        *(tree["layers"]["mlp"]["up_proj"]["weight"].codes() for tree in (stored, fresh)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)

    run = tmp_path / "run"
    succeed("train", *flags_without_quant(base, run, tmp_path))
    recorded = json.loads((run / "config.json").read_text())["quant"]
    assert (recorded["format"], recorded["icq"]["steps"]) == ("nf3", 5)
    direct = tmp_path / "direct"
    succeed("train", *train_flags(WORLD / "base-small", direct))
    losses = [
        [
            json.loads(line).get("loss")
            for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]
        ]
        for folder in (run, direct)
    ]
    assert losses[0] == losses[1] != []
    # What quantization did to the weights is measured once, too.
    surveys = [(folder / "quantization.json").read_text() for folder in (base, run, direct)]
    assert surveys[0] == surveys[1] == surveys[2] and json.loads(surveys[0])["sampled"] == 212_992
    # One file on the disk, however many runs share it.
    assert (run / "base.safetensors").stat().st_ino == (base / "base.safetensors").stat().st_ino

    merged = tmp_path / "merged"
    export = ["export", f"--run={run}", "--progress=false"]
    succeed(*export, f"--output_dir={merged}", "--kind=merged", "--dtype=float32")
    assert set(load_file(merged / "model.safetensors")) >= {"model.embed_tokens.weight"}
    assert "base-small" in (merged / "README.md").read_text()  # not the name of the base's folder
    text = tmp_path / "text.txt"
    text.write_text("what is the export of people ?\n" * 4)
    for folder in (run, merged):
        output = tmp_path / f"{folder.name}.json"
        perplexity = ["eval", f"--run={folder}", "--task=perplexity", f"--text={text}"]
        succeed(*perplexity, f"--output={output}")
    ours, theirs = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("run", "merged")
    )
    assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-4)

    page = (run / "report.html").read_text()  # of the end of the training
    succeed("report", f"--run={run}", f"--output={tmp_path / 'page.html'}")
    assert (tmp_path / "page.html").read_text() == page
    assert "4 layers of 64" in page and "Left out" not in page
    succeed("report", f"--run={base}")
    assert "4 layers of 64" in (base / "report.html").read_text()


def test_a_base_is_used_as_it_was_made(base: Path, tmp_path: Path, capsys) -> None:
    flags = train_flags(base, tmp_path / "run")
    err = fail(capsys, "train", *flags, "--quant.format=nf2")
    assert "quant.format = 'nf2'" in err and "'nf3'" in err and str(base) in err
    unset = flags_without_quant(base, tmp_path / "run", tmp_path)
    # nf4 and 64 are the defaults, and set here. 64 is also the size of the base.
    more = ["--quant.format=nf4", "--quant.block_size=64", "--quant.icq.steps=7"]
    err = fail(capsys, "train", *unset, *more)
    assert "quant.format = 'nf4', quant.icq.steps = 7: the base in" in err
    assert "with quant.format = 'nf3', quant.icq.steps = 5; expected" in err
    err = fail(capsys, "train", *flags, "--evaluate.baselines")
    assert "evaluate.baselines" in err and "full-precision" in err
    assert not (tmp_path / "run").exists()


def test_unset_settings_come_from_the_base(base: Path, tmp_path: Path) -> None:
    stored = QuantConfig(format="nf3", icq=IcqOptions(steps=5))
    model, output = str(base), str(tmp_path / "run")
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {model}\noutput_dir: {output}\nquant: {{block_size: 64}}\n")
    assert Config.load(file).quant == stored
    # In Python, QuantConfig() is not set.
    assert with_base_settings(Config(model, output)).quant == stored
    other = Config(model, output, quant=QuantConfig(format="nf2"))
    assert with_base_settings(other) == other
    original = Config(str(WORLD / "base-small"), output)
    assert with_base_settings(original) == original

    # A run goes on with its base when the folder of the base is gone.
    (tmp_path / "run").mkdir()
    shutil.copyfile(base / "base.safetensors", tmp_path / "run" / "base.safetensors")
    gone = Config(str(tmp_path / "gone"), output)
    assert with_base_settings(gone) == gone  # no config.json: an interrupted start
    save_config(tmp_path / "run", dataclasses.replace(gone, quant=stored))
    assert with_base_settings(gone).quant == stored
    assert Config.load(file, {"model": gone.model}).quant == stored
    # A run that made its base itself has the settings of its configuration.
    made = Config(str(WORLD / "base-small"), output)
    assert with_base_settings(made) == made


def test_quantizing_into_a_used_folder_is_refused(base: Path, capsys) -> None:
    before = (base / "base.safetensors").read_bytes()
    err = fail(capsys, "quantize", f"--model={WORLD / 'base-small'}", f"--output_dir={base}")
    assert "output_dir" in err and "new folder" in err
    assert (base / "base.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["trian"],
            ["trian", "'train'?", "eval, report, quantize, sensitivity, export, chat, serve"],
        ),
        (["train"], ["model", "irqlora train --help"]),
        (["quantize", "--model=a", "--output_dir=b", "--quant.fromat=nf4"], ["--quant.fromat"]),
        (["quantize", "--model=nowhere", "--output_dir=b"], ["nowhere", "no such folder"]),
        (["export", "--run=nowhere", "--output_dir=b"], ["nowhere"]),
        (["export", "--run=a", "--output_dir=b", "--kind=onnx"], ["kind", "onnx", "merged"]),
        (["chat", "--run=nowhere"], ["nowhere"]),
        (["serve", "--run=nowhere", "--port=-1"], ["port = -1", "65535"]),
        (["serve", "--run=nowhere", "--max_batch=0"], ["max_batch = 0", "at least 1"]),
        (["eval", "--run=nowhere", "--task=mmlu", "--mmlu=x"], ["nowhere"]),
        (["report", "--run=nowhere"], ["nowhere", "the folder of a run"]),
    ],
)
def test_bad_commands(
    tmp_path: Path, monkeypatch, capsys, flags: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    err = fail(capsys, *flags)
    for word in words:
        assert word in err
    assert list(tmp_path.iterdir()) == []


def test_help_lists_the_commands_and_every_option(capsys) -> None:
    assert cli.main([]) == 0
    out, _ = capsys.readouterr()
    commands = ("train", "eval", "report", "quantize", "sensitivity", "export", "chat", "serve")
    for command in commands:
        assert f"\n  {command} " in out
        with pytest.raises(SystemExit) as exit_:
            cli.main([command, "--help"])
        assert exit_.value.code == 0
        text, _ = capsys.readouterr()
        assert text.startswith(f"usage: irqlora {command}")
        left_out = {"CONFIG", "print_config"}  # and help of the entries of lists
        left_out |= {
            f"{name}.help" for name in ("quant.rules", "train.rates", "data.train", "data.eval")
        }
        options = [
            part for part in text.split("\n  --")[1:] if not left_out & set(part.split()[:2])
        ]
        assert len(options) >= (2 if command == "report" else 4)
        for option in (" ".join(option.split()) for option in options):
            # What it means, its type, and its default or that it must be given.
            assert "(type: " in option or "(required, type: " in option, option
            assert "default: " in option or "required" in option, option
            assert len(option.split("(type")[0]) > 24, option
