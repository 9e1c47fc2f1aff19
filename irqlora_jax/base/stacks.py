"""Collects the weights of a base on the host, stacked over the layers, before they are moved."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from irqlora_jax.adapters.method import Params
from irqlora_jax.files.tensors import aligned
from irqlora_jax.model.tree import LAYERS, Keys, Tree, insert, leaf_path
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.inputs import InputMoments
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.sharding import PAIR, sharding


class Matrix(NamedTuple):
    """A matrix that is quantized or fitted.

    Attributes:
        stack: name of its stack.
        path: its path in a layer.
        layer: index of the layer.
        layers: the layers of the stack.
        quant: its configuration.
    """

    stack: str
    path: Keys
    layer: int
    layers: range
    quant: QuantConfig


class Made(NamedTuple):
    """What is made of a matrix.

    Attributes:
        weight: the packed weight; None: the matrix is kept as it is.
        pair: the fitted pair lora_A and lora_B, or nothing.
    """

    weight: QTensor | None
    pair: Params

    def dense(self, weight: Float[Array, "out in"], scale: float) -> Float[Array, "out in"]:
        """The weights that the model computes with instead of `weight`; `scale` is the pair's."""
        whole = weight.astype(jnp.float32) if self.weight is None else self.weight.dequantize()
        if not self.pair:
            return whole
        a, b = (self.pair[name].astype(jnp.float32) for name in PAIR)
        return whole + scale * jnp.matmul(b, a, precision="highest")


Maker = Callable[[Matrix, jax.Array, InputMoments | None, jax.Array | None], Made]
"""Makes a matrix from its weight and, if there is a text, X^T X of its inputs and, if they were
asked for, the sums of its squared gradients."""


class Stacks:
    """Host arrays with one entry for each layer: leaves of QTensors, float weights, pairs."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._arrays: dict[Keys, list[np.ndarray]] = {}
        self._structures: dict[Keys, Any] = {}

    def put(self, matrix: Matrix, made: Made) -> None:
        """Copies the result. Waits for it, so that the buffer of the weight can be reused."""
        if made.weight is not None:
            place, count = (matrix.stack, *matrix.path), len(matrix.layers)
            self._put(place, made.weight, matrix.layer - matrix.layers.start, count)
        for leaf, value in made.pair.items():
            self._put((LAYERS, *matrix.path, leaf), value, matrix.layer, self._depth)

    def _put(self, place: Keys, tree: Any, index: int, count: int) -> None:
        leaves, self._structures[place] = jax.tree.flatten(tree)
        if place not in self._arrays:
            self._arrays[place] = [aligned((count, *leaf.shape), leaf.dtype) for leaf in leaves]
        for stack, leaf in zip(self._arrays[place], leaves, strict=True):
            stack[index] = leaf

    def space(self, place: Keys, index: int, like: jax.ShapeDtypeStruct) -> np.ndarray:
        """The entry of a float weight, to be filled. `like` has the shape of the whole stack."""
        if place not in self._arrays:
            self._arrays[place] = [aligned(like.shape, like.dtype)]
            self._structures[place] = jax.tree.structure(0)
        return self._arrays[place][0][index]

    def moved(self, mesh: Mesh | None) -> tuple[Tree, Tree]:
        """Moves everything to the devices: the layers of the base, and the pairs."""
        base: Tree = {}
        pairs: Tree = {LAYERS: {}}
        for place in list(self._arrays):
            arrays, own = self._arrays.pop(place), place[-1] in PAIR
            path = place if own else leaf_path(place)
            leaves = [to_device(arrays, mesh, path) for _ in range(len(arrays))]
            tree = jax.tree.unflatten(self._structures[place], leaves)
            insert(pairs if own else base, path, tree)
        return base, pairs


def to_device(arrays: list[np.ndarray], mesh: Mesh | None, path: Keys) -> jax.Array:
    """Pops the first array and puts it on the device. Frees the host copy unless it is aliased."""
    array = arrays.pop(0)
    where = None if mesh is None else sharding(mesh, path, array.shape)
    return jax.block_until_ready(jax.device_put(array, where, may_alias=True))
