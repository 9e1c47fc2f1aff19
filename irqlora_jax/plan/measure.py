"""Computes the memory that a run needs on each device, from shapes alone.

The size of stored arrays is computed exactly. The memory of the training step (gradients,
activations, dequantized weights) comes from compiling the real step for the device.
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
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from irqlora_jax.base.file import Base, base_shapes
from irqlora_jax.base.mesh import check_mesh
from irqlora_jax.base.storage import Storage, abstract_base, measure_base
from irqlora_jax.config import Config
from irqlora_jax.data import longest_row
from irqlora_jax.files.hub import read_dtype
from irqlora_jax.machine import fastest_dtype, total_memory
from irqlora_jax.messages import progress_bar
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.plan.gpus import OPTIONS, compile_only_devices, parse_fleet, usable_fraction
from irqlora_jax.runs.folder import BASE_FILE
from irqlora_jax.runs.load import check_model, is_base, read_architecture
from irqlora_jax.runs.optimizer import check_rates
from irqlora_jax.runs.state import init_state, make_model, make_optimizer
from irqlora_jax.sharding import ROWS, device_bytes, make_mesh, placed, tree_shardings
from irqlora_jax.train.step import make_step, state_shardings

TIGHT = 0.95
"""Above this fraction of the usable memory, fragmentation may fail an allocation."""
MAX_SPLIT = 8
"""Maximum factor by which a plan may raise the number of devices."""


@dataclasses.dataclass(frozen=True)
class PlanDevice:
    """The device that a run is planned for.

    Attributes:
        title: name of the device.
        devices: devices to compile for; a mesh may use all of them.
        memory: bytes that jax may use on each device.
        total: bytes of memory of each device.
        compiler: "own": compile for this device. "estimate": compile for the CPU instead, because
            jax has no compiler for GPUs here.
        options: options of the compiler.
        shared: host and device share one memory.
        capability: CUDA compute capability, if known.
        flops: floating-point operations a second in float32, if known.
        hosts: number of hosts with these devices, equally many each.
        link: GB/s between the devices of a host in each direction, if known.
    """

    title: str
    devices: list[Any]
    memory: int
    total: int
    compiler: str = "own"
    options: dict[str, Any] | None = None
    shared: bool = False
    capability: tuple[int, int] | None = None
    flops: float | None = None
    hosts: int = 1
    link: int | None = None


@dataclasses.dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a run needs on each device.

    Attributes:
        base: frozen weights.
        adapters: trained weights.
        optimizer: state of the optimizer on the device.
        host: state of the optimizer in pinned memory of the host.
        step: temporary memory of a training step: gradients, activations, dequantized weights of
            a layer, the batch.
        devices: number of devices.
        rows: rows of a forward pass, on all devices together.
        length: length of a row, in tokens.
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
        """Peak memory on each device, in bytes."""
        return self.base.total + self.adapters + self.optimizer + self.step


def find_plan_device(name: str | None, count: int) -> PlanDevice:
    """Returns the local device, or GPUs by name.

    Args:
        name: as for `plan.gpus.parse_fleet`; None: the local device.
        count: number of devices of the mesh.

    Raises:
        ValueError: no such device, or not enough devices.
    """
    if name is None:
        return _local_device()
    fleet = parse_fleet(name)
    device, most = fleet.device, MAX_SPLIT * count
    memory = int(device.memory * usable_fraction())
    known: dict[str, Any] = {"capability": device.capability, "flops": device.flops}
    if fleet.given:
        most = fleet.hosts * fleet.count
        known |= {"hosts": fleet.hosts}
    known |= {"link": device.link}
    target = PlanDevice(device.title, [], memory, device.memory, "estimate", **known)
    found = compile_only_devices(device, most // fleet.hosts, fleet.hosts)
    if found is not None:
        return dataclasses.replace(target, devices=found, compiler="own", options=OPTIONS)
    found = jax.devices("cpu")[: most if fleet.given else None]
    if count > len(found):
        raise ValueError(
            f"plan = {name!r}: the mesh has {count} devices; without the package "
            f"jax-cuda13-plugin a plan can have up to {len(found)} here"
        )
    return dataclasses.replace(target, devices=found)


def prepare(config: Config, name: str) -> None:
    """Sets up jax to plan for a named device. Call it before any other use of jax.

    jax must not initialize local GPUs, because it would reserve their memory. The CPU may stand in
    for the named device, so it gets as many devices as a plan may need.

    Raises:
        ValueError: an unknown name.
    """
    fleet = parse_fleet(name)
    jax.config.update("jax_platforms", "cpu")
    # A cached program for an absent device cannot be loaded.
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # jax reads the setting once, unless told so
    with contextlib.suppress(RuntimeError):  # jax is already initialized
        most = max(MAX_SPLIT * device_count(config), fleet.hosts * fleet.count)
        jax.config.update("jax_num_cpu_devices", most)


def _local_device() -> PlanDevice:
    devices = jax.devices()
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        memory = stats["bytes_limit"]
        return PlanDevice(devices[0].device_kind, devices, memory, int(memory / usable_fraction()))
    memory = total_memory() // len(devices)
    return PlanDevice(devices[0].device_kind, devices, memory, memory, shared=True)


def read_base_shapes(config: Config) -> tuple[Base, LlamaConfig]:
    """Returns the base of a run with jax.ShapeDtypeStruct in place of arrays.

    Reads only config.json, or the header of a quantized base. (If config.json ties a head that a
    local folder has, reads that too: `base.source.read_llama`.)

    Raises:
        FileNotFoundError, ValueError: as `runs.check_model` and `runs.read_architecture`.
    """
    check_model(config)
    llama = read_architecture(config.model, config.quant)
    if is_base(config.model):
        return base_shapes(Path(config.model) / BASE_FILE)
    return abstract_base(llama, config.quant, read_dtype(config.model)), llama


def measure(
    config: Config, base: Base, llama: LlamaConfig, target: PlanDevice, limit: int | None = None
) -> MemoryNeed:
    """The memory of `compile_step` alone."""
    return compile_step(config, base, llama, target, limit)[0]


def compile_step(
    config: Config, base: Base, llama: LlamaConfig, target: PlanDevice, limit: int | None = None
) -> tuple[MemoryNeed, Any]:
    """Compiles the training step of a run, from shapes alone.

    Args:
        config: of the run.
        base: from `read_base_shapes`.
        llama: its architecture.
        target: the device to compile for.
        limit: in bytes. If the stored arrays exceed it, nothing is compiled and `MemoryNeed.step`
            is 0.

    Returns:
        The memory, and the compiled program or None.

    Raises:
        ValueError: the mesh does not fit the model, the batch or the devices, or a rule of
            `train.rates` applies to nothing.
    """
    # The number of steps needs the data, and the memory does not depend on it.
    train, divisor = config.train.with_steps(1), 1
    rows = train.rows
    mesh = make_mesh(config.mesh, rows, target.devices)
    check_mesh(mesh, llama, config.quant)
    if target.compiler == "estimate" and train.compute_dtype != "float32":
        # CPUs compute in float32 in any case. Then every array is twice as large.
        train, divisor = dataclasses.replace(train, compute_dtype="float32"), 2
    # Use XLA, which needs at least as much memory: a kernel would check for the local device.
    dtype = train.compute_dtype or fastest_dtype(mesh.devices.flat[0])
    train = dataclasses.replace(train, compute_dtype=dtype, matmul=None)
    model = make_model(llama, config.adapter, train)
    check_rates(train, jax.eval_shape(model.init_adapters, jax.random.key(0)))
    optimizer = make_optimizer(train, config.adapter.chosen)
    length = longest_row(config.data, llama.max_position_embeddings)
    names = {"tokens": jnp.int32, "targets": jnp.bool_}
    if config.data.packing:
        names["segment_ids"] = jnp.int32
    preference = config.data.format == "preference"
    shape = ((2 if preference else 1) * train.batch_size, length)
    where = NamedSharding(mesh, P(ROWS))
    batch = {k: jax.ShapeDtypeStruct(shape, v, sharding=where) for k, v in names.items()}
    base = placed(base, tree_shardings(mesh, base))
    with jax.set_mesh(mesh):
        state = jax.eval_shape(lambda: init_state(model, optimizer, config.seed))
        # Absent devices have no list of memory kinds, so use an abstract mesh.
        places = mesh.abstract_mesh
        how: Any = {"model": model, "optimizer": optimizer, "config": train}
        step = make_step(places, state, **how, preference=preference)
        state = placed(
            state,
            state_shardings(places, state, train.offload_optimizer, config.adapter.splits),
        )
        # The reference of DPO is a copy of the adapters, if they do not start at 0.
        reference = state.adapters if preference and config.adapter.start_title else None
        away = [x for x in jax.tree.leaves(state) if _is_on_host(x)] if not target.shared else []
        host = device_bytes(away)
        need = MemoryNeed(
            base=measure_base(base),
            adapters=device_bytes((state.adapters, reference)),
            optimizer=device_bytes(state.opt_state) - host,
            host=host,
            step=0,
            devices=mesh.size,
            rows=rows,
            length=length,
        )
        if limit is not None and need.peak > limit:
            return need, None
        # On a CPU, level 0 compiles in half the time and needs the same memory.
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        options = {"xla_backend_optimization_level": 0} if on_cpu else target.options
        with progress_bar(f"Compiling the training step for {rows} rows"):
            lowered = step.trace(state, base, batch, reference).lower()
            with silent_stderr():
                program = lowered.compile(compiler_options=options)
    extra = new_bytes(program.memory_analysis())
    return dataclasses.replace(need, step=device_bytes(batch) + extra // divisor), program


def new_bytes(found: Any) -> int:
    """What a program needs besides its arguments: scratch space, and results in new arrays.

    Args:
        found: of `memory_analysis()`.
    """
    return found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Hides the output of the compiler, which warns if a program exceeds the memory.

    What Python writes there is still shown.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        with contextlib.ExitStack() as ours:
            if sys.stderr is sys.__stderr__:  # else something takes it already
                shown = ours.enter_context(open(kept, "w", buffering=1, closefd=False))
                ours.enter_context(contextlib.redirect_stderr(shown))
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _is_on_host(x: jax.ShapeDtypeStruct) -> bool:
    return x.sharding is not None and x.sharding.memory_kind == "pinned_host"


def device_count(config: Config) -> int:
    """Number of devices of a mesh; mesh.data null counts as 1."""
    mesh = config.mesh
    return (mesh.data or 1) * mesh.fsdp * mesh.tensor
