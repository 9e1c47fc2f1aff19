"""Writes prompts in the style of the training data, and decodes answers as they are generated."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from irqlora_jax.config import Config
from irqlora_jax.data import (
    alpaca_prompt,
    encode,
    encode_pairs,
    encode_source,
    read_chat_template,
)
from irqlora_jax.data.chat import render_chat
from irqlora_jax.data.formats import GUANACO
from irqlora_jax.data.templates import SOURCE, find_end

# Text in front of the user's message and in front of the answer. The latter has no space at its
# end: in running text, the space is part of the first token of the answer.
_SPEAKERS = {
    "oasst1": (GUANACO["prompter"], GUANACO["assistant"].rstrip()),
    "hh_rlhf": ("\n\nHuman: ", "\n\nAssistant:"),
}


@dataclasses.dataclass(frozen=True)
class Turn:
    """A message of the user and the answer."""

    user: str
    answer: str
    tokens: tuple[int, ...]
    """Tokens of the answer, as generated."""


@dataclasses.dataclass(frozen=True)
class Style:
    """The format of prompts and answers.

    Attributes:
        kind: "chat" uses a chat template. "alpaca" puts each instruction into Alpaca's prompt.
            "pairs" uses prompts unchanged and ends answers with eos. "oasst1" and "hh_rlhf" write
            the names of the speakers. "text" continues the prompt.
        template: the template of "chat"; None: the tokenizer's.
        end: text that ends an answer, where the tokenizer has no token for it.
    """

    kind: Literal["chat", "alpaca", "pairs", "oasst1", "hh_rlhf", "text"]
    template: str | None = None
    end: str = ""

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer: the name of the other speaker, or the end of a turn."""
        if self.kind in _SPEAKERS:
            return (_SPEAKERS[self.kind][0].rstrip(),)
        return (self.end,) if self.end else ()

    @property
    def continues(self) -> bool:
        """Whether the answer continues the text of the prompt."""
        return self.kind == "text"


def find_style(config: Config | None, tokenizer: Any) -> Style:
    """Returns the style of a run's training data; without a run, the chat template or plain text.

    With several formats, it is the style of the first source.

    Raises:
        FileNotFoundError: the file data.chat_template of the run does not exist.
        ValueError: the file is not UTF-8.
    """
    own = getattr(tokenizer, "chat_template", None)
    # The tokenizer of a run has the template, except in runs of earlier versions.
    kept = getattr(tokenizer, "init_kwargs", {}).get(SOURCE)
    kept = kept if isinstance(kept, str) else None
    if config is None:
        return Style("chat", end=find_end(tokenizer, kept)) if own else Style("text")
    learned, name = config.data.formats[0], config.data.chat_template
    if learned == "chat" or (learned == "preference" and (own or name)):
        template = None if kept else read_chat_template(name)
        return Style("chat", template, find_end(tokenizer, name or kept))
    if learned in ("alpaca", "oasst1", "hh_rlhf", "text"):
        return Style(learned)
    return Style("pairs")


def encode_turns(
    style: Style,
    tokenizer: Any,
    message: str,
    *,
    turns: Sequence[Turn] = (),
    context: str = "",
    system: str = "",
) -> list[int]:
    """Makes the tokens of a prompt, up to the start of the answer.

    Args:
        style: from `find_style`.
        tokenizer: a transformers tokenizer.
        message: the new message of the user.
        turns: the previous turns.
        context: the column "input" of Alpaca's files; other styles append it to the message.
        system: text in front of everything; the system message with a chat template.

    Raises:
        ValueError: the chat template failed for the conversation.
    """
    if context and style.kind != "alpaca":
        message = f"{message}\n\n{context}"
    if style.kind == "chat":
        text = _render(style, tokenizer, [*turns, Turn(message, "", ())], system)
        # The template writes bos itself.
        return encode(tokenizer, [text])[0]
    head = f"{system}\n\n" if system else ""
    if style.kind == "text":
        said = "".join(f"{turn.user}{turn.answer}\n" for turn in turns)
        return encode_source(tokenizer, [head + said + message])[0]
    if style.kind in _SPEAKERS:
        human, assistant = _SPEAKERS[style.kind]
        said = "".join(f"{human}{turn.user}{assistant}{turn.answer}" for turn in turns)
        return encode_source(tokenizer, [f"{head}{said}{human}{message}{assistant}"])[0]
    prompts = [*(turn.user for turn in turns), message]
    if style.kind == "alpaca":
        contexts = [*("" for _ in turns), context]
        prompts = [alpaca_prompt(*pair) for pair in zip(prompts, contexts, strict=True)]
    # The training data has prompts and answers tokenized separately.
    first, *rest = prompts
    tokens = encode_source(tokenizer, [head + first])[0]
    eos = tokenizer.eos_token_id
    for turn, prompt in zip(turns, encode(tokenizer, rest), strict=True):
        end = [] if eos is None or eos in turn.tokens[-1:] else [eos]
        tokens = [*tokens, *turn.tokens, *end, *prompt]
    return tokens


def encode_messages(
    style: Style, tokenizer: Any, messages: Sequence[Mapping[str, str]]
) -> list[int]:
    """Makes the tokens of a prompt from messages, up to the start of the answer.

    Args:
        style: from `find_style`; not the style "text", which has no turns.
        tokenizer: a transformers tokenizer.
        messages: of {"role": "system", "user" or "assistant", "content": text}. A chat template
            decides which order of roles it takes. In other styles, system messages come first, then
            a message of the user, and so on by turns. The last message is one of the user.

    Raises:
        ValueError: another order of roles, or the chat template failed.
    """
    if style.kind == "chat":
        # The template writes bos itself.
        return encode(tokenizer, render_chat(tokenizer, [messages], style.template, prompt=True))[0]
    roles = [message["role"] for message in messages]
    texts = [message["content"] for message in messages]
    head = next((place for place, role in enumerate(roles) if role != "system"), len(roles))
    wanted = [("user", "assistant")[place % 2] for place in range(len(roles) - head)]
    if roles[head:] != wanted or len(wanted) % 2 == 0:
        raise ValueError(
            f"roles {', '.join(roles)}: expected system messages, then messages of user and "
            "assistant by turns, the last one of the user"
        )
    said = texts[head:]
    turns = [
        _past_turn(style, tokenizer, user, answer)
        for user, answer in zip(said[:-1:2], said[1::2], strict=True)
    ]
    system = "\n\n".join(texts[:head])
    return encode_turns(style, tokenizer, said[-1], turns=turns, system=system)


def _past_turn(style: Style, tokenizer: Any, user: str, answer: str) -> Turn:
    """A turn whose answer is known as text, written and tokenized as in the training data."""
    if style.kind in _SPEAKERS:
        return Turn(user, f" {answer.strip()}", ())
    seam = "" if style.kind == "alpaca" else user
    (_, tokens), *_ = encode_pairs(tokenizer, [seam], [answer], join=style.kind != "alpaca")
    return Turn(user, answer, tuple(tokens))


def _render(style: Style, tokenizer: Any, turns: Sequence[Turn], system: str) -> str:
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages += [
            {"role": "user", "content": turn.user},
            {"role": "assistant", "content": turn.answer},
        ]
    return render_chat(tokenizer, [messages[:-1]], style.template, prompt=True)[0]


def decode_stream(
    tokenizer: Any,
    tokens: Iterable[int],
    *,
    prompt: Sequence[int] = (),
    stops: Sequence[str] = (),
) -> Iterator[str]:
    """Decodes tokens as they arrive, and yields text in whole characters.

    Args:
        tokenizer: a transformers tokenizer.
        tokens: the new tokens. They are not read further after a stop string.
        prompt: the tokens before them, which decide whether the text starts with a space.
        stops: the text ends before the first of these strings.
    """
    text = TextStream(tokenizer, prompt, stops)
    for token in tokens:
        piece = text.push(token)
        if piece:
            yield piece
        if text.stopped:
            return
    rest = text.end()
    if rest:
        yield rest


class TextStream:
    """Decodes tokens that are given one by one; see `decode_stream`.

    Attributes:
        stopped: whether the text has ended before a stop string. Give no more tokens then.
    """

    def __init__(
        self, tokenizer: Any, prompt: Sequence[int] = (), stops: Sequence[str] = ()
    ) -> None:
        """Starts a text. Arguments: as for `decode_stream`."""
        self.stopped = False
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        # Decode with the previous chunk: leading spaces depend on context. A chunk starts with a
        # whole character; a fixed number of previous tokens would not.
        self._before, self._fresh, self._held = list(prompt), [], ""

    def push(self, token: int) -> str:
        """Adds a token. Returns the text that has become certain, in whole characters."""
        self._fresh.append(token)
        text = _decode(self._tokenizer, self._before + self._fresh)
        # Several tokens may share the bytes of one character.
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        held = self._held + text[len(_decode(self._tokenizer, self._before)) :]
        self._before, self._fresh = self._fresh, []
        place = min((held.find(stop) for stop in self._stops if stop in held), default=-1)
        self.stopped = place >= 0
        ready = place if self.stopped else len(held) - _overlap(held, self._stops)
        self._held = "" if self.stopped else held[ready:]
        return held[:ready]

    def end(self) -> str:
        """Ends the text. Returns what was held back."""
        text = _decode(self._tokenizer, self._before + self._fresh)
        rest = text[len(_decode(self._tokenizer, self._before)) :]
        return "" if self.stopped else self._held + rest


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    return tokenizer.decode(
        list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest suffix of the text that is a proper prefix of a stop string."""
    lengths = (n for stop in stops for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n]))
    return max(lengths, default=0)
