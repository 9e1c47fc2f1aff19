"""Signals that ask a run to end."""

import os
import signal
import threading

import pytest

from irqlora_jax.train.stop import Stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_interrupts(number: signal.Signals, capfd) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), Stop() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.signal == number
        assert "send the signal again to end at once" in capfd.readouterr().err
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_a_signal_ends_the_work_and_errors_pass_through() -> None:
    done = []

    def work() -> str:
        os.kill(os.getpid(), signal.SIGINT)
        done.append("never")
        return "never"

    with Stop() as stop:
        assert stop.attempt(lambda: "result") == "result"
        assert stop.attempt(work) is None and not done
        assert stop.attempt(lambda: done.append("never")) is None and not done
    with Stop() as stop:
        with pytest.raises(ZeroDivisionError):
            stop.attempt(lambda: 1 / 0)
        assert stop.signal is None


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_have_no_handlers() -> None:
    """As in a notebook's or a server's worker: no error, and the main thread's stay."""
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with Stop() as stop:
            seen.append((stop.attempt(lambda: 1), signal.getsignal(signal.SIGINT) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(1, True)]
