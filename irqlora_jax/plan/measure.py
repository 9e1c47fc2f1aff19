"""What a run needs on each device, from shapes alone.

What is stored is arithmetic, and exact. What the training step needs besides (gradients,
activations, dequantized weights) is what the compiler says of the real step for the device.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from irqlora_jax.base.file import Base, base_shapes
from irqlora_jax.base.mesh import check_mesh
from irqlora_jax.base.storage import Storage, abstract_base, measure_base
from irqlora_jax.config import Config
from irqlora_jax.data import longest_row
from irqlora_jax.files.hub import read_values
from irqlora_jax.machine import fastest_dtype
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.plan.gpus import OPTIONS, absent_devices, find_device, usable_share
from irqlora_jax.runs.folder import BASE_FILE
from irqlora_jax.runs.load import check_model, is_base, read_architecture
from irqlora_jax.runs.state import init_state, make_model, make_optimizer
from irqlora_jax.sharding import ROWS, device_bytes, make_mesh, tree_shardings
from irqlora_jax.train.step import make_step, state_shardings

MOST_SPLIT = 8
"""Devices that a plan may try in the place of one."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What a run is planned for.

    Attributes:
        title: of the device.
        devices: to compile for; as many as a mesh may have.
        memory: bytes that jax may use on each.
        whole: bytes of the device.
        compiler: "own": for this very device. "estimate": for the CPU, because jax has no compiler
            for GPUs here.
        options: of the compiler.
        shared: the memory of the host is that of the device.
        capability: of CUDA, where it is known.
    """

    title: str
    devices: list[Any]
    memory: int
    whole: int
    compiler: str = "own"
    options: dict[str, Any] | None = None
    shared: bool = False
    capability: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes that a run needs on each device.

    Attributes:
        base: frozen weights.
        adapters: trained weights.
        optimizer: its state, on the device.
        host: its state, in pinned memory of the host.
        step: all that comes and goes in a training step: gradients, activations, a layer's
            dequantized weights, the batch.
        devices: number of them.
        rows: of a batch that are computed at one time, on all devices together.
        length: tokens of a row.
    """

    base: Storage
    adapters: int
    optimizer: int
    host: int
    step: int
    devices: int
    rows: int
    length: int

    @property
    def peak(self) -> int:
        """Most bytes in use at one time, on each device."""
        return self.base.total + self.adapters + self.optimizer + self.step


def find_target(name: str | None, count: int) -> Target:
    """The device at hand, or one of a name.

    Args:
        name: of `irqlora_jax.devices`; None: the device at hand.
        count: devices of the mesh.

    Raises:
        ValueError: no such device, or fewer than needed.
    """
    if name is None:
        return _at_hand()
    device = find_device(name)
    memory = int(device.memory * usable_share())
    capability = device.capability
    target = Target(device.title, [], memory, device.memory, "estimate", capability=capability)
    found = absent_devices(device, MOST_SPLIT * count)
    if found is not None:
        return dataclasses.replace(target, devices=found, compiler="own", options=OPTIONS)
    found = jax.devices("cpu")
    if count > len(found):
        raise ValueError(
            f"plan = {name!r}: the mesh has {count} devices; without the package "
            f"jax-cuda13-plugin up to {len(found)} can be planned for here"
        )
    return dataclasses.replace(target, devices=found)


def prepare(config: Config) -> None:
    """Makes jax ready to plan for a named device; call it before anything else of jax.

    Devices at hand are left alone: jax would look for their drivers, and take their memory. The
    CPU gets as many devices as a plan may ask for, for where it stands in.
    """
    jax.config.update("jax_platforms", "cpu")
    # What is compiled for a device that is not there cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    with contextlib.suppress(RuntimeError):  # jax is in use already
        jax.config.update("jax_num_cpu_devices", MOST_SPLIT * device_count(config))


def _at_hand() -> Target:
    devices = jax.devices()
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        memory = stats["bytes_limit"]
        return Target(devices[0].device_kind, devices, memory, int(memory / usable_share()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    return Target(devices[0].device_kind, devices, memory, memory, shared=True)


def read_base_shapes(config: Config) -> tuple[Base, LlamaConfig]:
    """The base of a run, with jax.ShapeDtypeStruct for its arrays, from a config.json alone (or the
    header of a quantized base).

    Raises:
        FileNotFoundError, ValueError: as `runs.check_model` and `runs.read_architecture`.
    """
    check_model(config)
    llama = read_architecture(config.model, config.quant)
    if is_base(config.model):
        return base_shapes(Path(config.model) / BASE_FILE)
    values = read_values(config.model)
    dtype = values.get("dtype") or values.get("torch_dtype") or "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(
            f"{config.model}: config.json: dtype = {dtype!r}: accepted is float32, bfloat16 or "
            "float16"
        )
    return abstract_base(llama, config.quant, jnp.dtype(dtype)), llama


def measure(
    config: Config, base: Base, llama: LlamaConfig, target: Target, limit: int | None = None
) -> Need:
    """Compiles the training step of a run, from shapes alone.

    Args:
        config: of the run.
        base: of `read_base_shapes`.
        llama: its architecture.
        target: to compile for.
        limit: bytes; where what is stored takes more, nothing is compiled and `Need.step` is 0.

    Raises:
        ValueError: a mesh that does not fit the model, the batch or the devices.
    """
    train, rows, share = config.train, config.train.batch_size // config.train.accumulation, 1
    mesh = make_mesh(config.mesh, rows, target.devices)
    check_mesh(mesh, llama, config.quant)
    if target.compiler == "estimate" and train.compute_dtype != "float32":
        # CPUs compute in float32 whatever the type: then every array is twice as large.
        train, share = dataclasses.replace(train, compute_dtype="float32"), 2
    # By XLA, which takes no less memory: a kernel asks for the device at hand.
    dtype = train.compute_dtype or fastest_dtype(mesh.devices.flat[0])
    train = dataclasses.replace(train, compute_dtype=dtype, matmul=None)
    model = make_model(llama, config.adapter, train)
    optimizer = make_optimizer(train)
    length = longest_row(config.data, llama.max_position_embeddings)
    names = {"tokens": jnp.int32, "targets": jnp.bool_}
    if config.data.packing:
        names["segment_ids"] = jnp.int32
    shape = (train.batch_size, length)
    where = NamedSharding(mesh, P(ROWS))
    batch = {k: jax.ShapeDtypeStruct(shape, v, sharding=where) for k, v in names.items()}
    base = _placed(base, tree_shardings(mesh, base))
    with jax.set_mesh(mesh):
        state = jax.eval_shape(lambda: init_state(model, optimizer, config.seed))
        # Devices that are not there do not say what memories they have; an abstract mesh may.
        places = mesh.abstract_mesh
        step = make_step(places, state, model=model, optimizer=optimizer, config=train)
        state = _placed(
            state,
            state_shardings(places, state, train.offload_optimizer, config.adapter.chosen.splits),
        )
        away = [x for x in jax.tree.leaves(state) if _is_on_host(x)] if not target.shared else []
        host = device_bytes(away)
        need = Need(
            base=measure_base(base),
            adapters=device_bytes(state.adapters),
            optimizer=device_bytes(state.opt_state) - host,
            host=host,
            step=0,
            devices=mesh.size,
            rows=rows,
            length=length,
        )
        if limit is not None and need.peak > limit:
            return need
        lowered = step.trace(state, base, batch).lower()
        # A CPU's machine code takes no other memory if it is left as it is, and half the time.
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        options = {"xla_backend_optimization_level": 0} if on_cpu else target.options
        with _quiet():
            program = lowered.compile(compiler_options=options)
    found = program.memory_analysis()
    extra = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return dataclasses.replace(need, step=device_bytes(batch) + extra // share)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the compiler itself writes: that a program is larger than the memory."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _is_on_host(x: jax.ShapeDtypeStruct) -> bool:
    return x.sharding is not None and x.sharding.memory_kind == "pinned_host"


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings
    )


def device_count(config: Config) -> int:
    """Devices of the mesh of a configuration; as few as it allows."""
    mesh = config.mesh
    return (mesh.data or 1) * mesh.fsdp * mesh.tensor
