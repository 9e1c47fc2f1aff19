"""Programs that run as several processes on this machine, connected over loopback."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.models import ROOT

_CONNECT = """
import sys
from irqlora_jax.processes import connect
connect(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
"""


def free_address() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


def train_commands(arguments: Sequence[str], count: int) -> list[list[str]]:
    """`python train.py` with these arguments, for each of the processes."""
    address = free_address()
    joined = (["--process", str(i), "--processes", str(count)] for i in range(count))
    start = [sys.executable, str(ROOT / "train.py"), *arguments, "--distributed", address]
    return [start + own for own in joined]


def start(command: Sequence[str], devices: int, folder: Path) -> subprocess.Popen[str]:
    """Starts one process with some devices of its own."""
    count = f"--xla_force_host_platform_device_count={devices}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {count}"
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=os.environ | own, cwd=folder, text=True, **pipes)


def finish(started: Sequence[subprocess.Popen[str]], seconds: float = 300) -> list[tuple[str, str]]:
    """Waits for all, and returns what each wrote to stdout and stderr."""
    try:
        return [process.communicate(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()


def run_processes(script: str, count: int, devices: int, folder: Path) -> list[str]:
    """Runs a script as several processes, and returns what each printed."""
    file, address = folder / "script.py", free_address()
    file.write_text(_CONNECT + script)
    commands = ([sys.executable, str(file), address, str(i), str(count)] for i in range(count))
    started = [start(command, devices, folder) for command in commands]
    said = finish(started)
    for process, (output, errors) in zip(started, said, strict=True):
        assert process.returncode == 0, f"{output[-3000:]}\n{errors[-6000:]}"
    return [output for output, _ in said]
