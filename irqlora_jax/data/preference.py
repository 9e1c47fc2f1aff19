"""Makes preference pairs: a chosen and a rejected answer to the same prompt."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from irqlora_jax.data.chat import (
    Conversation,
    encode_conversations,
    read_chat_template,
    read_messages,
    read_tools,
)
from irqlora_jax.data.config import DataConfig
from irqlora_jax.data.encode import encode_pairs, prefix_tokens
from irqlora_jax.data.examples import Example
from irqlora_jax.data.rows import PREFERENCE_COLUMNS, Row, read_rows
from irqlora_jax.text import shorten

_ANSWER = "\n\nAssistant:"  # starts an answer in Anthropic's data
logger = logging.getLogger(__name__)


class Pair(NamedTuple):
    """The two answers to a prompt, each with the prompt in front. Targets are in the answers."""

    chosen: Example
    rejected: Example

    @property
    def tokens(self) -> Int32[np.ndarray, " seq"]:
        """The tokens of both sequences, one after the other."""
        return np.concatenate([self.chosen.tokens, self.rejected.tokens])

    @property
    def targets(self) -> Bool[np.ndarray, " seq"]:
        """The targets of both sequences, one after the other."""
        return np.concatenate([self.chosen.targets, self.rejected.targets])


def rows_of(examples: Sequence[Example | Pair]) -> list[Example]:
    """The rows of a batch: an example has one, a pair two (chosen, rejected)."""
    rows: list[Example] = []
    for example in examples:
        rows += example if isinstance(example, Pair) else (example,)
    return rows


def load_pairs(
    source: str, config: DataConfig, tokenizer: Any, max_length: int | None = None
) -> list[Pair]:
    """Reads and tokenizes preference pairs (`data.format` preference).

    Text: the columns chosen and rejected, and prompt. Without a prompt, it is what both texts begin
    with, up to the last "\\n\\nAssistant:" in it if there is one. Prompt and answers are tokenized
    and truncated as in the formats with a prompt and an answer (`load_examples`); the two answers
    keep the same prompt.

    Messages: chosen and rejected are lists of messages, and so is prompt. Without a prompt, or with
    one that is the text of a message, it is what both lists begin with. The chat template writes
    them. Targets are the assistant's turns after the prompt. Both conversations are truncated on
    the right to `source_length` + `target_length`.

    A pair of equal answers, or without a target, teaches nothing and is left out; the log says how
    many.

    Args:
        source: as for `read_rows`.
        config: the lengths, `max_examples` (pairs) and `chat_template`.
        tokenizer: a transformers tokenizer.
        max_length: context length of the model in tokens.

    Raises:
        FileNotFoundError: no such file, and no such data set on the hub.
        ValueError: the data does not have this format, or no pair remains.
    """
    rows = read_rows(source, PREFERENCE_COLUMNS)[: config.max_examples]
    if isinstance(rows[0].columns["chosen"], list):
        found = _messages(source, rows, config, tokenizer, max_length)
    else:
        found = _texts(source, rows, config, tokenizer, max_length)
    pairs, equal, empty = [], 0, 0
    for pair in found:
        if np.array_equal(pair.chosen.tokens, pair.rejected.tokens):
            equal += 1
        elif not (pair.chosen.targets.any() and pair.rejected.targets.any()):
            empty += 1
        else:
            pairs.append(pair)
    same = "have a chosen answer equal to the rejected one (after truncation) and are left out"
    _warn(source, equal, len(rows), same)
    _warn(source, empty, len(rows), "have an answer without a token to learn and are left out")
    if not pairs:
        raise ValueError(
            f"{source}: none of its {len(rows)} rows has two different answers to learn from "
            "(data.format = 'preference')"
        )
    return pairs


def _texts(
    source: str, rows: Sequence[Row], config: DataConfig, tokenizer: Any, max_length: int | None
) -> list[Pair]:
    texts = [_split(row) for row in rows]
    prompts = [prompt for prompt, _, _ in texts]
    answers = [row[1] for row in texts] + [row[2] for row in texts]
    encoded = encode_pairs(tokenizer, [*prompts, *prompts], answers, join=True)
    eos, head = tokenizer.eos_token_id, len(prefix_tokens(tokenizer))
    ends = [] if eos is None else [eos]
    pairs, cut, over = [], 0, 0
    for place, row in enumerate(rows):
        prompt, chosen = encoded[place]
        rejected = encoded[len(rows) + place][1]
        if not prompt:
            raise ValueError(f"{row.place}: the prompt has no tokens")
        both = [answer if answer[-1:] == ends else answer + ends for answer in (chosen, rejected)]
        longest = max(map(len, both))
        cut += len(prompt) > config.source_length or longest > config.target_length
        prompt = _cut_left(prompt, head, config.source_length)
        room = config.target_length
        if max_length is not None and len(prompt) + min(longest, room) > max_length:
            over += 1
            room = min(room, max(max_length - len(prompt), max_length // 2))
            prompt = _cut_left(prompt, head, max_length - min(longest, room))
        pairs.append(Pair(*(_example(prompt, answer[:room]) for answer in both)))
    lengths = f"{config.source_length} or data.target_length = {config.target_length}"
    _warn(source, cut, len(rows), f"were cut to data.source_length = {lengths}")
    _warn(source, over, len(rows), f"were cut to the model's context of {max_length} tokens")
    return pairs


def _split(row: Row) -> tuple[str, str, str]:
    """Returns the prompt, the chosen answer and the rejected answer."""
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if row.columns.get("prompt") is not None:
        prompt = row.text("prompt")
        if prompt.endswith(" "):  # in running text it is part of the next token, in both answers
            return prompt[:-1], f" {chosen}", f" {rejected}"
        return prompt, chosen, rejected
    shared = chosen[: _shared(chosen, rejected)]
    place = shared.rfind(_ANSWER)
    if place >= 0:
        size = place + len(_ANSWER)
    else:
        # Whole words: the answers of "the red" and "the rest" do not begin inside of a word.
        size = max(shared.rfind(space) for space in " \n\t")
        if size < 0:
            raise ValueError(
                f"{row.place}: chosen = {shorten(chosen)} and rejected = {shorten(rejected)} do "
                "not begin with the same words: expected a column prompt, or the prompt in both"
            )
    return chosen[:size], chosen[size:], rejected[size:]


def _messages(
    source: str, rows: Sequence[Row], config: DataConfig, tokenizer: Any, max_length: int | None
) -> list[Pair]:
    both = [_conversations(row) for row in rows]
    conversations = [pair[0] for pair in both] + [pair[1] for pair in both]
    template = read_chat_template(config.chat_template)
    encoded = encode_conversations(tokenizer, conversations, template)
    longest = config.source_length + config.target_length
    limit = longest if max_length is None else min(longest, max_length)
    examples = []
    for tokens, learned in encoded:
        targets = learned[:limit].copy()
        targets[:1] = False
        examples.append(Example(tokens[:limit].astype(np.int32), targets))
    pairs = [Pair(*pair) for pair in zip(examples[: len(rows)], examples[len(rows) :], strict=True)]
    sizes = [len(tokens) for tokens, _ in encoded]
    cut = sum(max(pair) > limit for pair in zip(sizes, sizes[len(rows) :], strict=False))
    what = f"data.source_length + data.target_length = {longest}"
    what = what if limit == longest else f"the model's context of {max_length} tokens"
    _warn(source, cut, len(rows), f"were cut to {what}")
    return pairs


def _conversations(row: Row) -> tuple[Conversation, Conversation]:
    """Returns both conversations. The assistant's messages of the prompt have weight 0."""
    chosen, rejected = (read_messages(row, name) for name in PREFERENCE_COLUMNS)
    tools, given = read_tools(row), row.columns.get("prompt")
    whole = isinstance(given, str) and all(
        any(message["content"] == given for message in messages) for messages in (chosen, rejected)
    )
    if given is not None and not whole:
        prompt = read_messages(row, "prompt")
    else:
        size = _shared(chosen[:-1], rejected[:-1])  # each has an answer
        prompt, chosen, rejected = chosen[:size], chosen[size:], rejected[size:]
    prompt = [message | {"weight": 0} for message in prompt]
    one, other = (Conversation(row.place, [*prompt, *own], tools) for own in (chosen, rejected))
    return one, other


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the common start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _example(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    tokens = np.array([*prompt, *answer], np.int32)
    return Example(tokens, np.arange(len(tokens)) >= len(prompt))


def _cut_left(prompt: list[int], head: int, length: int) -> list[int]:
    over = max(0, len(prompt) - length)
    return prompt[:head] + prompt[head + over :]


def _warn(source: str, count: int, total: int, what: str) -> None:
    if count:
        logger.warning("%s: %d of %d rows %s", source, count, total, what)
