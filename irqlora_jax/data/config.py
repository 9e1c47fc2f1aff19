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
]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is learned from."""

    train: str = ""
    """Local file (.json, .jsonl, .csv, .tsv, .parquet or .txt), or a data set on the Hugging Face
    hub: ID, ID:CONFIGURATION or ID:CONFIGURATION:SPLIT (default: the split train)."""
    eval: str | None = None
    """Like `train`, for the evaluation loss. Null: `eval_fraction` of the training rows."""
    eval_fraction: float = 0.0
    """Share of the training rows held out for the evaluation loss when `eval` is null."""
    format: DataFormat = "alpaca"
    """Columns of a row. "alpaca" (also alpaca-cleaned): instruction, input, output. "input_output"
    (also longform): input, output. "self_instruct": prompt, completion. "flan_v2": inputs, targets.
    "chip2": text of <human>: and <bot>:. "hh_rlhf": chosen, "oasst1": text with all turns, or the
    messages of the original trees; both learn every turn. "chat": messages of role and content,
    written by the chat template, of which the assistant's are learned. "text": plain text."""
    source_length: int = 384
    """Longest prompt, in tokens; longer prompts are cut on the left."""
    target_length: int = 128
    """Longest answer, in tokens; longer answers are cut on the right. Formats without a prompt of
    their own (hh_rlhf, oasst1, chat) are cut to source_length + target_length."""
    train_on_source: bool = False
    """Put the loss on the prompt too."""
    sequence_length: int = 256
    """Plain text only: tokens of one training example."""
    max_examples: int | None = None
    """Use at most this many rows (null: all)."""
    chat_template: str | None = None
    """Chat only: file with a Jinja template, for a tokenizer that has none or another one."""
    group_by_length: bool = False
    """Put examples of similar length into a batch: less padding, a somewhat less random order."""
    packing: bool = False
    """Put several examples into one row, each seeing itself alone: hardly any padding. Then
    train.batch_size counts rows."""
    packing_length: int | None = None
    """Tokens of a packed row. Null: the longest that an example can have."""

    def __post_init__(self) -> None:
        share = self.eval_fraction
        require(0 <= share < 1, "data.eval_fraction", share, "0 <= eval_fraction < 1")
        for name in ("source_length", "target_length", "sequence_length", "packing_length"):
            value = getattr(self, name)
            ok = value is None or value >= 2
            require(ok, f"data.{name}", value, "a whole number of at least 2")
        ok = not (self.packing and self.group_by_length)
        require(ok, "data.group_by_length", self.group_by_length, "false with data.packing true")
        limit = self.max_examples
        ok = limit is None or limit >= 1
        require(ok, "data.max_examples", limit, "a whole number of at least 1, or null")
