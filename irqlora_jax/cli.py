"""The command line: `irqlora train | eval | quantize | export | chat`."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from irqlora_jax.config import Config, QuantizeConfig, parse_flags

_USAGE = """usage: irqlora COMMAND [--config FILE] [--section.field value ...]

  train      finetune a quantized LLaMA (also: python train.py)
  eval       questions, MMLU, perplexity, generation (also: python eval.py)
  quantize   quantize a base once, for many runs to share
  export     write a run as Hugging Face folders: adapter, merged or dequantized
  chat       talk to a model in the terminal

irqlora COMMAND --help lists every option with its unit and default."""


def _train(config: Any) -> None:
    from irqlora_jax.train import run

    run(config)


def _quantize(config: Any) -> None:
    from irqlora_jax.runs import quantize_model

    quantize_model(config)


def _eval(config: Any) -> None:
    from irqlora_jax.evaluate.tasks import evaluate_run

    evaluate_run(config)


def _export(config: Any) -> None:
    from irqlora_jax.hf import export

    export(config)


def _chat(config: Any) -> None:
    from irqlora_jax.chat import chat

    chat(config)


def _commands() -> dict[str, tuple[type, Callable[[Any], None]]]:
    """The options and the function of every command."""
    from irqlora_jax.chat import ChatConfig
    from irqlora_jax.evaluate.tasks import EvalConfig
    from irqlora_jax.hf import ExportConfig

    return {
        "train": (Config, _train),
        "eval": (EvalConfig, _eval),
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
    try:
        commands = _commands()
        if name not in commands:
            raise ValueError(f"{name!r}: accepted is {', '.join(commands)}")
        kind, command = commands[name]
        command(parse_flags(kind, flags, f"irqlora {name}"))
    except (ValueError, OSError) as error:
        print(f"irqlora {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
