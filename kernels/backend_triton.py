"""The Triton backend of Pallas: whether jax has it, what it runs on, and its deprecation."""

import functools
import math
import warnings
from typing import Any

import jax

from irqlora_jax.machine import compute_capability

DEPRECATED = "The Pallas Triton backend is deprecated and will be removed"
"""How jax begins what it says at every lowering, from 0.11 on."""


def backend() -> Any:
    """jax.experimental.pallas.triton, or None where jax has it no more."""
    try:
        from jax.experimental.pallas import triton
    except ImportError:
        return None
    return triton


def announce() -> None:
    """One notice of the deprecation, in place of one for each kernel. Call it where a kernel is
    traced.

    A kernel is lowered later than it is traced, so it is not enough to ignore jax's own warning
    for as long as a function runs: this asks for exactly that text to be ignored from now on.
    """
    if jax.__version_info__ >= (0, 11):
        warnings.filterwarnings("ignore", DEPRECATED, DeprecationWarning)
        _notice()


@functools.cache
def _notice() -> None:
    warnings.warn(
        f"jax {jax.__version__} deprecates the Triton backend of Pallas and will remove it; "
        "where it is gone, implementation = 'xla' serves in its place",
        FutureWarning,
        stacklevel=2,
    )


def refusal(device: Any = None) -> str | None:
    """Why no kernel can run here, if none can: jax, the device, or more than one of them.

    Args:
        device: of jax; None: the first one.
    """
    if backend() is None:
        return f"jax {jax.__version__} has no Triton backend of Pallas any more"
    device = jax.devices()[0] if device is None else device
    if (compute_capability(device) or (0, 0)) < (8, 0):
        needs = "an NVIDIA GPU of compute capability 8.0 or more"
        return f"it needs {needs}, the device is {device.device_kind}"
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and (count := math.prod(mesh.axis_sizes)) > 1:
        return f"it serves one device, not a mesh of {count}"
    return None
