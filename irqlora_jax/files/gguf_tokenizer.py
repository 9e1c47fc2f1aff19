"""Makes a transformers tokenizer from the metadata of a GGUF file.

The library transformers reads these tokenizers too, but it splits text as GPT-2 does, whatever rule
the file names: with SmolLM2, " ½" becomes other tokens.
Sources: the GGUF specification, and src/llama-vocab.cpp of llama.cpp for the rules by name.
"""

import enum
from collections.abc import Mapping, Sequence
from typing import Any

from irqlora_jax.files.gguf import Gguf
from irqlora_jax.text import require


class Kind(enum.IntEnum):
    """Kinds of tokens."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: dict[str, Sequence[str]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "tekken": (_TEKKEN,),
}
"""How text is split before the merges, by tokenizer.ggml.pre: patterns, one after the other."""
WHOLE_WORDS = ("llama-bpe", "tekken")  # a word that is a token needs no merges
_MARK = "▁"


def make_tokenizer(found: Gguf) -> Any:
    """Makes the tokenizer of a GGUF file, with its special tokens and its chat template.

    Raises:
        ValueError: the file has no tokenizer, or one of another kind.
    """
    from transformers import PreTrainedTokenizerFast

    kinds = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind, pre = _field(found, "model"), _field(found, "pre")
    _require("model", kind in kinds, kind, " or ".join(map(repr, kinds)))
    tokens, types = _field(found, "tokens", []), _field(found, "token_type", [])
    _require("tokens", len(set(tokens)) == len(tokens) > 0, tokens, "different texts")
    _require("token_type", len(types) == len(tokens), types, f"{len(tokens)} numbers")
    core = kinds[kind](found, tokens, types)
    special: dict[str, str | None] = {}
    for name in ("bos", "eos", "unknown", "padding"):
        place = _field(found, f"{name}_token_id")
        ok = place is None or (isinstance(place, int) and place < len(tokens))
        _require(f"{name}_token_id", ok, place, f"a number below {len(tokens)}")
        special[name] = None if place is None else tokens[place]
    defaults = {"bos": kind == "llama" or pre in WHOLE_WORDS, "eos": False}
    added = {
        name: token
        for name, default in defaults.items()
        if (token := special[name]) is not None and _field(found, f"add_{name}_token", default)
    }
    _add_tokens(core, tokens, types, added)
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == Kind.CONTROL]
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=special["bos"],
        eos_token=special["eos"],
        unk_token=special["unknown"],
        pad_token=special["padding"],
        additional_special_tokens=[token for token in control if token not in special.values()],
        model_max_length=found.fields.get(f"{found.architecture}.context_length"),
        clean_up_tokenization_spaces=False,
        chat_template=found.fields.get("tokenizer.chat_template"),
    )


def _byte_level(found: Gguf, tokens: Sequence[str], types: Sequence[int]) -> Any:
    """BPE over bytes, as GPT-2 and LLaMA 3 have it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = _field(found, "pre")
    _require("pre", pre in SPLITS, pre, f"one of {', '.join(SPLITS)}")
    merges = [tuple(merge.split(" ", 1)) for merge in _field(found, "merges", [])]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in WHOLE_WORDS))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[pre]]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([*splits, as_bytes])  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return core


def _sentencepiece(found: Gguf, tokens: Sequence[str], types: Sequence[int]) -> Any:
    """BPE over characters with a score for each token, as LLaMA 1 and 2 have it.

    The pair whose token has the highest score is merged first.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _field(found, "scores", [])
    _require("scores", len(scores) == len(tokens), scores, f"{len(tokens)} numbers")
    vocabulary = {token: place for place, token in enumerate(tokens)}
    merged = [place for place, kind in enumerate(types) if kind == Kind.NORMAL]
    merged.sort(key=lambda place: -scores[place])
    merges = [
        (token[:cut], token[cut:])
        for token in (tokens[place] for place in merged)
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    unknown = [token for token, kind in zip(tokens, types, strict=True) if kind == Kind.UNKNOWN][:1]
    model = models.BPE(
        vocabulary, merges, unk_token=next(iter(unknown), None), fuse_unk=True, byte_fallback=True
    )
    core = Tokenizer(model)
    prefixed = _field(found, "add_space_prefix", True)
    core.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [*[normalizers.Prepend(_MARK)] * prefixed, normalizers.Replace(" ", _MARK)]
    )
    joined = [decoders.Replace(_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] * prefixed
    core.decoder = decoders.Sequence([*joined, *strip])  # type: ignore[assignment]
    return core


def _add_tokens(
    core: Any, tokens: Sequence[str], types: Sequence[int], added: Mapping[str, str]
) -> None:
    """Registers tokens that are found before text is split, and those `added` around a text."""
    from tokenizers import AddedToken, processors

    for token, kind in zip(tokens, types, strict=True):
        if kind in (Kind.UNKNOWN, Kind.CONTROL):
            core.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == Kind.USER_DEFINED:
            core.add_tokens([AddedToken(token, special=False, normalized=False)])
    if added:
        before, after = ([added[name]] if name in added else [] for name in ("bos", "eos"))
        core.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B:1", *after],
            special_tokens=[(token, tokens.index(token)) for token in added.values()],
        )


def _field(found: Gguf, name: str, default: Any = None) -> Any:
    return found.fields.get(f"tokenizer.ggml.{name}", default)


def _require(name: str, ok: bool, value: Any, accepted: str) -> None:
    require(ok, f"tokenizer.ggml.{name}", value, accepted)
