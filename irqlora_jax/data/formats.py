"""Turns rows of each data format into prompts with answers, or into whole conversations."""

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from irqlora_jax.data.rows import PAIR_COLUMNS as PAIR_COLUMNS
from irqlora_jax.data.rows import TEXT_COLUMNS as TEXT_COLUMNS
from irqlora_jax.data.rows import Row, read_rows
from irqlora_jax.text import shorten

# Stanford Alpaca's two prompts (train.py of tatsu-lab/stanford_alpaca).
_REQUEST = "Write a response that appropriately completes the request.\n\n"
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    f"context. {_REQUEST}### Instruction:\n%s\n\n### Input:\n%s\n\n### Response:"
)
_WITHOUT_INPUT = (
    f"Below is an instruction that describes a task. {_REQUEST}"
    "### Instruction:\n%s\n\n### Response:"
)
_HUMAN, _BOT = "<human>: ", "\n<bot>: "
GUANACO = {"prompter": "### Human: ", "assistant": "### Assistant: "}
"""Text in front of the messages of each OASST1 role."""
logger = logging.getLogger(__name__)


class Pair(NamedTuple):
    """A prompt, its answer, and their place in the file for error messages."""

    place: str
    prompt: str
    answer: str


class Text(NamedTuple):
    """A whole conversation, and its place in the file for error messages."""

    place: str
    text: str


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """Stanford Alpaca's prompt. `context` is the column "input" of its files."""
    return _WITH_INPUT % (instruction, context) if context else _WITHOUT_INPUT % instruction


def read_pairs(source: str, format: str, limit: int | None = None) -> list[Pair]:
    """Reads a data set with prompts and answers, in one of the formats of `PAIR_COLUMNS`.

    Raises:
        FileNotFoundError, ValueError: as `read_rows`.
    """
    return [to_pair(row, format) for row in read_rows(source, PAIR_COLUMNS[format])[:limit]]


def to_pair(row: Row, format: str) -> Pair:
    """Makes the prompt and the answer of a row.

    Raises:
        ValueError: a column is not text, or not of this format.
    """
    if format == "alpaca":
        prompt = alpaca_prompt(row.text("instruction"), row.text("input", ""))
        return Pair(row.place, prompt, row.text("output"))
    if format == "chip2":
        return _chip2(row)
    return Pair(row.place, *(row.text(name) for name in PAIR_COLUMNS[format]))


def _chip2(row: Row) -> Pair:
    """Returns the first question and its answer."""
    text = row.text("text")
    prompt, bot, answer = text.partition(_BOT)
    if not (bot and prompt.startswith(_HUMAN)):
        start = text if len(text) < 40 else text[:40] + "..."
        raise ValueError(
            f"{row.place}: text = {start!r}: expected {_HUMAN + '...' + _BOT + '...'!r}"
        )
    return Pair(row.place, prompt.removeprefix(_HUMAN), answer.partition("\n" + _HUMAN)[0])


def read_texts(source: str, format: str, limit: int | None = None) -> list[Text]:
    """Reads a data set of whole conversations, in one of the formats of `TEXT_COLUMNS`.

    Raises:
        FileNotFoundError, ValueError: as `read_rows`.
    """
    (column,) = TEXT_COLUMNS[format]
    rows = read_rows(source, (column,))
    if format == "oasst1" and any("message_id" in row.columns for row in rows):
        return _trees(source, rows)[:limit]
    return [Text(row.place, row.text(column)) for row in rows[:limit]]


def _trees(source: str, rows: Sequence[Row]) -> list[Text]:
    """Makes a conversation of each message tree, with the best reply at each level, as Guanaco."""
    roots: list[Row] = []
    replies: dict[str, list[Row]] = {}
    seen: dict[str, str] = {}
    for row in rows:
        name, parent = row.text("message_id"), row.text("parent_id", "")
        # Unique ids exclude cycles in the walk from a root.
        if name in seen:
            raise ValueError(f"{row.place}: message_id = {shorten(name)} is also in {seen[name]}")
        seen[name] = row.place
        if not row.columns.get("deleted"):
            (replies.setdefault(parent, []) if parent else roots).append(row)
    if not roots:
        raise ValueError(f"{source}: no message begins a conversation (parent_id null)")
    texts, kept = [], 0
    for root in roots:
        turns, message = [root], root
        while message.text("message_id") in replies:
            message = min(replies[message.text("message_id")], key=_rank)
            turns.append(message)
        kept += len(turns)
        texts.append(Text(root.place, "".join(map(_turn, turns))))
    logger.info(
        "%s: %d conversations of the best replies, %d of %d messages",
        source,
        len(texts),
        kept,
        len(rows),
    )
    return texts


def _turn(row: Row) -> str:
    role = row.text("role")
    if role not in GUANACO:
        accepted = ", ".join(GUANACO)
        raise ValueError(f"{row.place}: role = {shorten(role)}: expected {accepted}")
    return GUANACO[role] + row.text("text")


def _rank(row: Row) -> float:
    """Rank of a message: 0 is the best, and infinity stands for a message without a rank."""
    value: Any = row.columns.get("rank")
    try:
        rank = math.inf if value in (None, "") else float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"{row.place}: rank = {shorten(value)}: expected a number or null"
        ) from None
    return math.inf if math.isnan(rank) else rank
