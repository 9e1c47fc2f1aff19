"""Runs another framework's training step in its own process, to time it in turns with ours.

A peer is a script that ends with `serve(variants)`. It gets its settings as one JSON argument,
prints what it is ("versions", "variants", "about"), and then does one step for every line that it
reads. Each process has its own threads, memory and packages, and sleeps while the other one works.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Step = Callable[[], float]
"""One training step. It returns the loss when the device has finished."""


class Peer:
    """A peer, as the benchmark sees it. `close` ends its process."""

    def __init__(self, script: str, settings: Mapping[str, Any], python: str) -> None:
        """Starts the process. It builds its models while we build ours."""
        command = [python, str(Path(__file__).with_name(script)), json.dumps(settings)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONWARNINGS": "ignore"},
        )
        self.losses: dict[str, float] = {}

    def ready(self) -> dict[str, Any]:
        """Waits for the models; returns "versions", "variants" and "about" (a text for each).

        Raises:
            ChildProcessError: the process ended before; its standard error says why.
        """
        return self._ask("")

    def step(self, variant: str) -> None:
        """Does one step of a variant."""
        self.losses[variant] = self._ask(variant)["loss"]

    def peak_bytes(self) -> int | None:
        """Peak device memory of the peer, or None if its framework does not know it."""
        return self._ask("peak")["peak"]

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            raise ChildProcessError(f"{self._process.args[1]} ended with code {code}")  # type: ignore[index]
        return json.loads(answer)


def serve(
    variants: Mapping[str, Step],
    about: Mapping[str, str],
    versions: str,
    peak: Callable[[], int | None] = lambda: None,
) -> None:
    """Answers the requests of `Peer` until it closes the pipe."""
    answers = os.fdopen(_OUTPUT, "w")
    head = {"variants": list(variants), "about": dict(about), "versions": versions}
    for line in sys.stdin:
        name = line.strip()
        if not name:
            answer: dict[str, Any] = head
        elif name == "peak":
            answer = {"peak": peak()}
        else:
            answer = {"loss": variants[name]()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def settings() -> dict[str, Any]:
    """The settings of this peer. Call it before other imports.

    The standard output is for the answers, but libraries may print there too. From this call on,
    their output goes to the standard error.
    """
    global _OUTPUT
    _OUTPUT = os.dup(1)
    os.dup2(2, 1)
    return json.loads(sys.argv[1])


_OUTPUT = 1
