"""How the messages of the package reach the user.

Every module logs to `logging.getLogger(__name__)`: `info` for progress and results,
`warning` for failures. The functions behind the commands (`train.run`, `evaluate_run`, `plan`,
`quantize_model`, `export`, `report`) show these messages without any configuration.

Python drops messages of level INFO unless somebody configures logging. A notebook would then train
in silence. So these functions run inside `shown()`, which adds a handler to the logger
"irqlora_jax" and removes it at the end. Only this logger changes, and only for that time: the root
logger belongs to the application. Propagation is off meanwhile. Otherwise a handler of the root
logger (Colab has one) would show every message a second time.

An application that configures logging keeps control:
    logging.basicConfig(level=logging.INFO)                     the messages go to its handlers
    logging.getLogger("irqlora_jax").addHandler(...)            and to this one; set a level too
    logging.getLogger("irqlora_jax").setLevel(logging.WARNING)  only warnings are shown
"""

import contextlib
import functools
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

ON_STDOUT = {"on_stdout": True}
"""For `logger.warning(..., extra=ON_STDOUT)`: a warning that belongs among the results."""

QUIET = 5.0
"""Seconds that work may take before something is said about it."""

_package = logging.getLogger("irqlora_jax")


class Plain(logging.Handler):
    """Writes messages as `print` does: INFO to stdout, warnings to stderr (see `ON_STDOUT`)."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a message. Progress bars are cleared for it and drawn again below it.

        Raises:
            OSError: it cannot be written.
        """
        warns = record.levelno >= logging.WARNING and not getattr(record, "on_stdout", False)
        with _bars_cleared():
            print(self.format(record), file=sys.stderr if warns else sys.stdout)


def _bars_cleared() -> contextlib.AbstractContextManager[Any]:
    bars: Any = sys.modules.get("tqdm")  # without this import, there is no bar
    return contextlib.nullcontext() if bars is None else bars.tqdm.external_write_mode()


def _is_configured() -> bool:
    """Whether the application handles the messages itself, or `shown` is already active."""
    own = bool(_package.handlers)
    return own or (_package.hasHandlers() and _package.isEnabledFor(logging.INFO))


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Context that shows the package's messages, unless the application configured logging."""
    if _is_configured():
        yield
        return
    handler, level, propagate = Plain(), _package.level, _package.propagate
    _package.addHandler(handler)
    _package.propagate = False
    if level == logging.NOTSET:
        _package.setLevel(logging.INFO)
    try:
        yield
    finally:
        _package.removeHandler(handler)
        _package.setLevel(level)
        _package.propagate = propagate


def shows_messages(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Makes a function run inside `shown()`."""

    @functools.wraps(function)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with shown():
            return function(*args, **kwargs)

    return wrapped


class _Lines:
    """A file in which every state of a bar is a line of standard error."""

    def write(self, text: str) -> None:
        """Writes the state as a line."""
        if text.strip():
            print(text.strip(), file=sys.stderr)

    def flush(self) -> None:
        """Writes nothing."""
        sys.stderr.flush()


def _in_notebook() -> bool:
    python = sys.modules.get("IPython")
    return python is not None and python.get_ipython() is not None


@contextlib.contextmanager
def progress_bar(
    what: str, total: int | None = None, unit: str = "", *, show: bool = True, **options: Any
) -> Iterator[Any]:
    """Context that shows how far some work is, even while a step of it takes long.

    In a terminal or a notebook this is a bar. Elsewhere, as in a log file, it is a line every few
    seconds, later every half minute. Work that ends before `QUIET` leaves no line, and work without
    a total no bar. All of this goes to standard error.

    Args:
        what: the work.
        total: number of units of work; None: unknown.
        unit: name of a unit.
        show: False shows nothing.
        options: of tqdm.

    Yields:
        The bar of tqdm.
    """
    from tqdm.auto import tqdm

    as_bar = sys.stderr.isatty() or _in_notebook()
    if total is None:
        options |= {"bar_format": "{desc}: {elapsed}", "leave": False}
    elif not as_bar:
        counts = "{n_fmt} of {total_fmt}{unit}, {elapsed}{postfix}"
        options |= {"bar_format": f"{{desc}}: {counts}"}
    if not as_bar:
        options |= {"file": _Lines(), "mininterval": float("inf")}
    bar = tqdm(
        total=total,
        desc=what,
        unit=f" {unit}" if unit and not as_bar else unit,
        disable=not show,
        delay=0 if as_bar and total is not None else QUIET,
        **options,
    )
    ended, started = threading.Event(), time.perf_counter()

    def repeat() -> None:
        early = 12 * QUIET
        while not ended.wait(QUIET if time.perf_counter() - started < early else 6 * QUIET):
            bar.refresh()

    thread = threading.Thread(target=repeat, daemon=True)
    if show:
        thread.start()
    try:
        with bar:
            yield bar
    finally:
        ended.set()
        if show:
            thread.join()
