"""A table for the allocation of bits: the error of every matrix with every candidate.

The table is kept in a file, so that an interrupted command goes on there, and another budget needs
no new table.
"""

import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from irqlora_jax.base.layerwise import check_tokens, output_error
from irqlora_jax.base.source import open_weights
from irqlora_jax.base.statistics import Gradients, Inputs, Statistics
from irqlora_jax.data.calibrate import CalibrationRows
from irqlora_jax.files.checksums import check_seal
from irqlora_jax.files.hub import file_marks, read_config, snapshot
from irqlora_jax.files.kept_values import append_value, kept_in, read_values
from irqlora_jax.files.small import read_json
from irqlora_jax.files.tensors import Header, aligned, read_into
from irqlora_jax.machine import installed_version
from irqlora_jax.messages import progress_bar
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.tree import (
    Keys,
    Tree,
    insert,
    leaf_path,
    linear_path,
    matrix_name,
    weight_name,
    weight_shapes,
)
from irqlora_jax.quant.config import KEPT, QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.text import require

Place = tuple[int, str]
"""Layer and projection of a matrix."""
ERRORS_FILE = "errors.jsonl"
"""Name of the file of a table, in the folder of a run or of `irqlora quantize`."""


def make_errors(
    source: str | Path,
    quant: QuantConfig,
    places: Sequence[Place],
    file: Path,
    *,
    calibrate: CalibrationRows | None = None,
    progress: bool = False,
) -> Float[np.ndarray, "places candidates"]:
    """Computes the errors that are not in the file yet, and adds them to it.

    Args:
        source: local folder, GGUF file or hub id.
        quant: with `quant.candidates` and `quant.allocation.errors`.
        places: the matrices.
        file: keeps the errors.
        calibrate: rows of text, for the errors that need them.
        progress: show a bar.

    Returns:
        The errors; infinite where a candidate cannot store a matrix.

    Raises:
        ValueError: the file has the errors of other settings; there is no sensitivity of a matrix;
            the text does not fit the model; a statistic is NaN or infinite.
    """
    asked = quant.allocation
    calibrate = calibrate if asked.needs_text else None
    measured = None if asked.sensitivity is None else read_costs(Path(asked.sensitivity))
    if measured is not None:
        missing = [place for place in places if place not in measured.costs]
        first = matrix_name(linear_path(missing[0][1]), missing[0][0]) if missing else None
        accepted = f"the results of all matrices, but {first} is missing"
        require(not missing, "quant.allocation.sensitivity", asked.sensitivity, accepted)
    identity = _identity(source, quant, calibrate, measured)
    known = read_values(file, identity, "errors", "errors for quant.budget")
    left = [place for place in places if place not in known]
    bar = progress_bar("Errors of the formats", len(places), "matrices", show=progress)
    with bar as shown, kept_in(file):
        shown.update(len(places) - len(left))
        for layer, name, errors in _errors(source, quant, left, calibrate, measured):
            append_value(file, layer, name, "errors", errors)
            known[layer, name] = errors
            shown.update()
    table = np.array([known[place] for place in places], np.float64)
    if measured is not None:
        reference = table[:, -1:]
        costs = np.array([measured.costs[place] for place in places])[:, None]
        table = table[:, :-1] * costs / np.where(reference > 0, reference, 1)
    return np.where(np.isfinite(table), table, np.inf)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Results of `irqlora sensitivity`.

    Attributes:
        costs: loss that the quantization of a matrix adds; more than 0, unless all are 0.
        quant: how the matrices were quantized.
    """

    costs: Mapping[Place, float]
    quant: QuantConfig


def read_costs(file: Path) -> Measured:
    """Reads sensitivity.json.

    Quantization does not improve a model, so a negative cost is noise. A cost that is smaller than
    the noise counts as the noise, or as the smallest cost above 0 if there is no noise.

    Raises:
        ValueError: no such file, or not the results of `irqlora sensitivity`.
    """
    field = f"quant.allocation.sensitivity = '{file}'"
    if not file.is_file():
        raise ValueError(f"{field}: no such file; expected the sensitivity.json of a folder")
    try:
        values = check_seal(read_json(file), "costs")
        costs = {
            (layer, name): float(cost)
            for name, own in values["costs"].items()
            for layer, cost in enumerate(own)
            if cost is not None
        }
        quant = QuantConfig.from_dict(values["settings"]["quant"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{field}: not the results of irqlora sensitivity ({error})") from error
    noise = -min(costs.values(), default=0.0)
    if noise <= 0:
        noise = min((cost for cost in costs.values() if cost > 0), default=0.0)
    return Measured({place: max(cost, noise) for place, cost in costs.items()}, quant)


def _identity(
    source: str | Path,
    quant: QuantConfig,
    calibrate: CalibrationRows | None,
    measured: Measured | None,
) -> dict[str, Any]:
    """Everything that the errors depend on, as plain values."""
    path = snapshot(source)
    found = {
        "files": file_marks(path),
        "llama": read_config(path).to_dict(),
        "version": installed_version("irqlora-jax"),
        "errors": quant.allocation.errors,
        "text": None if calibrate is None else calibrate.describe(),
        "quant.allocation": quant.allocation.candidates,
        "quant": quant.candidates,
        "sensitivity": None if measured is None else measured.quant,
    }
    return json.loads(json.dumps(found, default=dataclasses.asdict))


def _errors(
    source: str | Path,
    quant: QuantConfig,
    places: Collection[Place],
    calibrate: CalibrationRows | None,
    measured: Measured | None,
) -> Iterator[tuple[int, str, list[float]]]:
    """Yields layer, projection and the errors of all candidates; with a measured sensitivity also
    the error of what was measured."""
    if not places:
        return
    found, llama = open_weights(snapshot(source))
    shapes, _ = weight_shapes(llama)

    def read(layer: int) -> Tree:
        weights: Tree = {}
        for path in shapes:
            array = _read(found, weight_name(path, layer))
            insert(weights, leaf_path(path), jax.device_put(array, may_alias=True))
        return weights

    statistics: Statistics | None = None
    if calibrate is not None:
        check_tokens(calibrate, llama)
        statistics = _statistics(
            llama, calibrate, read, lambda path: _read(found, weight_name(path))
        )
    by_layer: dict[int, list[str]] = {}
    for layer, name in places:
        by_layer.setdefault(layer, []).append(name)
    order = range(llama.num_hidden_layers) if statistics is None else statistics.order
    for layer in order:
        names = by_layer.pop(layer, [])
        if not names and statistics is None:
            continue
        weights, moments, squares = read(layer), {}, {}
        if statistics is not None and names:
            try:
                moments = statistics.moments(weights)
            except ValueError as error:
                raise ValueError(f"layer {layer}: {error}") from error
            squares = statistics.squares
        for name in names:
            group, _ = linear_path(name)
            configs = list(quant.candidates)
            if measured is not None:
                configs.append(measured.quant.for_matrix(matrix_name(linear_path(name), layer)))
            given = weights[group][name]["weight"], moments.get(name), squares.get(name)
            yield layer, name, [_error(config, *given) for config in configs]
        if not by_layer:
            return
        if statistics is not None:
            statistics.advance(weights, weights)


def _statistics(
    llama: LlamaConfig,
    calibrate: CalibrationRows,
    read: Callable[[int], Tree],
    read_single: Callable[[Keys], np.ndarray],
) -> Statistics:
    if calibrate.config.metric == "gradients":
        outside = {path[0]: read_single(path) for path in weight_shapes(llama)[1]}
        return Gradients(llama, calibrate, outside, read, squares=True)
    return Inputs(llama, calibrate, read_single(("embed_tokens",)))


def _read(found: Mapping[str, Header], name: str) -> np.ndarray:
    array = aligned(found[name].shape, np.float32)
    read_into(array, found[name], name)
    return array


def _error(
    config: QuantConfig,
    weight: Float32[Array, "out in"],
    gram: Float32[Array, "in in"] | None,
    squares: Float32[Array, "out in"] | None,
) -> float:
    """The error of one matrix. A calibration that needs a text counts as none."""
    if config.format == KEPT:
        return 0.0
    packed = quantize(weight, config.plain if config.needs_inputs else config)
    if squares is None and gram is not None:
        return float(output_error(weight, packed.dequantize(), gram))
    return float(weighed_error(weight, packed.dequantize(), squares))


@jax.jit
def weighed_error(
    weight: Float32[Array, "out in"],
    other: Float32[Array, "out in"],
    squares: Float32[Array, "out in"] | None,
) -> Float32[Array, ""]:
    """The sum of F (W - W')^2, F = 1 without `squares`."""
    error = jnp.square(weight - other)
    error = error if squares is None else error * squares
    return error.sum(axis=1).sum()
