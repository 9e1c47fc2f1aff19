"""Runs a conversation with a model in the terminal (the command `irqlora chat`)."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax

from irqlora_jax.generate.conversation import Style, Turn, decode_stream, encode_turns, find_style
from irqlora_jax.generate.decode import stream
from irqlora_jax.messages import progress_bar
from irqlora_jax.runs.load import Run, load_run, unpacked

Write = Callable[[str], Any]
_HELP = "/reset clears the conversation, /quit ends it, Ctrl-C stops an answer"


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """Talks to a model in the terminal."""

    run: str
    """Folder of a run, of irqlora quantize, or of a Hugging Face model, or a .gguf file."""
    baseline: bool = False
    """Leave the finetuned adapter out. With LoftQ or CLoQ, use the initial one."""
    checkpoint: Literal["last", "best"] | int = "last"
    """Checkpoint of the adapter: "last", "best" (lowest evaluation loss), or a step number."""
    system: str = ""
    """Text before the conversation: the system message of a chat template, else plain text."""
    max_new_tokens: int = 512
    """Maximum length of an answer in tokens. The context of the model may allow less."""
    temperature: float = 0.7
    """Sampling temperature. 0: greedy decoding."""
    top_k: int | None = None
    """Sample only from the k most likely tokens (null: all)."""
    top_p: float | None = 0.9
    """Sample only from the most likely tokens with this total probability (null: all)."""
    seed: int = 0
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            accepted = "a whole number of at least 1"
            raise ValueError(f"max_new_tokens = {self.max_new_tokens}: expected {accepted}")


def chat(
    config: ChatConfig, read: Callable[[str], str] | None = None, write: Write | None = None
) -> None:
    """Reads messages and streams the answers, until /quit or the end of the input.

    The prompt has the style of the training data (see `conversation.find_style`). It contains all
    previous turns that fit into the context of the model. Older turns are dropped with a notice.
    KeyboardInterrupt stops an answer; while the chat waits for a message, it ends the chat.

    Args:
        config: the model and its decoding settings.
        read: reads a line after showing a prompt; EOFError ends the chat (default: `input`; the
            prompt is only shown in a terminal).
        write: writes a piece of text (default: standard output, flushed; if the messages come from
            a file or a pipe, only answers are written there, the rest to standard error).

    Raises:
        FileNotFoundError, ValueError: no such model, or invalid settings.
    """
    piped = not sys.stdin.isatty()
    note = write or functools.partial(_print, file=sys.stderr if piped else sys.stdout)
    write = write or _print
    read = read or ((lambda _: input()) if piped else input)
    with progress_bar("Loading the model"):
        run = load_run(config.run, adapter=not config.baseline, checkpoint=config.checkpoint)
        fast = unpacked(run, each_layer=True)
    style = find_style(run.config, run.tokenizer)
    # Fail before the first message if the settings are invalid or the chat template does not work.
    encode_turns(style, run.tokenizer, "?", system=config.system)
    stream(run.model, run.variables, [0], 1, **_sampling_options(config, 0))
    note(f"{run.folder}{_model_description(run, config)}. {_HELP}\n")
    turns: list[Turn] = []
    for number, message in enumerate(_messages(read, note)):
        if message is None:
            turns = []
            note("[conversation cleared]\n")
            continue
        tokens, dropped = _prompt(run, style, turns, message, config)
        if tokens is None:
            note("[the message is too long for the context of the model; not sent]\n")
            continue
        if dropped:
            note(f"[context full: the oldest {dropped} of {len(turns)} turns are dropped]\n")
            turns = turns[dropped:]
        turns.append(_answer(run, fast, style, tokens, message, config, number, write, note))


def _messages(read: Callable[[str], str], note: Write) -> Iterator[str | None]:
    """Yields messages until the end of the input; None for /reset."""
    while True:
        try:
            line = read("> ")
        except (EOFError, KeyboardInterrupt):
            note("\n")
            return
        command = line.strip()
        if command == "/quit":
            return
        if command:
            yield None if command == "/reset" else line


def _prompt(
    run: Run, style: Style, turns: list[Turn], message: str, config: ChatConfig
) -> tuple[list[int] | None, int]:
    """Returns a prompt that leaves room for an answer, and the number of dropped turns.

    The prompt is None if the message alone is too long.
    """
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
    fast: Run,
    style: Style,
    prompt: list[int],
    message: str,
    config: ChatConfig,
    number: int,
    write: Write,
    note: Write,
) -> Turn:
    room = run.model.config.max_position_embeddings - len(prompt)
    limit = min(config.max_new_tokens, room)
    eos = run.model.config.eos_token_ids
    tokens: list[int] = []
    said = ""

    def new() -> Iterator[int]:
        for token in stream(
            run.model,
            run.variables,
            prompt,
            limit,
            eos_token_ids=eos,
            decoding=(fast.model, fast.variables),
            **_sampling_options(config, number),
        ):
            tokens.append(token)
            yield token

    try:
        for piece in decode_stream(run.tokenizer, new(), prompt=prompt, stops=style.stops):
            # Strip the space or line break between the colon of the prompt and the answer.
            shown = piece if said or style.continues else piece.lstrip()
            if shown:
                write(shown)
            said += piece if said or style.continues or shown else ""
        write("\n")
        if len(tokens) == limit == room and tokens[-1] not in eos:
            note("[the context of the model is full]\n")
    except KeyboardInterrupt:
        note("\n[stopped]\n")
    return Turn(message, said.rstrip() if style.stops else said, tuple(tokens))


def _sampling_options(config: ChatConfig, number: int) -> dict[str, Any]:
    return {
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "key": jax.random.fold_in(jax.random.key(config.seed), number),
    }


def _model_description(run: Run, config: ChatConfig) -> str:
    if run.step is not None:
        return f", step {run.step}"
    return " without its adapter" if config.baseline and run.config is not None else ""


def _print(text: str, file: Any = None) -> None:
    print(text, end="", file=file, flush=True)
