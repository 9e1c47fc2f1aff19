"""A long run, and two equal ones, for `faults.py`."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.fault_inputs import bytes_of, train_flags, trained, without_times
from benchmarks.fault_kills import ROOT

STEADY = 0.2
"""Fraction of a run that is left out of the slopes: it compiles, and allocators warm up."""


def _start(argv: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True)
    return subprocess.Popen(
        [sys.executable, "-m", "irqlora_jax", *argv],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=(folder / "said.txt").open("w"),
        stderr=subprocess.STDOUT,
    )


def soak(inputs: Path, folder: Path, steps: int) -> dict[str, int]:
    """Trains and prints memory, open files and speed over time, with their slopes.

    Returns:
        The steps, and GROWTH or FAILED if there is such a fault.
    """
    often = max(1, steps // 20)
    argv = train_flags(
        inputs, steps, train__save_every=often, train__eval_every=often, log__every=often // 4 or 1
    )
    process = _start(argv, folder)
    samples: list[tuple[float, float, int]] = []
    started = last = time.monotonic()
    while process.poll() is None:
        time.sleep(0.5)
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            handles = len(os.listdir(f"/proc/{process.pid}/fd"))
            resident = int(status.split("VmRSS:")[1].split()[0]) / 1024
        except (OSError, IndexError):
            continue
        now = time.monotonic()
        samples.append((now - started, resident, handles))
        if now - last > 4:
            last = now
            print(f"  {now - started:.0f} s: {resident:.0f} MiB, {handles} open files", flush=True)
    if process.returncode != 0:
        print((folder / "said.txt").read_text()[-1000:])
        return {"FAILED": 1}
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().split("\n")
            if line]  # fmt: skip
    speeds = [(r["step"], r["tokens_per_second"]) for r in rows if "tokens_per_second" in r]
    steady = samples[int(len(samples) * STEADY) :]
    times, resident, handles = (np.array(column, float) for column in zip(*steady, strict=True))
    minutes = times / 60
    growth = float(np.polyfit(minutes, resident, 1)[0])
    leaked = float(np.polyfit(minutes, handles, 1)[0])
    place, speed = np.array(speeds[int(len(speeds) * STEADY) :], float).T
    slower = float(np.polyfit(place / steps, speed, 1)[0] / speed.mean())
    print(f"{steps} steps in {samples[-1][0]:.0f} s, slopes after the first {STEADY:.0%}")
    print(f"memory: {resident[0]:.0f} to {resident[-1]:.0f} MiB, {growth:+.2f} MiB a minute, "
          f"{1024 * growth * minutes[-1] / steps:+.2f} KiB a step")  # fmt: skip
    print(f"open files: {handles.min():.0f} to {handles.max():.0f}, {leaked:+.3f} a minute")
    print(f"tokens/s: median {np.median(speed):.0f}, {slower:+.1%} over the run")
    grows = leaked * minutes[-1] > 5 or growth * minutes[-1] > 0.1 * resident[0]
    return {"steps": steps} | ({"GROWTH": 1} if grows else {})


def same(inputs: Path, folder: Path) -> dict[str, int]:
    """Trains twice with one seed and compares every file.

    Returns:
        The number of files with the same bytes, of those that are the same without measured times,
        and of the others.
    """
    folders = folder / "one", folder / "two"
    for one in folders:
        process, last = _start(train_flags(inputs, 6), one), 0.0
        while process.poll() is None:
            time.sleep(0.2)
            if time.monotonic() - last > 4:
                last = time.monotonic()
                print(f"  {one.name}", flush=True)
        if process.returncode != 0:
            raise RuntimeError((one / "said.txt").read_text()[-1000:])
    runs = [one / "run" for one in folders]
    first, second = map(bytes_of, runs)
    counts = {"same bytes": 0, "same without times": 0, "compared by checksum": 0, "DIFFERENT": 0}
    if trained(runs[0]) != trained(runs[1]):
        counts["DIFFERENT"] += 1
        print("different: arrays, losses or scores")
    for name in sorted(first.keys() | second.keys()):
        if name.startswith("checkpoints/"):  # orbax names files at random; `trained` compares
            counts["compared by checksum"] += 1
        elif first.get(name) == second.get(name):
            counts["same bytes"] += 1
        elif all((run / name).is_file() for run in runs) and _equal(*(run / name for run in runs)):
            counts["same without times"] += 1
            print(f"  the same without times: {name}")
        else:
            counts["DIFFERENT"] += 1
            print(f"different: {name}")
    return counts


def _equal(one: Path, other: Path) -> bool:
    if one.name in ("report.html", "checksums.json"):  # made of files with times
        return True
    lines = [path.read_text().split("\n") for path in (one, other)]
    if one.suffix != ".jsonl":
        lines = [["\n".join(each)] for each in lines]
    values = [[without_times(json.loads(line)) for line in each if line] for each in lines]
    return values[0] == values[1]
