"""Kills commands at random moments, starts them again, and compares with undisturbed ones."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.fault_inputs import bytes_of, files_of, train_flags, trained, without_times

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Step:
    """A command that is killed, and what its end has to be.

    Attributes:
        argv: of `irqlora`, run in a folder of its own.
        result: of that folder.
        needs: folders of an undisturbed run that the command reads.
    """

    argv: tuple[str, ...]
    result: Callable[[Path], Any]
    needs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Phase:
    """Part of a command: begins when a file that matches `pattern` appears.

    Attributes:
        step: name of the command.
        pattern: in the folder of the command; None: the start of the process.
        span: seconds after the begin in which the kill falls; None: up to the end.
    """

    step: str
    pattern: str | None = None
    span: float | None = None


STEPS_DONE = 8
PHASES = {
    "start": Phase("train", None, 4.0),
    "quantizing": Phase("train", "run/train.lock", 1.5),
    "new folder": Phase("train", "run/tokenizer", 0.5),
    "LoftQ": Phase("loftq", "run/train.lock", 3.0),
    "LoftQ's start": Phase("loftq", "run/checkpoints", 0.3),
    "steps": Phase("train", "run/metrics.jsonl"),
    "checkpoint": Phase("train", "run/checkpoints/*tmp*", 0.05),
    "first checkpoint": Phase("loftq", "run/checkpoints/*tmp*", 0.05),
    "end": Phase("train", f"run/checkpoints/{STEPS_DONE}"),
    "quantize": Phase("quantize", "base*"),
    "export": Phase("export", "*.part"),
    "perplexity": Phase("perplexity"),
    "MMLU": Phase("mmlu", "out/*.part"),
    "answers": Phase("generate", "out/*.part"),
}


def _training(folder: Path) -> Any:
    run = folder / "run"
    names = ("config.json", "data.json", "base.safetensors", "quantization.json")
    hashes = {name: digest for name, digest in bytes_of(run).items() if name in names}
    tokenizer = bytes_of(run / "tokenizer")
    # The names of files in checkpoints are random, and their number is orbax's.
    others = {name.split("/")[0] for name in files_of(run)}
    return trained(run), hashes, tokenizer, sorted(others)


def _bytes(folder: Path) -> Any:
    return {name: digest for name, digest in bytes_of(folder).items()}


def _evaluation(folder: Path) -> Any:
    found = json.loads((folder / "out" / "result.json").read_text())
    answers = folder / "out" / "result.jsonl"
    text = answers.read_text() if answers.is_file() else None
    return without_times(found), text, files_of(folder / "out")


def steps(inputs: Path, model: Path | None = None) -> dict[str, Step]:
    """The commands by name. With a model of one's own, the data are prompts and answers."""
    changes: dict[str, Any] = {"train__steps": STEPS_DONE}
    if model is not None:
        changes |= {"model": model, "data.format": "input_output"}
    source = model or inputs / "model"
    train = tuple(train_flags(inputs, STEPS_DONE, **changes))
    ask = ("eval", "--run=run", "--progress=false")
    fitted = ("--adapter.init=loftq", "--quant.calibration=none")
    return {
        "train": Step(train, _training),
        "loftq": Step((*train, *fitted), _training),
        "quantize": Step(("quantize", f"--model={source}", "--output_dir=base",
                          "--progress=false"), _bytes),
        "export": Step(("export", "--run=run", "--output_dir=exported", "--progress=false"),
                       lambda folder: bytes_of(folder / "exported"), ("run",)),
        "perplexity": Step((*ask, "--task=perplexity", f"--text={inputs}/text.txt",
                            "--output=out/result.json"), _evaluation, ("run",)),
        "mmlu": Step((*ask, "--task=mmlu", f"--mmlu={inputs}/mmlu", "--shots=1", "--batch_size=1",
                      "--output=out/result.json"), _evaluation, ("run",)),
        "generate": Step((*ask, "--task=generate", f"--prompts={inputs}/prompts.txt",
                          "--batch_size=1", "--max_new_tokens=16", "--output=out/result.jsonl"),
                         _answers, ("run",)),
    }  # fmt: skip


def _answers(folder: Path) -> Any:
    return (folder / "out" / "result.jsonl").read_text(), files_of(folder / "out")


class Process:
    """A command in a process of its own, with places for temporary files that can be listed."""

    def __init__(self, step: Step, folder: Path) -> None:
        self._log = folder.parent / f"{folder.name}.log"
        for name in ("tmp", "home"):
            (folder.parent / name).mkdir(exist_ok=True)
        places = {"TMPDIR": str(folder.parent / "tmp"), "HOME": str(folder.parent / "home")}
        places |= {"PYTHONPATH": str(ROOT)}
        with self._log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "irqlora_jax", *step.argv],
                cwd=folder,
                env={"JAX_PLATFORMS": "cpu"} | os.environ | places,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> str:
        """Waits for the end, and returns what was said.

        Raises:
            RuntimeError: the command fails.
        """
        last = time.monotonic()
        while self.process.poll() is None:
            time.sleep(0.05)
            if time.monotonic() - last > 4:
                last = time.monotonic()
                print("  waiting for the command", flush=True)
        said = self.said()
        if self.process.returncode != 0:
            raise RuntimeError(f"exit code {self.process.returncode}: {said[-800:]}")
        return said

    def kill_in(self, phase: Phase, folder: Path, rng: random.Random, longest: float) -> bool:
        """Kills the process at a random moment of a phase; False if it ended before."""
        last = time.monotonic()
        while phase.pattern and not any(folder.glob(phase.pattern)):
            if self.process.poll() is not None:
                return False
            if time.monotonic() - last > 4:
                last = time.monotonic()
                print("  waiting for the phase", flush=True)
            time.sleep(0.001)
        try:
            self.process.wait(rng.uniform(0, phase.span or longest))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait() == -signal.SIGKILL

    def said(self) -> str:
        return self._log.read_text()


@dataclasses.dataclass
class Undisturbed:
    """Results of the commands without a kill, made once each."""

    steps: dict[str, Step]
    folder: Path
    results: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def result(self, name: str) -> Any:
        if name not in self.results:
            print(f"undisturbed: {name}", flush=True)
            work = self.prepare(name, self.folder / name / "work")
            Process(self.steps[name], work).wait()  # compiles
            shutil.rmtree(work)
            self.prepare(name, work)
            started = time.monotonic()
            Process(self.steps[name], work).wait()
            self.seconds[name] = time.monotonic() - started
            self.results[name] = self.steps[name].result(work)
        return self.results[name]

    def prepare(self, name: str, work: Path) -> Path:
        shutil.rmtree(work, ignore_errors=True)  # of a call before this one
        work.mkdir(parents=True)
        for needed in self.steps[name].needs:
            self.result("train")
            shutil.copytree(self.folder / "train" / "work" / needed, work / needed)
        return work


def outside(work: Path) -> list[str]:
    """Files that a command left beside its output: temporary ones, or of the home folder."""
    found = [f"tmp/{name}" for name in files_of(work.parent / "tmp")]
    found += [f"home/{name}" for name in files_of(work.parent / "home")]
    allowed = ("run", "base", "exported", "out")
    return found + [path.name for path in work.iterdir() if path.name not in allowed]


def one_chain(
    whole: Undisturbed, name: str, kills: int, seed: int, scratch: Path
) -> tuple[list[str], str | None]:
    """Kills a command up to `kills` times in one phase and then lets it end.

    Returns:
        The phases in which it was killed, and the fault, if any.
    """
    phase, rng = PHASES[name], random.Random(f"{name} {seed}")
    expected = whole.result(phase.step)
    step, work = whole.steps[phase.step], scratch / "work"
    shutil.rmtree(scratch, ignore_errors=True)
    whole.prepare(phase.step, work)
    killed: list[str] = []
    longest = max(0.3, whole.seconds[phase.step] * (0.9 if phase.pattern is None else 0.25))
    try:
        ended = False
        while len(killed) < kills and not ended:
            process = Process(step, work)
            ended = not process.kill_in(phase, work, rng, longest)
            killed += [] if ended else [name]
            said = process.wait() if ended else ""
        if not ended:
            said = Process(step, work).wait()
    except RuntimeError as error:
        # The kill may fall between the last write and the end of the process.
        if "exists; expected a new folder" not in str(error):
            return killed, f"LOST: {error}"
        said = str(error)
    if "Traceback" in said:
        return killed, f"TRACEBACK: {said[-800:]}"
    try:
        found = step.result(work)
    except (OSError, ValueError) as error:
        return killed, f"LOST: {error}"
    if found != expected:
        return killed, f"SILENT: {_difference(found, expected)}"
    left = outside(work)
    return killed, f"OUTSIDE: {left[:5]}" if left else None


def _difference(found: Any, expected: Any) -> str:
    if isinstance(found, dict) and isinstance(expected, dict):
        names = [k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k)]
        return f"{sorted(names)[:4]}"
    if isinstance(found, Sequence) and isinstance(expected, Sequence):
        pairs = zip(found, expected, strict=False)
        return "; ".join(_difference(a, b) for a, b in pairs if a != b)[:300]
    return f"{str(found)[:100]} instead of {str(expected)[:100]}"
