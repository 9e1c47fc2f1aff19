"""Text to tokens: bos exactly once, and seams as in running text."""

from collections.abc import Sequence
from typing import Any


def prefix_tokens(tokenizer: Any) -> list[int]:
    """What every sequence starts with: [bos], or [] for a tokenizer without."""
    if tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id]
    # Some folders do not name the bos token that their tokenizer nevertheless puts in front.
    added = tokenizer("").get("input_ids", [])
    return [int(token) for token in added if token != tokenizer.eos_token_id][:1]


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of each text as it is: no bos, no eos."""
    if not texts:
        return []
    # Without `verbose=False` transformers warns of texts longer than the model's context.
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def encode_source(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of each text with exactly one bos in front (none for a tokenizer without)."""
    head = prefix_tokens(tokenizer)
    # A text may spell its bos out.
    return [
        tokens if head and tokens[:1] == head else head + tokens
        for tokens in encode(tokenizer, texts)
    ]


def encode_pairs(
    tokenizer: Any, sources: Sequence[str], targets: Sequence[str], *, join: bool
) -> list[tuple[list[int], list[int]]]:
    """Tokens of each source (bos in front) and of each target, tokenized apart.

    Args:
        tokenizer: of transformers.
        sources: prompts.
        targets: their continuations.
        join: put one space between the two where neither has white space at the seam, and give
            that space to the side where this tokenizer has it in running text: "the cat" is
            "the" + " cat" for byte-level BPE, while SentencePiece puts the space in front of "cat"
            by itself.
    """
    if join:
        seams = [_seam(*pair) for pair in zip(sources, targets, strict=True)]
        implied = _implies_space(tokenizer, seams)
        sources = [source for source, _, _ in seams]
        targets = [target if implied else space + target for _, space, target in seams]
    return list(zip(encode_source(tokenizer, sources), encode(tokenizer, targets), strict=True))


def _seam(source: str, target: str) -> tuple[str, str, str]:
    """The source, the space that belongs in front of the target ("" or " "), the target."""
    if target.startswith(" "):
        return source, " ", target[1:]
    if source.endswith(" "):
        return source[:-1], " ", target
    bare = source and target and not source[-1].isspace() and not target[0].isspace()
    return source, " " if bare else "", target


def _implies_space(tokenizer: Any, seams: Sequence[tuple[str, str, str]]) -> bool:
    """Whether the target alone already has the tokens that it has behind a space.

    Decided by the first pair whose tokens, cut apart, are those of the running text.
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
