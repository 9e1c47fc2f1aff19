"""Makes examples (tokens and their loss mask) from files and data sets of the hub."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Bool, Int32

from irqlora_jax.data.chat import (
    Conversation,
    encode_conversations,
    read_chat_template,
    read_conversations,
)
from irqlora_jax.data.config import DataConfig
from irqlora_jax.data.encode import encode_pairs as encode_pairs
from irqlora_jax.data.encode import encode_source as encode_source
from irqlora_jax.data.encode import prefix_tokens
from irqlora_jax.data.formats import PAIR_COLUMNS, Pair, Text, read_pairs, read_texts
from irqlora_jax.data.formats import alpaca_prompt as alpaca_prompt
from irqlora_jax.data.rows import Row as Row
from irqlora_jax.data.rows import read_documents
from irqlora_jax.data.rows import read_rows as read_rows
from irqlora_jax.text import shorten

logger = logging.getLogger(__name__)


class Example(NamedTuple):
    """Tokens of one sequence. `targets` is true for the tokens that count in the loss."""

    tokens: Int32[np.ndarray, " seq"]
    targets: Bool[np.ndarray, " seq"]


def load_examples(
    source: str, config: DataConfig, tokenizer: Any, max_length: int | None = None
) -> list[Example]:
    """Reads and tokenizes a data set.

    Prompts and answers: the prompt is truncated on the left to `source_length`, but its bos stays.
    The answer ends with eos and is truncated on the right to `target_length`. Prompt and answer
    are tokenized separately, so that the mask is exact.

    Conversations (hh_rlhf, oasst1, chat) are truncated on the right to `source_length` +
    `target_length`. hh_rlhf and oasst1 get bos and eos, and all tokens after bos are targets. chat
    is tokenized as the chat template writes it.

    Plain text: a document is a row, or in a .txt file the text between lines `<|endoftext|>`. Each
    document gets bos and eos. All documents are joined and cut into windows of `sequence_length`.
    All tokens of a window except the first are targets.

    The first token of an example is never a target, because no token precedes it. The log says how
    many rows were truncated, have an empty answer, or were left out without any target.

    Args:
        source: as for `read_rows`; for plain text also a .txt file.
        config: the format, the lengths and `max_examples` (rows; for plain text windows).
        tokenizer: a transformers tokenizer; bos and eos are used if it has them.
        max_length: context length of the model in tokens; longer examples are truncated again. The
            answer may use at least half of it; the prompt gets the rest and is cut on the left.

    Raises:
        FileNotFoundError: no such file, and no such data set on the hub.
        ValueError: the data does not have this format; the message names the row and the reason.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length = {max_length}: expected a whole number of at least 2")
    if config.format == "preference":
        raise ValueError("data.format = 'preference': expected a format of single examples")
    if config.format == "text":
        return _windows(source, config, tokenizer, max_length)
    said: Said = Counter()
    items = _read_items(source, config)
    template = read_chat_template(config.chat_template) if config.format == "chat" else None
    drafts = draft_examples(items, config, tokenizer, max_length, template, said)
    found = [to_example(draft) for draft in drafts]
    examples = [example for example in found if example.targets.any()]
    if not examples:
        raise ValueError(
            f"{source}: none of its {len(drafts)} rows has a token to learn (data.format = "
            f"'{config.format}')"
        )
    said["have no token to learn and are left out"] = len(drafts) - len(examples)
    for what, count in said.items():
        if count:
            logger.warning("%s: %d of %d rows %s", source, count, len(drafts), what)
    return examples


Draft = tuple[Sequence[int], Sequence[bool]]
"""Tokens, and which of them are targets."""
Item = Pair | Text | Conversation
"""What a row of a format holds."""
Said = Counter[str]
"""What happened to rows, in words, and to how many."""


def to_example(draft: Draft) -> Example:
    """Makes an example, whose first token is never a target."""
    tokens, learned = draft
    targets = np.array(learned, bool)
    targets[:1] = False
    return Example(np.array(tokens, np.int32), targets)


def _read_items(source: str, config: DataConfig) -> Sequence[Item]:
    if config.format in PAIR_COLUMNS:
        return read_pairs(source, config.format, config.max_examples)
    if config.format == "chat":
        return read_conversations(source, config.max_examples)
    return read_texts(source, config.format, config.max_examples)


def draft_examples(
    items: Sequence[Item],
    config: DataConfig,
    tokenizer: Any,
    max_length: int | None,
    template: str | None,
    said: Said,
    implied: bool | None = None,
) -> list[Draft]:
    """Tokenizes rows of any format but plain text, and truncates them, as `load_examples` does.

    Args:
        items: of the type that belongs to the format.
        config: the format and the lengths.
        tokenizer: a transformers tokenizer.
        max_length: context length of the model in tokens.
        template: chat template, used instead of the tokenizer's.
        said: counts truncated and empty rows.
        implied: as for `encode_pairs`.

    Raises:
        ValueError: a row cannot be tokenized; the message names it.
    """
    if config.format in PAIR_COLUMNS:
        return _pairs(cast(Sequence[Pair], items), config, tokenizer, max_length, said, implied)
    if config.format == "chat":
        talks, whole = cast(Sequence[Conversation], items), config.train_on_source
        encoded = encode_conversations(tokenizer, talks, template, whole=whole)
        drafts: list[Draft] = [(tokens.tolist(), mask.tolist()) for tokens, mask in encoded]
    else:
        texts, end = [item.text for item in cast(Sequence[Text], items)], eos_tokens(tokenizer)
        tokens = [ids + end for ids in encode_source(tokenizer, texts)]
        said["are empty"] += sum(not text for text in texts)
        drafts = [(ids, [True] * len(ids)) for ids in tokens]
    return _cut_right(drafts, config, max_length, said)


def joins(config: DataConfig) -> bool:
    """Whether a space stands between prompt and answer."""
    # Alpaca's prompt ends with a colon, and its answers follow without a space.
    return config.format in PAIR_COLUMNS and config.format != "alpaca"


def _pairs(
    rows: Sequence[Pair],
    config: DataConfig,
    tokenizer: Any,
    max_length: int | None,
    said: Said,
    implied: bool | None,
) -> list[Draft]:
    prompts, answers = [row.prompt for row in rows], [row.answer for row in rows]
    pairs = encode_pairs(tokenizer, prompts, answers, join=joins(config), implied=implied)
    head, end = len(prefix_tokens(tokenizer)), eos_tokens(tokenizer)
    drafts: list[Draft] = []
    cut, over, blank = 0, 0, 0
    for row, (prompt, answer) in zip(rows, pairs, strict=True):
        blank += not answer
        answer = answer + end
        if not answer:
            name = PAIR_COLUMNS[config.format][-1]
            raise ValueError(f"{row.place}: {name} = {shorten(row.answer)} has no tokens")
        # Without bos, the answer of an empty prompt has no context.
        if not prompt:
            raise ValueError(f"{row.place}: the prompt has no tokens")
        cut += len(prompt) > config.source_length or len(answer) > config.target_length
        prompt = _cut_left(prompt, head, config.source_length)
        answer = answer[: config.target_length]
        if max_length is not None and len(prompt) + len(answer) > max_length:
            over += 1
            answer = answer[: max(max_length - len(prompt), max_length // 2)]
            prompt = _cut_left(prompt, head, max_length - len(answer))
        learned = [config.train_on_source] * len(prompt) + [True] * len(answer)
        drafts.append((prompt + answer, learned))
    source_end, target_end = config.source_length, config.target_length
    what = f"were cut to data.source_length = {source_end} or data.target_length = {target_end}"
    said[what] += cut
    said[f"were cut to the model's context of {max_length} tokens"] += over
    said["have an empty answer"] += blank
    return drafts


def _cut_left(prompt: list[int], head: int, length: int) -> list[int]:
    over = max(0, len(prompt) - length)
    return prompt[:head] + prompt[head + over :]


def _cut_right(
    drafts: list[Draft], config: DataConfig, max_length: int | None, said: Said
) -> list[Draft]:
    longest = config.source_length + config.target_length
    cut = sum(len(tokens) > longest for tokens, _ in drafts)
    said[f"were cut to data.source_length + data.target_length = {longest}"] += cut
    if max_length is not None and max_length < longest:
        over = sum(len(tokens) > max_length for tokens, _ in drafts)
        said[f"were cut to the model's context of {max_length} tokens"] += over
        longest = max_length
    return [(tokens[:longest], learned[:longest]) for tokens, learned in drafts]


def _windows(
    source: str, config: DataConfig, tokenizer: Any, max_length: int | None
) -> list[Example]:
    documents, length = read_documents(source), window_length(source, config, max_length)
    end = eos_tokens(tokenizer)
    parts = [np.array(ids + end, np.int32) for ids in encode_source(tokenizer, documents)]
    stream = np.concatenate(parts)
    examples = []
    for start in range(0, len(stream) - 1, length):
        tokens = stream[start : start + length]
        if len(tokens) > 1:
            examples.append(Example(tokens, np.arange(len(tokens)) > 0))
    if not examples:
        raise ValueError(f"{source} has fewer than 2 tokens")
    return examples[: config.max_examples]


def window_length(source: str, config: DataConfig, max_length: int | None) -> int:
    """Length of the windows of plain text, in tokens. Says if the context of the model is less."""
    length = config.sequence_length
    if max_length is not None and max_length < length:
        logger.warning(
            "%s: data.sequence_length = %d is more than the model's context of %d tokens, which is "
            "used instead",
            source,
            length,
            max_length,
        )
        length = max_length
    return length


def eos_tokens(tokenizer: Any) -> list[int]:
    """The tokens at the end of an example: [eos], or [] if the tokenizer has no eos."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
