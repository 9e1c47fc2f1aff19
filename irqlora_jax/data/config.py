"""Configuration of the data."""

import dataclasses
from typing import Literal

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
class DataConfig:
    """The training data and its format."""

    train: str = ""
    """Local file (.json, .jsonl, .csv, .tsv, .parquet or .txt), or a data set on the Hugging Face
    hub: ID, ID:CONFIGURATION or ID:CONFIGURATION:SPLIT (default split: train)."""
    eval: str | None = None
    """Data set for the evaluation loss, given like `train`. Null: use `eval_fraction`."""
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
    """Use at most this many rows (null: all)."""
    chat_template: str | None = None
    """Chat only: file with a Jinja template, used instead of the tokenizer's template."""
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
        for name in ("packing", "train_on_source"):
            value, accepted = getattr(self, name), "false with data.format preference"
            require(not (value and self.format == "preference"), f"data.{name}", value, accepted)
        limit = self.max_examples
        ok = limit is None or limit >= 1
        require(ok, "data.max_examples", limit, "a whole number of at least 1, or null")
