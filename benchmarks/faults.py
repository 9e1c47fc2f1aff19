"""Faults on purpose: killed commands, damaged files, wrong input, long runs, two equal runs.

    python benchmarks/faults.py --part kills --count 100
    python benchmarks/faults.py --part damage
    python benchmarks/faults.py --part fuzz --count 5000
    python benchmarks/faults.py --part soak --count 5000
    python benchmarks/faults.py --part same

Parts can be divided: `--first 100 --count 50` does the cases 100 to 149. `--json FILE` appends
the counts to a file, and `--summary FILE...` adds the files of several calls up.

Everything runs on a tiny LLaMA with random weights, or with --model on a folder of Hugging Face.
What is promised stands in docs/reliability.md. The exit code is 1 if there is a fault.
"""

import argparse
import collections
import datetime
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# Replaces this folder: transformers would import evaluate.py in place of a package of that name.
sys.path.pop(0)
sys.path.insert(0, str(ROOT))

from benchmarks import fault_damage, fault_fuzz, fault_kills, fault_long  # noqa: E402
from benchmarks.fault_inputs import train_flags, write_inputs  # noqa: E402
from benchmarks.fault_worker import Answer, Worker, command  # noqa: E402
from benchmarks.timing import machine, table  # noqa: E402

FAULTS = ("LOST", "SILENT", "UNNAMED", "TRACEBACK", "HANG", "OUTSIDE")
Counts = collections.Counter[str]


class Progress:
    """A line at most every 4 seconds."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, text: str) -> None:
        if time.monotonic() - self._last > 4:
            self._last = time.monotonic()
            print(f"  {text}", flush=True)


def _say_fault(outcome: str, where: object, text: str) -> None:
    print(f"{outcome}: {where}\n    {text.strip()[-1500:]}", flush=True)


def _must(answer: Answer) -> None:
    if answer.kind != "done":
        raise RuntimeError(answer.error)


def write_run(work: Path) -> Path:
    """Makes WORK/whole with run/, of 4 steps and an evaluation, and base/. Returns the inputs."""
    inputs, folder = write_inputs(work / "inputs"), work / "whole"
    if folder.exists():
        return inputs
    folder.mkdir()
    with Worker() as call:
        base = ("quantize", f"--model={inputs / 'model'}", "--output_dir=base", "--progress=false",
                "--quant.format=nf4", "--quant.calibration=none")  # fmt: skip
        ask = ("eval", "--run=run", "--task=perplexity", f"--text={inputs / 'text.txt'}")
        for argv in (base, train_flags(inputs, 4), (*ask, "--progress=false")):
            print(f"  {argv[0]}", flush=True)
            _must(call(command, *argv, folder=folder, limit=600.0))
    return inputs


def damage(args: argparse.Namespace, folder: Path) -> Counts:
    """Every damage of every file, for every command."""
    inputs = write_run(folder)
    every = [
        (name, case)
        for name, uses in fault_damage.uses_of(inputs).items()
        for case in fault_damage.cases(folder / "whole" / name, uses)
        if args.only in f"{name}/{case}"
    ]
    counts, progress, expected = Counts(), Progress(), {}
    scratch = folder / "scratch"

    def fresh(name: str) -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        shutil.copytree(folder / "whole" / name, scratch / name)

    with Worker() as work:
        for number, (name, case) in _chosen(args, every):
            if (name, case.use) not in expected:
                fresh(name)
                call = (fault_damage.reference, inputs, scratch, name, case.use)
                expected[name, case.use] = work(*call, folder=scratch, limit=600.0)
            fresh(name)
            call = (fault_damage.judge, inputs, scratch, name, case, expected[name, case.use])
            found = work(*call, folder=scratch)
            outcome, answer = found if isinstance(found, tuple) else (found.kind.upper(), found)
            counts[outcome] += 1
            if outcome in FAULTS:
                _say_fault(outcome, f"{number} {name}/{case}", answer.error or answer.said)
            progress(f"{number} of {len(every)}: {dict(counts)}")
    return counts


def fuzz(args: argparse.Namespace, folder: Path) -> Counts:
    """Wrong input for every reader, in turn."""
    inputs = write_run(folder)
    names = [name for name in fault_fuzz.targets() if args.only in name]
    every = [
        (names[i % len(names)], args.seed + i // len(names))
        for i in range(args.first + _all(args, 5000))
    ]
    counts, progress = Counts(), Progress()
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    with Worker() as work:
        if not (folder / "plain").exists():
            call = (fault_fuzz.write_originals, folder, inputs, folder / "whole" / "run")
            _must(work(*call, folder=folder, limit=600.0))
        for number, (name, seed) in _chosen(args, every):
            answer = work(fault_fuzz.run_input, folder, scratch, name, seed, folder=scratch)
            outcome = answer.kind if answer.kind in ("done", "refused") else answer.kind.upper()
            if answer.kind == "refused" and not answer.is_sentence:
                outcome = "NO SENTENCE"
            counts[outcome] += 1
            if outcome in FAULTS or outcome == "NO SENTENCE":
                _say_fault(outcome, f"{name}, seed {seed}, {answer.value}", answer.error)
            progress(f"{number} of {len(every)}: {dict(counts)}")
    return counts


def kills(args: argparse.Namespace, folder: Path) -> Counts:
    """Kills at random moments; every command has to end as without them."""
    inputs = write_inputs(folder / "inputs")
    whole = fault_kills.Undisturbed(fault_kills.steps(inputs, args.model), folder / "whole")
    names = [name for name in fault_kills.PHASES if args.only in name]
    counts, phases, chain = Counts(), Counts(), args.first
    while counts["killed"] < _all(args, 100):
        name, seed = names[chain % len(names)], args.seed + chain
        rest = min(1 + chain % 2, _all(args, 100) - counts["killed"])
        killed, fault = fault_kills.one_chain(whole, name, rest, seed, folder / "scratch")
        chain += 1
        counts["killed"] += len(killed)
        phases.update(killed)
        if fault:
            counts[fault.partition(":")[0]] += 1
            _say_fault(fault.partition(":")[0], f"{name}, seed {seed}", fault)
        print(f"  {counts['killed']} kills, chain {chain}: {dict(phases)}", flush=True)
        if chain - args.first > 5 * _all(args, 100):
            break
    print(f"kills by phase: {dict(phases)}")
    return counts


def soak(args: argparse.Namespace, folder: Path) -> Counts:
    """One long run: memory, open files and speed over time."""
    inputs = write_inputs(folder / "inputs")
    return Counts(fault_long.soak(inputs, folder / "soak", _all(args, 5000)))


def same(args: argparse.Namespace, folder: Path) -> Counts:
    """Two runs of one seed."""
    inputs = write_inputs(folder / "inputs")
    return Counts(fault_long.same(inputs, folder / "same"))


def _all(args: argparse.Namespace, default: int) -> int:
    return default if args.count is None else args.count


def _chosen(args: argparse.Namespace, every: list[Any]) -> list[tuple[int, Any]]:
    """The cases from --first on, at most --count, with their numbers."""
    end = None if args.count is None else args.first + args.count
    return list(enumerate(every))[args.first : end]


PARTS = {"kills": kills, "damage": damage, "fuzz": fuzz, "soak": soak, "same": same}


def report(files: list[Path]) -> tuple[str, bool]:
    """A table of the counts in the files, one row for each part, and whether there is a fault."""
    found: dict[str, Counts] = {}
    for file in files:
        for line in file.read_text().splitlines():
            row = json.loads(line)
            found.setdefault(row["part"], Counts()).update(row["counts"])
    rows = []
    for part, counts in found.items():
        whole = ", ".join(f"{v} {k}" for k, v in sorted(counts.items()) if not _is_fault(k))
        rows.append((part, whole, *(str(counts[name]) for name in FAULTS)))
    faulty = any(_is_fault(name) and n for c in found.values() for name, n in c.items())
    return table(("part", "counts", *FAULTS), rows), faulty


def _is_fault(name: str) -> bool:
    return name.isupper()


def main() -> int:
    """Runs a part, or adds the counts of several calls up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=list(PARTS))
    parser.add_argument("--count", type=int, help="cases, kills or steps (default: all)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--model", type=Path, help="kills: folder of a LLaMA (default: a tiny one)")
    parser.add_argument("--work", type=Path, help="folder to keep for the next call")
    parser.add_argument("--json", type=Path, help="file to which the counts are appended")
    parser.add_argument("--summary", type=Path, nargs="+", help="print a table of such files")
    args = parser.parse_args()
    if args.summary:
        text, faulty = report(args.summary)
        print(f"{datetime.date.today()}, {machine()}\n\n{text}")
        return int(faulty)
    if args.part is None:
        parser.error("expected --part or --summary")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="irqlora-faults-") as temporary:
        folder = (args.work or Path(temporary)).resolve()
        os.environ |= {
            "TQDM_DISABLE": "1",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            # Tiny programs take longer to compile than to run.
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0",
        }
        counts = PARTS[args.part](args, folder)
    row = {"part": args.part, "counts": dict(counts), "first": args.first, "seed": args.seed}
    row |= {"date": str(datetime.date.today()), "machine": machine()}
    print(f"{args.part}: {dict(counts)} in {time.monotonic() - started:.0f} s")
    if args.json:
        with args.json.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return int(any(_is_fault(name) and n for name, n in counts.items()))


if __name__ == "__main__":
    sys.exit(main())
