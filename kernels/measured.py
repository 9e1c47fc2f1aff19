"""Where a kernel is taken without being asked for: where a committed measurement says it is faster.

`measured.json` holds what benchmarks/kernels.py --record found on a GPU, and nothing else. A kernel
that was not measured for the device, the format, the shape and the number of rows is never the
default. With --tune it holds the tiles too that were the fastest there; elsewhere each kernel has a
rule for them (`default_tiles`).
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "measured.json"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A kernel beside XLA's path, in one run.

    Attributes:
        operation: "matmul" (y = x W^T), "matmul_transposed" (dX = g W) or "search" (ICQ's
            shifts, or the ranges of integers).
        implementation: as asked for, "mosaic" or "triton".
        device: `device_kind` of jax.
        format: of the codes.
        shape: [out, in] of the matrix; of a search [any, block size].
        rows: of x or g, from and to: neighbors that were both measured. Of a search, 0 and 0.
        speedup: over XLA's path, the least of the two ends.
        jax: version.
        date: of the run, YYYY-MM-DD.
        tiles: fields of the kernel's `Tiles` that were the fastest; empty: those of its rule.
    """

    operation: str
    implementation: str
    device: str
    format: str
    shape: tuple[int, int]
    rows: tuple[int, int]
    speedup: float
    jax: str
    date: str
    tiles: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)


@functools.cache
def read_measurements(file: Path = FILE) -> tuple[Measurement, ...]:
    """What was measured so far.

    Raises:
        ValueError: not a list of measurements.
    """
    try:
        return tuple(
            Measurement(**entry | {"shape": tuple(entry["shape"]), "rows": tuple(entry["rows"])})
            for entry in json.loads(file.read_text(encoding="utf-8"))
        )
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: not a list of measurements: {error}") from error


def fastest(
    operation: str,
    implementation: str,
    device: str,
    format: str,
    shape: tuple[int, int],
    rows: int = 0,
    measurements: Sequence[Measurement] | None = None,
) -> Measurement | None:
    """Where the kernel was faster than XLA's path here, by the most; None: nowhere."""
    known = read_measurements() if measurements is None else measurements
    wanted = operation, implementation, device, format, shape
    found = [
        one
        for one in known
        if (one.operation, one.implementation, one.device, one.format, one.shape) == wanted
        and one.rows[0] <= rows <= one.rows[1]
        and one.speedup > 1
    ]
    return max(found, key=lambda one: one.speedup, default=None)


def is_faster(*place: Any) -> bool:
    """Whether a measurement says that the kernel is faster; arguments of `fastest`."""
    return fastest(*place) is not None


def tuned_tiles(*place: Any) -> dict[str, Any]:
    """Fields of the kernel's `Tiles` that were the fastest, none for its rule; arguments of
    `fastest`."""
    found = fastest(*place)
    return found.tiles if found else {}
