"""Messages appear without configuration, and an application that configures logging has its way."""

import ast
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tqdm import tqdm

from irqlora_jax import messages
from irqlora_jax.messages import ON_STDOUT, progress_bar, shown, shows_messages

PACKAGE = logging.getLogger("irqlora_jax")
PUBLIC = {
    "train/finetune.py": "run",
    "plan/plan.py": "plan",
    "runs/quantize.py": "quantize_model",
    "evaluate/tasks.py": "evaluate_run",
    "evaluate/sensitivity.py": "measure_sensitivity",
    "export/folder.py": "export",
    "report/write.py": "report",
    "report/sensitivity.py": "sensitivity",
}
logger = logging.getLogger("irqlora_jax.room.module")


@shows_messages
def work() -> str:
    logger.info("a table\nof two lines, 50 %")
    logger.warning("%d rows were cut", 3)
    logger.warning("no page", extra=ON_STDOUT)
    logger.debug("details")
    return "done"


class Collecting(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def collecting() -> Iterator[Collecting]:
    """A handler of the root logger."""
    handler, level = Collecting(), logging.root.level
    logging.root.addHandler(handler)
    yield handler
    logging.root.removeHandler(handler)
    logging.root.setLevel(level)


def test_messages_are_plain_and_logging_is_as_before_afterwards(capsys) -> None:
    before = (list(PACKAGE.handlers), PACKAGE.level, PACKAGE.propagate)
    assert work() == "done"
    out, err = capsys.readouterr()
    assert out == "a table\nof two lines, 50 %\nno page\n"
    assert err == "3 rows were cut\n"
    with pytest.raises(ValueError, match="wrong"), shown():
        raise ValueError("wrong")
    assert (PACKAGE.handlers, PACKAGE.level, PACKAGE.propagate) == before


def test_a_function_inside_of_another_one_shows_nothing_twice(capsys) -> None:
    with shown():
        work()
        logger.info("more")
    assert capsys.readouterr().out == "a table\nof two lines, 50 %\nno page\nmore\n"


def test_a_process_that_configures_nothing() -> None:
    script = "from tests.test_messages import work; work()"
    command = [sys.executable, "-c", script]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "a table\nof two lines, 50 %\nno page\n"
    assert done.stderr == "3 rows were cut\n"


def test_a_root_logger_that_takes_messages_gets_all_of_them(collecting, capsys) -> None:
    logging.root.setLevel(logging.INFO)
    work()
    assert collecting.lines == ["a table\nof two lines, 50 %", "3 rows were cut", "no page"]
    assert capsys.readouterr() == ("", "")


def test_a_root_logger_without_messages_shows_none_a_second_time(collecting, capsys) -> None:
    """Such as Colab's, whose level is WARNING."""
    work()
    assert collecting.lines == []
    assert "of two lines" in capsys.readouterr().out


def test_a_handler_of_the_package_is_the_only_one(said, capsys) -> None:
    work()
    assert said == ["a table\nof two lines, 50 %", "3 rows were cut", "no page"]
    assert capsys.readouterr() == ("", "")


def test_a_level_of_the_package_is_kept(capsys) -> None:
    PACKAGE.setLevel(logging.WARNING)
    try:
        work()
        assert PACKAGE.level == logging.WARNING
    finally:
        PACKAGE.setLevel(logging.NOTSET)
    assert capsys.readouterr() == ("no page\n", "3 rows were cut\n")


def test_a_bar_is_cleared_and_drawn_again(capsys) -> None:
    with tqdm(total=2, desc="steps", disable=False) as bar:
        bar.update()
        drawn = capsys.readouterr().err
        assert "steps" in drawn
        with shown():
            logger.info("between")
        out, err = capsys.readouterr()
    assert out == "between\n"
    cleared, again = err.split("steps", 1)
    assert cleared.startswith("\r") and not cleared.strip() and "1/2" in again


def threads() -> int:
    """How many there are, without tqdm's own, which the first bar starts and which stays."""
    return sum(type(thread).__name__ != "TMonitor" for thread in threading.enumerate())


@pytest.mark.parametrize("total", [None, 7])
def test_work_that_takes_long_is_named_line_by_line(capsys, monkeypatch, total) -> None:
    """And a failure ends the lines."""
    monkeypatch.setattr(messages, "QUIET", 0.05)
    before = threads()
    with pytest.raises(ValueError, match="wrong"), progress_bar("Counting", total, "sheep") as bar:
        bar.update(3)
        shown, end = ("", ""), time.monotonic() + 60  # a busy machine may show them late
        while shown[1].count("\n") < 2 and time.monotonic() < end:
            time.sleep(0.02)
            shown = tuple(map(str.__add__, shown, capsys.readouterr()))
        raise ValueError("wrong")
    out, err = map(str.__add__, shown, capsys.readouterr())
    lines = err.splitlines()
    assert out == "" and len(lines) >= 2 and "\r" not in err
    assert all(re.match(r"Counting: (\d of 7 sheep, )?00:0\d", line) for line in lines)
    assert ("3 of 7" in lines[-1]) is (total == 7)
    time.sleep(0.2)
    assert capsys.readouterr().err == "" and threads() == before


@pytest.mark.parametrize(("quiet", "show"), [(0.02, False), (100.0, True)])
def test_short_work_and_unwanted_bars_leave_no_line(capsys, monkeypatch, quiet, show) -> None:
    monkeypatch.setattr(messages, "QUIET", quiet)
    with progress_bar("Counting", 7, show=show) as bar:
        bar.update(3)
        time.sleep(0.1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("path", PUBLIC)
def test_public_functions_show_their_messages(path: str) -> None:
    tree = ast.parse((Path(__file__).parents[1] / "irqlora_jax" / path).read_text())
    (function,) = (
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == PUBLIC[path]
    )
    assert [ast.unparse(node) for node in function.decorator_list] == ["shows_messages"]
