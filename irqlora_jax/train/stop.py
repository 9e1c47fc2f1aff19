"""Signals that ask a run to end."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

Result = TypeVar("Result")
_SAYS = b"\nending after this step, with a checkpoint; once more ends at once\n"


class _GivenUp(BaseException):
    """Unwinds what need not be finished. Like KeyboardInterrupt it is no Exception."""


class Stop:
    """As a context: SIGINT (Ctrl-C) and SIGTERM (a cluster that takes its machine back) only ask.

    The second of them raises KeyboardInterrupt. A signal that is ignored stays so, and outside of
    the main thread, where Python allows no handlers, nothing changes.

    Attributes:
        signal: what came, if anything did.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}
        self._gives_up = False

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that Python did not install.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]

    def attempt(self, work: Callable[[], Result]) -> Result | None:
        """The result of `work`, or None if a signal comes before it is finished."""
        if self.signal is not None:
            return None
        try:
            self._gives_up = True
            result = work()
            self._gives_up = False
        except _GivenUp:
            return None
        return result

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        os.write(2, _SAYS)  # print may be at work just now, and may not be entered twice
        if self._gives_up:
            self._gives_up = False
            raise _GivenUp
