"""Describes a tokenizer of Hugging Face as GGUF does: the inverse of `files.gguf_tokenizer`.

llama.cpp knows the rules that split text before the merges by name. So a tokenizer is recognized by
its patterns, and an unknown one is refused. At the end, both forms must give the same tokens.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from irqlora_jax.files.gguf import Gguf
from irqlora_jax.files.gguf_model import ENDS
from irqlora_jax.files.gguf_tokenizer import GPT2, SPLITS, WHOLE_WORDS, Kind, make_tokenizer
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.text import first_few, require, shorten

_NUMBER = r"\p{N}"
_MARK = "▁"
_SAMPLES = (
    "The year 1984 isn't far. x=12, 3.14159 and 100000; we've 2nd I'LL don't",
    "  two  spaces\n\n\ttab and\r\nlines   \n    def f(x):\n\treturn x**2  # ok",
    "naïve café Straße 東京都 🙂👍🏽 Здравствуйте مرحبا ÀÉ",
    "https://example.org/a_b?c=d&e=%20 <a href='x'> $5 + `y` ~ ^ {[()]} camelCaseWORDS",
)
logger = logging.getLogger(__name__)


def tokenizer_fields(tokenizer: Any, config: LlamaConfig) -> dict[str, Any]:
    """The metadata of a tokenizer, its special tokens and its chat template.

    Args:
        tokenizer: a fast tokenizer of transformers.
        config: the architecture; says how many tokens there are, and which ones end a text.

    Raises:
        ValueError: a kind of tokenizer that llama.cpp does not know by name, or more tokens than
            the model has.
    """
    accepted = "a tokenizer with a tokenizer.json (GGUF)"
    require(tokenizer.is_fast, "tokenizer", type(tokenizer).__name__, accepted)
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = core["model"].get("type")
    require(kind == "BPE", "tokenizer: model", kind, "'BPE' (GGUF)")
    tokens, types = _tokens(core, config.vocab_size)
    merges = [m if isinstance(m, str) else " ".join(m) for m in core["model"]["merges"]]
    fields: dict[str, Any]
    if core["model"].get("byte_fallback"):
        fields = {"model": "llama", "pre": "default"}
        fields["scores"] = _scores(tokens, [tuple(merge.split(" ", 1)) for merge in merges])
        first = tokenizer.convert_ids_to_tokens(
            tokenizer("a", add_special_tokens=False)["input_ids"][0]
        )
        fields["add_space_prefix"] = first.startswith(_MARK)
    else:
        fields = {"model": "gpt2", "pre": _pre(core), "merges": merges}
        fields["add_space_prefix"] = False
    fields |= {"tokens": tokens, "token_type": types} | _special(tokenizer, config)
    found = {f"tokenizer.ggml.{name}": value for name, value in fields.items() if value is not None}
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    if template:
        found["tokenizer.chat_template"] = template
    _check(found, tokenizer)
    return found


def _tokens(core: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """All tokens in order, and their kinds. Unused rows of the table get names of their own."""
    places = {place: token for token, place in core["model"]["vocab"].items()}
    added = {each["id"]: each for each in core["added_tokens"]}
    places |= {place: each["content"] for place, each in added.items()}
    spare = sorted(place for place in places if place >= size)
    if spare:
        raise ValueError(
            f"tokenizer: tokens {first_few([str(place) for place in spare])} are beyond "
            f"vocab_size = {size}; expected a tokenizer of the model's size"
        )
    unknown = core["model"].get("unk_token") if core["model"].get("byte_fallback") else None

    def type_of(place: int) -> int:
        token = places.get(place)
        if token is None:
            return Kind.UNUSED
        if token == unknown:
            return Kind.UNKNOWN
        if place in added:
            return Kind.CONTROL if added[place]["special"] else Kind.USER_DEFINED
        is_byte = unknown is not None and len(token) == 6 and token[:3] == "<0x"
        return Kind.BYTE if is_byte else Kind.NORMAL

    names = [places.get(place, f"[PAD{place}]") for place in range(size)]
    return names, [int(type_of(place)) for place in range(size)]


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """Scores with the order of the merges: the pair whose token has the highest one comes first."""
    ranks: dict[str, int] = {}
    for pair in merges:
        ranks.setdefault("".join(pair), len(ranks))
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def _pre(core: Mapping[str, Any]) -> str:
    """The name of the rules that split text, found by their patterns."""
    outer = core.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    patterns: list[str] = []
    for step in steps:
        match step:
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(_NUMBER)
            case {"type": "Split", "pattern": {"Regex": text}, "behavior": "Isolated"}:
                patterns.append(text)
            case {
                "type": "Split",
                "pattern": {"Regex": text},
                "behavior": "Removed",
                "invert": True,
            }:
                patterns.append(text)
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": with_pattern}:
                patterns += [GPT2] * with_pattern
            case _:
                known = f"byte-level BPE with the rules {', '.join(SPLITS)}"
                require(False, "tokenizer: pre_tokenizer", step.get("type"), known)
    name = next((name for name, own in SPLITS.items() if tuple(own) == tuple(patterns)), None)
    if name is None:
        raise ValueError(
            f"tokenizer: pre_tokenizer splits text with {shorten(' then '.join(patterns))}, which "
            f"llama.cpp does not know by a name; expected the rules of {', '.join(SPLITS)}"
        )
    whole = bool(core["model"].get("ignore_merges"))
    accepted = f"{name in WHOLE_WORDS} with the rules {name}"
    require(whole == (name in WHOLE_WORDS), "tokenizer: ignore_merges", whole, accepted)
    return name


def _special(tokenizer: Any, config: LlamaConfig) -> dict[str, Any]:
    """Special tokens, and whether a text gets them.

    GGUF has three places for tokens that end an answer. The tokenizer's own one comes first.
    """
    own = tokenizer.eos_token_id
    ends = sorted(config.eos_token_ids, key=lambda end: end != own)
    if len(ends) > len(ENDS):
        logger.info(f"eos_token_id: GGUF has {len(ENDS)} places; left out {ends[len(ENDS) :]}")
    bos = tokenizer.bos_token_id
    bos = config.bos_token_id if bos is None else bos
    pad = tokenizer.pad_token_id
    found = {
        "bos": bos,
        "unknown": tokenizer.unk_token_id,
        "padding": config.pad_token_id if pad is None else pad,
        **dict(zip(ENDS, ends, strict=False)),
    }
    ids = tokenizer("a")["input_ids"]
    return {f"{name}_token_id": place for name, place in found.items()} | {
        "add_bos_token": len(ids) > 1 and ids[0] == bos,
        "add_eos_token": len(ids) > 1 and ids[-1] == own,
    }


def _check(fields: Mapping[str, Any], tokenizer: Any) -> None:
    """Both forms of the tokenizer must find the same tokens in sample texts."""
    made = make_tokenizer(Gguf(Path("tokenizer"), fields, {}))
    for text in _SAMPLES:
        ours, theirs = (each(text, verbose=False)["input_ids"] for each in (made, tokenizer))
        if ours != theirs:
            place = next(
                (i for i, pair in enumerate(zip(ours, theirs, strict=False)) if len({*pair}) > 1),
                min(len(ours), len(theirs)),
            )
            raise ValueError(
                f"tokenizer: {shorten(text)} gets other tokens by the rules of GGUF "
                f"({fields['tokenizer.ggml.model']}, {fields['tokenizer.ggml.pre']}), from token "
                f"{place} on; expected a tokenizer with these rules alone"
            )
