"""Whether a run fits, before any of it is read: `irqlora train --config FILE --plan [NAME]`."""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

from irqlora_jax.base.file import Base
from irqlora_jax.config import Config
from irqlora_jax.messages import shows_messages
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.plan.gpus import find_device
from irqlora_jax.plan.measure import (
    MOST_SPLIT,
    Need,
    Target,
    device_count,
    find_target,
    measure,
    read_base_shapes,
)
from irqlora_jax.text import aligned, readable_size

_TIGHT = 0.95  # of the usable memory: beyond it, fragments of free memory may be too small
_MOST_SHARE = 0.95  # the driver and the libraries need the rest
_MOST_ROWS = 1024
_SMALL_CHUNK = 256
logger = logging.getLogger(__name__)


@shows_messages
def plan(config: Config, name: str | None = None) -> bool:
    """Says what a run needs and whether that fits; where it does not, tries what would.

    Reads a config.json or the header of a quantized base, and writes nothing.

    Args:
        config: of the run.
        name: device to plan for, of `irqlora_jax.devices`; None: the one at hand.

    Returns:
        Whether it fits.

    Raises:
        ValueError, OSError: bad input, in one sentence.
    """
    if name is not None:
        find_device(name)  # before anything that takes time
        config = _with(config, {"mesh.data": config.mesh.data or 1})
    base, llama = read_base_shapes(config)
    target = find_target(name, device_count(config))
    need = measure(config, base, llama, target)
    logger.info(_table(config, need, target))
    room = target.memory - need.peak
    if need.peak <= _TIGHT * target.memory:
        logger.info(f"fits, with {readable_size(room)} to spare")
        rows, most = _most_rows(config, base, llama, target, need)
        if rows > need.rows:
            logger.info(f"up to {rows} rows at a time fit (tried: peak {readable_size(most.peak)})")
        return True
    if room >= 0:
        logger.info(f"fits, but tightly: {readable_size(room)} to spare")
    else:
        logger.info(f"does not fit: {readable_size(-room)} too much")
    _advise(config, base, llama, target, need)
    return room >= 0


def _table(config: Config, need: Need, target: Target) -> str:
    stored, away = need.base, "" if need.host == 0 else " on the device"
    bits = lambda size: f"{8 * size / stored.weights:.3f}" if need.devices == 1 else ""  # noqa: E731
    kept = "weights" if config.quant.format == "none" else "codes"
    rows = [
        ("on each of them" if need.devices > 1 else "", "GiB", "bits a weight"),
        (f"base: {kept}", _gib(stored.codes), bits(stored.codes)),
        ("base: scales", _gib(stored.scales), bits(stored.scales)),
        ("base: shifts", _gib(stored.shifts), bits(stored.shifts)),
        ("base: embeddings, output matrix, norms", _gib(stored.rest), ""),
        ("adapters", _gib(need.adapters), ""),
        (f"optimizer state{away}", _gib(need.optimizer), ""),
        ("gradients, activations and temporaries", _gib(need.step), ""),
        ("peak", _gib(need.peak), ""),
        (f"usable of {_gib(target.whole)}", _gib(target.memory), ""),
    ]
    if need.host:
        rows.append(("in pinned memory of the host: optimizer state", _gib(need.host), ""))
    train, count = config.train, "" if need.devices == 1 else f"{need.devices} x "
    text = (
        f"{config.model} on {count}{target.title}: {need.rows} rows of {need.length} tokens at a "
        f"time, {train.accumulation} to a step\n{aligned(rows)}"
    )
    capability = target.capability
    if capability and capability < (8, 0) and train.compute_dtype == "bfloat16":
        text += f"\n{target.title} has no products of bfloat16: --train.compute_dtype float16"
    if target.compiler == "estimate":
        text += (
            "\nThe base, the adapters and the optimizer are exact; the gradients, activations and "
            "temporaries are\nestimated with the compiler for CPUs, which put the peak 4 % too low "
            "to 9 % too high where\nit was checked: install jax-cuda13-plugin to compile for GPUs."
        )
    return text


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _most_rows(
    config: Config, base: Base, llama: LlamaConfig, target: Target, need: Need
) -> tuple[int, Need]:
    """The most rows at a time that were seen to fit, at least those of the configuration."""

    def rows(count: int) -> Need:
        changes = {"train.accumulation": 1, "train.batch_size": count}
        return measure(_with(config, changes), base, llama, target)

    unit = need.devices // config.mesh.tensor
    double, limit = rows(2 * need.rows), _TIGHT * target.memory
    slope = max((double.peak - need.peak) / need.rows, 1)
    guess = min(int(need.rows + (limit - need.peak) / slope), _MOST_ROWS)
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


def _advise(config: Config, base: Base, llama: LlamaConfig, target: Target, need: Need) -> None:
    """Tries what saves memory, each on top of the others, and says what is enough."""
    words, memory = "", target.memory
    if memory < _MOST_SHARE * target.whole:
        memory = int(_MOST_SHARE * target.whole)
        words = f"XLA_CLIENT_MEM_FRACTION={_MOST_SHARE} "
    limit = int(_TIGHT * memory)

    def attempt(changes: dict[str, Any]) -> Need:
        return measure(_with(config, changes), base, llama, target, limit)

    def tell(changes: dict[str, Any], found: Need) -> None:
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

    # The last one was needed; of those before it, the dearest are tried to be done without first.
    for name in list(taken)[-2::-1]:
        fewer = {k: v for k, v in taken.items() if k != name}
        taken = fewer if fits_too(fewer) else taken
    for parts in _divisors(config.train.batch_size):
        if config.train.accumulation < parts < taken.get("train.accumulation", 0):
            fewer = taken | {"train.accumulation": parts}
            if fits_too(fewer):
                taken = fewer
                break
    logger.info(f"so it fits: {words}{_flags(taken)}".rstrip())
    if words:
        logger.info("(XLA_CLIENT_MEM_FRACTION is a variable of the environment)")


def _flags(changes: dict[str, Any]) -> str:
    return " ".join(f"--{name} {str(value).lower()}" for name, value in changes.items())


def _savings(config: Config, target: Target) -> Iterator[dict[str, Any]]:
    """Changes that save memory, those that cost least first."""
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
    if config.adapter.dtype == "float32":
        yield {"adapter.dtype": "bfloat16"}
    for fsdp in [n * mesh.fsdp for n in _divisors(MOST_SPLIT)[1:]]:
        for n in reversed(_divisors(train.batch_size)):
            change = {"train.accumulation": n, "mesh.fsdp": fsdp}
            if _is_valid(config, change, target):
                yield change
                break


def _is_valid(config: Config, changes: dict[str, Any], target: Target) -> bool:
    """Whether the rows of a batch and the devices suffice for the mesh."""
    new = _with(config, changes)
    rows = new.train.batch_size // new.train.accumulation
    split = rows % ((new.mesh.data or 1) * new.mesh.fsdp) == 0
    return split and device_count(new) <= len(target.devices)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _with(config: Config, changes: dict[str, Any]) -> Config:
    """A configuration with other values of some fields, by their dotted names."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, field = name.split(".")
        sections.setdefault(section, {})[field] = value
    new = {k: dataclasses.replace(getattr(config, k), **v) for k, v in sections.items()}
    return dataclasses.replace(config, **new)
