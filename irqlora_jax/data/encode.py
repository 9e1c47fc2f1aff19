"""Tokenizes text: exactly one bos, and joins of two texts tokenized as in running text."""

from collections.abc import Sequence
from typing import Any


def prefix_tokens(tokenizer: Any) -> list[int]:
    """The tokens at the start of every sequence: [bos], or [] if the tokenizer has no bos."""
    if tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id]
    # Some tokenizers add a bos token although their configuration does not name it.
    added = tokenizer("").get("input_ids", [])
    return [int(token) for token in added if token != tokenizer.eos_token_id][:1]


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokenizes each text without bos and eos."""
    if not texts:
        return []
    # verbose=False: no warning about texts longer than the context of the model.
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def encode_source(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokenizes each text with exactly one bos in front (none if the tokenizer has no bos)."""
    head = prefix_tokens(tokenizer)
    # The text itself may start with bos.
    return [
        tokens if head and tokens[:1] == head else head + tokens
        for tokens in encode(tokenizer, texts)
    ]


def encode_pairs(
    tokenizer: Any,
    sources: Sequence[str],
    targets: Sequence[str],
    *,
    join: bool,
    implied: bool | None = None,
) -> list[tuple[list[int], list[int]]]:
    """Tokenizes each source (with bos in front) and each target separately.

    Args:
        tokenizer: a transformers tokenizer.
        sources: prompts.
        targets: their continuations.
        join: put one space between source and target if neither has white space at the seam. The
            space goes to the side where the tokenizer has it in running text: byte-level BPE
            splits "the cat" into "the" + " cat"; SentencePiece adds the space of "cat" by itself.
        implied: whether the tokenizer adds the space by itself; None: `implies_space` of the pairs.
    """
    if join:
        seams = [_seam(*pair) for pair in zip(sources, targets, strict=True)]
        if implied is None:
            implied = _implies_space(tokenizer, seams)
        sources = [source for source, _, _ in seams]
        targets = [target if implied else space + target for _, space, target in seams]
    return list(zip(encode_source(tokenizer, sources), encode(tokenizer, targets), strict=True))


def implies_space(tokenizer: Any, sources: Sequence[str], targets: Sequence[str]) -> bool:
    """Whether the tokenizer adds a space in front of a target by itself, as SentencePiece does."""
    return _implies_space(tokenizer, [_seam(*pair) for pair in zip(sources, targets, strict=True)])


def _seam(source: str, target: str) -> tuple[str, str, str]:
    """Returns the source, the space between the two ("" or " "), and the target."""
    if target.startswith(" "):
        return source, " ", target[1:]
    if source.endswith(" "):
        return source[:-1], " ", target
    bare = source and target and not source[-1].isspace() and not target[0].isspace()
    return source, " " if bare else "", target


def _implies_space(tokenizer: Any, seams: Sequence[tuple[str, str, str]]) -> bool:
    """Whether the target alone gets the same tokens as the target after a space.

    The first pair decides whose separate tokens equal the tokens of the joined text.
    """
    for source, space, target in seams[:64]:
        if not (source and space and target):
            continue
        whole, left, spaced, plain = encode(
            tokenizer, [source + " " + target, source, " " + target, target]
        )
        if left + spaced == whole:
            return False
        if left + plain == whole:
            return True
    return False
