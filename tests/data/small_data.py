"""Small tokenizers and files for the tests of the data."""

import json

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from irqlora_jax.data import alpaca_prompt
from irqlora_jax.data.config import DataConfig

WORDS = ["question", "what", "is", "color", "of", "ada", "bern", "?", "answer"]
WORDS += ["red", "green", "blue", "dark"]
ROWS = [
    {"input": "question what is color of ada bern ?  answer", "output": "red"},
    {"input": "question what is color of bern ?  answer", "output": "dark blue"},
]
CORPUS = [
    "the cat sat on the mat and the answer is red or green, dark blue at night.",
    alpaca_prompt("Name a color.", "night") + "red",
    alpaca_prompt("Name a color.") + "dark blue",
    *(f"{row['input']} {row['output']}" for row in ROWS),
]


def make_tokenizer(kind="word", bos=True, eos=True, template="<s> $A"):
    """A word-level, byte-level ("byte") or SentencePiece-like ("piece") tokenizer.

    `bos` and `eos` say whether the tokenizer names them, `template` what it adds by itself.
    """
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    if kind == "word":
        vocab = {token: index for index, token in enumerate(special + WORDS)}
        core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        core = Tokenizer(models.BPE(unk_token="<unk>"))
        alphabet = []
        if kind == "byte":
            core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            core.decoder = decoders.ByteLevel()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
        else:
            replace = normalizers.Replace(" ", "▁")
            # No piece spans two words, as in LLaMA's vocabulary.
            core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
            core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
            core.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            )
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        core.train_from_iterator(CORPUS, trainer)
    if template:
        core.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    names = {"bos_token": "<s>"} if bos else {}
    names |= {"eos_token": "</s>"} if eos else {}
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **names)


def write_file(folder, name, content):
    """Text as it is; rows as .jsonl or .json."""
    path = folder / name
    if not isinstance(content, str):
        lines = [json.dumps(row) for row in content]
        content = "\n".join(lines) if name.endswith("l") else f"[{', '.join(lines)}]"
    path.write_text(content, encoding="utf-8")
    return str(path)


def config(format="input_output", **values):
    return DataConfig(format=format, **values)


def learned(example, tokenizer):
    return tokenizer.decode(example.tokens[example.targets])
