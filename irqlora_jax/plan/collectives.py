"""Counts the collectives of a compiled program, and the bytes that they move.

A collective in a loop counts as often as the loop runs. Bytes are those that a device sends on a
ring of n devices: (n - 1) / n of the result of an all-gather, as much of the operand of a
reduce-scatter, and twice as much of an all-reduce. A ring over several hosts leaves each host once,
and all rings share the network adapters of the host, one for each GPU, as NCCL does.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2}
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{")
_LINE = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_CALLED = re.compile(
    r"\b(?:body|condition|calls|to_apply)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(
    r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}"
)

Shape = tuple[str, tuple[int, ...]]
"""Type and sizes, as the program names them: ("u8", (80, 1024))."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: one of `KINDS`.
        shapes: of its results on one device.
        group: the first group of devices that take part together.
        times: how often it runs.
        overlapped: number of fusions and library calls, such as products, that the program starts
            between the start and the end of the collective; 0 if it waits at once.
    """

    kind: str
    shapes: tuple[Shape, ...]
    group: tuple[int, ...]
    times: int
    overlapped: int

    @property
    def nbytes(self) -> float:
        """Bytes that each device sends, each time."""
        size, count = sum(map(shape_bytes, self.shapes)), len(self.group)
        if self.kind == "reduce-scatter":  # the result is one part of the operand
            return size * (count - 1)
        share = 1.0 if self.kind == "collective-permute" else (count - 1) / count
        return size * share * (2 if self.kind == "all-reduce" else 1)

    def network_bytes(self, local: int) -> float:
        """Bytes that each network adapter sends, each time: 0 if the group is of one host.

        Groups with k devices of a host make local / k rings, which share the `local` adapters.

        Args:
            local: devices of a host, each with an adapter.
        """
        hosts = [device // local for device in self.group]
        return self.nbytes / hosts.count(hosts[0]) if len(set(hosts)) > 1 else 0.0


def shape_bytes(shape: Shape) -> float:
    """Size of an array of a program."""
    kind, sizes = shape
    digits = re.search(r"\d+", kind)
    bits = _BITS.get(kind) or int(digits[0] if digits else 8)
    return math.prod(sizes) * bits / 8


class Line(NamedTuple):
    """One line of a program that runs.

    Attributes:
        operation: such as "all-gather-start".
        shapes: of its results.
        rest: of the line, behind the operation.
        times: how often it runs.
        lines: of its computation.
        place: in `lines`.
    """

    operation: str
    shapes: list[Shape]
    rest: str
    times: int
    lines: list[str]
    place: int


def running_lines(program: str) -> Iterator[Line]:
    """The lines that a program runs, those of loops and called computations in place of the call.

    Args:
        program: `compiled.as_text()`.

    Raises:
        ValueError: a loop with a collective has no known number of turns.
    """
    lines: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        head = _HEAD.match(line)
        if head:
            name = head[2]
            entry = name if head[1] else entry
        lines.setdefault(name, []).append(line)

    def visit(name: str, times: int) -> Iterator[Line]:
        for place, line in enumerate(lines.get(name, ())):
            parts = _LINE.match(line)
            if parts is None:
                continue
            result, operation, rest = parts.groups()
            yield Line(operation, _shapes(result), rest, times, lines[name], place)
            if _kind(operation):
                continue
            turns = _turns(lines, name, rest) if operation == "while" else 1
            again = times * (turns or 1)
            for one, branches in _CALLED.findall(rest):
                for other in [one, *re.findall(r"[\w.\-]+", branches)]:
                    for inner in visit(other, again):
                        if turns is None and _kind(inner.operation):
                            raise ValueError(
                                f"a loop with collectives and unknown turns: {line[:200]}"
                            )
                        yield inner

    yield from visit(entry, 1)


def collectives(program: str, devices: int) -> list[Collective]:
    """The collectives of a program, with the number of times that they run.

    Args:
        program: `compiled.as_text()`.
        devices: number of devices that it runs on.

    Raises:
        ValueError: as `running_lines`, or the devices are written in an unknown form.
    """
    found: list[Collective] = []
    for line in running_lines(program):
        kind = _kind(line.operation)
        if kind is None:
            continue
        shapes, work = tuple(line.shapes), 0
        if line.operation != kind:  # it starts here
            work = _work_meanwhile(line.lines, line.place, kind)
            if kind == "all-gather":  # operands, then results
                shapes = shapes[len(shapes) // 2 :]
            if kind == "collective-permute":  # operand, result, and perhaps more
                shapes = shapes[1:2]
        group = _group(line.rest, devices)
        found.append(Collective(kind, shapes, group, line.times, work))
    return found


def seconds_at_least(found: Iterable[Collective], local: int, link: float, network: float) -> float:
    """Seconds that the slowest part of each ring needs, one collective after the other.

    Args:
        found: collectives of a step.
        local: devices of a host.
        link: bytes a second between the devices of a host, in each direction.
        network: bytes a second of each network adapter, in each direction.
    """
    return sum(
        one.times * max(one.nbytes / link, one.network_bytes(local) / network) for one in found
    )


def _turns(lines: dict[str, list[str]], name: str, rest: str) -> int | None:
    """How often a loop runs, if that is known.

    The compiler does not say so of a loop around a pipelined loop. Such a loop counts from 0.
    """
    known = _TRIPS.search(rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", rest)
    test = "\n".join(lines.get(condition[1], ())) if condition else ""
    for inner in re.findall(r"calls=%?([\w.\-]+)", test):
        test += "\n".join(lines.get(inner, ()))
    bounds = re.findall(r" constant\((\d+)\)", test)
    if len(bounds) != 1 or re.findall(r"direction=(\w+)", test) != ["LT"]:
        return None
    value = rest.split(")")[0]
    while True:  # back to the first number of the tuple that the loop starts with
        own = rf"\s+%?{re.escape(value.lstrip('%'))} = .*? (tuple|copy|constant)\((%?[\w.\-]+)"
        found = next(filter(None, (re.match(own, line) for line in lines[name])), None)
        if found is None:
            return None
        if found[1] == "constant":
            return int(bounds[0]) if found[2] == "0" else None
        value = found[2]


def _kind(operation: str) -> str | None:
    """The kind of the collective that an operation starts, if any."""
    kind = operation.removesuffix("-start")
    return kind if kind in KINDS else None


def _work_meanwhile(lines: list[str], place: int, kind: str) -> int:
    """Counts what the computation starts after a collective, before it waits for it."""
    name = re.match(r"\s+(?:ROOT )?%?([\w.\-]+)", lines[place])
    assert name is not None
    own, count = rf"(?<![\w.\-]){re.escape(name[1])}(?![\w.\-])", 0
    for line in lines[place + 1 :]:
        parts = _LINE.match(line)
        if parts is None:
            continue
        _, operation, rest = parts.groups()
        if operation == f"{kind}-done" and re.search(own, rest):
            break
        count += operation in ("fusion", "custom-call")
    return count


def total_bytes(found: Iterable[Collective]) -> float:
    """Bytes that each device sends in one run of the program."""
    return sum(one.nbytes * one.times for one in found)


def _shapes(text: str) -> list[Shape]:
    return [
        (kind, tuple(int(size) for size in sizes.split(",") if size))
        for kind, sizes in _SHAPE.findall(text)
    ]


def _group(text: str, devices: int) -> tuple[int, ...]:
    """The first group of devices of a collective."""
    listed, iota, named = (form.search(text) for form in (_LISTED, _IOTA, _NAMED))
    if listed:
        return _numbers(listed[1])
    if iota:
        shape, sizes, order = (_numbers(part or "") for part in iota.groups())
        ids = _ids(sizes, order).reshape(shape)
        return tuple(ids.reshape(-1, shape[-1])[0].tolist())
    if named:
        axes = re.findall(r"'(\w+)'=(\d+)", named[1])
        sizes = tuple(int(size) for _, size in axes)
        ids = _ids(_numbers(named[2] or "") or sizes, _numbers(named[3] or "")).reshape(sizes)
        own = re.findall(r"'(\w+)'", named[4])
        place = tuple(slice(None) if name in own else 0 for name, _ in axes)
        return tuple(ids[place].reshape(-1).tolist())
    if "source_target_pairs=" in text or "replica_groups={}" in text:
        return tuple(range(devices))
    raise ValueError(f"unknown groups of devices: {text[:300]}")


def _ids(sizes: tuple[int, ...], order: tuple[int, ...]) -> np.ndarray:
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(order) if order else ids


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)
