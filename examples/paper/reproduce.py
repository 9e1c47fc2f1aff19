"""The tables of the IR-QLoRA paper: our figures next to the printed ones, and their costs.

    python examples/paper/reproduce.py --table 1 --dry-run
    python examples/paper/reproduce.py --table 1 --model FOLDER_OR_HUB_ID --mmlu FOLDER

Every row is a few commands of `irqlora`: quantize a base, finetune, evaluate. The script shows and
runs them. It never repeats a finished command, and tables share commands, so you can stop and
restart at any time. `--dry-run` shows rows, commands and costs, and runs nothing. `--report` shows
the results so far. Other flags, such as --train.accumulation 4, go to `irqlora train`.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from costs import ASSUMPTIONS, cost, shapes, storage, total
from rows import METHODS, TASKS, Asked, Row, Stage, Table, figures, size_of, stages, tables, times

from irqlora_jax.cli import main as irqlora
from irqlora_jax.files.small import write_text
from irqlora_jax.text import aligned

_FIXED = {"quant.", "adapter.", "data.", "output_dir", "model", "train.steps", "config"}


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the flags for `irqlora train`.

    Raises:
        ValueError: a flag that the rows set.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = [*tables(), 15]
    parser.add_argument("--table", type=int, nargs="+", required=True, choices=numbers)
    parser.add_argument("--model", help="folder with a Hugging Face LLaMA, or its id on the hub")
    parser.add_argument(
        "--size", help="rows of this size, such as 13b or llama2-7b (default: the model's)"
    )
    parser.add_argument("--rows", nargs="+", help="numbers or names of rows (default: all)")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="data of the finetunes: alpaca=FILE, flan_v2=FILE; FILE alone is alpaca",
    )
    parser.add_argument("--mmlu", help="folder with dev/ and test/ of MMLU")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/paper"), help="folder for everything"
    )
    parser.add_argument("--steps", type=int, help="steps of a finetune (default: the paper's)")
    parser.add_argument(
        "--max_questions",
        type=int,
        help="questions of each MMLU subject, and of each task of table 8",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=list(TASKS.values()),
        help="table 8: tasks of lm-eval; the end of a name says for which column it is",
    )
    parser.add_argument("--task_folder", help="table 8: folder with your own task files")
    parser.add_argument(
        "--plan",
        metavar="GPU",
        help="with --dry-run: compile the steps for this GPU (a100-80, ...)",
    )
    parser.add_argument("--dry-run", action="store_true", help="run nothing")
    parser.add_argument("--report", action="store_true", help="only show results")
    options, flags = parser.parse_known_args(argv)
    for flag in flags:
        name = flag.removeprefix("--").partition("=")[0]
        if flag.startswith("--") and any(name.startswith(fixed) for fixed in _FIXED):
            raise ValueError(f"{flag}: the rows set it; expected other flags of train")
    return options, flags


def read_asked(options: argparse.Namespace, flags: Sequence[str]) -> Asked:
    """The options that all rows share.

    Raises:
        ValueError: an unknown name of data.
    """
    data = {}
    for text in options.data:
        name, given, file = text.partition("=")
        data |= {name: file} if given else {"alpaca": text}
    for name in data:
        if name not in ("alpaca", "flan_v2"):
            raise ValueError(f"data = '{name}=...': expected alpaca=FILE and flan_v2=FILE")
    model = options.model or "MODEL"
    return Asked(
        model=model,
        output=options.output / Path(model).name,
        data=data,
        steps=options.steps,
        mmlu=options.mmlu,
        max_questions=options.max_questions,
        tasks=tuple(options.tasks),
        task_folder=options.task_folder,
        flags=tuple(flags),
    )


def choose(table: Table, size: str, names: Sequence[str] | None) -> list[Row]:
    """Rows of a size, chosen by number (from 1) or name.

    Raises:
        ValueError: there is no such row.
    """
    own = [row for row in table.rows if row.size == size]
    if not own:
        sizes = ", ".join(dict.fromkeys(row.size for row in table.rows))
        raise ValueError(f"size = {size!r}: table {table.number} has {sizes}")
    if names is None:
        return own
    known = {name for place, row in enumerate(own, 1) for name in (str(place), row.method.lower())}
    for name in names:
        if name.lower() not in known:
            accepted = f"1 to {len(own)}, {', '.join(dict.fromkeys(row.method for row in own))}"
            raise ValueError(f"rows = {name!r}: expected {accepted}")
    wanted = {name.lower() for name in names}
    return [r for n, r in enumerate(own, 1) if str(n) in wanted or r.method.lower() in wanted]


# ---------------------------------------------------------------------------------------- running


def check_settings(asked: Asked) -> None:
    """Stores the settings that finished rows depend on, and refuses other settings in the folder.

    Raises:
        ValueError: the folder has other settings; the message says which.
    """
    file = asked.output / "settings.json"
    found = {"model": asked.model, "steps": asked.steps, "max_questions": asked.max_questions}
    found |= {"flags": list(asked.flags)} | {f"data {k}": v for k, v in asked.data.items()}
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name, value in found.items():
        if name in kept and kept[name] != value:
            raise ValueError(
                f"{asked.output} was begun with {name} = {kept[name]!r}, not {value!r}: "
                "expected the same, or another --output"
            )
    asked.output.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(kept | found, indent=1) + "\n")


def run(stage: Stage, asked: Asked) -> None:
    """Runs a command that is not done.

    Raises:
        SystemExit: the command failed (with its exit code), or a signal came.
    """
    if stage.done.is_file():
        return
    if stage.argv[0] == "quantize":  # it needs a new folder; an unfinished one may exist
        shutil.rmtree(stage.done.parent, ignore_errors=True)
    print(f"$ irqlora {shlex.join(stage.argv)}", flush=True)
    started = time.perf_counter()
    try:
        code = irqlora(stage.argv)
    finally:
        seconds = times(asked.output)
        seconds[stage.key] = seconds.get(stage.key, 0.0) + time.perf_counter() - started
        write_text(asked.output / "seconds.json", json.dumps(seconds, indent=1) + "\n")
    if code != 0:
        raise SystemExit(code)


def missing(row: Row, table: Table, asked: Asked) -> str:
    """The missing options that a row needs."""
    return ", ".join(stage.needs for stage in stages(row, table, asked) if stage.needs)


# --------------------------------------------------------------------------------------- printing


def compare(table: Table, rows: Sequence[Row], ours: Mapping[Row, Any], exact: bool) -> str:
    """A text table with two lines for each row: the paper's figures and ours.

    Args:
        table: the rows' table.
        rows: the rows to show.
        ours: for each row its figures, or a text that says why there are none.
        exact: whether the model is the paper's, so that differences are meaningful.
    """
    digits = 2 if table.number in (6, 7) else 1
    with_difference = exact and table.number not in (6, 7)
    last = ["difference"] if with_difference else []
    lines: list[list[str]] = [["row", "bits", "data", "", *table.columns, *last]]
    several = len({row.size for row in rows}) > 1
    for row in rows:
        name = f"{row.size} {row.method}" if several else row.method
        marks = "".join(f" [{mark}]" for mark in row.notes)
        lines.append([f"{name}{marks}", str(row.bits), row.data, "paper"])
        lines[-1] += [_number(v, table, p, digits) for p, v in enumerate(row.figures)]
        lines[-1] += [""] * bool(last)
        own = ours[row]
        if isinstance(own, str):
            lines.append([f"  {own}", "", "", "here", *[""] * (len(table.columns) + len(last))])
            continue
        lines.append(
            ["", "", "", "here", *(_number(v, table, p, digits) for p, v in enumerate(own))]
        )
        if last:
            place = table.columns.index("Average")
            gap = None if own[place] is None else own[place] - row.figures[place]
            lines[-1].append("" if gap is None else f"{gap:+.1f}")
    return aligned(lines)


def _number(value: float | None, table: Table, place: int, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{2 if table.columns[place] == 'Entropy' else digits}f}"


def footnotes(table: Table, rows: Sequence[Row]) -> str:
    """The notes of the rows."""
    used = dict.fromkeys(note for row in rows for note in row.notes)
    return "\n".join(f"[{note}] {table.notes[note]}" for note in used)


def explain(table: Table, rows: Sequence[Row], asked: Asked, llama: Any, plan: str | None) -> str:
    """Rows, commands and costs of a run."""
    own = [row for row in rows if row.method in METHODS]
    if table.number == 6:
        return "nothing to run: storage is computed from shapes"
    costs = {row: cost(row, table, asked, llama, plan) for row in own}
    lines = [["row", "bits", "data", "made as", "state", "paper (h)", "derived (h)", "eval (h)"]]
    lines[0] += ["GiB", *([f"GiB, {plan}"] if plan else [])]
    for row in rows:
        if row not in costs:
            blank = [""] * (len(lines[0]) - 4)
            lines.append([row.method, str(row.bits), row.data, "not available here", *blank])
            continue
        state = "done" if all(s.done.is_file() for s in stages(row, table, asked)) else "to do"
        state = f"needs {needs}" if (needs := missing(row, table, asked)) else state
        lines.append([row.method, str(row.bits), row.data, row.name, state])
        lines[-1] += _cost(costs[row], plan)
    whole = total(own, costs, table, asked)
    lines.append(["total left to do", "", "", "", "", *_cost(whole, plan)])
    commands = dict.fromkeys(
        f"irqlora {shlex.join(stage.argv)}"
        for row in own
        for stage in stages(row, table, asked)
        if not stage.done.is_file()
    )
    return "\n".join([aligned(lines), "", ASSUMPTIONS, "", *commands])


def _cost(own: Any, plan: str | None) -> list[str]:
    cells = [f"{hours:.2f}" for hours in (own.paper, own.derived, own.evaluation)]
    cells.append(f"{own.stored:.2f}")
    return cells + ([] if plan is None else ["-" if own.peak is None else f"{own.peak:.2f}"])


def show(number: int, options: argparse.Namespace, asked: Asked) -> None:
    """Runs the missing commands of one table and prints it.

    Raises:
        ValueError, OSError: bad input; the message is one sentence.
        SystemExit: a command failed.
    """
    table = tables()[6 if number == 15 else number]
    size = options.size
    if size is None and options.model is not None:
        size = size_of(shapes(options.model, ""))
    sizes = list(dict.fromkeys(row.size for row in table.rows))
    if table.number == 6 and size is None and options.model is None:
        chosen = [row for each in sizes for row in choose(table, each, options.rows)]
    else:
        chosen = choose(table, size or sizes[0], options.rows)
    exact = options.model is None or size_of(shapes(options.model, "")) == chosen[0].size
    print(f"\nTable {number}. {table.title}")
    if options.model is not None:
        print(f"here: {asked.model}{'' if exact else f', which is not LLaMA {chosen[0].size}'}")
    ready = options.model is not None and not options.dry_run
    if options.dry_run or (not ready and table.number != 6):
        print()
        print(explain(table, chosen, asked, shapes(options.model, chosen[0].size), options.plan))
    if ready and not options.report and table.number != 6:
        check_settings(asked)
        for row in chosen:
            if row.method in METHODS and not missing(row, table, asked):
                for stage in stages(row, table, asked):
                    run(stage, asked)
    ours: dict[Row, Any] = {}
    for row in chosen:
        if row.method not in METHODS:
            ours[row] = "not available here"
        elif table.number == 6:
            ours[row] = [storage(row, shapes(options.model, row.size)) / 2**30]
        else:
            needs = missing(row, table, asked)
            ours[row] = figures(row, table, asked) or (f"needs {needs}" if needs else "not run")
    print()
    print(compare(table, chosen, ours, exact))
    if notes := footnotes(table, chosen):
        print(f"\n{notes}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad input, 130 Ctrl-C, or the code of a failed command."""
    try:
        options, flags = parse(argv)
        asked = read_asked(options, flags)
        if options.model is None and not options.dry_run and set(options.table) - {6, 15}:
            raise ValueError("model = None: expected a folder or an id on the hub, or --dry-run")
        for number in options.table:
            show(number, options, asked)
    except (ValueError, OSError) as error:
        print(f"reproduce.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.close(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
