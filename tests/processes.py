"""Starts programs as several processes on this machine, connected over loopback."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.models import ROOT

CONNECT = """
import os, sys
import jax
jax.config.update("jax_num_cpu_devices", int(os.environ["DEVICES"]))
jax.config.update("jax_platforms", "cpu")
from irqlora_jax.processes import connect
connect(os.environ["ADDRESS"], int(os.environ["PROCESS"]), int(os.environ["PROCESSES"]))
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_processes(
    command: Sequence[str], count: int, devices: int, folder: Path, **changes: str
) -> list[subprocess.Popen[str]]:
    """Starts `command` `count` times. Their environment says who they are (`CONNECT`); the words
    {process}, {processes} and {address} of the command are replaced."""
    address = f"127.0.0.1:{free_port()}"
    started = []
    for process in range(count):
        names = {"process": process, "processes": count, "address": address}
        own = {key.upper(): str(value) for key, value in names.items()} | {"DEVICES": str(devices)}
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        own |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
        started.append(
            subprocess.Popen(
                [part.format(**names) if "{" in part else part for part in command],
                env=environment | own | changes,
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def run_processes(script: str, count: int, devices: int, folder: Path) -> list[str]:
    """Runs a script after `CONNECT` in each process, and returns what each printed."""
    file = folder / "script.py"
    file.write_text(CONNECT + script)
    started = start_processes([sys.executable, str(file)], count, devices, folder)
    return [output for output, _ in finish(started)]


def finish(started: list[subprocess.Popen[str]], code: int = 0) -> list[tuple[str, str]]:
    """Waits for all, and returns what each wrote to stdout and stderr."""
    try:
        said = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (output, errors) in zip(started, said, strict=True):
        assert process.returncode == code, f"{output[-3000:]}\n{errors[-6000:]}"
    return said
