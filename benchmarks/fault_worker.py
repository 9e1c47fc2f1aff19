"""Calls of the package as the command line would answer them, for `faults.py` and `tests/faults`.

The command line turns ValueError and OSError into one sentence. Every other error, and every
traceback that anything prints, is a fault of the package. `Worker` makes the calls in a process of
its own and ends it when a call takes too long.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

LIMIT = 30.0
"""Seconds of the processor after which a call hangs. So other load on the machine does not count. A
call that waits hangs after ten times as long."""
Kind = Literal["done", "refused", "traceback", "hang"]


@dataclasses.dataclass(frozen=True)
class Answer:
    """How a call ended.

    Attributes:
        kind: "refused" is an error that the command line turns into a sentence.
        value: what the call returned.
        error: the sentence of a refusal, or the traceback.
        said: everything that was written to stdout and stderr.
    """

    kind: Kind
    value: Any = None
    error: str = ""
    said: str = ""

    @property
    def is_sentence(self) -> bool:
        """Whether a refusal is one line."""
        return "\n" not in self.error.strip()


def attempt(call: Callable[..., Any], *arguments: Any) -> Answer:
    """Calls in this process."""
    kind: Kind = "done"
    value, error = None, ""
    from irqlora_jax.messages import shown

    with _captured() as said, shown():
        try:
            value = call(*arguments)
        except (ValueError, OSError) as refusal:
            kind, error = "refused", str(refusal)
        except BaseException:  # panics of Rust are no Exceptions
            kind, error = "traceback", traceback.format_exc()
    if "Traceback (most recent call last)" in said[0]:
        kind, error = "traceback", said[0]
    return Answer(kind, value, error, said[0])


def command(*argv: str) -> Answer:
    """Runs `irqlora ARGV` in this process."""
    from irqlora_jax.cli import main

    ended = attempt(main, argv)
    if ended.kind != "done" or ended.value == 0:
        return ended
    lines = [line for line in ended.said.splitlines() if line.startswith(f"irqlora {argv[0]}: ")]
    last = ended.said[ended.said.rindex(lines[-1]) :] if lines else ended.said
    return dataclasses.replace(ended, kind="refused", error=last.strip())


@contextlib.contextmanager
def _captured() -> Iterator[list[str]]:
    """Yields a list that holds at the end what was written, by C++ and by threads too."""
    said = [""]
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        kept = [os.dup(number) for number in (1, 2)]
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            if sys.stdout is sys.__stdout__:  # else, as in a test, it writes elsewhere
                yield said
            else:
                with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                    yield said
        finally:
            for stream in (sys.stdout, sys.stderr, file):
                stream.flush()
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
            file.seek(0)
            said[0] = file.read()


class Worker:
    """A process for calls. Functions and arguments are pickled, so functions have a module."""

    def __init__(self) -> None:
        self._process: Any = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def __call__(
        self, call: Callable[..., Any], *arguments: Any, folder: Path, limit: float = LIMIT
    ) -> Any:
        """Makes a call in a folder. Returns an `Answer` "hang" or "traceback" if it never ends."""
        if self._process is None:
            self._start()
        self._pipe.send((call, arguments, str(folder)))
        started, waited, before = time.monotonic(), 0, self._busy()
        while not self._pipe.poll(1.0):
            waited += 1
            if waited % 5 == 0:
                print(f"  {waited} s in {call.__name__} {arguments}"[:150], flush=True)
            lives = self._process.is_alive()
            hangs = self._busy() - before > limit or time.monotonic() - started > 10 * limit
            if hangs or not lives:
                self._stop()
                return Answer("hang" if lives else "traceback", error="the process ended")
        try:
            return self._pipe.recv()
        except EOFError:
            self._stop()
            return Answer("traceback", error="the process ended")

    def _busy(self) -> float:
        """Seconds of the processor that the process has used; on Linux only, else 0."""
        file = Path(f"/proc/{self._process.pid}/stat")
        fields = file.read_text().rpartition(")")[2].split() if file.exists() else ["0"] * 13
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, list(sys.path)), daemon=True)
        self._process.start()
        theirs.close()
        while not self._pipe.poll(1.0):
            print("  starting a process", flush=True)
        self._pipe.recv()

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


def _serve(pipe: Any, path: list[str]) -> None:
    sys.path[:] = path
    import irqlora_jax.cli
    import irqlora_jax.train.finetune  # noqa: F401
    from irqlora_jax.train import loop
    from tests.models import made_once

    loop.make_step = made_once(loop.make_step)  # tracing takes longer than a short run
    pipe.send(None)
    while True:
        try:
            call, arguments, folder = pipe.recv()
        except EOFError:
            return
        os.chdir(folder)
        pipe.send(call(*arguments))
