"""Reads everything that a folder has about its run. Missing or damaged parts are None."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

from irqlora_jax.base.file import base_shapes, has_base, read_base_config, read_source
from irqlora_jax.base.storage import Storage, bits_by_layer, measure_base
from irqlora_jax.base.stored import find_file
from irqlora_jax.config import Config, read_stored_config
from irqlora_jax.files.checksums import text_checksum
from irqlora_jax.files.small import read_json
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.llama import Llama
from irqlora_jax.runs.checkpoint_files import newest_log
from irqlora_jax.runs.folder import BASE_FILE, ENVIRONMENT_FILE, SURVEY_FILE
from irqlora_jax.runs.load import read_evaluation, read_results
from irqlora_jax.runs.recorded import RECORD_FILE, check_recorded
from irqlora_jax.runs.state import init_state, make_optimizer
from irqlora_jax.sharding import device_bytes
from irqlora_jax.text import first_few

Piece = TypeVar("Piece")


@dataclasses.dataclass(frozen=True)
class TrainedSize:
    """Size of the trained parameters.

    Attributes:
        weights: number of trained parameters.
        adapters: bytes of the parameters.
        optimizer: bytes of the optimizer's state.
    """

    weights: int
    adapters: int
    optimizer: int


@dataclasses.dataclass(frozen=True)
class RunData:
    """Data about a run. Parts that the folder does not have are None or empty.

    Attributes:
        name: name of the folder.
        folder: its absolute path.
        source: the model that the base was made from.
        settings: the configuration, from config.json.
        quant: configuration of the quantizer.
        llama: the architecture.
        storage: size of the base.
        bits: stored bits a weight, by projection, lists over the layers.
        trained: size of adapters and optimizer.
        survey: statistics of the quantization (`base.survey.summarize`).
        metrics: the lines of metrics.jsonl.
        results: the rows of results.json.
        evaluations: contents of every eval-*.json, by "eval-...".
        environment: device and versions of the training.
        problems: sentences about files that exist but cannot be used.
    """

    name: str
    folder: Path
    source: str | None
    settings: Mapping[str, Any] | None
    quant: Mapping[str, Any] | None
    llama: LlamaConfig | None
    storage: Storage | None
    bits: Mapping[str, Sequence[float]] | None
    trained: TrainedSize | None
    survey: Mapping[str, Any] | None
    metrics: Sequence[Mapping[str, Any]]
    results: Sequence[Mapping[str, Any]]
    evaluations: Mapping[str, Mapping[str, Any]]
    environment: Mapping[str, Any] | None
    problems: Sequence[str]


def read_run_data(folder: Path) -> RunData:
    """Reads the folder of a run or of `irqlora quantize`, without its weights.

    Raises:
        FileNotFoundError: the folder has neither a configuration nor a base.
    """
    base, problems = find_file(folder / BASE_FILE).name, []
    if not has_base(folder) and not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"run = '{folder}': has neither config.json nor {BASE_FILE}; expected the "
            "folder of a run, or of irqlora quantize"
        )

    def attempt(name: str, read: Callable[[Path], Piece], optional: bool = True) -> Piece | None:
        try:
            check_recorded(folder, name)
            if optional and not (folder / name).is_symlink() and not (folder / name).exists():
                return None
            return read(folder / name)
        except Exception as error:  # old or damaged files may contain anything
            problems.append(f"{name} cannot be used: {_sentence(error)}")
            return None

    stored = attempt(base, read_base_config, optional=not (folder / RECORD_FILE).exists())
    llama, quant = stored or (None, None)
    settings = attempt("config.json", read_json)
    trained = None
    if llama is not None and settings is not None:
        known = llama
        trained = attempt(
            "config.json", lambda file: _measure_trained(read_stored_config(file), known)
        )
    files = sorted(folder.glob("eval-*.json"))
    evaluations = {file.stem: attempt(file.name, read_evaluation) for file in files}
    attempt("metrics.jsonl", _check_metrics, optional=False)
    return RunData(
        name=folder.resolve().name,
        folder=folder.absolute(),
        source=attempt(base, read_source) or (settings or {}).get("model"),
        settings=settings,
        quant=(settings or {}).get("quant") if quant is None else dataclasses.asdict(quant),
        llama=llama,
        storage=attempt(base, lambda file: measure_base(base_shapes(file)[0])),
        bits=attempt(base, _read_bits),
        trained=trained,
        survey=attempt(SURVEY_FILE, _read_survey),
        metrics=attempt("metrics.jsonl", read_metrics) or [],
        results=attempt("results.json", read_results) or [],
        evaluations={name: one for name, one in evaluations.items() if one is not None},
        environment=attempt(ENVIRONMENT_FILE, read_json),
        problems=problems,
    )


def _read_bits(file: Path) -> Mapping[str, Sequence[float]]:
    base, llama = base_shapes(file)
    return bits_by_layer(base, llama.num_hidden_layers)


def _sentence(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _read_survey(file: Path) -> Mapping[str, Any]:
    found = read_json(file)
    if "calibrate" in found:
        errors = found["calibrate"]
        errors = errors.get("output_error") if isinstance(errors, dict) else None
        if not isinstance(errors, dict) or not {"plain", "own"} <= errors.keys():
            raise ValueError("not the errors of outputs")
    if found.keys() == {"calibrate"}:  # of a base that was fitted together with its adapter
        return found
    needed = {"mean_entropy", "entropy", "error", "codes"}
    kinds = [found.get("plain"), found.get("calibrated", found.get("plain"))]
    ok = all(isinstance(kind, dict) and needed <= kind.keys() for kind in kinds)
    if not ok or not {"format", "weights", "sampled"} <= found.keys():
        raise ValueError("not the statistics of a quantization")
    return found


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Reads the complete lines that have a step, sorted by step."""
    rows = []
    for line in _lines(file):
        row = _metrics_row(line)
        if row is not None:
            rows.append(row)
    return sorted(rows, key=lambda row: row["step"])


def _lines(file: Path) -> list[str]:
    """The lines of metrics.jsonl; none without the file."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    return text.split("\n")


def _metrics_row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _check_metrics(file: Path) -> None:
    newest = newest_log(file.parent)
    lines = _lines(file)
    if newest is not None:
        step, checksum = newest
        rows = [(line, _metrics_row(line)) for line in lines]
        kept = [f"{line}\n" for line, row in rows if row is not None and row["step"] <= step]
        if text_checksum("".join(kept)) != checksum:
            raise ValueError(f"lines up to step {step} are missing or changed")
    if lines[-1].startswith("{"):  # an interrupted run may leave an incomplete last line
        lines.pop()
    damaged = [str(i) for i, line in enumerate(lines, 1) if line and _metrics_row(line) is None]
    if damaged:
        raise ValueError(f"damaged lines {first_few(damaged)}, left out")


def metric_curve(
    metrics: Sequence[Mapping[str, Any]], name: str, max_points: int = 200
) -> tuple[list[float], list[float | None]]:
    """Returns the steps and values of a metric.

    Args:
        metrics: lines of metrics.jsonl.
        name: name of the metric.
        max_points: maximum number of points. With more lines, a point is the mean of several
            consecutive lines.

    Returns:
        The steps (of a mean: the last one), and the values; None for a value that is not finite.
    """
    found = [(row["step"], _finite(row[name])) for row in metrics if name in row]
    size = max(1, math.ceil(len(found) / max_points))
    steps, values = [], []
    for start in range(0, len(found), size):
        part = found[start : start + size]
        known = [value for _, value in part if value is not None]
        steps.append(float(part[-1][0]))
        values.append(sum(known) / len(known) if known else None)
    return steps, values


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _measure_trained(config: Config, llama: LlamaConfig) -> TrainedSize:
    model = Llama(llama, adapter=config.adapter)
    # The state does not depend on the number of steps, which may need the data.
    optimizer = make_optimizer(config.train.with_steps(1), config.adapter.chosen)
    state = jax.eval_shape(lambda: init_state(model, optimizer, config.seed))
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.adapters))
    return TrainedSize(weights, device_bytes(state.adapters), device_bytes(state.opt_state))
