"""How a model is addressed: the text around what a person says, as the model learned it."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from irqlora_jax.config import Config
from irqlora_jax.data import alpaca_prompt, encode, encode_source, read_chat_template
from irqlora_jax.data.chat import render_chat
from irqlora_jax.data.formats import GUANACO

# Text in front of what a person says, and of the answer. No space stands behind the latter: in
# running text it belongs to the first token of the answer.
_SPEAKERS = {
    "oasst1": (GUANACO["prompter"], GUANACO["assistant"].rstrip()),
    "hh_rlhf": ("\n\nHuman: ", "\n\nAssistant:"),
}


@dataclasses.dataclass(frozen=True)
class Turn:
    """What was said and answered."""

    user: str
    answer: str
    tokens: tuple[int, ...]
    """Of the answer, as the model gave them."""


@dataclasses.dataclass(frozen=True)
class Style:
    """How a model is addressed.

    Attributes:
        kind: "chat" writes messages with a chat template; "alpaca" puts Alpaca's prompt around each
            instruction; "pairs" gives prompts as they are and ends answers with eos; "oasst1" and
            "hh_rlhf" name the speakers; "text" is continued.
        template: of "chat"; None is the tokenizer's own.
    """

    kind: Literal["chat", "alpaca", "pairs", "oasst1", "hh_rlhf", "text"]
    template: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Text that ends an answer: the other speaker."""
        return (_SPEAKERS[self.kind][0].rstrip(),) if self.kind in _SPEAKERS else ()

    @property
    def continues(self) -> bool:
        """Whether an answer goes on with the text of the prompt."""
        return self.kind == "text"


def find_style(config: Config | None, tokenizer: Any) -> Style:
    """The style that a run learned; without a run, the tokenizer's chat template or plain text.

    Raises:
        FileNotFoundError: the run's data.chat_template is gone.
        ValueError: it is not UTF-8.
    """
    own = getattr(tokenizer, "chat_template", None)
    if config is None:
        return Style("chat" if own else "text")
    learned = config.data.format
    if learned == "chat":
        return Style("chat", read_chat_template(config.data.chat_template))
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
    """Tokens up to where the answer to a message begins.

    Args:
        style: of `find_style`.
        tokenizer: of transformers.
        message: what is said.
        turns: what was said before.
        context: what Alpaca's files call the input; stands behind the message elsewhere.
        system: stands in front of everything; with a chat template as the system message.

    Raises:
        ValueError: the chat template does not take the conversation.
    """
    if context and style.kind != "alpaca":
        message = f"{message}\n\n{context}"
    if style.kind == "chat":
        text = _render(style, tokenizer, [*turns, Turn(message, "", ())], system)
        # bos stands where the template writes it.
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
    # Prompts and answers were learned as tokens apart.
    first, *rest = prompts
    tokens = encode_source(tokenizer, [head + first])[0]
    eos = tokenizer.eos_token_id
    for turn, prompt in zip(turns, encode(tokenizer, rest), strict=True):
        end = [] if eos is None or eos in turn.tokens[-1:] else [eos]
        tokens = [*tokens, *turn.tokens, *end, *prompt]
    return tokens


def _render(style: Style, tokenizer: Any, turns: Sequence[Turn], system: str) -> str:
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages += [
            {"role": "user", "content": turn.user},
            {"role": "assistant", "content": turn.answer},
        ]
    return render_chat(tokenizer, [messages[:-1]], style.template, prompt=True)[0]


def spoken(
    tokenizer: Any,
    tokens: Iterable[int],
    *,
    prompt: Sequence[int] = (),
    stops: Sequence[str] = (),
) -> Iterator[str]:
    """Text of tokens as they come, in pieces of whole characters.

    Args:
        tokenizer: of transformers.
        tokens: the new ones. No more of them are taken once the text has ended.
        prompt: the tokens in front, which decide whether the text begins with a space.
        stops: the text ends in front of the first of these.
    """
    # Decoded together with what was told last, since spaces depend on what stands in front. That
    # begins with a whole character, which a fixed number of tokens would not.
    before, fresh, held = list(prompt), [], ""
    for token in tokens:
        fresh.append(token)
        text = _decode(tokenizer, before + fresh)
        # The bytes of a character may be spread over several tokens.
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            continue
        held += text[len(_decode(tokenizer, before)) :]
        before, fresh = fresh, []
        place = min((held.find(stop) for stop in stops if stop in held), default=-1)
        if place >= 0:
            yield held[:place]
            return
        ready = len(held) - _overlap(held, stops)
        if ready:
            yield held[:ready]
            held = held[ready:]
    rest = _decode(tokenizer, before + fresh)[len(_decode(tokenizer, before)) :]
    if held + rest:
        yield held + rest


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    return tokenizer.decode(
        list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of the text that one of the stops begins with."""
    lengths = (n for stop in stops for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n]))
    return max(lengths, default=0)
