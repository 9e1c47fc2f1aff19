"""Quantizes a model layer by layer, with statistics from rows of text (`statistics.py`).

Memory is needed for the weights of one layer and its statistics, and on the host for the hidden
states. Finished layers can be kept in files, so that an interrupted call goes on there.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.base.exchange import tree_from_first
from irqlora_jax.base.file import Base, read_base, read_source, save_base
from irqlora_jax.base.fit_layer import StoredLinear
from irqlora_jax.base.stacks import Made, Maker, Matrix, Stacks
from irqlora_jax.base.statistics import Gradients, Inputs, Statistics, alone
from irqlora_jax.base.storage import packed_shape
from irqlora_jax.base.train_layer import train_layer
from irqlora_jax.data.calibrate import CalibrationRows
from irqlora_jax.files.tensors import FLOATS, Header, aligned, read_into
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.tree import Tree, insert, leaf_path, matrix_name, weight_name, weight_shapes
from irqlora_jax.processes import first_only, from_first, is_first, together
from irqlora_jax.quant.config import KEPT, QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.quant.inputs import InputMoments
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.sharding import LINEAR_NAMES, PAIR

logger = logging.getLogger(__name__)


class OutputErrors(NamedTuple):
    """Errors of the outputs of one matrix: |X (W - W')^T|^2 / |X W^T|^2. With `calibrate.metric`
    gradients, X^T X is the sum of G^T G over the rows.

    Attributes:
        plain: error of the plain quantizer.
        own: error of the quantizer of this base, and with a fitted adapter of both.
    """

    plain: float
    own: float


Watch = Callable[[int, str, Array, QTensor, QuantConfig, OutputErrors | None], None]
"""Called for each quantized matrix with layer, projection, weights, the QTensor, its configuration
and, if there is a text, the errors of its outputs. The weights are overwritten after the call."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What is made of the weights of a model.

    Attributes:
        quant: quantization settings.
        make: makes one matrix. It gets each matrix that is quantized or whose projection is in
            `targets`.
        dtype: type of the matrices for `make`; None: the type in the file.
        calibrate: rows of text; None: one matrix after the other, without statistics.
        finished: files of finished layers; None: they are not kept.
        watch: called for each quantized matrix.
        adapter: of the fitted pairs; None: there are none.
        squares: `make` gets the squared gradients too.
    """

    quant: QuantConfig
    make: Maker
    dtype: Any
    calibrate: CalibrationRows | None = None
    finished: "FinishedLayers | None" = None
    watch: Watch | None = None
    adapter: AdapterConfig | None = None
    squares: bool = False

    @property
    def targets(self) -> tuple[str, ...]:
        """The projections that get a pair."""
        return () if self.adapter is None else self.adapter.targets

    def shapes(self, matrix: Matrix, shape: tuple[int, ...]) -> Made:
        """The shapes of what is made of a matrix of a shape."""
        out, into = shape
        kept = matrix.quant.format == KEPT
        weight: Any = None if kept else packed_shape((out, into), matrix.quant)
        pair: Any = {}
        if self.adapter is not None and matrix.path[-1] in self.targets:
            sizes = {"lora_A": (self.adapter.rank, into), "lora_B": (out, self.adapter.rank)}
            dtype = jnp.dtype(self.adapter.dtype)
            pair = {name: jax.ShapeDtypeStruct(size, dtype) for name, size in sizes.items()}
        return Made(weight, pair)

    @property
    def scale(self) -> float:
        """The factor of the update of a pair."""
        return 0.0 if self.adapter is None else self.adapter.scale


@jax.jit
def output_error(
    weight: Float[Array, "out in"], other: Float[Array, "out in"], gram: Float32[Array, "in in"]
) -> Float32[Array, ""]:
    """|X (W - W')^T|^2 / |X W^T|^2 in Frobenius norms, with gram = X^T X."""
    weight = weight.astype(jnp.float32)

    def size(x: Array) -> Array:
        return jnp.sum(jnp.matmul(x, gram, precision="highest") * x)

    whole = size(weight)
    return size(weight - other) / jnp.where(whole > 0, whole, 1)


@dataclasses.dataclass(frozen=True)
class FinishedLayers:
    """Files of the layers that are finished, so that an interrupted command goes on there.

    Attributes:
        folder: FOLDER/layer_INDEX.safetensors; deleted when the base is complete.
        identity: everything that the layers depend on. Files with another identity are not used.
    """

    folder: Path
    identity: str

    def read(self, layer: int) -> tuple[Base, dict[str, OutputErrors]] | None:
        """What `write` got for a layer; None if there is no such file, or it is damaged."""
        file = self._file(layer)
        if not file.is_file():
            return None
        try:
            about, (base, _) = json.loads(read_source(file) or "{}"), read_base(file)
        except ValueError as error:
            logger.warning(f"{error}; layer {layer} is quantized again")
            return None
        if about.get("identity") != self.identity:
            return None
        errors = {name: OutputErrors(*pair) for name, pair in about["errors"].items()}
        return base, errors

    def write(
        self,
        layer: int,
        made: Base,
        errors: Mapping[str, OutputErrors],
        llama: LlamaConfig,
        quant: QuantConfig,
    ) -> None:
        """Writes the packed weights and the pairs of a layer, and its errors by projection."""
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"identity": self.identity, "errors": errors}
        save_base(self._file(layer), made, llama, quant, json.dumps(about))

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer_{layer}.safetensors"


def check_tokens(rows: CalibrationRows, llama: LlamaConfig) -> None:
    """Says if there are fewer tokens than inputs of a layer, or tokens beyond the vocabulary.

    Raises:
        ValueError: a token is not in the vocabulary.
    """
    highest = int(rows.tokens.max())
    if highest >= llama.vocab_size:
        raise ValueError(
            f"calibrate.data: token {highest}; expected tokens below vocab_size = "
            f"{llama.vocab_size}, from the tokenizer of the model"
        )
    name, (_, widest) = max(llama.linear_shapes.items(), key=lambda item: item[1][1])
    if rows.tokens.size < widest:
        logger.warning(
            f"calibrate: {rows.tokens.size:,} tokens are fewer than the {widest:,} inputs of "
            f"{name}; more calibrate.rows, or more calibrate.damping, are better"
        )


def make_layers(
    found: Mapping[str, Header],
    llama: LlamaConfig,
    matrices: Sequence[Matrix],
    task: Task,
    stacks: Stacks,
    outside: Mapping[str, Float[np.ndarray, "..."]],
    bar: Any,
    mesh: Mesh | None = None,
) -> None:
    """Makes matrices, one layer after the other. All processes.

    Every process computes all layers, but the results of the first one are used, so that all
    continue with the same bits.

    Args:
        found: headers of the weights.
        llama: the architecture.
        matrices: those to make.
        task: what to make of them; with `calibrate`.
        stacks: gets the results.
        outside: weights outside of the layers: "embed_tokens", and for gradients "norm" and, if it
            is not tied, "lm_head".
        bar: the progress bar, which counts weights.
        mesh: its devices of this process compute rows of text side by side; None: one device.
            Everything else, also `quant.training`, is computed on one device.

    Raises:
        ValueError: a statistic of a layer is NaN or infinite, or an error of `task.make`.
    """
    assert task.calibrate is not None
    depth = llama.num_hidden_layers
    by_layer: list[dict[Any, Matrix]] = [{} for _ in range(depth)]
    for matrix in matrices:
        by_layer[matrix.layer][matrix.path] = matrix

    def read(layer: int) -> Tree:
        return _read_layer(found, llama, layer, by_layer[layer], task.dtype)

    def begin() -> Statistics:
        assert task.calibrate is not None
        if task.calibrate.config.metric == "gradients":
            return Gradients(llama, task.calibrate, outside, read, task.squares, mesh)
        both = task.quant.training != "none"
        return Inputs(llama, task.calibrate, outside["embed_tokens"], both, mesh)

    statistics = together(begin)
    # Layers behind the last one with a matrix to make, e.g. of a resumed table, are not computed.
    needed = max((i + 1 for i, layer in enumerate(statistics.order) if by_layer[layer]), default=0)
    for count, layer in enumerate(statistics.order[:needed]):
        own, weights = by_layer[layer], together(lambda layer=layer: read(layer))

        def make(layer: int = layer, weights: Tree = weights) -> Any:
            return _make_layer(statistics, weights, by_layer[layer], task, layer, llama)

        made, errors = _finished_or(make, task, layer, weights, own, llama)
        new = weights
        for path, matrix in own.items():
            (group, name), one = path, made[path]
            weight = weights[group][name]["weight"]
            if one.weight is not None:
                if task.watch is not None:
                    task.watch(layer, name, weight, one.weight, matrix.quant, errors.get(name))
                bar.update(weight.size)
            stacks.put(matrix, one)
            changed = {name: {**weights[group][name], "weight": one.dense(weight, task.scale)}}
            new = {**new, group: {**new[group], **changed}}
        if count + 1 < needed:
            statistics.advance(weights, new)
        if errors:
            plain, now = (math.fsum(x) / len(errors) for x in zip(*errors.values(), strict=True))
            error = f"output error {now:.2%} (plain quantizer {plain:.2%})"
            bar.set_postfix_str(f"layer {count + 1} of {depth}, {error}")


def _finished_or(
    make: Callable[[], tuple[dict[Any, Made], dict[str, OutputErrors]]],
    task: Task,
    layer: int,
    weights: Tree,
    matrices: Mapping[Any, Matrix],
    llama: LlamaConfig,
) -> tuple[dict[Any, Made], dict[str, OutputErrors]]:
    """The finished layer, or what `make` gives, which is then kept; of the first process."""
    files, kept = task.finished, None
    if files is not None:
        kept = together(lambda: files.read(layer) if is_first() else None)
    finished = from_first(lambda: "" if kept is None else "finished")
    made, errors = {}, {}
    if kept is not None:
        made, errors = _unpack(kept)
    elif not finished:
        made, errors = together(make)
    if jax.process_count() > 1:
        shapes = {path: weights[path[0]][path[1]]["weight"].shape for path in matrices}
        like = {path: task.shapes(matrix, shapes[path]) for path, matrix in matrices.items()}
        made = jax.tree.map(jnp.asarray, tree_from_first(made, like))
        found = json.loads(from_first(lambda: json.dumps(errors)))
        errors = {name: OutputErrors(*pair) for name, pair in found.items()}
    if files is not None and not finished:
        first_only(lambda: files.write(layer, _pack(made), errors, llama, task.quant))
    return made, errors


def _read_layer(
    found: Mapping[str, Header],
    llama: LlamaConfig,
    layer: int,
    matrices: Mapping[Any, Matrix],
    dtype: Any,
) -> Tree:
    """All weights of a layer. Those that are not made have the type of the file."""
    weights: Tree = {}
    for path, shape in weight_shapes(llama)[0].items():
        name = weight_name(path, layer)
        own = dtype is not None and path in matrices
        array = aligned(shape, dtype if own else FLOATS[found[name].dtype])
        read_into(array, found[name], name)
        insert(weights, leaf_path(path), jax.device_put(array, may_alias=True))
    return weights


def _make_layer(
    statistics: Statistics,
    weights: Tree,
    matrices: Mapping[Any, Matrix],
    task: Task,
    layer: int,
    llama: LlamaConfig,
) -> tuple[dict[Any, Made], dict[str, OutputErrors]]:
    made: dict[Any, Made] = {}
    errors: dict[str, OutputErrors] = {}
    try:
        moments = statistics.moments(weights) if matrices else {}
    except ValueError as error:
        raise ValueError(f"layer {layer}: {error}") from error
    assert task.calibrate is not None
    inputs: InputMoments | None = None
    for path, matrix in matrices.items():
        (group, name), gram = path, moments[path[-1]]
        if inputs is None or inputs.gram is not gram:  # the same for q, k and v; one at a time
            inputs = InputMoments(gram, task.calibrate.config.damping)
        try:
            weight, squares = weights[group][name]["weight"], statistics.squares.get(name)
            made[path] = task.make(matrix, weight, inputs, squares)
        except ValueError as error:
            raise ValueError(f"{matrix_name(path, layer)}: {error}") from error
    if matrices and task.quant.training != "none":
        assert isinstance(statistics, Inputs)
        made = _train(statistics, weights, made, task, layer, llama)
    for (group, name), matrix in matrices.items():
        one, weight = made[group, name], weights[group][name]["weight"]
        if one.weight is not None:
            plain = quantize(weight, matrix.quant.plain).dequantize()
            both = plain, one.dense(weight, task.scale)
            found = (float(output_error(weight, x, moments[name])) for x in both)
            errors[name] = OutputErrors(*found)
    return made, errors


def _train(
    statistics: Inputs,
    weights: Tree,
    made: Mapping[Any, Made],
    task: Task,
    layer: int,
    llama: LlamaConfig,
) -> dict[Any, Made]:
    """Trains the matrices of a layer together, and logs the error of its output."""
    options, full = task.quant.trainer, statistics.full
    assert options is not None and full is not None
    start = {name: StoredLinear(None, {}) for name in LINEAR_NAMES}
    start |= {name: StoredLinear(*one) for (_, name), one in made.items()}
    settings = dataclasses.replace(alone(llama, layer), adapter=task.adapter)
    states, full = (x.astype(np.float32, copy=False) for x in (statistics.states, full))
    found = train_layer(settings, task.quant, layer, weights, start, states, full, options)
    logger.info(
        f"layer {layer}: mean squared error of the output {found.loss_before:.3g} before its "
        f"training, {found.loss_after:.3g} after"
    )
    return {path: Made(*found.linears[path[-1]]) for path in made}


def _pack(made: Mapping[Any, Made]) -> Base:
    """The results of a layer as a tree for `save_base`."""
    tree: Base = {}
    for path, one in made.items():
        weight = {} if one.weight is None else {"weight": one.weight}
        insert(tree, path, {**weight, **one.pair})
    return tree


def _unpack(
    kept: tuple[Base, dict[str, OutputErrors]],
) -> tuple[dict[Any, Made], dict[str, OutputErrors]]:
    """The reverse of `_pack`."""
    tree, errors = kept
    return {
        (group, name): Made(one.get("weight"), {leaf: one[leaf] for leaf in PAIR if leaf in one})
        for group, part in tree.items()
        for name, one in part.items()
    }, errors
