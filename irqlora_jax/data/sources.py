"""Reads the training set and the evaluation set of a configuration, from one source or several."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from irqlora_jax.data.batches import held_indices
from irqlora_jax.data.config import DataConfig
from irqlora_jax.data.examples import Example, load_examples
from irqlora_jax.data.order import Part
from irqlora_jax.data.preference import Pair, load_pairs
from irqlora_jax.data.streaming import StreamedExamples, open_stream


class DataSets(NamedTuple):
    """The data of a run.

    Attributes:
        train: the training examples (or preference pairs) of all sources, one source after the
            other.
        evaluation: the evaluation examples (or pairs), in memory.
        parts: the sources of `train`.
    """

    train: Sequence[Example] | list[Pair]
    evaluation: list[Example] | list[Pair]
    parts: tuple[Part, ...]


def load_data_sets(
    config: DataConfig, tokenizer: Any, max_length: int | None, seed: int
) -> DataSets:
    """Reads the data sets of a configuration. Several sources are read in their order.

    Args:
        config: the sources, and how they are read.
        tokenizer: a transformers tokenizer.
        max_length: context length of the model in tokens, as for `load_examples`.
        seed: of the choice of held-out examples.

    Raises:
        FileNotFoundError, ValueError: as `load_examples`, or a source cannot be streamed.
    """
    if not config.sources or not config.sources[0].path:
        raise ValueError(
            f"data.train = {config.train!r}: expected a file or the id of a data set, or a list"
        )
    load: Any = load_pairs if config.format == "preference" else load_examples
    evaluation: list[Any] = []
    for source in config.eval_sources:
        own = config.of_source(source)
        evaluation += load(source.path, own, tokenizer, max_length)
    if config.streaming:
        return _stream(config, tokenizer, max_length, seed, evaluation)
    sets = [
        load(source.path, config.of_source(source), tokenizer, max_length)
        for source in config.sources
    ]
    train = [example for one in sets for example in one]
    counts = list(map(len, sets))
    if not config.eval_sources and config.eval_fraction:
        held = held_indices(len(train), config.eval_fraction, seed)
        evaluation = [train[index] for index in held]
        left_out = set(held)
        train = [example for index, example in enumerate(train) if index not in left_out]
        counts = _remaining(counts, held)
    _check_parts(config, counts)
    weights = config.weights or [None] * len(counts)
    return DataSets(train, evaluation, tuple(map(Part, counts, weights)))


def _stream(
    config: DataConfig,
    tokenizer: Any,
    max_length: int | None,
    seed: int,
    evaluation: list[Example],
) -> DataSets:
    streams = [
        open_stream(source.path, config.of_source(source), tokenizer, max_length)
        for source in config.sources
    ]
    train = StreamedExamples(streams)
    if not config.eval_sources and config.eval_fraction:
        held = held_indices(len(train), config.eval_fraction, seed)
        evaluation = [train[index] for index in held]
        evaluation = [example for example in evaluation if example.targets.any()]
        train = train.without(np.array(held))
    _check_parts(config, [stream.count for stream in train.streams])
    weights = config.weights or [None] * len(streams)
    parts = [
        Part(stream.count, weight, stream.blocks)
        for stream, weight in zip(train.streams, weights, strict=True)
    ]
    return DataSets(train, evaluation, tuple(parts))


def _remaining(counts: Sequence[int], held: Sequence[int]) -> list[int]:
    """Numbers of examples of the sources without the held-out ones."""
    source = np.searchsorted(np.cumsum(counts), held, side="right")
    return (np.array(counts) - np.bincount(source, minlength=len(counts))).tolist()


def _check_parts(config: DataConfig, counts: Sequence[int]) -> None:
    for place, (source, count) in enumerate(zip(config.sources, counts, strict=True)):
        if not count:
            raise ValueError(
                f"data.train[{place}].path = {source.path!r}: data.eval_fraction = "
                f"{config.eval_fraction} leaves none of its examples; expected more of them"
            )
