"""Writes conversations with a chat template and masks the assistant's turns for the loss."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from irqlora_jax.data.rows import CONVERSATIONS, Row, check_text, format_hint, read_rows
from irqlora_jax.data.template import render
from irqlora_jax.data.templates import CHAT_TEMPLATES
from irqlora_jax.text import read_text, require

_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
"""The usual names of the roles in ShareGPT's files and in files of the same form."""
_OTHER_TEMPLATE = "give another one as data.chat_template"


class Conversation(NamedTuple):
    """Messages with role and content, and their place in the file for error messages."""

    place: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    """Schemas of the functions that the assistant may call, for the chat template."""


def read_chat_template(file: str | None) -> str | None:
    """Returns the template that `data.chat_template` names, or reads its file; None if it is null.

    Raises:
        FileNotFoundError: no such template and no such file.
        ValueError: not UTF-8.
    """
    if file is None or file in CHAT_TEMPLATES:
        return None if file is None else CHAT_TEMPLATES[file]
    if not Path(file).is_file():
        raise FileNotFoundError(
            f"data.chat_template = '{file}': there is no such file; expected a file or "
            f"{', '.join(CHAT_TEMPLATES)}"
        )
    return read_text(Path(file))


def read_conversations(source: str, limit: int | None = None) -> list[Conversation]:
    """Reads rows of "messages" (role, content) or "conversations" (from, value; ShareGPT).

    A column "system" is the system message of a conversation without one. A row may also have
    "tools", a list of objects or such a list as JSON text. A message with "tool_calls" needs no
    content. A message may have a "weight", 1 or 0; see `encode_conversations`.

    Raises:
        FileNotFoundError, ValueError: as `read_rows`; a malformed message or malformed tools.
    """
    return [to_conversation(row) for row in read_rows(source, ())[:limit]]


def to_conversation(row: Row) -> Conversation:
    """Makes the conversation of a row.

    Raises:
        ValueError: as `read_conversations`.
    """
    name = next((name for name in CONVERSATIONS if row.columns.get(name) is not None), None)
    if name is None:
        there = ", ".join(row.columns) or "none"
        raise ValueError(
            f"{row.place} has no column 'messages': its columns are {there}; expected is messages "
            f"(of role and content) or conversations (of from and value){format_hint(row)}"
        )
    return Conversation(row.place, read_messages(row, name), read_tools(row))


def read_messages(row: Row, name: str) -> list[dict[str, Any]]:
    """The messages in a column of a row, as `Conversation` has them.

    Raises:
        ValueError: not a list of messages, or one is malformed.
    """
    messages = row.columns.get(name)
    if not isinstance(messages, list) or not messages:
        kind = type(messages).__name__ if messages else "empty"
        raise ValueError(f"{row.place}: {name} is {kind}: expected a list of messages")
    column = "" if name in CONVERSATIONS else f" of {name}"
    places = (f"{row.place}, message {number}{column}" for number in range(1, len(messages) + 1))
    found = [_message(message, place) for message, place in zip(messages, places, strict=True)]
    system = row.text("system", "") if name in CONVERSATIONS else ""
    if system and found[0]["role"] != "system":
        found = [{"role": "system", "content": system}, *found]
    return found


def read_tools(row: Row) -> list[dict[str, Any]] | None:
    """The column "tools" of a row; None without tools.

    Raises:
        ValueError: not a list of objects, nor its JSON text.
    """
    tools = given = row.columns.get("tools")
    if isinstance(given, str) and given.strip():
        # Tables keep schemas with different fields as text.
        with contextlib.suppress(ValueError, RecursionError):
            tools = json.loads(given)
    if tools in (None, "", []):
        return None
    ok = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    require(ok, f"{row.place}: tools", given, "a list of objects, or its JSON text")
    return tools


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"{place} is of type {type(message).__name__}: expected an object")
    role, content = ("from", "value") if "from" in message else ("role", "content")
    check_text(message.get(role), place, role)
    if not message.get("tool_calls") or message.get(content) is not None:
        check_text(message.get(content), place, content)
    weight = message.get("weight")
    require(weight in (None, 0, 1), f"{place}: weight", weight, "0 or 1")
    # Table formats fill missing fields with null. Keep other fields: the template may read them.
    rest = {k: v for k, v in message.items() if v is not None and k not in (role, content)}
    who = message[role]
    return {"role": _SHAREGPT.get(who, who), "content": message.get(content)} | rest


def encode_conversations(
    tokenizer: Any,
    conversations: Sequence[Conversation],
    template: str | None = None,
    *,
    whole: bool = False,
) -> list[tuple[Int[np.ndarray, " seq"], Bool[np.ndarray, " seq"]]]:
    """Tokenizes conversations as the template writes them, and marks the tokens to learn.

    These are the assistant's tokens, without its messages of weight 0.

    A turn of the assistant starts after the prompt that the template writes for the previous
    messages, and ends where the template ends the turn. White space after an end-of-turn token is
    not part of the turn. A token on the border counts as part of the turn if it holds any of its
    characters. There is a bos only if the template writes one, as in a chat with the model.

    Args:
        tokenizer: a transformers tokenizer, with its template.
        conversations: from `read_conversations`.
        template: used instead of the tokenizer's template.
        whole: learn everything, except for the assistant's messages of weight 0.

    Returns:
        The tokens of each conversation, and a mask that is true for the tokens to learn.

    Raises:
        ValueError: there is no template; or the template's text for the first messages is not a
            prefix of its text for all messages, so that no exact mask exists.
    """
    if template is None and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "data.format = 'chat': the tokenizer has no chat template; give a file with one as "
            f"data.chat_template, or {' or '.join(CHAT_TEMPLATES)}"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"data.format = 'chat': {type(tokenizer).__name__} does not give the positions of its "
            "tokens; expected a tokenizer with a tokenizer.json"
        )
    written = [_write(tokenizer, each, template, 0 if whole else 1) for each in conversations]
    encoded = tokenizer(
        [text for text, _ in written],
        add_special_tokens=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    special = np.array(sorted(special - {tokenizer.unk_token_id}), int)  # unk ends no turn
    pairs = zip(written, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [
        (np.array(tokens, int), _mask(text, turns, np.array(tokens, int), offsets, special) ^ whole)
        for (text, turns), tokens, offsets in pairs
    ]


def end_tokens(tokenizer: Any) -> list[int]:
    """The tokens that end an answer: eos, and the special token behind a turn of the assistant.

    A chat template that fails on a short conversation names no token.
    """
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if getattr(tokenizer, "chat_template", None) is None:
        return ends
    answer = "An answer."
    turns = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
    try:
        (text,) = render_chat(tokenizer, [turns], None, prompt=False)
    except ValueError:
        return ends
    behind = text.rpartition(answer)[2].lstrip()
    tokens = tokenizer(behind, add_special_tokens=False)["input_ids"][:1] if behind else []
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    special -= {tokenizer.unk_token_id}
    return [*ends, *(token for token in tokens if token in special and token not in ends)]


def render_chat(
    tokenizer: Any,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    template: str | None,
    *,
    prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[str]:
    """Renders each conversation as text.

    Args:
        tokenizer: a transformers tokenizer.
        conversations: messages with role and content.
        template: used instead of the tokenizer's own template (None: the tokenizer's).
        prompt: end with the text that starts an answer of the assistant.
        tools: schemas of functions, for the template.

    Raises:
        ValueError: the template is not valid Jinja, fails for a conversation, or was stopped.
    """
    return render(tokenizer, conversations, template, prompt=prompt, tools=tools)


def _mask(
    text: str,
    turns: Sequence[tuple[int, int]],
    tokens: Int[np.ndarray, " seq"],
    offsets: Sequence[tuple[int, int]],
    special: Int[np.ndarray, " n"],
) -> Bool[np.ndarray, " seq"]:
    """Marks the tokens that hold characters of the turns."""
    # Some tokenizers leave spaces out of the offsets. So let a token start where the previous one
    # ends, unless both hold bytes of the same character.
    start, stop = np.array(offsets, int).reshape(-1, 2).T
    start = np.minimum(start, np.concatenate([[0], stop])[: len(stop)])
    mask = np.zeros(len(tokens), bool)
    for first, last in turns:
        inside = (start < last) & (stop > first)
        ends = np.flatnonzero(inside & np.isin(tokens, special))
        if len(ends) and not text[stop[ends[-1]] : last].strip():
            inside[ends[-1] + 1 :] = False
        mask |= inside
    return mask


def _write(
    tokenizer: Any, conversation: Conversation, template: str | None, weight: int
) -> tuple[str, list[tuple[int, int]]]:
    """Renders a conversation, and finds the assistant's turns of a weight.

    Returns:
        The text, and the start and end of each of these turns in it.
    """
    place, messages, tools = conversation
    answers = [
        i
        for i, message in enumerate(messages)
        if message["role"] == "assistant" and message.get("weight", 1) == weight
    ]

    def render(counts: list[int], prompt: bool) -> list[str]:
        try:
            parts = [messages[:count] for count in counts]
            return render_chat(tokenizer, parts, template, prompt=prompt, tools=tools)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None

    *wholes, text = render([*(i + 1 for i in answers), len(messages)], prompt=False)
    prompts = render(answers, prompt=True) if answers else []
    for i, prompt, whole in zip(answers, prompts, wholes, strict=True):
        if not (whole.startswith(prompt) and text.startswith(whole)):
            what = "prompt for" if text.startswith(whole) else "text up to"
            raise ValueError(
                f"{place}: the chat template's {what} message {i + 1} is not a prefix of its text "
                "of the whole conversation, so the assistant's turns cannot be found; "
                f"{_OTHER_TEMPLATE}"
            )
    return text, [(len(p), len(whole)) for p, whole in zip(prompts, wholes, strict=True)]
