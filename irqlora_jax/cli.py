"""The command line: `irqlora train | eval | report | quantize | export | chat`."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from irqlora_jax.config import Config, QuantizeConfig, parse_flags

_USAGE = """usage: irqlora COMMAND [--config FILE] [--section.field value ...]

  train      finetune a quantized LLaMA (also: python train.py); --plan only says whether it fits
  eval       questions, MMLU, perplexity, generation (also: python eval.py)
  report     write the page about a run again
  quantize   quantize a base once, for many runs to share
  export     write a run as Hugging Face folders: adapter, merged or dequantized
  chat       talk to a model in the terminal

irqlora COMMAND --help lists every option with its unit and default."""


@dataclasses.dataclass(frozen=True)
class TrainOptions(Config):
    __doc__ = Config.__doc__

    plan: bool | str = False
    """Only say whether the run fits, and what would: `--plan` for the device at hand, `--plan NAME`
    for another (t4, 4090, l4, a6000, a100-40, a100-80, h100, h200, ...). The training step is
    compiled from shapes: no weights are read, nothing is written."""


def _train(options: TrainOptions) -> None:
    fields = (field.name for field in dataclasses.fields(Config))
    config = Config(**{name: getattr(options, name) for name in fields})
    if options.plan is False:
        from irqlora_jax.train.finetune import run

        run(config)
        return
    from irqlora_jax.plan.measure import prepare
    from irqlora_jax.plan.plan import plan

    name = None if options.plan is True else str(options.plan)
    if name is not None:
        prepare(config)
    plan(config, name)


def _quantize(config: Any) -> None:
    from irqlora_jax.runs.quantize import quantize_model

    quantize_model(config)


def _eval(config: Any) -> None:
    from irqlora_jax.evaluate.tasks import evaluate_run
    from irqlora_jax.report.write import try_to_write
    from irqlora_jax.runs.folder import BASE_FILE

    evaluate_run(config)
    folder = Path(config.run)
    if (folder / BASE_FILE).is_file() and (folder / "config.json").is_file():
        try_to_write(folder, print)


def _report(config: Any) -> None:
    from irqlora_jax.report.write import report

    report(config)


def _export(config: Any) -> None:
    from irqlora_jax.export.folder import export

    export(config)


def _chat(config: Any) -> None:
    from irqlora_jax.generate.chat import chat

    chat(config)


def _commands() -> dict[str, tuple[type, Callable[[Any], None]]]:
    """The options and the function of every command."""
    from irqlora_jax.evaluate.tasks import EvalConfig
    from irqlora_jax.export.folder import ExportConfig
    from irqlora_jax.generate.chat import ChatConfig
    from irqlora_jax.report.write import ReportConfig

    return {
        "train": (TrainOptions, _train),
        "eval": (EvalConfig, _eval),
        "report": (ReportConfig, _report),
        "quantize": (QuantizeConfig, _quantize),
        "export": (ExportConfig, _export),
        "chat": (ChatConfig, _chat),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit code: 0 done, 2 the user's input, 130 Ctrl-C. Anything else raises, which makes 1;
        training that a signal ended, with a checkpoint, raises SystemExit(130 or 143).
    """
    name, *flags = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(_USAGE)
        return 0
    from irqlora_jax.machine import cache_programs

    try:
        commands = _commands()
        if name not in commands:
            raise ValueError(f"{name!r}: accepted is {', '.join(commands)}")
        kind, command = commands[name]
        options = parse_flags(kind, flags, f"irqlora {name}")
        cache_programs()
        command(options)
    except (ValueError, OSError) as error:
        print(f"irqlora {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
