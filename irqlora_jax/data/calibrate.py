"""The text for calibrations that look at the inputs of the layers."""

import dataclasses
import hashlib
import logging
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32

from irqlora_jax.data.config import DataConfig, DataFormat
from irqlora_jax.data.encode import encode_source
from irqlora_jax.data.examples import load_examples
from irqlora_jax.data.rows import read_documents
from irqlora_jax.text import require

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CalibrateConfig:
    """The text for a quantizer that looks at the inputs of the layers: quant.calibration importance
    or gptq, quant.rounding feedback, quant.training, quant.outlier_rule sensitivity, adapter.init
    cloq, adapter.lqlora.weights, quant.allocation.errors."""

    data: str | None = None
    """Local file or data set on the hub, given like `data.train`."""
    format: DataFormat = "text"
    """Format of `data`, as for `data.format`. "text": its documents or rows are joined by blank
    lines."""
    rows: int = 128
    """Number of rows, drawn at random from all the text. More rows take longer and are better."""
    length: int = 512
    """Length of a row, in tokens."""
    seed: int = 0
    """Random seed of the draw."""
    damping: float = 0.01
    """Added to the second moments, as a fraction of their mean. With few tokens, more damping is
    better."""
    metric: Literal["inputs", "gradients"] = "inputs"
    """Of what the second moments are taken. "inputs": of the inputs of each linear layer (GPTQ).
    "gradients": of the gradients of the loss (OAC). This takes several times as long, and the
    memory of the host must hold the hidden states of all layers. `adapter.init` cloq then fits the
    pairs to these gradients, not to the outputs of the layers. `adapter.lqlora.weights` and
    `quant.allocation.errors` fisher need it.
    """
    batch_size: int = 8
    """Rows of a forward pass on each device."""
    activations: Literal["float32", "bfloat16"] = "float32"
    """Type of the activations between the layers. They are in the memory of the host."""

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("length", 2), ("batch_size", 1)):
            value = getattr(self, name)
            accepted = f"a whole number of at least {least}"
            require(value >= least, f"calibrate.{name}", value, accepted)
        require(0 <= self.damping < 1, "calibrate.damping", self.damping, "0 <= value < 1")
        ok, accepted = self.format != "preference", "a format of single examples"
        require(ok, "calibrate.format", self.format, accepted)
        metric = self.metric
        require(
            metric in ("inputs", "gradients"), "calibrate.metric", metric, "inputs or gradients"
        )
        kind = self.activations
        known = kind in ("float32", "bfloat16")
        require(known, "calibrate.activations", kind, "float32 or bfloat16")


@dataclasses.dataclass(frozen=True)
class CalibrationRows:
    """Rows of tokens and how to use them.

    Attributes:
        tokens: int32 [rows, length], without padding.
        config: the settings.
    """

    tokens: Int32[np.ndarray, "rows length"]
    config: CalibrateConfig = CalibrateConfig()

    def describe(self) -> dict[str, Any]:
        """Everything that a result depends on, as plain values."""
        return {
            "data": self.config.data,
            "rows": len(self.tokens),
            "length": self.tokens.shape[1],
            "seed": self.config.seed,
            "damping": self.config.damping,
            "metric": self.config.metric,
            "activations": self.config.activations,
            "batch_size": self.config.batch_size,
            "sha256": hashlib.sha256(self.tokens.tobytes()).hexdigest(),
        }


def read_calibration(
    config: CalibrateConfig, tokenizer: Any, max_length: int
) -> CalibrationRows | None:
    """Reads the text, joins its documents or examples, and draws rows; None without `data`.

    Args:
        config: the settings.
        tokenizer: a transformers tokenizer.
        max_length: context length of the model in tokens.

    Raises:
        FileNotFoundError: no such file, and no such data set on the hub.
        ValueError: the data does not have this format, the text is shorter than one row, or a row
            is longer than the context of the model.
    """
    if config.data is None:
        return None
    accepted = f"at most max_position_embeddings = {max_length}"
    require(config.length <= max_length, "calibrate.length", config.length, accepted)
    stream = _read_stream(config.data, config.format, tokenizer, max_length)
    count = len(stream) // config.length
    if count == 0:
        raise ValueError(
            f"calibrate.data = '{config.data}': {len(stream)} tokens; expected at least the length "
            f"of a row, {config.length} (calibrate.length)"
        )
    if count < config.rows:
        logger.warning(
            f"calibrate.data = '{config.data}': {len(stream):,} tokens are enough for {count} of "
            f"{config.rows} rows (calibrate.rows)"
        )
    drawn = np.random.default_rng(config.seed).permutation(count)[: config.rows]
    rows = stream[: count * config.length].reshape(count, config.length)
    return CalibrationRows(np.ascontiguousarray(rows[np.sort(drawn)], np.int32), config)


def _read_stream(
    source: str, format: DataFormat, tokenizer: Any, max_length: int
) -> Int32[np.ndarray, " tokens"]:
    """All tokens of a text, or of the examples one after the other."""
    try:
        if format == "text":
            text = "\n\n".join(read_documents(source))
            return np.array(encode_source(tokenizer, [text])[0], np.int32)
        data = DataConfig(format=format, source_length=max_length, target_length=max_length)
        examples = load_examples(source, data, tokenizer, max_length)
    except ValueError as error:
        message = str(error).replace("data.format", "calibrate.format")
        raise ValueError(f"calibrate.data: {message}") from error
    return np.concatenate([example.tokens for example in examples])
