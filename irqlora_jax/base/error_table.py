"""A table for the allocation of bits: the error of every matrix with every candidate.

The table is kept in a file, so that an interrupted command goes on there, and another budget needs
no new table.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.base.layerwise import Task, output_error
from irqlora_jax.base.make import fit_pair, make_matrices
from irqlora_jax.base.source import open_weights
from irqlora_jax.base.stacks import Made, Matrix, Stacks
from irqlora_jax.data.calibrate import CalibrationRows
from irqlora_jax.files.checksums import check_seal
from irqlora_jax.files.hub import file_marks, read_config, snapshot
from irqlora_jax.files.kept_values import Values, append_value, kept_in, read_values
from irqlora_jax.files.small import read_json
from irqlora_jax.machine import installed_version
from irqlora_jax.messages import progress_bar
from irqlora_jax.model.tree import LAYERS, linear_path, matrix_name
from irqlora_jax.processes import exchange, first_only, from_first, is_first, together
from irqlora_jax.quant.config import KEPT, QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.quant.inputs import InputMoments
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
    adapter: AdapterConfig | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> Float[np.ndarray, "places candidates"]:
    """Computes the errors that are not in the file yet, and adds them to it. All processes; the
    first one writes the file.

    Args:
        source: local folder, GGUF file or hub id.
        quant: with `quant.candidates` and `quant.allocation.errors`.
        places: the matrices.
        file: keeps the errors.
        calibrate: rows of text, for the errors or the pairs that need them.
        adapter: of pairs that are fitted to the weights; its targets have the errors that remain
            after one turn of `adapter.init`. None: there are none.
        mesh: devices for the rows of text; None: one.
        progress: show a bar.

    Returns:
        The errors; infinite where a candidate cannot store a matrix.

    Raises:
        ValueError: the file has the errors of other settings; there is no sensitivity of a matrix;
            the text does not fit the model; a statistic is NaN or infinite.
    """
    asked = quant.allocation
    pairs = adapter is not None and adapter.needs != "nothing"
    calibrate = calibrate if asked.needs_text or pairs else None
    measured = None if asked.sensitivity is None else read_costs(Path(asked.sensitivity))
    if measured is not None:
        missing = [place for place in places if place not in measured.costs]
        first = matrix_name(linear_path(missing[0][1]), missing[0][0]) if missing else None
        accepted = f"the results of all matrices, but {first} is missing"
        require(not missing, "quant.allocation.sensitivity", asked.sensitivity, accepted)
    if adapter is not None:
        adapter = _one_turn(adapter)
    identity = _identity(source, quant, calibrate, measured, adapter)
    known = _of_first(lambda: read_values(file, identity, "errors", "errors for quant.budget"))
    left = [place for place in places if place not in known]
    bar = progress_bar("Errors of the formats", len(places), "matrices", show=progress)
    with bar as shown, kept_in(file):
        shown.update(len(places) - len(left))

        def keep(layer: int, name: str, errors: list[float]) -> None:
            if is_first():
                append_value(file, layer, name, "errors", errors)
            known[layer, name] = errors
            shown.update()

        if left:
            _compute(source, quant, left, calibrate, measured, adapter, mesh, keep)
            known = _of_all(known, file)
    table = np.array([known[place] for place in places], np.float64)
    if measured is not None:
        reference = table[:, -1:]
        costs = np.array([measured.costs[place] for place in places])[:, None]
        table = table[:, :-1] * costs / np.where(reference > 0, reference, 1)
    return np.where(np.isfinite(table), table, np.inf)


def _of_first(work: Callable[[], Values]) -> Values:
    """The values that the first process reads. All processes."""
    if jax.process_count() == 1:
        return work()
    return _from_json(from_first(lambda: _to_json(work())))


def _of_all(own: Values, file: Path) -> Values:
    """The values of all processes. Those that the first one did not have are added to its file.
    With a text every process has all of them, and those of the first one count. All processes."""
    if jax.process_count() == 1:
        return own
    found: Values = {}
    for text in reversed(exchange(_to_json(own))):
        found |= _from_json(text)

    def add() -> None:
        for layer, name in sorted(found.keys() - own.keys()):
            append_value(file, layer, name, "errors", found[layer, name])

    first_only(add)
    return found


def _to_json(values: Values) -> str:
    return json.dumps([(*place, value) for place, value in values.items()])


def _from_json(text: str) -> Values:
    return {(layer, name): value for layer, name, value in json.loads(text)}


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
    adapter: AdapterConfig | None,
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
    found |= {} if adapter is None else {"adapter": adapter}
    return json.loads(json.dumps(found, default=dataclasses.asdict))


def _one_turn(adapter: AdapterConfig) -> AdapterConfig:
    """The initialization with a single turn: more turns change little and take long."""
    name = adapter.start.name
    options = dataclasses.replace(getattr(adapter, name), iterations=1)
    return dataclasses.replace(adapter, **{name: options})


def _compute(
    source: str | Path,
    quant: QuantConfig,
    places: Sequence[Place],
    calibrate: CalibrationRows | None,
    measured: Measured | None,
    adapter: AdapterConfig | None,
    mesh: Mesh | None,
    keep: Callable[[int, str, list[float]], None],
) -> None:
    """Calls `keep` with layer, projection and the errors of all candidates; with a measured
    sensitivity also the error of what was measured. The model stays as it is."""
    kind = quant.allocation.errors
    damping = 0.0 if calibrate is None else calibrate.config.damping

    def make(
        matrix: Matrix, weight: jax.Array, gram: InputMoments | None, squares: jax.Array | None
    ) -> Made:
        name, key = matrix.path[-1], jax.random.key(0)
        pair = adapter if adapter is not None and name in adapter.targets else None

        def error(config: QuantConfig, pair: AdapterConfig | None) -> float:
            """The error with a candidate. A calibration that needs a text counts as none."""
            if config.format == KEPT:
                return 0.0
            config = config.plain if config.needs_inputs else config
            if pair is None:
                stored = quantize(weight, config).dequantize()
            else:
                made = fit_pair(weight, config, pair, key, gram, squares, damping)
                stored = made.dense(weight, pair.scale)
            if kind == "inputs":
                assert gram is not None
                return float(output_error(weight, stored, gram.gram))
            return float(weighed_error(weight, stored, squares if kind == "fisher" else None))

        errors = [error(config, pair) for config in quant.candidates]
        if measured is not None:
            place = matrix_name(matrix.path, matrix.layer)
            errors.append(error(measured.quant.for_matrix(place), None))
        keep(matrix.layer, name, errors)
        return Made(None, {})

    found, llama = together(lambda: open_weights(snapshot(source)))
    layers = range(llama.num_hidden_layers)
    kept = QuantConfig(format=KEPT)
    matrices = [Matrix(LAYERS, linear_path(name), i, layers, kept) for i, name in places]
    squares = kind == "fisher" or (adapter is not None and adapter.needs == "fisher")
    task = Task(kept, make, np.float32, calibrate, squares=squares)
    make_matrices(found, llama, matrices, task, Stacks(len(layers)), None, mesh)


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
