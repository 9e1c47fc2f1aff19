"""Handles signals that ask a run to end."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

import jax

Result = TypeVar("Result")
_NOTICE = b"\nending after this step with a checkpoint; send the signal again to end at once\n"


class _AttemptInterrupted(BaseException):
    """Interrupts `Stop.attempt`. Like KeyboardInterrupt, it is not an Exception."""


class Stop:
    """Context in which the first SIGINT (Ctrl-C) or SIGTERM (e.g. preemption) is only recorded.

    The second signal raises KeyboardInterrupt. Ignored signals stay ignored. Outside of the main
    thread nothing changes, because Python allows no handlers there.

    Attributes:
        signal: the recorded signal, if any.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}
        self._in_attempt = False

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            # None means a handler that was not installed by Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]

    def attempt(self, work: Callable[[], Result]) -> Result | None:
        """Returns the result of `work`, or None if a signal arrives before it is finished.

        Of several processes each finishes `work`: the others would wait for it.
        """
        if jax.process_count() > 1:
            return work()
        if self.signal is not None:
            return None
        try:
            self._in_attempt = True
            result = work()
            self._in_attempt = False
        except _AttemptInterrupted:
            return None
        return result

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        os.write(2, _NOTICE)  # not print, which is not reentrant
        if self._in_attempt:
            self._in_attempt = False
            raise _AttemptInterrupted
