"""Where a kernel is the default: only where a committed measurement says that it is faster.

`measured.json` holds the results of `benchmarks/kernels.py --record` on a GPU, and nothing else. A
kernel is never the default for a device, format, shape and number of rows that were not measured.
With --tune the file also has the fastest tiles; without them a kernel uses its rule,
`default_tiles`.
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
    """A kernel compared with XLA's path in one run.

    Attributes:
        operation: "matmul" (y = x W^T), "matmul_transposed" (dX = g W) or "search" (ICQ's
            shifts, or the ranges of integers).
        implementation: "mosaic" or "triton".
        device: `device_kind` of jax.
        format: name of the code book.
        shape: [out, in] of the matrix; for a search [0, block size].
        rows: first and last number of rows of x or g; neighbors, both measured. For a search 0, 0.
        speedup: over XLA's path, the smaller of the two ends.
        jax: version of jax.
        date: date of the run, YYYY-MM-DD.
        tiles: fields of the fastest `Tiles` that differ from the kernel's rule.
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
    """All committed measurements.

    Raises:
        ValueError: the file is not a list of measurements.
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
    """The measurement with the largest speedup over XLA's path; None if none is above 1."""
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
    """Whether a measurement says that the kernel is faster; takes the arguments of `fastest`."""
    return fastest(*place) is not None


def tuned_tiles(*place: Any) -> dict[str, Any]:
    """Fields of the fastest `Tiles` that differ from the kernel's rule.

    Takes the arguments of `fastest`.
    """
    found = fastest(*place)
    return found.tiles if found else {}
