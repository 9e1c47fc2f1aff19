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

Several devices compute batches of rows side by side. The results do not depend on their number.
"""

import abc
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int

from irqlora_jax.base.exchange import own_devices, single
from irqlora_jax.data.calibrate import CalibrationRows
from irqlora_jax.model.alone import GROUPS, layer_moments, layer_outputs
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.layer import Settings, rms_norm
from irqlora_jax.model.loss import row_cross_entropy
from irqlora_jax.model.tree import Tree, linear_weights

SAME_INPUTS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Projections with the inputs of another one."""
Moments = dict[str, Float32[Array, "in in"]]
"""A matrix for each projection, with a mean diagonal of 1."""
Squares = dict[str, Float32[Array, "out in"]]
"""Sums of squared gradients for each projection."""


class Devices:
    """The devices of this process, which compute batches of rows side by side.

    Each batch is computed by one device, and sums go through the batches in their order. So the
    results are the same for any number of devices.
    """

    def __init__(self, mesh: Mesh | None) -> None:
        self._devices = own_devices(mesh)

    def copied(self, tree: Any) -> list[Any]:
        """A copy of a tree for each device."""
        if len(self._devices) == 1:
            return [tree]
        return [jax.device_put(tree, device) for device in self._devices]

    def map(
        self, function: Callable[..., Any], copies: Sequence[Any], *batches: Iterable[np.ndarray]
    ) -> Iterator[Any]:
        """Yields `function(tree, *batch)` for each batch, on the first device.

        Args:
            function: of the tree and of a batch of each of `batches`.
            copies: of the tree, from `copied`.
            batches: of rows, in their order.
        """
        given = zip(*batches, strict=True)
        if len(copies) == 1:
            yield from (function(copies[0], *batch) for batch in given)
            return
        while several := list(itertools.islice(given, len(copies))):
            found = []
            for device, copy, batch in zip(self._devices, copies, several, strict=False):
                with jax.set_mesh(single(device)):
                    found.append(function(copy, *jax.device_put(batch, device)))
            while found:
                yield jax.device_put(found.pop(0), self._devices[0])


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
        self._size = rows.config.batch_size
        self.states = _kept(embeddings[rows.tokens], rows.config.activations)
        self.full = self.states.copy() if both else None

    def moments(self, weights: Tree) -> Moments:
        total: Any = None
        own = self._devices.copied(weights)
        measure = functools.partial(input_moments, alone(self._llama, self._layer))
        for found in self._devices.map(measure, own, _wide(self._parts(self.states))):
            total = _added(total, found)
        total = _relative(total)
        return total | {name: total[same] for name, same in SAME_INPUTS.items()}

    def advance(self, weights: Tree, quantized: Tree) -> None:
        for states, own in ((self.states, quantized), (self.full, weights)):
            if states is not None:
                own = self._devices.copied(own)
                apply = functools.partial(layer_outputs, alone(self._llama, self._layer))
                parts = self._parts(states)  # views, so that no second array is needed
                outputs = self._devices.map(apply, own, _wide(parts))
                for part, output in zip(parts, outputs, strict=True):
                    part[:] = output
        self._layer += 1

    def _parts(self, states: np.ndarray) -> list[np.ndarray]:
        return [states[i : i + self._size] for i in range(0, len(states), self._size)]


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
        size = rows.config.batch_size
        batches = [rows.tokens[i : i + size] for i in range(0, len(rows.tokens), size)]
        self._states = [[_kept(outside["embed_tokens"][batch], self._dtype) for batch in batches]]
        for layer in range(depth):
            weights = self._devices.copied(read(layer))
            apply = functools.partial(layer_outputs, alone(llama, layer))
            outputs = self._devices.map(apply, weights, _wide(self._states[-1]))
            self._states.append([_kept(x, self._dtype) for x in outputs])
        head = outside.get("lm_head", outside["embed_tokens"])
        last = self._devices.copied((outside["norm"], head))
        measure = functools.partial(_loss_gradient, llama)
        found = self._devices.map(measure, last, _wide(self._states.pop()), batches)
        self._gradients = [np.asarray(gradient) for gradient in found]
        self._next: list[np.ndarray] = []
        self.squares, self._squared = {}, squares

    def moments(self, weights: Tree) -> Moments:
        total: Any = None
        self._next = []
        own = self._devices.copied(weights)
        settings = alone(self._llama, len(self._states) - 1)  # states in front of each layer
        measure = functools.partial(gradient_moments, settings, squares=self._squared)
        batches = _wide(self._states[-1]), self._gradients
        for before, *found in self._devices.map(measure, own, *batches):
            self._next.append(np.asarray(before))
            total = _added(total, found)
        moments, self.squares = total
        return _relative(moments)

    def advance(self, weights: Tree, quantized: Tree) -> None:
        if not self._next:  # the layer was finished already
            self.moments(weights)
        self._gradients, self._next = self._next, []
        self._states.pop()


def alone(llama: LlamaConfig, layer: int) -> Settings:
    """The settings of a layer without adapters. Layers of the same kind have the same."""
    return Settings(llama.of_layer(layer), None, None, None, deterministic=True)


def _added(total: Any, found: Any) -> Any:
    """Adds to a sum. Waits for it, so that not the results of all devices are on the first one."""
    if total is None:
        return found
    return jax.block_until_ready(jax.tree.map(jnp.add, total, found))


def _wide(batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The batches as float32, one after the other."""
    return (batch.astype(np.float32) for batch in batches)


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
    last: tuple[Float[Array, " hidden"], Float[Array, "vocab hidden"]],
    x: Float32[Array, "batch seq hidden"],
    tokens: Int[Array, "batch seq"],
) -> Float32[Array, "batch seq hidden"]:
    """The gradient of the sum of the rows' cross-entropies. `last`: the norm and the head."""
    norm, head = last

    def loss(x: Array) -> Array:
        features = rms_norm(x, norm, llama.rms_norm_eps)
        return row_cross_entropy(features, head, tokens, jnp.ones(tokens.shape, bool))[0].sum()

    return jax.grad(loss)(x)


@functools.partial(jax.jit, static_argnames=("settings", "squares"))
def gradient_moments(
    settings: Settings,
    weights: Tree,
    x: Float32[Array, "batch seq hidden"],
    gradient: Float32[Array, "batch seq hidden"],
    squares: bool = False,
) -> tuple[Float32[Array, "batch seq hidden"], Moments, Squares]:
    """The gradient in front of the layer, the sum of G^T G over the rows and, if asked for, the sum
    of the squares of the elements of G.

    The rows are summed one after the other.
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

    total, before = jax.lax.scan(row_moments, (start, each), (x, gradient))
    return before, *total
