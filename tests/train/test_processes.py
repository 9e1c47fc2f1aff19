"""Runs of two processes with four devices each, against runs of one process with one device."""

import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from irqlora_jax.config import Config
from irqlora_jax.evaluate.tasks import EvalConfig, evaluate_run
from irqlora_jax.train.finetune import run
from tests.models import QUICKSTART, ROOT, WORLD, as_flags, run_settings
from tests.processes import finish, run_processes, start, train_commands
from tests.train.small_runs import assert_same_run, losses_of, rows_of, steps_of

pytestmark = pytest.mark.usefixtures("optimizer_promotion")
MODEL = ROOT / "examples" / "factworld" / "base-small"
MIXED = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
FSDP = {"mesh__data": 2, "mesh__fsdp": 4}
TEXT = {"quant__calibration": "importance", "calibrate__rows": 8, "calibrate__length": 64}
TEXT |= {"calibrate__data": str(WORLD / "data" / "train.jsonl")}
TEXT |= {"calibrate__format": "input_output"}
QUESTIONS: dict[str, Any] = {"evaluate__questions": str(WORLD / "data" / "questions.jsonl")}
CASES: dict[str, dict[str, Any]] = {
    "mixed": MIXED | QUESTIONS | {"evaluate__max_questions": 24, "evaluate__baselines": True},
    "fsdp": FSDP | {"adapter__init": "loftq", "data__packing": True, "train__accumulation": 2},
    "text": {"mesh__data": 8} | TEXT,
    "tensor": {"mesh__data": 4, "mesh__tensor": 2, "adapter__dropout": 0.1},
    "data": {"mesh__data": 8, "quant__format": "int3", "train__batch_size": 8},
}
QUICK = ("mixed", "fsdp", "text")

RUNS = """
import json
import time
from irqlora_jax.config import Config
from irqlora_jax.train.finetune import run
for settings in json.loads(%r):
    began = time.monotonic()
    run(Config.load(%r, settings))
    print("TIME", settings["output_dir"], time.monotonic() - began, file=sys.stderr)
"""
SCORES = """
from irqlora_jax.evaluate.tasks import EvalConfig, evaluate_run
from irqlora_jax.sharding import MeshConfig
for task in ("perplexity", "questions", "generate"):
    given = {"text": %r} if task == "perplexity" else {}
    given |= {"prompt": "Where", "max_new_tokens": 4} if task == "generate" else {}
    evaluate_run(EvalConfig(%r, task, mesh=MeshConfig(data=2, fsdp=2, tensor=2), **given))
"""


def settings_of(folder: Path, **changes: Any) -> dict[str, Any]:
    given = {"train__steps": 4, "train__batch_size": 16, "train__eval_every": 2, "log__every": 1}
    given |= {"quant__block_size": 32, "train__schedule": "constant", "train__warmup_steps": 0}
    return run_settings(MODEL, folder, **(given | changes))


def alone(changes: dict[str, Any]) -> dict[str, Any]:
    return changes | dict.fromkeys(("mesh__data", "mesh__fsdp", "mesh__tensor"), 1)


def assert_same_losses(one: Path, other: Path) -> None:
    """Metrics agree within 1e-5 of their size: sums over devices have another order."""
    pairs = zip(rows_of(one), rows_of(other), strict=True)
    names = ("step", "loss", "grad_norm", "targets", "learning_rate", "eval_loss")
    for ours, theirs in pairs:
        assert ours.keys() - {"device_share"} == theirs.keys() - {"device_share"}
        for name in ours.keys() & set(names):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    rows = (WORLD / "data" / "eval.jsonl").read_text().splitlines()[:40]
    file.write_text("\n".join(json.loads(row)["input"] for row in rows))
    return file


def run_pair(names: Sequence[str], text: Path, folder: Path) -> Path:
    """Runs of two processes, and scores of the first of them, by one pair of processes."""
    runs = json.dumps([settings_of(folder / name, **CASES[name]) for name in names])
    scores = SCORES % (str(text), str(folder / names[0]))
    run_processes(RUNS % (runs, str(QUICKSTART)) + scores, 2, 4, folder)
    return folder


@pytest.fixture(scope="module")
def pair(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_pair(QUICK, text, tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("single")


@pytest.mark.parametrize("name", QUICK)
def test_two_processes_train_as_one(pair: Path, single: Path, name: str) -> None:
    assert_as_one(pair, single, name)


@pytest.mark.long
def test_more_meshes_train_as_one(text: Path, single: Path, tmp_path: Path) -> None:
    names = [name for name in CASES if name not in QUICK]
    made = run_pair(names, text, tmp_path)
    for name in names:
        assert_as_one(made, single, name)


def assert_as_one(pair: Path, single: Path, name: str) -> None:
    run(Config.load(QUICKSTART, settings_of(single / name, **alone(CASES[name]))))
    assert_same_losses(pair / name, single / name)
    one, other = (folder / name / "base.safetensors" for folder in (pair, single))
    assert one.read_bytes() == other.read_bytes()
    assert len(losses_of(pair / name)) == 4 and steps_of(pair / name)
    rows = [json.loads((folder / name / "results.json").read_text()) for folder in (pair, single)]
    for ours, theirs in zip(*rows, strict=True):
        assert ours["model"] == theirs["model"] and ours["accuracy"] == theirs["accuracy"]
        assert ours["bits"] == theirs["bits"]
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)


def test_one_process_scores_and_goes_on_where_two_ended(
    pair: Path, single: Path, text: Path, tmp_path: Path
) -> None:
    """Eight devices wrote the checkpoint; one reads it, bit by bit, and trains on."""
    folder = pair / "mixed"
    for task, given in (("perplexity", {"text": str(text)}), ("questions", {})):
        asked = EvalConfig(str(folder), task, output=str(tmp_path / task), progress=False, **given)
        ours, theirs = evaluate_run(asked), json.loads((folder / f"eval-{task}.json").read_text())
        for name in ("nll", "accuracy", "count", "tokens"):
            if name in ours:
                np.testing.assert_allclose(theirs[name], ours[name], rtol=1e-5)
    asked = EvalConfig(str(folder), "generate", prompt="Where", max_new_tokens=4, progress=False)
    written = json.loads((folder / "eval-generate.json").read_text())
    assert written["text"] == evaluate_run(asked)["text"]
    longer = {"train__steps": 6, "mesh__data": 1}
    run(Config.load(QUICKSTART, settings_of(folder, **alone(CASES["mixed"]) | longer)))
    through = settings_of(single / "through", **alone(CASES["mixed"]) | longer)
    run(Config.load(QUICKSTART, through))
    ours, theirs = (dict(losses_of(place)) for place in (folder, single / "through"))
    assert ours.keys() == theirs.keys() == set(range(1, 7))
    for step, loss in theirs.items():
        np.testing.assert_allclose(ours[step], loss, rtol=1e-5)


REFUSED = """
import dataclasses
import json
import os
import jax
from pathlib import Path
from irqlora_jax.config import Config
from irqlora_jax.train.finetune import run

def attempt(**changes):
    try:
        run(Config.load(%r, json.loads(%r) | changes))
    except (ValueError, OSError, RuntimeError) as error:
        print(json.dumps([type(error).__name__, str(error)]), flush=True)

mine = jax.process_index()
attempt(**{"train.learning_rate": 0.5 if mine else 0.25})
attempt(**{"mesh.data": 4})
attempt(**{"mesh.data": 16})
Path(f"here{mine}").mkdir()
os.chdir(f"here{mine}")
attempt(**{"output_dir": "run"})
os.chdir("..")
data = Path("train.jsonl")
if mine == 0:
    data.write_text('{"input": "a", "output": "b"}\\n' * 32)
attempt(**{"data.train": str(data.absolute()), "model": "nowhere" if mine else %r})
print(sorted(path.name for path in Path("run").glob("*")))
"""


def test_what_two_processes_refuse(tmp_path: Path) -> None:
    """Both say the same, name the process, and write nothing; then they try the next."""
    given = json.dumps(settings_of(tmp_path / "run", mesh__data=8, train__steps=1))
    script = REFUSED % (str(QUICKSTART), given, str(MODEL))
    said = [
        [json.loads(line) for line in output.splitlines() if line.startswith('["')]
        for output in run_processes(script, 2, 4, tmp_path)
    ]
    for first, second in zip(*said, strict=True):
        assert first[0] == second[0] or "OtherProcessError" in (first[0], second[0])
    differ, few, many, unseen, model = said[0]
    assert "train.learning_rate = 0.5 in process 1" in differ[1]
    assert "0.25 in process 0" in differ[1]
    assert "= 4 x 1 x 1 = 4 devices: expected all 8 devices of the 2 processes" in few[1]
    assert "= 16 devices: there are 8" in many[1]
    assert "process 1" in unseen[1] and "output_dir" in unseen[1] and "all hosts share" in unseen[1]
    assert "model = " in model[1] and "process 1" in model[1]
    assert not list((tmp_path / "run").glob("*"))


def wait_for(file: Path, text: str, seconds: float = 120) -> None:
    ends = time.monotonic() + seconds
    while not (file.is_file() and text in file.read_text()):
        assert time.monotonic() < ends, f"no {text} in {file}"
        time.sleep(0.1)


def endless(folder: Path) -> list[Any]:
    """Two processes that train for thousands of steps."""
    settings = settings_of(folder, mesh__data=8, train__steps=4000, train__eval_every=0)
    flags = ["--config", str(QUICKSTART), *as_flags(settings)]
    return [start(command, 4, folder.parent) for command in train_commands(flags, 2)]


def test_a_signal_to_one_process_ends_all_with_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    started = endless(folder)
    wait_for(folder / "metrics.jsonl", '"step": 3,')
    started[1].send_signal(signal.SIGTERM)
    said = finish(started, 60)
    assert [process.returncode for process in started] == [128 + signal.SIGTERM] * 2
    assert "SIGTERM: ended after step" in said[0][0] and said[1][0].count("SIGTERM") == 0
    (step,) = steps_of(folder)
    assert dict(losses_of(folder)).keys() == set(range(1, step + 1))


@pytest.mark.long
def test_a_process_that_dies_ends_the_others_within_a_minute(tmp_path: Path) -> None:
    started = endless(tmp_path / "run")
    wait_for(tmp_path / "run" / "metrics.jsonl", '"step": 3,')
    started[1].kill()
    killed = time.monotonic()
    (_, error), _ = finish(started, 60)
    assert time.monotonic() - killed < 60 and started[0].returncode != 0
    assert "one of them has probably died" in error or "another task died" in error


@pytest.mark.long
def test_kills_do_not_change_the_end(tmp_path: Path) -> None:
    """Ten times one of two processes is killed at a random moment, and both are started again."""
    rng, settings = np.random.default_rng(0), {"mesh__data": 8, "train__steps": 160}
    settings |= {"train__save_every": 5, "train__eval_every": 40, "train__batch_size": 8}

    def begin(folder: Path) -> list[Any]:
        flags = ["--config", str(QUICKSTART), *as_flags(settings_of(folder, **settings))]
        return [start(command, 4, tmp_path) for command in train_commands(flags, 2)]

    began = time.monotonic()
    whole = begin(tmp_path / "whole")
    wait_for(tmp_path / "whole" / "metrics.jsonl", '"step": 1,')
    longest = time.monotonic() - began + 3  # while it starts, or within its first steps
    finish(whole)
    for _ in range(10):
        started = begin(tmp_path / "killed")
        time.sleep(rng.uniform(0.4, 1) * longest)
        assert [process.poll() for process in started] == [None, None]
        started[rng.integers(2)].kill()
        finish(started, 400)  # if it was not connected yet, the other one waits for five minutes
    last = begin(tmp_path / "killed")
    finish(last)
    assert [process.returncode for process in last] == [0, 0]
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
