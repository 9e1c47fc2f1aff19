"""Statistics of the linear layers for rows of text, one layer after the other.

`Inputs`: X^T X of the inputs X of each linear layer (GPTQ). In front of a layer are the hidden
states that the quantized layers before it give. The layer itself is in full precision.

`Gradients`: the sum of G^T G over the rows, where G [out, in] is the gradient of the row's
cross-entropy (OAC, arXiv 2405.15025). It says how much the loss, and not only the output of the
layer, depends on the weights. The whole model is in full precision, and the layers come from the
last to the first. We could not check the paper's closed form: this is our reading.

`Gradients` also sums the squares of the elements of G: the Fisher information of each weight, as
LQ-LoRA needs it.

Calibrations do not depend on the size of these matrices, so each is divided by its mean diagonal.

With a mesh, the rows of a forward pass are split over its devices. Sums over rows are then rounded
in another order, so a few codes may differ from the codes that one device gives.
"""

import abc
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int

from irqlora_jax.data.calibrate import CalibrationRows
from irqlora_jax.model.alone import GROUPS, layer_moments, layer_outputs
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.layer import Settings, rms_norm
from irqlora_jax.model.loss import row_cross_entropy
from irqlora_jax.model.tree import Tree, linear_weights
from irqlora_jax.sharding import ROWS, put_copies, put_rows

SAME_INPUTS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Projections with the inputs of another one."""
Moments = dict[str, Float32[Array, "in in"]]
"""A matrix for each projection, with a mean diagonal of 1."""
Squares = dict[str, Float32[Array, "out in"]]
"""Sums of squared gradients for each projection."""


class Devices:
    """Where layers are computed.

    Attributes:
        count: number of parts that rows are split into.
    """

    def __init__(self, mesh: Mesh | None) -> None:
        self._mesh = mesh
        self.count = 1 if mesh is None else mesh.shape[ROWS[0]] * mesh.shape[ROWS[1]]

    def copied(self, tree: Any) -> Any:
        """A tree with a copy on each device."""
        return tree if self._mesh is None else put_copies(self._mesh, tree)

    def call(self, function: Callable[..., Any], *rows: np.ndarray) -> Any:
        """`function` of rows [batch, ...], which are split over the devices."""
        if self._mesh is None:
            return function(*rows)
        with jax.set_mesh(self._mesh):
            return function(*(put_rows(self._mesh, x) for x in rows))


class Statistics(abc.ABC):
    """Goes through the layers in the order of `order`.

    Attributes:
        order: indices of the layers.
        squares: sums of squared gradients of the layer of the last `moments`; empty if they were
            not asked for.
    """

    order: Sequence[int]
    squares: Squares

    @abc.abstractmethod
    def moments(self, weights: Tree) -> Moments:
        """The statistics of the next layer.

        Args:
            weights: of the layer, in full precision.

        Raises:
            ValueError: a value is NaN or infinite.
        """

    @abc.abstractmethod
    def advance(self, weights: Tree, quantized: Tree) -> None:
        """Moves behind the next layer.

        Args:
            weights: of the layer, in full precision.
            quantized: the weights that the layer has now, dense.
        """


class Inputs(Statistics):
    """X^T X of the inputs, from the first layer to the last.

    Attributes:
        states: hidden states in front of the next layer, behind the quantized layers.
        full: the same behind the layers in full precision; None: not asked for.
    """

    def __init__(
        self,
        llama: LlamaConfig,
        rows: CalibrationRows,
        embeddings: Float[np.ndarray, "vocab hidden"],
        both: bool = False,
        mesh: Mesh | None = None,
    ) -> None:
        self.order, self.squares = range(llama.num_hidden_layers), {}
        self._llama, self._devices = llama, Devices(mesh)
        self._layer = 0
        self._size = rows.config.batch_size * self._devices.count
        self.states = _kept(embeddings[rows.tokens], rows.config.activations)
        self.full = self.states.copy() if both else None

    def moments(self, weights: Tree) -> Moments:
        total: Any = None
        own = self._devices.copied(weights)
        measure = functools.partial(input_moments, alone(self._llama, self._layer), own)
        for part in self._parts(self.states):
            found = self._devices.call(measure, part.astype(np.float32))
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        total = _relative(self._devices.copied(total))
        return total | {name: total[same] for name, same in SAME_INPUTS.items()}

    def advance(self, weights: Tree, quantized: Tree) -> None:
        for states, own in ((self.states, quantized), (self.full, weights)):
            if states is not None:
                own = self._devices.copied(own)
                settings = alone(self._llama, self._layer)
                apply = functools.partial(layer_outputs, settings, own)
                for part in self._parts(states):  # views, so that no second array is needed
                    part[:] = self._devices.call(apply, part.astype(np.float32))
        self._layer += 1

    def _parts(self, states: np.ndarray) -> Iterator[np.ndarray]:
        return (states[i : i + self._size] for i in range(0, len(states), self._size))


class Gradients(Statistics):
    """Sums of G^T G, from the last layer to the first.

    The hidden states in front of all layers, and the gradients, are on the host.
    """

    def __init__(
        self,
        llama: LlamaConfig,
        rows: CalibrationRows,
        outside: Mapping[str, Float[np.ndarray, "..."]],
        read: Callable[[int], Tree],
        squares: bool = False,
        mesh: Mesh | None = None,
    ) -> None:
        """Computes the hidden states, and the gradients behind the last layer.

        Args:
            llama: the architecture.
            rows: the text.
            outside: "embed_tokens", "norm", and "lm_head" if it is not tied.
            read: the weights of a layer in full precision.
            squares: also sum the squared gradients.
            mesh: devices; None: one.
        """
        self._llama, self._dtype = llama, rows.config.activations
        self._devices = Devices(mesh)
        depth = llama.num_hidden_layers
        self.order = range(depth - 1, -1, -1)
        batches = _batches(rows, self._devices.count)
        self._states = [[_kept(outside["embed_tokens"][batch], self._dtype) for batch in batches]]
        for layer in range(depth):
            weights = self._devices.copied(read(layer))
            apply = functools.partial(layer_outputs, alone(llama, layer), weights)
            outputs = (self._devices.call(apply, x.astype(np.float32)) for x in self._states[-1])
            self._states.append([_kept(x, self._dtype) for x in outputs])
        head = outside.get("lm_head", outside["embed_tokens"])
        norm, head = self._devices.copied((outside["norm"], head))
        measure = functools.partial(_loss_gradient, llama, norm, head)
        self._gradients = [
            np.asarray(self._devices.call(measure, x.astype(np.float32), batch))
            for x, batch in zip(self._states.pop(), batches, strict=True)
        ]
        self._next: list[np.ndarray] = []
        self.squares, self._squared = {}, squares

    def moments(self, weights: Tree) -> Moments:
        total: Any = None
        self._next = []
        own = self._devices.copied(weights)
        for x, g in zip(self._states[-1], self._gradients, strict=True):
            parts = self._devices.count if len(x) % self._devices.count == 0 else 1
            options = {"squares": self._squared, "parts": parts}
            settings = alone(self._llama, len(self._states) - 1)  # states in front of each layer
            measure = functools.partial(gradient_moments, settings, own, **options)
            before, *found = self._devices.call(measure, x.astype(np.float32), g)
            self._next.append(np.asarray(before))
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        moments, self.squares = self._devices.copied(total)
        return _relative(moments)

    def advance(self, weights: Tree, quantized: Tree) -> None:
        if not self._next:  # the layer was finished already
            self.moments(weights)
        self._gradients, self._next = self._next, []
        self._states.pop()


def alone(llama: LlamaConfig, layer: int) -> Settings:
    """The settings of a layer without adapters. Layers of the same kind have the same."""
    return Settings(llama.of_layer(layer), None, None, None, deterministic=True)


def _batches(rows: CalibrationRows, devices: int) -> list[Int[np.ndarray, "batch length"]]:
    size = rows.config.batch_size * devices
    return [rows.tokens[i : i + size] for i in range(0, len(rows.tokens), size)]


def _kept(x: Any, dtype: str) -> np.ndarray:
    return np.asarray(x).astype(jnp.dtype(dtype))


def _relative(total: Moments) -> Moments:
    """Divides each matrix by its mean diagonal, and checks it."""
    for name, gram in total.items():
        # The extremes need no array of the size of the matrix. They are NaN if any value is.
        if not np.isfinite([float(gram.min()), float(gram.max())]).all():
            raise ValueError(
                f"{name}: an input or gradient is NaN or infinite for the calibration text; "
                "expected a model with finite activations"
            )
    means = {name: jnp.diagonal(gram).mean() for name, gram in total.items()}
    return {name: gram / jnp.where(means[name] > 0, means[name], 1) for name, gram in total.items()}


@functools.partial(jax.jit, static_argnames="settings")
def input_moments(
    settings: Settings, weights: Tree, x: Float32[Array, "batch seq hidden"]
) -> Moments:
    """X^T X of the inputs of each projection, without those in `SAME_INPUTS`."""
    found = layer_moments(settings, weights, x)[1]
    return {name: gram for name, gram in found.items() if name not in SAME_INPUTS}


@functools.partial(jax.jit, static_argnames="llama")
def _loss_gradient(
    llama: LlamaConfig,
    norm: Float[Array, " hidden"],
    head: Float[Array, "vocab hidden"],
    x: Float32[Array, "batch seq hidden"],
    tokens: Int[Array, "batch seq"],
) -> Float32[Array, "batch seq hidden"]:
    """The gradient of the sum of the rows' cross-entropies."""

    def loss(x: Array) -> Array:
        features = rms_norm(x, norm, llama.rms_norm_eps)
        return row_cross_entropy(features, head, tokens, jnp.ones(tokens.shape, bool))[0].sum()

    return jax.grad(loss)(x)


@functools.partial(jax.jit, static_argnames=("settings", "squares", "parts"))
def gradient_moments(
    settings: Settings,
    weights: Tree,
    x: Float32[Array, "batch seq hidden"],
    gradient: Float32[Array, "batch seq hidden"],
    squares: bool = False,
    parts: int = 1,
) -> tuple[Float32[Array, "batch seq hidden"], Moments, Squares]:
    """The gradient in front of the layer, the sum of G^T G over the rows and, if asked for, the sum
    of the squares of the elements of G.

    The rows are summed one after the other in each of `parts`, which devices compute side by side.
    """
    linear = {group: weights[group] for group in GROUPS}  # and biases, whose gradients are dropped

    def row_moments(
        total: tuple[Moments, Squares], row: tuple[Array, Array]
    ) -> tuple[tuple[Moments, Squares], Array]:
        x, g = (part[None] for part in row)

        def outputs(linear: Tree, x: Array) -> Array:
            return layer_outputs(settings, weights | linear, x)

        wide = jax.tree.map(lambda w: w.astype(jnp.float32), linear)
        own, before = jax.vjp(outputs, wide, x)[1](g)
        flat = linear_weights(own)
        grams = {name: jnp.matmul(g.T, g, precision="highest") for name, g in flat.items()}
        found = grams, {name: g**2 for name, g in flat.items()} if squares else {}
        return jax.tree.map(jnp.add, total, found), before[0]

    shapes = {name: weight.shape for name, weight in linear_weights(linear).items()}
    start = {name: jnp.zeros((size, size), jnp.float32) for name, (_, size) in shapes.items()}
    each = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items() if squares}

    def of_part(x: Array, gradient: Array) -> Any:
        return jax.lax.scan(row_moments, (start, each), (x, gradient))

    if parts == 1:
        total, before = of_part(x, gradient)
        return before, *total
    split = (y.reshape(parts, -1, *y.shape[1:]) for y in (x, gradient))
    totals, before = jax.vmap(of_part)(*split)
    return before.reshape(x.shape), *jax.tree.map(lambda y: y.sum(0), totals)
