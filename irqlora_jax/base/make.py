"""Reads and quantizes the weights of a LLaMA, from a Hugging Face folder or a GGUF file.

Weights are quantized one tensor at a time while a thread reads the next one. So the host needs
little more memory than the packed model. With a text for the calibration, they are quantized layer
by layer (`layerwise.py`). Only safetensors and GGUF are opened, never pickles.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.lora import LORA
from irqlora_jax.base.exchange import on_own_device
from irqlora_jax.base.layerwise import FinishedLayers, Task, Watch, check_tokens, make_layers
from irqlora_jax.base.parts import Parts, Place
from irqlora_jax.base.rounds import make_each
from irqlora_jax.base.source import open_weights
from irqlora_jax.base.stacks import Made, Matrix, Stacks, to_device
from irqlora_jax.base.storage import plan_stacks
from irqlora_jax.data.calibrate import CalibrateConfig, CalibrationRows
from irqlora_jax.files.hub import file_marks, read_config, snapshot
from irqlora_jax.files.tensors import FLOATS, Header, aligned, read_into
from irqlora_jax.machine import installed_version
from irqlora_jax.messages import progress_bar
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.tree import (
    Keys,
    Tree,
    insert,
    leaf_path,
    matrix_name,
    weight_name,
    weight_shapes,
)
from irqlora_jax.processes import together
from irqlora_jax.quant.config import KEPT, QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.quant.formats import FORMATS
from irqlora_jax.quant.inputs import InputMoments
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.sharding import LINEAR_NAMES, sharding
from irqlora_jax.text import require

_TABLE = ("embed_tokens",)


def load_base(
    source: str | Path,
    quant: QuantConfig | None,
    *,
    calibrate: CalibrationRows | None = None,
    keep: Path | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
    watch: Watch | None = None,
) -> tuple[Tree, LlamaConfig]:
    """Reads a model and quantizes its linear layers, but not the head and the embeddings.

    Args:
        source: local folder, GGUF file or hub id.
        quant: quantization settings. None or format "none" keeps the type of the file.
        calibrate: rows of text, needed if `quant.needs_text`. With them, the model is quantized
            layer by layer, and the errors of the outputs are measured.
        keep: folder for finished layers, so that an interrupted call goes on there. Only with
            `calibrate`. The caller deletes it.
        mesh: devices to split the weights over, and the rows of `calibrate` (default: all on the
            first device).
        progress: show a bar.
        watch: called for each quantized matrix.

    Returns:
        The frozen weights, stacked over the layers (`model/tree.py`), and the architecture.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: a file is missing or invalid (the message
            names it), a rule matches no matrix, or there is no text although it is needed.
    """
    quant = QuantConfig(format=KEPT) if quant is None else quant
    _check_rows(quant, None, calibrate)

    def make(
        matrix: Matrix, weight: jax.Array, gram: InputMoments | None, squares: jax.Array | None
    ) -> Made:
        return Made(_packed(weight, matrix.quant, gram), {})

    finished = _finished(keep, source, calibrate, quant)
    task = Task(quant, make, np.float32, calibrate, finished, watch)
    base, _, config = _load(source, task, mesh, progress)
    return base, config


def load_fitted(
    source: str | Path,
    quant: QuantConfig,
    adapter: AdapterConfig,
    key: PRNGKeyArray,
    *,
    calibrate: CalibrationRows | None = None,
    keep: Path | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
    watch: Watch | None = None,
) -> tuple[Tree, Tree, LlamaConfig]:
    """Like `load_base`, but fits the targets of an adapter together with their LoRA pairs.

    Args:
        source: local folder, GGUF file or hub id.
        quant: quantization settings.
        adapter: initialization, targets, rank, alpha and type of the pairs.
        key: random key, e.g. for a randomized SVD.
        calibrate: rows of text, also needed unless `adapter.needs` is "nothing".
        keep: as for `load_base`.
        mesh: devices to split weights and pairs over (default: all on the first device).
        progress: show a bar.
        watch: called for each quantized matrix.

    Returns:
        The frozen weights, the pairs lora_A and lora_B for `Llama.init_adapters`, both stacked over
        the layers, and the architecture.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: as `load_base`; also if nothing is
            quantized, or if the initialization is not fitted to the weights.
    """
    require(quant.quantizes, "quant.format", quant.format, ", ".join(FORMATS))
    if adapter.start.fit is None:
        raise ValueError(f"adapter.init = {adapter.init!r}: expected one fitted to the weights")
    damping = _check_rows(quant, adapter, calibrate)
    seed = jax.random.key_data(key).tolist()  # `key` may be on other devices than the weights

    def make(
        matrix: Matrix, weight: jax.Array, gram: InputMoments | None, squares: jax.Array | None
    ) -> Made:
        name, config = matrix.path[-1], matrix.quant
        if name not in adapter.targets:
            return Made(_packed(weight, config, gram), {})
        start = jax.random.wrap_key_data(
            jnp.asarray(seed, jnp.uint32), impl=jax.random.key_impl(key)
        )
        own = jax.random.fold_in(start, LINEAR_NAMES.index(name))
        own = jax.random.fold_in(own, matrix.layer)
        if config.format == KEPT:
            # There is no quantization error to correct, so initialize the pair as in LoRA.
            rows, columns = weight.shape
            return Made(None, LORA.init(own, (rows, columns), adapter.rank, None, adapter.dtype))
        return fit_pair(weight, config, adapter, own, gram, squares, damping)

    finished = _finished(keep, source, calibrate, quant, adapter, seed)
    # Keep the type of the file: each iteration reads the matrix again and widens it slab by slab.
    squares = adapter.needs == "fisher"
    task = Task(quant, make, None, calibrate, finished, watch, adapter, squares)
    return _load(source, task, mesh, progress)


def fit_pair(
    weight: jax.Array,
    config: QuantConfig,
    adapter: AdapterConfig,
    key: PRNGKeyArray,
    gram: InputMoments | None,
    squares: jax.Array | None,
    damping: float,
) -> Made:
    """Fits the quantized weight and the pair by `adapter.init`. `squares` are used if it needs
    them, `damping` is that of the text."""
    start = adapter.start
    assert start.fit is not None
    options = getattr(adapter, start.name, start.options)
    scale = adapter.scale_for((weight.shape[0], weight.shape[1]))
    given: dict[str, Any] = {"gram": gram, "damping": damping}
    given |= {"fisher": squares} if adapter.needs == "fisher" else {}
    packed, a, b = start.fit(
        weight, config, adapter.rank, scale, options, key, adapter.dtype, **given
    )
    return Made(packed, {"lora_A": a, "lora_B": b})


def load_loftq(
    source: str | Path,
    quant: QuantConfig,
    adapter: AdapterConfig,
    key: PRNGKeyArray,
    **options: Any,
) -> tuple[Tree, Tree, LlamaConfig]:
    """Calls `load_fitted` with LoftQ (`adapters/loftq.py`) and ignores `adapter.init`."""
    return load_fitted(source, quant, dataclasses.replace(adapter, init="loftq"), key, **options)


def check_text(quant: QuantConfig, adapter: AdapterConfig | None, given: CalibrateConfig) -> None:
    """Checks that the settings of the text and of the training are what the other settings need.

    Raises:
        ValueError: there is no text although one is needed, its metric does not fit, or pairs are
            not trained that have to be; the message names the settings.
    """
    if adapter is not None and adapter.start.trained:
        accepted, trainer = f"with adapter.init {adapter.init}", quant.trainer
        require(trainer is not None, "quant.training", quant.training, f"apiq or block {accepted}")
        assert trainer is not None
        rate = f"quant.{quant.training}.pair_lr"
        require(trainer.pair_lr > 0, rate, trainer.pair_lr, f"a positive number {accepted}")
    needed = f"a text, needed by quant ({quant.label})" if quant.needs_text else None
    chooses = quant.budget is not None and quant.allocation.needs_text
    if chooses:
        needed = f"a text, needed by quant.allocation.errors {quant.allocation.errors}"
    if adapter is not None and adapter.needs != "nothing":
        needed = f"a text, needed by adapter.init {adapter.init}"
    require(needed is None or given.data is not None, "calibrate.data", None, needed or "")
    ok = adapter is None or adapter.needs != "fisher" or given.metric == "gradients"
    accepted = "gradients, which weigh the errors of adapter.init"
    require(ok, "calibrate.metric", given.metric, accepted)
    errors = quant.allocation.errors
    metric = "gradients" if errors == "fisher" else "inputs"
    ok, accepted = not chooses or given.metric == metric, f"{metric} with quant.allocation.errors"
    require(ok, "calibrate.metric", given.metric, f"{accepted} {errors}")
    ok = quant.training == "none" or given.metric == "inputs"
    accepted = f"inputs with quant.training {quant.training}"
    require(ok, "calibrate.metric", given.metric, accepted)


def _check_rows(
    quant: QuantConfig, adapter: AdapterConfig | None, calibrate: CalibrationRows | None
) -> float:
    """Checks as `check_text`, for rows that need not come from a file. Returns the damping."""
    given = CalibrateConfig() if calibrate is None else calibrate.config
    source = None if calibrate is None else given.data or "rows"
    check_text(quant, adapter, dataclasses.replace(given, data=source))
    return given.damping


def _packed(weight: jax.Array, config: QuantConfig, gram: InputMoments | None) -> QTensor:
    return quantize(weight, config, gram=gram if config.needs_inputs else None)


def _finished(
    keep: Path | None, source: str | Path, calibrate: CalibrationRows | None, *settings: Any
) -> FinishedLayers | None:
    """Names all that the layers depend on."""
    if keep is None or calibrate is None:
        return None
    path = snapshot(source)
    about = {
        "files": file_marks(path),
        "llama": read_config(path).to_dict(),
        "version": installed_version("irqlora-jax"),
        "text": calibrate.describe(),
        "settings": settings,
    }
    return FinishedLayers(keep, json.dumps(about, default=dataclasses.asdict))


def _load(
    source: str | Path, task: Task, mesh: Mesh | None, progress: bool
) -> tuple[Tree, Tree, LlamaConfig]:
    """Returns the base, the pairs that `task.make` fits, and the architecture."""
    found, config = together(lambda: open_weights(snapshot(source)))
    layered, single = weight_shapes(config)
    stacks = Stacks(config.num_hidden_layers, mesh)
    total = sum(map(math.prod, single.values()))
    total += config.num_hidden_layers * sum(map(math.prod, layered.values()))
    with progress_bar("Loading", total, "weights", show=progress, unit_scale=True) as bar:
        matrices = together(lambda: _read_kept(found, config, task, stacks, bar))
        outside = make_matrices(found, config, matrices, task, stacks, bar, mesh)
        base, pairs = stacks.moved()
        for path, shape in single.items():
            if path[0] in outside:
                weight = to_device(outside.pop(path[0]), mesh, path)
            else:
                parts = together(lambda p=path: _read_parts(found, p, single[p], mesh))
                weight = parts.moved()
            insert(base, leaf_path(path), weight)
            bar.update(math.prod(shape))
    return base, pairs, config


def make_matrices(
    found: Mapping[str, Header],
    llama: LlamaConfig,
    matrices: Sequence[Matrix],
    task: Task,
    stacks: Stacks,
    bar: Any,
    mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
    """Makes matrices: one after the other, or with a text layer by layer (`make_layers`).

    Returns:
        Weights outside of the layers that were read for it: name and array.
    """
    with on_own_device(mesh):
        if task.calibrate is None:
            make_each(found, matrices, task, stacks, bar)
            return {}
        check_tokens(task.calibrate, llama)
        single = weight_shapes(llama)[1]
        wanted = single if task.calibrate.config.metric == "gradients" else [_TABLE]
        outside = together(
            lambda: {path[0]: _read_single(found, path, single[path]) for path in wanted}
        )
        make_layers(found, llama, matrices, task, stacks, outside, bar, mesh)
        return outside


def _read_single(found: Mapping[str, Header], path: Keys, shape: tuple[int, ...]) -> np.ndarray:
    """A weight outside of the layers, whole."""
    name = weight_name(path)
    weight = aligned(shape, FLOATS[found[name].dtype])
    read_into(weight, found[name], name)
    return weight


def _read_parts(
    found: Mapping[str, Header], path: Keys, shape: tuple[int, ...], mesh: Mesh | None
) -> Parts:
    """The parts of a weight outside of the layers that the devices of this process need."""
    name = weight_name(path)
    where = None if mesh is None else sharding(mesh, path, shape)
    parts = Parts(shape, FLOATS[found[name].dtype], where)
    for space, place in parts.spaces():
        _read_place(space, place, found[name], name)
    return parts


def _read_place(space: np.ndarray, place: Place, header: Header, name: str) -> None:
    """Reads the rows and columns of a weight at a place."""
    rows, *columns = place
    whole = all(
        s.indices(size)[:2] == (0, size) for s, size in zip(columns, header.shape[1:], strict=True)
    )
    read_into(space, header, name, rows.start, None if whole else columns[0])


def _read_kept(
    found: Mapping[str, Header], config: LlamaConfig, task: Task, stacks: Stacks, bar: Any
) -> list[Matrix]:
    """Reads the weights of the layers that are kept as they are, and lists the other ones."""
    matrices, shapes = [], weight_shapes(config)[0]
    for name, layers in plan_stacks(config, task.quant).items():
        for layer in layers:
            for path, shape in shapes.items():
                own = task.quant.for_matrix(matrix_name(path, layer))
                linear = path[-1] in LINEAR_NAMES
                kept = not linear or own.format == KEPT
                if linear and (not kept or path[-1] in task.targets):
                    matrices.append(Matrix(name, path, layer, layers, own))
                if not kept:
                    continue
                tensor = weight_name(path, layer)
                like = jax.ShapeDtypeStruct((len(layers), *shape), FLOATS[found[tensor].dtype])
                for space, place in stacks.spaces((name, *path), layer - layers.start, like):
                    _read_place(space, place, found[tensor], tensor)
                bar.update(math.prod(shape))
    return matrices
