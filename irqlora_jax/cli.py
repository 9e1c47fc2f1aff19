"""The command line: `irqlora COMMAND`, with train, eval, report, quantize, sensitivity, export,
chat and serve.

A command's modules are imported only when it runs, so help and usage errors appear at once.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import irqlora_jax

# The class of the options, and the function that runs the command.
Loaded = tuple[type, Callable[[Any], Any]]


def _train() -> Loaded:
    from irqlora_jax.config import TrainOptions

    return TrainOptions, _finetune_or_plan


def _finetune_or_plan(options: Any) -> None:
    config = options.config()
    if options.plan is False:
        from irqlora_jax.plan.fit import largest_base
        from irqlora_jax.train.finetune import run

        run(config, resume_from=options.resume_from, fit=largest_base)
        return
    from irqlora_jax.plan.measure import prepare
    from irqlora_jax.plan.plan import plan

    name = None if options.plan is True else str(options.plan)
    if name is not None:
        prepare(config, name)
    plan(config, name)


def _eval() -> Loaded:
    from irqlora_jax.evaluate.tasks import EvalConfig

    return EvalConfig, _evaluate_and_report


def _evaluate_and_report(config: Any) -> None:
    from pathlib import Path

    from irqlora_jax.base.file import has_base
    from irqlora_jax.evaluate.tasks import evaluate_run
    from irqlora_jax.processes import is_first
    from irqlora_jax.report.write import try_to_write

    evaluate_run(config)
    folder = Path(config.run)
    if is_first() and has_base(folder) and (folder / "config.json").is_file():
        try_to_write(folder)


def _report() -> Loaded:
    from irqlora_jax.report.write import ReportConfig, report

    return ReportConfig, report


def _quantize() -> Loaded:
    from irqlora_jax.config import QuantizeConfig
    from irqlora_jax.runs.quantize import quantize_model

    return QuantizeConfig, quantize_model


def _sensitivity() -> Loaded:
    from irqlora_jax.evaluate.sensitivity import SensitivityConfig
    from irqlora_jax.report.sensitivity import sensitivity

    return SensitivityConfig, sensitivity


def _export() -> Loaded:
    from irqlora_jax.export.folder import ExportConfig, export

    return ExportConfig, export


def _chat() -> Loaded:
    from irqlora_jax.generate.chat import ChatConfig, chat

    return ChatConfig, chat


def _serve() -> Loaded:
    from irqlora_jax.serve.command import ServeConfig, serve

    return ServeConfig, serve


# Name: the line in the help, and a function that imports what the command needs.
_COMMANDS: dict[str, tuple[str, Callable[[], Loaded]]] = {
    "train": (
        "finetune a quantized model (also: python train.py); --plan only checks whether it fits",
        _train,
    ),
    "eval": ("questions, MMLU, perplexity, generation (also: python eval.py)", _eval),
    "report": ("rewrite the report page of a run", _report),
    "quantize": ("quantize a base once for many runs", _quantize),
    "sensitivity": ("quantize one matrix at a time: which ones cost most?", _sensitivity),
    "export": ("write a run for transformers, PEFT, llama.cpp, bitsandbytes or vLLM", _export),
    "chat": ("talk to a model in the terminal", _chat),
    "serve": ("serve a model with the OpenAI API", _serve),
}
# What the command of this name would do.
_ELSEWHERE = {
    "plan": "train --plan",
    "generate": "eval --task generate",
    "mmlu": "eval --task mmlu",
}


_MANY = ("train", "eval", "quantize")
"""Commands that several processes can run together."""
_JOIN = """several processes: --distributed auto (SLURM, Open MPI, Kubernetes), or
  --distributed HOST:PORT --process I --processes N (docs/scale.md)"""


def _usage() -> str:
    lines = "\n".join(f"  {name:<11}  {line}" for name, (line, _) in _COMMANDS.items())
    return f"""usage: irqlora COMMAND [--config FILE] [--section.field value ...]

{lines}

irqlora COMMAND --help lists every option with its unit and default.
{", ".join(_MANY)} in {_JOIN}
irqlora --version prints the version."""


def _connection(name: str, flags: Sequence[str]) -> tuple[dict[str, Any] | None, list[str]]:
    """Takes the options of `processes.connect` out of the flags; None: there are none.

    Raises:
        ValueError: a value is wrong, or the command runs in one process only.
    """
    import argparse

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--distributed")
    parser.add_argument("--process", type=int)
    parser.add_argument("--processes", type=int)
    try:
        found, rest = parser.parse_known_args(flags)
    except argparse.ArgumentError as error:
        raise ValueError(f"{error.argument_name}: {error.message}") from error
    given = {key: value for key, value in vars(found).items() if value is not None}
    if not given:
        return None, list(flags)
    if name not in _MANY and found.distributed != "off":
        raise ValueError(f"--distributed: expected one of the commands {', '.join(_MANY)}")
    return given, rest


def _unknown(name: str) -> str:
    import difflib

    nearest = difflib.get_close_matches(name, _COMMANDS, n=1)
    meant = _ELSEWHERE.get(name) or (nearest[0] if nearest else None)
    hint = f"did you mean {meant!r}? " if meant else ""
    return f"{name[:200]!r} is not a command; {hint}the commands are {', '.join(_COMMANDS)}"


def _sentence(error: Exception) -> str:
    """The text of an error; also for one of the system about a path, which may be long."""
    from irqlora_jax.text import shorten

    if isinstance(error, OSError) and error.strerror and isinstance(error.filename, str):
        return f"{shorten(error.filename, quoted=False)}: {error.strerror}"
    return str(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit code: 0 for success, 2 for invalid input, 130 for Ctrl-C, 141 if the reader of the
        output has closed it (as `head -1` does). Other errors are raised (exit code 1). Training
        that a signal ended raises SystemExit(130 or 143).
    """
    try:
        code = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes the rest at its end, so the rest needs a place to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return code


def _run(argv: Sequence[str] | None) -> int:
    name, *flags = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(f"irqlora {irqlora_jax.__version__}")
        return 0
    if name not in _COMMANDS:
        print(f"irqlora: {_unknown(name)}", file=sys.stderr)
        return 2
    try:
        _, load = _COMMANDS[name]
        kind, command = load()
        from irqlora_jax.config import parse_flags

        connection, flags = _connection(name, flags)
        options = parse_flags(kind, flags, f"irqlora {name}")
        if connection is not None:
            from irqlora_jax.processes import connect

            connect(**connection)
        from irqlora_jax.machine import cache_programs
        from irqlora_jax.messages import shown

        # Orbax reads arrays at the same time. The first error of a damaged checkpoint is raised;
        # asyncio would log the others as tracebacks.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        with shown():
            cache_programs()
            command(options)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"irqlora {name}: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        from irqlora_jax.processes import describe_loss

        sentence = describe_loss(error)
        if sentence is None:
            raise
        print(f"irqlora {name}: {sentence}", file=sys.stderr)
        return 1
    return 0
