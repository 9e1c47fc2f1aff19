"""`irqlora sensitivity`: which matrices does quantization hurt most?"""

import dataclasses
import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Int32

from irqlora_jax.base.make import check_text, load_base
from irqlora_jax.base.storage import plan_stacks
from irqlora_jax.config.base import quant_settings
from irqlora_jax.data.calibrate import CalibrateConfig, CalibrationRows, read_calibration
from irqlora_jax.data.encode import encode_source
from irqlora_jax.evaluate.suggested import Suggestion, suggest
from irqlora_jax.evaluate.swapped import Batches, Whole, measure_whole, swapped_losses
from irqlora_jax.files.checksums import seal
from irqlora_jax.files.hub import file_marks, load_tokenizer, read_config, snapshot
from irqlora_jax.files.kept_values import append_value, kept_in, read_values
from irqlora_jax.files.small import write_text
from irqlora_jax.machine import installed_version
from irqlora_jax.messages import progress_bar, shows_messages
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import linear_path, linear_stacks, matrix_name
from irqlora_jax.quant.config import KEPT, QuantConfig
from irqlora_jax.quant.formats import FORMATS
from irqlora_jax.runs.folder import KEPT_LAYERS, check_writable
from irqlora_jax.runs.load import is_base
from irqlora_jax.runs.lock import locked
from irqlora_jax.runs.quantize import quantize_base
from irqlora_jax.sharding import LINEAR_NAMES
from irqlora_jax.text import aligned, read_text, require

RESULT_FILE, LOSSES_FILE = "sensitivity.json", "losses.jsonl"
Losses = dict[tuple[int, str], float]
"""Losses by layer and projection, in nats per token."""
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SensitivityConfig:
    """Quantizes one matrix of a model at a time, and measures the loss of a text.

    An interrupted command continues when it is given again."""

    model: str
    """Folder with a Hugging Face model (safetensors), its id on the hub, or a .gguf file."""
    text: str
    """A plain text file. Its first tokens are scored."""
    output_dir: str
    """Folder for losses.jsonl, sensitivity.json and the page sensitivity.html."""
    quant: QuantConfig = QuantConfig()
    calibrate: CalibrateConfig = CalibrateConfig()
    mode: Literal["one", "all_but_one"] = "one"
    """"one": a single matrix is quantized, all others are in full precision. "all_but_one": a
    single matrix is in full precision, all others are quantized."""
    projections: tuple[str, ...] = ()
    """Measure only these projections, e.g. ["q_proj", "down_proj"] (empty: all seven)."""
    rows: int = 4
    """Number of rows of text. A row starts at the last token of the row before it."""
    length: int = 512
    """Length of a row, in tokens."""
    batch_size: int = 4
    """Rows of a forward pass."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the activations. Small differences need float32."""
    extra_bits: float = 0.1
    """Bits per weight that the suggested rules may add."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        for name in ("model", "text", "output_dir"):
            value = getattr(self, name)
            require(value.strip() != "", name, value, "a file" if name == "text" else "a folder")
        require(self.quant.quantizes, "quant.format", self.quant.format, ", ".join(FORMATS))
        for name in self.projections:
            require(name in LINEAR_NAMES, "projections", name, ", ".join(LINEAR_NAMES))
        for name, least in (("rows", 1), ("length", 2), ("batch_size", 1)):
            value = getattr(self, name)
            require(value >= least, name, value, f"a whole number of at least {least}")
        extra = self.extra_bits
        require(0 <= extra < math.inf, "extra_bits", extra, "a finite number of 0 or more")


@shows_messages
def measure_sensitivity(asked: SensitivityConfig) -> dict[str, Any]:
    """Measures the losses, and writes sensitivity.json.

    Returns:
        The contents of the JSON: the settings; the loss in "full_precision" and with everything
        "quantized" (nats per token); by projection, lists over the layers (null: not measured) of
        "losses", of "costs" (the loss that the quantization of the matrix adds), and of "outliers"
        ("channel" and "ratio": the input channel with the largest mean square, and its mean square
        over the mean of all channels); "survey" (`base.survey.summarize`); "suggestion".

    Raises:
        ValueError, OSError: bad input, or the results cannot be written.
    """
    folder, started = Path(asked.output_dir), time.perf_counter()
    if is_base(asked.model):
        raise ValueError(
            f"model = '{asked.model}': already quantized; expected a model with float weights"
        )
    if not Path(asked.text).is_file():
        raise FileNotFoundError(f"text = '{asked.text}': no such file")
    llama, tokenizer = read_config(asked.model), load_tokenizer(asked.model)
    plan_stacks(llama, asked.quant)  # refuses a rule that matches nothing
    tokens = np.array(encode_source(tokenizer, [read_text(Path(asked.text))])[0], np.int32)
    rows = _cut(tokens, asked, llama.max_position_embeddings)
    check_text(asked.quant, None, asked.calibrate)
    drawn = read_calibration(asked.calibrate, tokenizer, llama.max_position_embeddings)
    check_writable(folder)
    with locked(folder):
        file = folder / LOSSES_FILE
        of = "losses of irqlora sensitivity"
        losses = read_values(file, _identity(asked, rows, drawn), "loss", of)
        result = _measure(asked, rows, drawn, file, losses)
        result |= {"seconds": round(time.perf_counter() - started, 3)}
        write_text(folder / RESULT_FILE, json.dumps(seal(result), indent=1) + "\n")
        shutil.rmtree(folder / KEPT_LAYERS, ignore_errors=True)
    logger.info(f"written to {folder / RESULT_FILE}")
    return result


def _cut(
    tokens: Int32[np.ndarray, " all"], asked: SensitivityConfig, context: int
) -> Int32[np.ndarray, "rows seq"]:
    """Cuts the first tokens into rows, each of which starts at the last token of the previous."""
    length, step = asked.length, asked.length - 1
    accepted = f"at most max_position_embeddings = {context}"
    require(length <= context, "length", length, accepted)
    count = min(asked.rows, (len(tokens) - 1) // step)
    if count < 1:
        raise ValueError(
            f"text = '{asked.text}': {len(tokens)} tokens; expected at least the length of a row, "
            f"{length} (--length)"
        )
    if count < asked.rows:
        logger.info(f"the text is long enough for {count} of {asked.rows} rows")
    return np.stack([tokens[i * step : i * step + length] for i in range(count)])


def _identity(
    asked: SensitivityConfig, rows: Int32[np.ndarray, "rows seq"], drawn: CalibrationRows | None
) -> dict[str, Any]:
    """Everything that the losses depend on, as plain values. Rounding aside, batches do not."""
    path = snapshot(asked.model)
    found = {
        "model": asked.model,
        "files": file_marks(path),
        "llama": read_config(path).to_dict(),
        "text": hashlib.sha256(rows.tobytes()).hexdigest(),
        "rows": len(rows),
        "length": asked.length,
        "mode": asked.mode,
        "compute_dtype": asked.compute_dtype,
        "calibrate": None if drawn is None else drawn.describe(),
    } | quant_settings(asked.quant)
    return json.loads(json.dumps(found, default=dataclasses.asdict))


def _measure(
    asked: SensitivityConfig,
    rows: Int32[np.ndarray, "rows seq"],
    drawn: CalibrationRows | None,
    file: Path,
    losses: Losses,
) -> dict[str, Any]:
    """Computes the losses that are not known yet, and puts everything together."""
    keep = file.parent / KEPT_LAYERS  # deleted with the result
    packed, llama, survey = quantize_base(
        asked.model, asked.quant, calibrate=drawn, keep=keep, progress=asked.progress
    )
    base, _ = load_base(asked.model, None, progress=asked.progress)
    model = Llama(llama, compute_dtype=asked.compute_dtype)
    batches = [rows[i : i + asked.batch_size] for i in range(0, len(rows), asked.batch_size)]
    with progress_bar("Measuring the whole model", show=asked.progress):
        full = measure_whole(model, base, batches)
        whole = measure_whole(model, packed, batches).loss
    layers, names = range(llama.num_hidden_layers), asked.projections or LINEAR_NAMES
    wanted = [(i, n) for i in layers for n in LINEAR_NAMES if n in names]
    wanted = [place for place in wanted if _own_format(asked.quant, place) != KEPT]
    left = [place for place in wanted if place not in losses]
    if len(left) < len(wanted):
        logger.info(f"{len(wanted) - len(left)} of {len(wanted)} matrices are in {file}")
    alone = asked.mode == "one"
    pair = (base, packed) if alone else (packed, base)
    bar = progress_bar("Sensitivity", len(wanted), "matrices", show=asked.progress)
    with bar as shown, kept_in(file):
        shown.update(len(wanted) - len(left))
        for layer, name, loss in swapped_losses(model, *pair, batches, left):
            append_value(file, layer, name, "loss", loss)
            losses[layer, name] = loss
            shown.update()
    losses = {place: losses[place] for place in wanted}
    costs = {p: loss - full.loss if alone else whole - loss for p, loss in losses.items()}
    dtype = next(weight.dtype for _, weight in linear_stacks(base))
    advice = suggest(costs, asked.quant, llama, asked.extra_bits, dtype)
    _say(asked, full.loss, whole, costs, advice)
    return _describe(asked, batches, full, whole, losses, costs) | {
        "survey": survey,
        "suggestion": {
            "rules": advice.text,
            "added": advice.added,
            "bits_before": advice.before,
            "bits_after": advice.after,
        },
    }


def _own_format(quant: QuantConfig, place: tuple[int, str]) -> str:
    layer, name = place
    return quant.for_matrix(matrix_name(linear_path(name), layer)).format


def _describe(
    asked: SensitivityConfig,
    batches: Batches,
    full: Whole,
    whole: float,
    losses: Losses,
    costs: Losses,
) -> dict[str, Any]:
    return {
        "settings": dataclasses.asdict(asked),
        "directory": str(Path.cwd()),
        "tokens": sum(batch[:, 1:].size for batch in batches),
        "rows": sum(map(len, batches)),
        "full_precision": _finite(full.loss),
        "quantized": _finite(whole),
        "losses": _by_projection(losses, len(full.moments)),
        "costs": _by_projection(costs, len(full.moments)),
        "outliers": {
            name: {
                "channel": [int(np.argmax(own[name])) for own in full.moments],
                "ratio": [float(own[name].max() / own[name].mean()) for own in full.moments],
            }
            for name in LINEAR_NAMES
        },
        "versions": {"irqlora_jax": installed_version("irqlora-jax"), "jax": jax.__version__},
    }


def _by_projection(values: Mapping[tuple[int, str], float], depth: int) -> dict[str, Any]:
    names = [name for name in LINEAR_NAMES if any(name == one for _, one in values)]
    return {
        name: [_finite(values.get((layer, name), math.nan)) for layer in range(depth)]
        for name in names
    }


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _say(
    asked: SensitivityConfig, full: float, whole: float, costs: Losses, advice: Suggestion
) -> None:
    label = asked.quant.label
    logger.info(
        aligned(
            [
                ("model", "loss (nats a token)"),
                ("full precision", f"{full:.4f}"),
                (f"{label}, all matrices", f"{whole:.4f}"),
            ]
        )
    )
    head = ("quantized alone" if asked.mode == "one" else "kept alone", "costs (nats a token)")
    worst = sorted(costs.items(), key=lambda item: -item[1])[:5]
    logger.info(
        aligned([head, *((matrix_name(linear_path(n), i), f"{c:+.4f}") for (i, n), c in worst)])
    )
    logger.info(suggestion_sentence(advice.added, advice.before, advice.after))
    if advice.added:
        logger.info(advice.text)


def suggestion_sentence(added: int, before: float, after: float) -> str:
    """Says what the suggested rules are, and that they are not measured."""
    if not added:
        return (
            "No rules to suggest: no cost is above the noise, or extra_bits is too small for a "
            f"larger format ({before:.2f} bits a weight). More rows give less noise."
        )
    matrices = "the matrix" if added == 1 else f"the {added} matrices"
    return (
        f"A suggestion: these rules give a larger format to {matrices} that cost most per bit, and "
        f"need {after:.2f} instead of {before:.2f} bits a weight. What they gain together is not "
        "measured; compare both with irqlora eval."
    )
