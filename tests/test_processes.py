"""How a process joins others: its options. What processes do together: train/test_processes.py."""

import subprocess
import sys
from typing import Any

import pytest

from irqlora_jax import cli
from irqlora_jax.processes import check_agreement, connect, exchange, from_first, together


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("on",), "distributed = 'on': expected off, auto or HOST:PORT of the first process"),
        (("host",), "distributed = 'host': expected"),
        (("host:0", 0, 2), "distributed = 'host:0': expected"),
        (("host:70000", 0, 2), "distributed = 'host:70000': expected"),
        ((":7777", 0, 2), "distributed = ':7777': expected"),
        (
            ("host:1",),
            "processes = None: expected a whole number with distributed host:1",
        ),
        (("host:1", 0, 0), "processes = 0: expected"),
        (("host:1", 2, 2), "process = 2: expected a whole number with distributed host:1"),
        (("host:1", None, 2), "process = None: expected"),
        (("auto", 0), "process = 0: expected null with distributed auto"),
        (("off", None, 2), "processes = 2: expected null with distributed off"),
    ],
)
def test_what_connect_refuses(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        connect(*given)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "--run", "r", "--distributed", "auto"], "--distributed: expected one of the"),
        (["train", "--process", "first"], "--process: invalid int value: 'first'"),
        (
            ["eval", "--run", "r", "--task", "mmlu", "--processes=2"],
            "processes = 2: expected null with distributed off",
        ),
        (["eval", "--run", "r", "--task", "mmlu", "--distributed=x"], "distributed = 'x': exp"),
    ],
)
def test_options_of_the_command_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"irqlora {arguments[0]}: {message}")


def test_auto_without_a_launcher_says_what_to_do() -> None:
    code = "from irqlora_jax.processes import connect; connect('auto')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("ValueError: distributed = auto: ")
    assert last.endswith(
        "expected a program started by SLURM, Open MPI or Kubernetes, off, or "
        "HOST:PORT of the first process"
    )


def test_a_process_alone_waits_for_nobody() -> None:
    assert exchange("text") == ["text"] == [from_first(lambda: "text")]
    check_agreement({"a": 1})
    with pytest.raises(KeyError):
        together(lambda: {}["missing"])
