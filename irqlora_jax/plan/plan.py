"""Checks whether a run fits into the memory (`irqlora train --config FILE --plan [NAME]`)."""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

from irqlora_jax.base.file import Base
from irqlora_jax.base.make import check_text
from irqlora_jax.config import Config, with_base_settings
from irqlora_jax.messages import shows_messages
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.plan.calibration import CalibrationNeed, measure_calibration
from irqlora_jax.plan.collectives import KINDS, collectives, seconds_at_least, total_bytes
from irqlora_jax.plan.fit import with_planned_rules
from irqlora_jax.plan.gpus import parse_fleet
from irqlora_jax.plan.measure import (
    MAX_SPLIT,
    TIGHT,
    MemoryNeed,
    PlanDevice,
    compile_step,
    device_count,
    find_plan_device,
    measure,
    read_base_shapes,
)
from irqlora_jax.runs.load import is_base
from irqlora_jax.sharding import check_rows
from irqlora_jax.text import aligned, readable_size

_MAX_SHARE = 0.95  # the driver and the libraries need the rest
_MAX_ROWS = 1024
_SMALL_CHUNK = 256
NETWORK = 50
"""GB/s of a network adapter, in each direction: 400 Gb/s. Each GPU has one."""
logger = logging.getLogger(__name__)


@shows_messages
def plan(config: Config, name: str | None = None) -> bool:
    """Reports the memory of a run and whether it fits. If not, tries settings that save memory.

    Reads only config.json or the header of a quantized base, and writes nothing.

    Args:
        config: of the run.
        name: devices to plan for, as for `plan.gpus.parse_fleet`; None: the local device.

    Returns:
        Whether the run fits.

    Raises:
        ValueError, OSError: bad input.
    """
    if name is not None:
        config = _with_data(config, name)  # refuse an unknown name before the slow steps
    config = with_base_settings(config)
    target = find_plan_device(name, device_count(config))
    if not is_base(config.model):
        check_text(config.quant, config.adapter, config.calibrate)
    asked = config
    config = with_planned_rules(config, target)
    base, llama = read_base_shapes(config)
    need, program = compile_step(config, base, llama, target)
    logger.info(_table(config, need, target))
    if need.devices > 1 and target.compiler == "own":
        logger.info(_traffic(program, need, target))
    calibrated = True
    if config.calibrate.data is not None and not is_base(config.model):
        needed = measure_calibration(asked, llama, target)
        logger.info(_calibration(config, needed, target))
        calibrated = needed.device <= target.memory
    room = target.memory - need.peak
    if need.peak <= TIGHT * target.memory:
        logger.info(f"fits, with {readable_size(room)} to spare")
        rows, most = _most_rows(config, base, llama, target, need)
        if rows > need.rows:
            what = "pairs" if config.data.format == "preference" else "rows"
            peak = readable_size(most.peak)
            logger.info(f"up to {rows} {what} at a time fit (tried: peak {peak})")
        return calibrated
    if room >= 0:
        logger.info(f"fits, but tightly: {readable_size(room)} to spare")
    else:
        logger.info(f"does not fit: {readable_size(-room)} too much")
    _advise(config, base, llama, target, need)
    return room >= 0 and calibrated


def _with_data(config: Config, name: str) -> Config:
    """Sets `mesh.data` for the devices of a plan, which the mesh has to fill if there are several.

    Raises:
        ValueError: an unknown device, or a mesh that does not fill the devices or cannot split the
            rows.
    """
    fleet, mesh = parse_fleet(name), config.mesh
    inner = mesh.fsdp * mesh.tensor
    if not fleet.given:
        return _replace_fields(config, {"mesh.data": mesh.data or 1})
    total = fleet.hosts * fleet.count
    data = mesh.data or max(1, total // inner)
    if data * inner != total:
        raise ValueError(
            f"plan = {name!r}: has {total} devices, but mesh.data x mesh.fsdp x mesh.tensor = "
            f"{data} x {mesh.fsdp} x {mesh.tensor}; expected the product {total}"
        )
    check_rows(config.train.rows, data * mesh.fsdp)  # before devices are made, perhaps very many
    return _replace_fields(config, {"mesh.data": data})


def _traffic(program: Any, need: MemoryNeed, target: PlanDevice) -> str:
    """What the devices send each other in a step, and how long that takes at least."""
    found = collectives(program.as_text(), need.devices)
    local = need.devices // target.hosts
    rows = [("sent by each device in a step", "times", "GiB")]
    for kind in KINDS:
        own = [one for one in found if one.kind == kind]
        if own:
            times = sum(one.times for one in own)
            rows.append((kind, f"{times:,}", f"{total_bytes(own) / 2**30:.3f}"))
    text = aligned(rows)
    if target.hosts > 1:
        far = sum(one.times * one.network_bytes(local) for one in found)
        text += f"\nbetween hosts, by each network adapter: {far / 2**30:.3f} GiB"
    if target.link is not None:
        seconds = seconds_at_least(found, local, target.link * 1e9, NETWORK * 1e9)
        parts = f"{target.link} GB/s in a host"
        if target.hosts > 1:
            parts += f", {NETWORK} GB/s (400 Gb/s) for each network adapter, one for each GPU"
        text += f"\nat least {seconds:.3f} seconds, by arithmetic: {parts}"
    return text


def _table(config: Config, need: MemoryNeed, target: PlanDevice) -> str:
    stored, where = need.base, "" if need.host == 0 else " on the device"
    bits = lambda size: f"{8 * size / stored.weights:.3f}" if need.devices == 1 else ""  # noqa: E731
    kept = "weights" if not config.quant.quantizes else "codes"
    outliers = [("base: outliers", _gib(stored.outliers), bits(stored.outliers))]
    outliers = outliers if stored.outliers else []
    rows = [
        ("on each device" if need.devices > 1 else "", "GiB", "bits a weight"),
        (f"base: {kept}", _gib(stored.codes), bits(stored.codes)),
        ("base: scales", _gib(stored.scales), bits(stored.scales)),
        ("base: shifts", _gib(stored.shifts), bits(stored.shifts)),
        *outliers,
        ("base: embeddings, output matrix, norms", _gib(stored.rest), ""),
        ("adapters", _gib(need.adapters), ""),
        (f"optimizer state{where}", _gib(need.optimizer), ""),
        ("gradients, activations and temporaries", _gib(need.step), ""),
        ("peak", _gib(need.peak), ""),
        (f"usable of {_gib(target.total)}", _gib(target.memory), ""),
    ]
    if need.host:
        rows.append(("in pinned memory of the host: optimizer state", _gib(need.host), ""))
    train, count = config.train, "" if need.devices == 1 else f"{need.devices} x "
    text = f"{config.model} on {count}{target.title}: {need.rows} rows of {need.length} tokens per "
    passes = f"forward pass, {train.accumulation} passes per step"
    if config.data.format == "preference":
        text = text.replace(" rows of ", " pairs of rows of ")
        passes += ", and as many of the reference without a gradient"
    text += f"{passes}\n{aligned(rows)}"
    capability = target.capability
    if capability and capability < (8, 0) and train.compute_dtype == "bfloat16":
        text += f"\n{target.title} does not support bfloat16: use --train.compute_dtype float16"
    if target.compiler == "estimate":
        text += (
            "\nThe base, the adapters and the optimizer are exact. The gradients, activations and "
            "temporaries are\nestimated with the compiler for CPUs. In our checks the peak was 4 % "
            "too low to 9 % too high.\nInstall jax-cuda13-plugin to compile for GPUs."
        )
    return text


def _calibration(config: Config, need: CalibrationNeed, target: PlanDevice) -> str:
    text = (
        f"calibration with a text, before the training: {_gib(need.device)} GiB on one device, "
        f"{_gib(need.host)} GiB of hidden states on the host, {need.work / 1e12:,.1f} TFLOP"
    )
    if target.flops is not None:
        minutes = need.work / target.flops / 60
        text += f" ({minutes:,.1f} minutes on one device at the float32 rate of its data sheet)"
    if need.device > target.memory:
        over = readable_size(need.device - target.memory)
        sizes = ["calibrate.batch_size", "calibrate.length"]
        training = config.quant.training
        sizes += [f"quant.{training}.batch"] if training != "none" else []
        advice = f"a smaller {' or '.join(sizes)} needs less"
        text += f"\nThis does not fit: {over} too much; {advice}"
    return text


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _most_rows(
    config: Config, base: Base, llama: LlamaConfig, target: PlanDevice, need: MemoryNeed
) -> tuple[int, MemoryNeed]:
    """Searches the maximum number of rows of a forward pass that fits."""

    def rows(count: int) -> MemoryNeed:
        changes = {"train.accumulation": 1, "train.batch_size": count}
        return measure(_replace_fields(config, changes), base, llama, target)

    unit = need.devices // config.mesh.tensor
    double, limit = rows(2 * need.rows), TIGHT * target.memory
    slope = max((double.peak - need.peak) / need.rows, 1)
    guess = min(int(need.rows + (limit - need.peak) / slope), _MAX_ROWS)
    best = (2 * need.rows, double) if double.peak <= limit else (need.rows, need)
    for _ in range(3):
        guess = guess // unit * unit
        if guess <= best[0]:
            break
        found = rows(guess)
        if found.peak <= limit:
            return guess, found
        guess = int(guess * 0.9)
    return best


def _advise(
    config: Config, base: Base, llama: LlamaConfig, target: PlanDevice, need: MemoryNeed
) -> None:
    """Adds settings that save memory one by one, and reports which are sufficient."""
    words, memory = "", target.memory
    if memory < _MAX_SHARE * target.total:
        memory = int(_MAX_SHARE * target.total)
        words = f"XLA_CLIENT_MEM_FRACTION={_MAX_SHARE} "
    limit = int(TIGHT * memory)

    def attempt(changes: dict[str, Any]) -> MemoryNeed:
        return measure(_replace_fields(config, changes), base, llama, target, limit)

    def tell(changes: dict[str, Any], found: MemoryNeed) -> None:
        if found.step:
            verdict = "fits" if found.peak <= limit else "does not fit"
            logger.info(f"  {_gib(found.peak)} GiB, {verdict}: {words}{_flags(changes)}")

    logger.info(f"tried, with {_gib(memory)} GiB usable:")
    taken: dict[str, Any] = {}
    best = need
    if words:
        tell(taken, need)
    for change in _savings(config, target):
        if best.peak <= limit:
            break
        found = attempt(taken | change)
        if not found.step or found.peak < best.peak:
            taken, best = taken | change, found
            tell(taken, best)
    if best.peak > limit:
        logger.info("nothing more to try: take a larger device, or quant.format nf3 or nf2")
        return

    def fits_too(changes: dict[str, Any]) -> bool:
        if not _is_valid(config, changes, target):
            return False
        found = attempt(changes)
        tell(changes, found)
        return found.peak <= limit

    # The last change was needed. Try to drop the earlier ones, the most expensive first.
    for name in list(taken)[-2::-1]:
        fewer = {k: v for k, v in taken.items() if k != name}
        taken = fewer if fits_too(fewer) else taken
    for parts in _divisors(config.train.batch_size):
        if config.train.accumulation < parts < taken.get("train.accumulation", 0):
            fewer = taken | {"train.accumulation": parts}
            if fits_too(fewer):
                taken = fewer
                break
    logger.info(f"fits with: {words}{_flags(taken)}".rstrip())
    if words:
        logger.info("(XLA_CLIENT_MEM_FRACTION is an environment variable)")


def _flags(changes: dict[str, Any]) -> str:
    return " ".join(f"--{name} {str(value).lower()}" for name, value in changes.items())


def _savings(config: Config, target: PlanDevice) -> Iterator[dict[str, Any]]:
    """Yields changes that save memory, the cheapest first."""
    train, mesh = config.train, config.mesh
    rows = (mesh.data or 1) * mesh.fsdp
    if not train.remat:
        yield {"train.remat": True}
    parts = [n for n in _divisors(train.batch_size) if train.batch_size // n % rows == 0]
    if parts[-1] > train.accumulation:
        yield {"train.accumulation": parts[-1]}
    if train.loss_chunk > _SMALL_CHUNK:
        yield {"train.loss_chunk": _SMALL_CHUNK}
    if not train.offload_optimizer and not target.shared:
        yield {"train.offload_optimizer": True}
    has_large_leaves = config.adapter.rank >= 32  # 4,096 numbers from 128 features on
    if train.optimizer_bits == 32 and not train.offload_optimizer and has_large_leaves:
        yield {"train.optimizer_bits": 8}
    if config.adapter.dtype == "float32":
        yield {"adapter.dtype": "bfloat16"}
    for fsdp in [n * mesh.fsdp for n in _divisors(MAX_SPLIT)[1:]]:
        for n in reversed(_divisors(train.batch_size)):
            change = {"train.accumulation": n, "mesh.fsdp": fsdp}
            if _is_valid(config, change, target):
                yield change
                break


def _is_valid(config: Config, changes: dict[str, Any], target: PlanDevice) -> bool:
    """Whether the mesh can split the rows of a batch and has enough devices."""
    new = _replace_fields(config, changes)
    rows = new.train.rows
    split = rows % ((new.mesh.data or 1) * new.mesh.fsdp) == 0
    return split and device_count(new) <= len(target.devices)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _replace_fields(config: Config, changes: dict[str, Any]) -> Config:
    """Returns a copy of the configuration with new values of fields, given by dotted names."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, field = name.split(".")
        sections.setdefault(section, {})[field] = value
    new = {k: dataclasses.replace(getattr(config, k), **v) for k, v in sections.items()}
    return dataclasses.replace(config, **new)
