"""Splits arrays over a mesh of devices with the axes (data, fsdp, tensor), by one rule per array.

The rows of a batch are split over data and fsdp together. The axis tensor splits a linear layer
along its outputs (q, k, v, gate, up) or its inputs (o, down), so that attention and MLP each need
one all-reduce. The axis fsdp splits a linear layer along its outputs; its parts are gathered in
packed form before use. Scales and shifts are split like their blocks. Second-level scales,
outliers, norms, biases and scalars are replicated on all devices.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from irqlora_jax.processes import put
from irqlora_jax.text import require

LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a model. They are quantized, and adapters may target them."""
AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
"""The mesh axes that split the rows of a batch."""
SPLIT_INPUTS = ("o_proj", "down_proj")
"""Layers that the axis tensor splits along their inputs; the others are split along outputs."""

Axes = tuple[str, ...]
Splits = Mapping[str, tuple[str | None, ...]]
"""By leaf of an adapter, for each dimension: "out" or "in"; "blocks" for inputs of a leaf that also
follows the outputs; None if it is not split."""
PAIR: Splits = {"lora_A": (None, "in"), "lora_B": ("out", None)}
"""How a LoRA pair is split."""

OVERLAP = {"xla_gpu_enable_pipelined_all_gather": True}
"""Compiler options for GPUs with the axis fsdp: the weights of the next layer travel while this one
computes (benchmarks/collectives.py)."""
MOMENT = ("codes", "absmax")
"""The arrays of a moment in 8 bits (`runs.moments.Moment`), which are split like their leaf."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The mesh of devices. Their number is data x fsdp x tensor."""

    data: int | None = None
    """Data parallelism: number of copies of the model. Null: as many as the devices allow."""
    fsdp: int = 1
    """Fully sharded data parallelism: split weights and rows into this many parts. Parts of weights
    are gathered before use."""
    tensor: int = 1
    """Tensor parallelism: split every matrix product into this many parts."""

    def __post_init__(self) -> None:
        for name in ("data", "fsdp", "tensor"):
            value = getattr(self, name)
            ok = value is None or value >= 1
            require(ok, f"mesh.{name}", value, "a whole number of at least 1")


def make_mesh(
    config: MeshConfig,
    rows: int,
    devices: Sequence[Any] | None = None,
    *,
    field: str = "train.batch_size / train.accumulation",
) -> Mesh:
    """Makes a mesh over the devices of all processes.

    With `mesh.data` null it uses the largest number of devices that can split the rows evenly.

    Args:
        config: sizes of the axes.
        rows: rows of a forward pass.
        devices: devices to use instead of all.
        field: setting of the rows, for messages.

    Raises:
        ValueError: not enough devices, the rows cannot be split evenly, or a process would have no
            part in the mesh.
    """
    devices = jax.devices() if devices is None else devices
    inner = config.fsdp * config.tensor
    data = config.data
    if data is None:
        most = max(1, len(devices) // inner)
        data = max((n for n in range(1, most + 1) if rows % (n * config.fsdp) == 0), default=1)
    if data * inner > len(devices):
        raise ValueError(
            f"mesh.data x mesh.fsdp x mesh.tensor = {data} x {config.fsdp} x {config.tensor} = "
            f"{data * inner} devices: there are {len(devices)}"
        )
    check_rows(rows, data * config.fsdp, field)
    if jax.process_count() > 1 and data * inner < len(devices):
        raise ValueError(
            f"mesh.data x mesh.fsdp x mesh.tensor = {data} x {config.fsdp} x {config.tensor} = "
            f"{data * inner} devices: expected all {len(devices)} devices of the "
            f"{jax.process_count()} processes; a batch has {rows} rows ({field}) to split over "
            "mesh.data x mesh.fsdp"
        )
    shape = (data, config.fsdp, config.tensor)
    grid = np.asarray(devices[: math.prod(shape)]).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def check_rows(rows: int, parts: int, field: str = "train.batch_size / train.accumulation") -> None:
    """Checks that mesh.data x mesh.fsdp can split the rows of a forward pass evenly.

    Args:
        rows: of a forward pass.
        parts: mesh.data x mesh.fsdp.
        field: setting of the rows, for messages.

    Raises:
        ValueError: it cannot.
    """
    if rows % parts:
        raise ValueError(
            f"mesh.data x mesh.fsdp = {parts} cannot split the {rows} rows of a batch "
            f"({field}): expected a divisor"
        )


def spec(mesh: Mesh | AbstractMesh, path: Axes, shape: tuple[int, ...], splits: Splits = PAIR) -> P:
    """The partition spec of one array of the base, the adapters or the optimizer's state.

    Adapters, embeddings and the output matrix are split as far as their sizes allow. `check_mesh`
    checks beforehand that the linear layers can be split.

    Args:
        mesh: from `make_mesh`.
        path: names that lead to the array, e.g. (layers, mlp, up_proj, weight, packed).
        shape: of the array.
        splits: of the adapter method (`adapters.Method.splits`).
    """
    if path and path[0] in ("embed_tokens", "lm_head"):
        return P(_fitting(mesh, shape[0], ("tensor", "fsdp")))
    linear = next((name for name in path if name in LINEAR_NAMES), None)
    if linear is None or path[-1] == "bias":
        return P()
    out, into = _linear_axes(linear)
    if "weight" not in path:
        axes = {"out": out, "in": (*into, "fsdp"), "blocks": into, None: ()}
        leaf = path[-2] if path[-1] in MOMENT else path[-1]
        roles = splits.get(leaf, (None,) * len(shape[1:]))
        sizes = zip(shape[1:], roles, strict=True)
        return P(None, *(_fitting(mesh, size, axes[role]) for size, role in sizes))
    if len(shape) < 3:
        return P()
    return P(None, _fitting(mesh, shape[1], out), _fitting(mesh, shape[2], into))


def _linear_axes(name: str) -> tuple[Axes, Axes]:
    """Mesh axes that split the outputs and the inputs of a linear layer."""
    return (("fsdp",), ("tensor",)) if name in SPLIT_INPUTS else (("tensor", "fsdp"), ())


def _fitting(mesh: Mesh | AbstractMesh, size: int, axes: Axes) -> Axes | None:
    """Takes axes in order, skipping an axis if `size` is not divisible by it and the taken ones."""
    taken: Axes = ()
    for axis in axes:
        if size % math.prod(mesh.shape[name] for name in (*taken, axis)) == 0:
            taken += (axis,)
    return taken or None


def sharding(
    mesh: Mesh | AbstractMesh, path: Axes, shape: tuple[int, ...], splits: Splits = PAIR
) -> NamedSharding:
    """The `NamedSharding` of `spec`."""
    return NamedSharding(mesh, spec(mesh, path, shape, splits))


def tree_shardings(mesh: Mesh | AbstractMesh, tree: Any, splits: Splits = PAIR) -> Any:
    """The sharding of every array of a tree: a base, adapters, or a training state.

    Args:
        mesh: from `make_mesh`.
        tree: arrays, or their shapes.
        splits: of the adapter method.
    """

    def rule(path: Any, leaf: Any) -> NamedSharding:
        return sharding(mesh, _names(path), leaf.shape, splits)

    return jax.tree_util.tree_map_with_path(rule, tree)


def placed(shapes: Any, shardings: Any) -> Any:
    """Shapes (jax.ShapeDtypeStruct) with these shardings."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings
    )


def put_batch(mesh: Mesh, batch: dict[str, Any]) -> dict[str, jax.Array]:
    """Puts a batch on the devices, with its rows split over them."""
    return put(batch, NamedSharding(mesh, P(ROWS)))


def split_activation(x: jax.Array, over_tensor: bool = False) -> jax.Array:
    """Constrains the sharding of an activation [batch, ..., features].

    Rows are split if their number allows it. Features are replicated, or split over tensor with
    `over_tensor`. Without the constraint, the compiler splits the features of the residual stream
    and gathers them before every product. Does nothing outside of `jax.set_mesh`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    features = _fitting(mesh, x.shape[-1], ("tensor",)) if over_tensor else None
    middle = (None,) * (x.ndim - 2)
    rule = P(_fitting(mesh, x.shape[0], ROWS), *middle, features)
    return jax.lax.with_sharding_constraint(x, rule)


def gather(tree: Any, name: str, splits: Splits | None = None) -> Any:
    """Gathers the fsdp parts of a weight or adapter of one layer. It stays split over tensor.

    Weights are gathered in packed form, so only 2 to 8 bits per weight are sent. Does nothing
    outside of `jax.set_mesh`.

    Args:
        tree: weight, QTensor or adapter of a linear layer (without the axis of the layers), or
            embeddings.
        name: of the layer.
        splits: the `splits` of the method, if `tree` is an adapter.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    stacked = (1,) if name in LINEAR_NAMES else ()

    def collect(path: Any, x: jax.Array) -> jax.Array:
        kind = ("weight",) if splits is None else ()
        shape = (*stacked, *x.shape)
        rule = spec(mesh, (name, *kind, *_names(path)), shape, splits or {})[len(stacked) :]
        kept = ("tensor" if axes and "tensor" in axes else None for axes in rule)
        return jax.lax.with_sharding_constraint(x, P(*kept))

    return jax.tree_util.tree_map_with_path(collect, tree)


def _names(path: Any) -> Axes:
    return tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def device_bytes(tree: Any) -> int:
    """Counts the bytes of a tree of arrays or shapes. Shapes with a sharding count per device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape
        if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None:
            shape = leaf.sharding.shard_shape(shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def bytes_by_device(tree: Any) -> dict[Any, int]:
    """Counts the bytes of a tree of arrays on each device."""
    total: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            total[shard.device] = total.get(shard.device, 0) + shard.data.nbytes
    return total
