"""The launch scripts for several hosts, run as two processes on this machine."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.models import QUICKSTART, ROOT, as_flags, long, run_settings
from tests.processes import finish, free_address

SCRIPTS = ROOT / "examples" / "cluster"
# Stands for SLURM's: two tasks of a step, with the variables that SLURM sets.
SRUN = """#!/bin/bash
test "$1" = --kill-on-bad-exit=1 && shift
export SLURM_JOB_ID=4711 SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1 SLURM_NTASKS=2
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" && wait $first
"""
IRQLORA = f"""#!/bin/bash
exec {sys.executable} -m irqlora_jax "$@"
"""


def launch(kind: str, flags: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    """The commands of a script with these flags, and their variables."""
    if kind == "slurm":
        return [(["bash", str(SCRIPTS / "slurm.sbatch"), *flags], {})]
    address = free_address()
    if kind == "two_machines":
        script = str(SCRIPTS / "two_machines.sh")
        return [([script, address, str(process), *flags], {}) for process in range(2)]
    (job,) = yaml.safe_load((SCRIPTS / "jobset.yaml").read_text())["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    assert pods["parallelism"] == pods["completions"] == 2
    container = pods["template"]["spec"]["containers"][0]
    (command,) = container["args"]
    given = "--config /shared/config.yaml --mesh.fsdp 8"
    assert given in command and "irqlora-hosts-0-0.irqlora:7777" in command
    command = command.replace(given, '"$@"').replace("irqlora-hosts-0-0.irqlora:7777", address)
    arguments = [*container["command"], command, "bash", *flags]
    return [(arguments, {"JOB_COMPLETION_INDEX": str(process)}) for process in range(2)]


@pytest.mark.parametrize("kind", ["slurm", *long("two_machines", "jobset")])
def test_the_launch_scripts_train(kind: str, tmp_path: Path) -> None:
    for name, text in {"srun": SRUN, "irqlora": IRQLORA}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    model, folder = ROOT / "examples" / "factworld" / "base-small", tmp_path / "run"
    settings = run_settings(model, folder, train__steps=1, train__warmup_steps=0, mesh__data=2)
    flags = ["--config", str(QUICKSTART), *as_flags(settings)]
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu"}
    own |= {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen(command, env=os.environ | own | more, cwd=tmp_path, **pipes)
        for command, more in launch(kind, flags)
    ]
    said = finish(started, 200)
    assert [process.returncode for process in started] == [0] * len(started), said
    assert sum(output.count("2 of 2 devices") for output, _ in said) == 1
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
