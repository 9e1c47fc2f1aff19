"""What is asked of compiled programs: their computations, and what each fusion reads and makes."""

import dataclasses
import math
import re

FLOATS = ("f32", "bf16", "f16")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a compiled program.

    Attributes:
        computation: that it stands in.
        name: of its result.
        kind: operation.
        types: (type, number of elements) of its results; several for a tuple.
        calls: computation that it runs, if any.
        operands: names.
    """

    computation: str
    name: str
    kind: str
    types: tuple[tuple[str, int], ...]
    calls: str | None
    operands: tuple[str, ...]


def parse(text: str) -> list[Instruction]:
    """The instructions of `compiled.as_text()`."""
    found, computation = [], ""
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{", line)
        if head:
            computation = head[1]
        body = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", line)
        if body:
            types = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", body[2])
            sizes = tuple((t, math.prod(int(n) for n in d.split(",") if n)) for t, d in types)
            calls = re.search(r"(?:calls|to_apply|body)=%?([\w.\-]+)", body[4])
            operands = tuple(re.findall(r"%([\w.\-]+)", body[4].split("), ")[0]))
            found.append(
                Instruction(
                    computation, body[1], body[3], sizes, calls[1] if calls else None, operands
                )
            )
    return found


def dequantized(program: list[Instruction], layers: int) -> dict[str, int]:
    """How many 4-bit weights, one layer of those stacked, the fusions of a computation make."""
    sizes = {(one.computation, one.name): one.types for one in program}
    found: dict[str, int] = {}
    for one in stored(program):
        if one.kind != "fusion":
            continue
        inputs = [sizes.get((one.computation, name), ()) for name in one.operands]
        packed = {2 * n // layers for types in inputs for kind, n in types if kind == "u8"}
        count = sum(kind in FLOATS and n in packed for kind, n in one.types)
        if count:
            found[one.computation] = found.get(one.computation, 0) + count
    return found


def stored(program: list[Instruction]) -> list[Instruction]:
    """Those whose results exist in memory: all but what is inside of a fusion, and views."""
    fused = {one.calls for one in program if one.kind == "fusion"}
    views = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional")
    return [one for one in program if one.computation not in fused and one.kind not in views]


def stacked_floats(
    program: list[Instruction], layers: int, shapes: tuple[tuple[int, int], ...]
) -> list[Instruction]:
    """What holds the dequantized weights of all layers: of one of these shapes, for each layer."""
    sizes = {layers * math.prod(shape) for shape in shapes}
    return [one for one in program if any(k in FLOATS and n in sizes for k, n in one.types)]
