"""Collects the weights of a base on the host, stacked over the layers, before they are moved.

Of every array a process holds only the parts that its own devices need.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from irqlora_jax.adapters.method import Params
from irqlora_jax.base.parts import Parts, Place
from irqlora_jax.model.tree import LAYERS, Keys, Tree, insert, leaf_path
from irqlora_jax.processes import put
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
    """Arrays with one entry for each layer: leaves of QTensors, float weights, pairs."""

    def __init__(self, depth: int, mesh: Mesh | None = None) -> None:
        """Starts without arrays.

        Args:
            depth: number of layers.
            mesh: devices to split the arrays over; None: all on the first device.
        """
        self._depth, self._mesh = depth, mesh
        self._arrays: dict[Keys, list[Parts]] = {}
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
            self._arrays[place] = [
                self._parts(place, (count, *leaf.shape), leaf.dtype) for leaf in leaves
            ]
        for stack, leaf in zip(self._arrays[place], leaves, strict=True):
            stack.put(np.asarray(leaf), index)

    def spaces(
        self, place: Keys, index: int, like: jax.ShapeDtypeStruct
    ) -> Iterator[tuple[np.ndarray, Place]]:
        """The parts of the entry of a float weight, to be filled (`Parts.spaces`). `like` has the
        shape of the whole stack."""
        if place not in self._arrays:
            self._arrays[place] = [self._parts(place, like.shape, like.dtype)]
            self._structures[place] = jax.tree.structure(0)
        return self._arrays[place][0].spaces(index)

    def _parts(self, place: Keys, shape: tuple[int, ...], dtype: Any) -> Parts:
        where = None if self._mesh is None else sharding(self._mesh, _path(place), shape)
        return Parts(shape, dtype, where)

    def moved(self) -> tuple[Tree, Tree]:
        """Moves everything to the devices: the layers of the base, and the pairs."""
        base: Tree = {}
        pairs: Tree = {LAYERS: {}}
        for place in list(self._arrays):
            leaves = [parts.moved() for parts in self._arrays.pop(place)]
            tree = jax.tree.unflatten(self._structures[place], leaves)
            insert(pairs if place[-1] in PAIR else base, _path(place), tree)
        return base, pairs


def _path(place: Keys) -> Keys:
    """Where an array is in its tree. The names of a pair are whole paths already."""
    return place if place[-1] in PAIR else leaf_path(place)


def to_device(array: np.ndarray, mesh: Mesh | None, path: Keys) -> jax.Array:
    """Puts an array that this process has whole on the devices, without a copy where it can."""
    where = None if mesh is None else sharding(mesh, path, array.shape)
    if where is not None and not where.is_fully_addressable:
        return jax.block_until_ready(put(array, where))
    return jax.block_until_ready(jax.device_put(array, where, may_alias=True))
