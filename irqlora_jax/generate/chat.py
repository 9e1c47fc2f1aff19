"""A conversation with a model in the terminal."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax

from irqlora_jax.generate.conversation import Style, Turn, encode_turns, find_style, spoken
from irqlora_jax.generate.decode import stream
from irqlora_jax.runs.load import Run, load_run

Write = Callable[[str], Any]
_HELP = "/reset forgets what was said, /quit ends, Ctrl-C stops an answer"


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """A conversation in the terminal."""

    run: str
    """Folder of a run, of irqlora quantize, or of a Hugging Face LLaMA."""
    baseline: bool = False
    """Leave the adapter out: the quantized model before its finetune (with LoftQ that has the pair
    that it began with)."""
    checkpoint: Literal["last", "best"] | int = "last"
    """Which adapter of a run: the newest, that of the best evaluation loss, or that of a step."""
    system: str = ""
    """What stands in front of the conversation: the system message of a chat template, plain text
    elsewhere."""
    max_new_tokens: int = 512
    """Longest answer, in tokens; at most what the context of the model leaves."""
    temperature: float = 0.7
    """0 takes the likeliest token each time, larger values vary more."""
    top_k: int | None = None
    """Draw among the k likeliest tokens only (null: all)."""
    top_p: float | None = 0.9
    """Draw among the likeliest tokens that make up this probability (null: all)."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            accepted = "a whole number of at least 1"
            raise ValueError(f"max_new_tokens = {self.max_new_tokens}: accepted is {accepted}")


def chat(
    config: ChatConfig, read: Callable[[str], str] = input, write: Write | None = None
) -> None:
    """Reads messages and writes answers as they come, until /quit or the end of the input.

    The prompt has the form that the run learned (see `conversation.find_style`). What was said
    stays in the prompt as long as the context of the model has room for it; then the oldest turns
    are dropped, which is said. KeyboardInterrupt stops an answer, and ends at the prompt.

    Args:
        config: the model and how it answers.
        read: gives a line, for a prompt to show; EOFError ends.
        write: shows a piece of text (default: standard output, at once).

    Raises:
        FileNotFoundError, ValueError: no such model, or bad settings.
    """
    write = _print if write is None else write
    run = load_run(config.run, adapter=not config.baseline, checkpoint=config.checkpoint)
    style = find_style(run.config, run.tokenizer)
    # Said before the first message: bad settings and a template that does not work.
    encode_turns(style, run.tokenizer, "?", system=config.system)
    stream(run.model, run.variables, [0], 1, **_drawing(config, 0))
    write(f"{run.folder}{_which(run, config)}. {_HELP}\n")
    turns: list[Turn] = []
    for number, message in enumerate(_messages(read, write)):
        if message is None:
            turns = []
            write("[forgotten]\n")
            continue
        tokens, dropped = _prompt(run, style, turns, message, config)
        if tokens is None:
            write("[the message is too long for the context of the model; not sent]\n")
            continue
        if dropped:
            write(f"[context full: the oldest {dropped} of {len(turns)} turns are dropped]\n")
            turns = turns[dropped:]
        turns.append(_answer(run, style, tokens, message, config, number, write))


def _messages(read: Callable[[str], str], write: Write) -> Iterator[str | None]:
    """Messages until the end; None is /reset."""
    while True:
        try:
            line = read("> ")
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        command = line.strip()
        if command == "/quit":
            return
        if command:
            yield None if command == "/reset" else line


def _prompt(
    run: Run, style: Style, turns: list[Turn], message: str, config: ChatConfig
) -> tuple[list[int] | None, int]:
    """Tokens that leave room for an answer, and how many of the oldest turns had to go for that;
    None where the message alone is too long."""
    context = run.model.config.max_position_embeddings
    room = context - max(1, min(config.max_new_tokens, context // 4))
    for dropped in range(len(turns) + 1):
        tokens = encode_turns(
            style, run.tokenizer, message, turns=turns[dropped:], system=config.system
        )
        if len(tokens) <= room:
            return tokens, dropped
    return None, 0


def _answer(
    run: Run,
    style: Style,
    prompt: list[int],
    message: str,
    config: ChatConfig,
    number: int,
    write: Write,
) -> Turn:
    room = run.model.config.max_position_embeddings - len(prompt)
    limit = min(config.max_new_tokens, room)
    eos = run.model.config.eos_token_ids
    tokens: list[int] = []
    said = ""

    def new() -> Iterator[int]:
        for token in stream(
            *(run.model, run.variables, prompt, limit),
            eos_token_ids=eos,
            **_drawing(config, number),
        ):
            tokens.append(token)
            yield token

    try:
        for piece in spoken(run.tokenizer, new(), prompt=prompt, stops=style.stops):
            # An answer begins behind the space or line end that belongs to the prompt's colon.
            shown = piece if said or style.continues else piece.lstrip()
            if shown:
                write(shown)
            said += piece if said or style.continues or shown else ""
        write("\n")
        if len(tokens) == limit == room and tokens[-1] not in eos:
            write("[the context of the model is full]\n")
    except KeyboardInterrupt:
        write("\n[stopped]\n")
    return Turn(message, said.rstrip() if style.stops else said, tuple(tokens))


def _drawing(config: ChatConfig, number: int) -> dict[str, Any]:
    return {
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "key": jax.random.fold_in(jax.random.key(config.seed), number),
    }


def _which(run: Run, config: ChatConfig) -> str:
    if run.step is not None:
        return f", step {run.step}"
    return " without its adapter" if config.baseline and run.config is not None else ""


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
