"""The command line: one sentence and exit code 2 for bad input, and nothing written."""

import asyncio
import gc
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import eval as eval_script
import irqlora_jax
import train as train_script
from tests.models import QUICKSTART, ROOT, WORLD, as_flags, run_settings

pytestmark = pytest.mark.usefixtures("optimizer_promotion")


class Case:
    """A folder in which one thing is wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        shutil.copytree(WORLD / "base-small", self.model)
        self.data = folder / "data.jsonl"
        lines = (WORLD / "data" / "train.jsonl").read_text().splitlines(keepends=True)[:32]
        self.data.write_text("".join(lines))
        self.output = folder / "run"

    def flags(self, *more: str) -> list[str]:
        settings = run_settings(self.model, self.output, train__steps=2, data__eval=None)
        settings |= {"data.train": str(self.data), "data.max_examples": None}
        return [f"--config={QUICKSTART}", *as_flags(settings), *more]

    def edit_config(self, **values) -> None:
        path = self.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def edit_weights(self, change: Callable[[dict], None]) -> None:
        path = self.model / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


UP = "model.layers.1.mlp.up_proj.weight"


def truncate(case: Case) -> None:
    path = case.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def shrink_vocabulary(case: Case) -> None:
    def shrink(tensors: dict) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:20].copy()

    case.edit_weights(shrink)
    case.edit_config(vocab_size=20)


def poison(tensors: dict) -> None:
    tensors[UP] = tensors[UP].copy()
    tensors[UP][3, 4] = np.nan


BAD: dict[str, tuple[Callable[[Case], object], list[str], list[str]]] = {
    "unknown key": (lambda c: None, ["--quant.formt=nf4"], ["--quant.formt"]),
    "wrong type": (
        lambda c: None,
        ["--train.steps=many"],
        ["steps", "many", "whole number"],
    ),
    "unknown format": (lambda c: None, ["--quant.format=nf5"], ["quant.format", "nf5", "nf3"]),
    "rank 0": (lambda c: None, ["--adapter.rank=0"], ["adapter.rank", "0", "at least 1"]),
    "block size 7": (lambda c: None, ["--quant.block_size=7"], ["7", "multiple of 8"]),
    "missing folder": (lambda c: shutil.rmtree(c.model), [], ["model"]),
    "other architecture": (lambda c: c.edit_config(model_type="gpt2"), [], ["gpt2", "llama"]),
    "truncated weights": (truncate, [], ["model.safetensors"]),
    "missing tensor": (lambda c: c.edit_weights(lambda t: t.pop(UP)), [], [UP]),
    "wrong shape": (
        lambda c: c.edit_weights(lambda t: t.update({UP: t[UP][:-1].copy()})),
        [],
        [UP, "191", "192"],
    ),
    "NaN weights": (lambda c: c.edit_weights(poison), [], [UP, "NaN"]),
    "tokenizer of another model": (shrink_vocabulary, [], ["embedding has 20 rows"]),
    "empty data": (lambda c: c.data.write_text(""), [], ["data.jsonl"]),
    "missing column": (
        lambda c: c.data.write_text('{"input": "a", "answer": "b"}\n'),
        [],
        ["data.jsonl", "output", "answer"],
    ),
    "malformed line": (
        lambda c: c.data.write_text(c.data.read_text() + '{"input": "a", \n'),
        [],
        ["data.jsonl", "33"],
    ),
    "other files": (
        lambda c: (c.output.mkdir(), (c.output / "thesis.tex").write_text("x")),
        [],
        ["output_dir", "holds other files"],
    ),
    "output is a file": (lambda c: c.output.write_text("x"), [], ["output_dir", "a file"]),
    "output cannot be written": (
        lambda c: None if Path("/proc").is_dir() else pytest.skip("needs a folder like /proc"),
        ["--output_dir=/proc/run"],
        ["output_dir = '/proc/run': not writable"],
    ),
    "no such questions": (
        lambda c: None,
        ["--evaluate.questions=nowhere.jsonl"],
        ["nowhere.jsonl", "no such file"],
    ),
    "sample without room": (
        lambda c: None,
        ["--evaluate.samples=[question]", "--evaluate.sample_tokens=2000"],
        ["evaluate.samples", "'question'", "sample_tokens = 2000", "context"],
    ),
    "more devices than there are": (
        lambda c: None,
        ["--mesh.data=4", "--mesh.fsdp=4"],
        ["mesh.data x mesh.fsdp", "16 devices", "there are 8"],
    ),
    "a kernel for another device": (
        lambda c: None,
        ["--train.matmul=triton"],
        ["train.matmul", "'triton'", "compute capability 8.0", "cpu", "'xla' serves"],
    ),
    "a kernel for packed weights": (
        lambda c: None,
        ["--train.matmul=mosaic", "--quant.format=none"],
        ["train.matmul", "'mosaic'", "packed weights", "'xla'"],
    ),
    "early stopping without evaluation data": (
        lambda c: None,
        ["--train.early_stopping=3"],
        ["train.early_stopping = 3", "data.eval or data.eval_fraction"],
    ),
    "early stopping without evaluations": (
        lambda c: None,
        ["--train.early_stopping=3", "--train.eval_every=0"],
        ["train.early_stopping", "3", "train.eval_every"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(case: Case, capsys, name: str) -> None:
    spoil, flags, words = BAD[name]
    spoil(case)
    before = {path: path.stat().st_mtime_ns for path in case.folder.rglob("*")}
    assert train_script.main(case.flags(*flags)) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert word in err
    assert {path: path.stat().st_mtime_ns for path in case.folder.rglob("*")} == before


@pytest.mark.parametrize("what", ["model", "data.train"])
def test_a_hub_that_cannot_be_reached(case: Case, capsys, monkeypatch, what: str) -> None:
    import datasets
    import huggingface_hub

    def unreachable(*args, **options):
        raise ConnectionError("Bearer hf_secret")

    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, unreachable)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert train_script.main(case.flags(f"--{what}=somebody/something")) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1 and "somebody/something" in err and "hf_secret" not in err
    assert "connect to the network, or give a local f" in err
    assert not case.output.exists()


def test_a_disk_without_room_is_refused_before_the_weights_are_read(
    case: Case, capsys, monkeypatch
) -> None:
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1, 1))
    truncate(case)  # reading would fail
    assert train_script.main(case.flags()) == 2
    _, err = capsys.readouterr()
    assert "output_dir" in err and "GiB" in err and "model.safetensors" not in err
    assert not case.output.exists()


def test_examples_longer_than_the_context_are_counted_and_cut(case: Case, capsys) -> None:
    case.edit_config(max_position_embeddings=8)
    assert train_script.main(case.flags("--train.steps=1")) == 0
    out, err = capsys.readouterr()
    message = "32 of 32 rows were cut to the model's context of 8 tokens"
    assert message in err and message not in out


def test_a_run_from_the_command_line_and_another_one_in_its_folder(case: Case, capsys) -> None:
    assert train_script.main(case.flags("--data.eval_fraction=0.25")) == 0
    out, _ = capsys.readouterr()
    assert "plain nf3" in out and "finetuned" in out
    assert f"irqlora eval --run {case.output} --task perplexity" in out
    stored = (case.output / "config.json").read_bytes()
    assert train_script.main(case.flags("--adapter.rank=4")) == 2
    _, err = capsys.readouterr()
    assert "holds another run" in err
    assert (case.output / "config.json").read_bytes() == stored

    run = f"--run={case.output}"
    questions = f"--questions={WORLD / 'data' / 'questions.jsonl'}"
    text = case.folder / "text.txt"
    text.write_text("what is the export of people ?\n")
    for flags in (
        ["--task=factworld", questions, "--limit=64"],
        ["--task=factworld", questions, "--limit=64", "--baseline"],
        ["--task=perplexity", f"--text={text}"],
        ["--task=generate", "--prompt=question what is", "--max_new_tokens=4"],
    ):
        assert eval_script.main([run, "--progress=false", *flags]) == 0
    out, _ = capsys.readouterr()
    assert "bits per fact" in out and "perplexity" in out
    with_adapter = json.loads((case.output / "eval-factworld.json").read_text())
    without = json.loads((case.output / "eval-factworld-baseline.json").read_text())
    assert with_adapter["count"] == without["count"] == 64
    assert with_adapter["bits_per_fact"] != without["bits_per_fact"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--task=factworld"], ["run"]),
        (["--model=m", "--task=factworld"], ["--model: unknown field; did you mean --run?"]),
        (["--run=nowhere", "--task=factworld"], ["nowhere", "config.json"]),
        (["--run=nowhere", "--task=mmmlu"], ["task", "mmmlu", "perplexity"]),
        (["--run=nowhere", "--task=lm-eval:"], ["task", "lm-eval:NAME,NAME"]),
        (["--run=nowhere", "--task=generate"], ["prompt", "--prompt"]),
        (["--run=nowhere", "--task=perplexity"], ["text", "--text"]),
    ],
)
def test_bad_evaluations(capsys, flags: list[str], words: list[str]) -> None:
    assert eval_script.main(flags) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def modules_after(*argv: str) -> tuple[int, set[str], str, str]:
    """The exit code of a command in a new process, the modules it imported, stdout and stderr."""
    script = (
        "import sys\n"
        "from irqlora_jax.cli import main\n"
        "try:\n"
        "    code = main(sys.argv[1:])\n"
        "except SystemExit as error:\n"
        "    code = error.code\n"
        "print()\n"
        "print(code, *sys.modules)\n"
    )
    command = [sys.executable, "-c", script, *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    code, *modules = last.split(" ")
    return int(code), set(modules), "\n".join(lines), done.stderr


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ([], 0, "usage: irqlora COMMAND"),
        (["--help"], 0, "usage: irqlora COMMAND"),
        (["--version"], 0, f"irqlora {irqlora_jax.__version__}"),
        (["trian"], 2, "irqlora: 'trian' is not a command; did you mean 'train'?"),
        (["xyz"], 2, "irqlora: 'xyz' is not a command; the commands are train, eval"),
    ],
)
def test_nothing_is_imported_before_the_command_is_known(
    argv: list[str], code: int, words: str
) -> None:
    found, modules, out, err = modules_after(*argv)
    assert found == code and words in (err if code else out)
    assert not {"jax", "numpy", "jsonargparse", "irqlora_jax.config"} & modules
    assert {name for name in modules if name.startswith("irqlora_jax.")} == {"irqlora_jax.cli"}


def test_only_the_chosen_command_is_imported() -> None:
    code, modules, out, _ = modules_after("report", "--help")
    assert code == 0 and out.startswith("usage: irqlora report")
    assert "irqlora_jax.report.write" in modules
    for room in ("train", "plan", "export", "generate.chat", "evaluate.tasks"):
        assert f"irqlora_jax.{room}" not in modules


def test_reads_that_nobody_waits_for_print_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Of several errors at the same time, the command says one; asyncio would log the others."""

    async def fail() -> None:
        raise ValueError("damaged")

    async def start_and_forget() -> None:
        task = asyncio.ensure_future(fail())
        await asyncio.sleep(0)
        del task

    logger = logging.getLogger("asyncio")
    logged = []
    for level in (logging.NOTSET, None):
        if level is None:
            assert irqlora_jax.cli.main(["report", "--run=nowhere"]) == 2
        else:
            logger.setLevel(level)
        asyncio.run(start_and_forget())
        gc.collect()
        logged.append("never retrieved" in caplog.text)
        caplog.clear()
    logger.setLevel(logging.NOTSET)
    assert logged == [True, False]


def test_the_package_is_the_command() -> None:
    command = [sys.executable, "-m", "irqlora_jax", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"irqlora {irqlora_jax.__version__}\n"


@pytest.mark.parametrize("flags", ["--help", "report --run RUN --output PAGE"])
def test_a_closed_pipe_is_no_error(tmp_path: Path, flags: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    flags = flags.replace("RUN", str(run)).replace("PAGE", str(tmp_path / "page.html"))
    command = [sys.executable, "-m", "irqlora_jax", *flags.split()]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
