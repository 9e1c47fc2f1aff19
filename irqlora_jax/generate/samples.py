"""Answers sample prompts during the training."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from irqlora_jax.config import Config
from irqlora_jax.generate.conversation import Style, decode_stream, encode_turns, find_style
from irqlora_jax.generate.decode import generate
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.llama import Llama
from irqlora_jax.text import shorten


@dataclasses.dataclass(frozen=True)
class Samples:
    """Prompts that are answered at every evaluation.

    Attributes:
        texts: as in the configuration.
        prompts: their tokens, up to the start of the answer.
        style: format of the prompts.
        tokenizer: a transformers tokenizer.
        tokens: maximum length of an answer.
    """

    texts: tuple[str, ...]
    prompts: list[list[int]]
    style: Style
    tokenizer: Any
    tokens: int


def read_samples(config: Config, tokenizer: Any, llama: LlamaConfig) -> Samples:
    """Encodes the prompts of `evaluate.samples`.

    Raises:
        ValueError: a prompt leaves no room for an answer.
    """
    texts, style = config.evaluate.samples, find_style(config, tokenizer)
    prompts = [encode_turns(style, tokenizer, text) for text in texts]
    room = llama.max_position_embeddings - config.evaluate.sample_tokens
    for text, prompt in zip(texts, prompts, strict=True):
        if not 0 < len(prompt) <= room:
            raise ValueError(
                f"evaluate.samples: {shorten(text)} has {len(prompt)} tokens; expected 1 to {room} "
                f"(the model's context of {llama.max_position_embeddings} less "
                f"evaluate.sample_tokens = {config.evaluate.sample_tokens})"
            )
    return Samples(texts, prompts, style, tokenizer, config.evaluate.sample_tokens)


def answer_samples(
    samples: Samples, model: Llama, variables: Mapping[str, Any]
) -> list[dict[str, str]]:
    """Answers the prompts with greedy decoding: {"prompt": text, "answer": text} for each."""
    if not samples.prompts:
        return []
    eos = model.config.eos_token_ids
    new = generate(model, variables, samples.prompts, samples.tokens, eos_token_ids=eos)
    answers = []
    for text, prompt, tokens in zip(samples.texts, samples.prompts, new, strict=True):
        pieces = decode_stream(samples.tokenizer, tokens, prompt=prompt, stops=samples.style.stops)
        answers.append({"prompt": text, "answer": "".join(pieces)})
    return answers
