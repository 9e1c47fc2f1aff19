"""The committed questions and answers, split by entities."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import world as factworld

from irqlora_jax.data import load_examples
from irqlora_jax.data.config import DataConfig
from irqlora_jax.evaluate import load_questions

VALIDATION_SHARE = 1 / 3  # share of the held-out entities; the test asks about the others


@dataclasses.dataclass(frozen=True)
class Data:
    """Questions and answers as tokens, about three disjoint sets of entities."""

    train: list
    validation: list
    test: list
    loss: list
    """Facts of the test's entities that the test does not ask for; for the evaluation loss."""


def load_data(tokenizer: Any, questions: int | None = None) -> Data:
    """Reads the committed files. `questions` limits the test; validation gets half as many."""
    world, folder = factworld.make_world(), factworld.FOLDER / "data"
    entity_of = {tuple(name): index for index, name in enumerate(world.names.tolist())}
    held_out = 1 - factworld.FINETUNE_SHARE
    last = round((factworld.FINETUNE_SHARE + VALIDATION_SHARE * held_out) * world.entities)

    def validates(tokens: Sequence[int]) -> bool:
        # <s> question what is NOUN of FIRST LAST
        entity = entity_of[int(tokens[6]), int(tokens[7])]
        return entity % world.entities < last

    pairs = DataConfig(format="input_output")
    train, loss = (
        load_examples(str(folder / f"{name}.jsonl"), pairs, tokenizer) for name in ("train", "eval")
    )
    asked = load_questions(str(folder / "questions.jsonl"), tokenizer)
    validation = [question for question in asked if validates(question.prompt)]
    test = [question for question in asked if not validates(question.prompt)]
    return Data(
        train=train,
        validation=validation[: questions and questions // 2],
        test=test[:questions],
        loss=[example for example in loss if not validates(example.tokens)],
    )
