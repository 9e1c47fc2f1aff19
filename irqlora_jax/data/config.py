"""Configuration of the data."""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from irqlora_jax.text import require

DataFormat = Literal[
    "alpaca",
    "input_output",
    "self_instruct",
    "flan_v2",
    "chip2",
    "hh_rlhf",
    "oasst1",
    "chat",
    "text",
    "preference",
]


@dataclasses.dataclass(frozen=True)
class DataSource:
    """One data set of several."""

    text_field: ClassVar[str] = "path"
    example: ClassVar[str] = "[{path: FILE, weight: 1}]"

    path: str
    """Local file, pattern of files, or data set on the hub, as for `data.train`."""
    weight: float | None = None
    """Share of the examples that come from this source, relative to the other sources. Null for
    all: every example once an epoch."""
    format: DataFormat | None = None
    """Columns of a row. Null: `data.format`."""
    max_examples: int | None = None
    """Use at most this many rows. Null: `data.max_examples`."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training data and its format."""

    train: str | tuple[DataSource, ...] = ""
    """Local file (.json, .jsonl, .csv, .tsv, .parquet or .txt), a pattern of files
    ("data/*.jsonl"), or a data set on the Hugging Face hub: ID, ID:CONFIGURATION or
    ID:CONFIGURATION:SPLIT (default split: train). Or a list of these, or a list of entries
    {path, weight, format, max_examples}. With weights, examples are drawn by weight, and every
    source goes through its own epochs."""
    eval: str | tuple[DataSource, ...] | None = None
    """Data sets for the evaluation loss, given like `train`, without weights. Null: use
    `eval_fraction`."""
    eval_fraction: float = 0.0
    """Fraction of the training rows held out for the evaluation loss when `eval` is null."""
    format: DataFormat = "alpaca"
    """Columns of a row. "alpaca" (also alpaca-cleaned): instruction, input, output. "input_output"
    (also longform): input, output. "self_instruct": prompt, completion. "flan_v2": inputs, targets.
    "chip2": text with <human>: and <bot>:. "hh_rlhf": chosen; the loss covers every turn. "oasst1":
    text with all turns, or the messages of the original trees; the loss covers every turn. "chat":
    messages with role and content, and optionally tools, written with the chat template; the loss
    covers the assistant's turns, except for messages with weight 0. "text": plain text.
    "preference": prompt, chosen, rejected, as text or as lists of messages; without a prompt, it is
    what chosen and rejected begin with. The model is trained with DPO (`train.dpo`), and
    train.batch_size counts pairs."""
    source_length: int = 384
    """Longest prompt in tokens. Longer prompts are truncated on the left."""
    target_length: int = 128
    """Longest answer in tokens. Longer answers are truncated on the right. Conversations (hh_rlhf,
    oasst1, chat) are truncated to source_length + target_length."""
    train_on_source: bool = False
    """Compute the loss on the prompt too."""
    sequence_length: int = 256
    """Plain text only: length of a training example in tokens."""
    max_examples: int | None = None
    """Use at most this many rows of each entry of `train` and `eval` (null: all)."""
    streaming: bool = False
    """Read and tokenize the rows of `train` when they are used, for sets larger than the memory.
    Files must be .jsonl or .parquet; those of a data set on the hub are downloaded. Rows without a
    token to learn are not left out, and a bad row is found only when it is used. Plain text,
    packing and group_by_length tokenize every row once at the start, to know the lengths. The
    evaluation set is in memory in any case."""
    chat_template: str | None = None
    """Chat only: chatml, llama-2, llama-3, alpaca, mistral or zephyr, or a file with a Jinja
    template. Used instead of the tokenizer's template, and kept in the tokenizer of the run."""
    group_by_length: bool = False
    """Put examples of similar length into a batch: less padding, but a less random order."""
    packing: bool = False
    """Pack several examples into one row, with almost no padding. Examples do not attend to each
    other. train.batch_size then counts rows."""
    packing_length: int | None = None
    """Length of a packed row in tokens. Null: the longest possible example."""

    def __post_init__(self) -> None:
        share = self.eval_fraction
        require(0 <= share < 1, "data.eval_fraction", share, "0 <= eval_fraction < 1")
        for name in ("source_length", "target_length", "sequence_length", "packing_length"):
            value = getattr(self, name)
            ok = value is None or value >= 2
            require(ok, f"data.{name}", value, "a whole number of at least 2")
        ok = not (self.packing and self.group_by_length)
        require(ok, "data.group_by_length", self.group_by_length, "false with data.packing true")
        for name in ("packing", "train_on_source", "streaming"):
            value, accepted = getattr(self, name), "false with data.format preference"
            require(not (value and self.format == "preference"), f"data.{name}", value, accepted)
        limit = self.max_examples
        ok = limit is None or limit >= 1
        require(ok, "data.max_examples", limit, "a whole number of at least 1, or null")
        _check_sources("data.train", self.sources, self.format)
        _check_sources("data.eval", self.eval_sources, self.format)
        for place, source in enumerate(self.eval_sources):
            name = f"data.eval[{place}].weight"
            require(source.weight is None, name, source.weight, "null; weights are for data.train")
        ok = not (self.group_by_length and self.weights)
        accepted = "false with weights in data.train"
        require(ok, "data.group_by_length", self.group_by_length, accepted)

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """The entries of `train`."""
        return _as_sources(self.train)

    @property
    def eval_sources(self) -> tuple[DataSource, ...]:
        """The entries of `eval`."""
        return () if self.eval is None else _as_sources(self.eval)

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The weights of the sources; None if every example comes once an epoch."""
        found = [source.weight for source in self.sources if source.weight is not None]
        return tuple(found) or None

    @property
    def formats(self) -> tuple[DataFormat, ...]:
        """The formats of the sources, each once, in their order."""
        found: list[DataFormat] = [source.format or self.format for source in self.sources]
        return tuple(dict.fromkeys(found or [self.format]))

    def of_source(self, source: DataSource) -> "DataConfig":
        """The configuration for one source alone."""
        format, limit = source.format or self.format, source.max_examples or self.max_examples
        return dataclasses.replace(
            self, train=source.path, eval=None, format=format, max_examples=limit
        )


def _as_sources(value: str | tuple[DataSource, ...]) -> tuple[DataSource, ...]:
    return (DataSource(value),) if isinstance(value, str) else value


def _check_sources(field: str, sources: Sequence[DataSource], format: DataFormat) -> None:
    weighted = any(source.weight is not None for source in sources)
    for place, source in enumerate(sources):
        name = f"{field}[{place}]"
        ok = bool(source.path.strip()) or len(sources) == 1  # data.train may still be ""
        require(ok, f"{name}.path", source.path, "a file or the id of a data set")
        kind = source.format or format
        ok = (kind == "preference") == (format == "preference")
        accepted = (
            f"a format that goes with data.format {format}; pairs cannot be mixed with examples"
        )
        require(ok, f"{name}.format", kind, accepted)
        weight, limit = source.weight, source.max_examples
        if weighted:
            accepted = "a positive number, as other entries have a weight"
            require(weight is not None, f"{name}.weight", weight, accepted)
        ok = weight is None or 0 < weight < math.inf
        require(ok, f"{name}.weight", weight, "a positive finite number, or null")
        ok = limit is None or limit >= 1
        require(ok, f"{name}.max_examples", limit, "a whole number of at least 1, or null")
