"""The Triton backend of Pallas: does jax have it, which devices run it, and its deprecation."""

import functools
import math
import warnings
from typing import Any

import jax

from irqlora_jax.machine import compute_capability

DEPRECATED = "The Pallas Triton backend is deprecated and will be removed"
"""Start of the warning that jax gives at every lowering, from 0.11 on."""


def backend() -> Any:
    """jax.experimental.pallas.triton, or None if this jax no longer has it."""
    try:
        from jax.experimental.pallas import triton
    except ImportError:
        return None
    return triton


def announce() -> None:
    """Warns once of the deprecation, not once for each kernel. Call it when a kernel is traced.

    jax itself warns when it lowers a kernel, which happens after tracing. A context that ignores
    warnings would end before that. So this adds a filter for that text and leaves it there.
    """
    if jax.__version_info__ >= (0, 11):
        warnings.filterwarnings("ignore", DEPRECATED, DeprecationWarning)
        _notice()


@functools.cache
def _notice() -> None:
    warnings.warn(
        f"jax {jax.__version__} deprecates the Triton backend of Pallas and will remove it; "
        "then implementation = 'xla' serves instead",
        FutureWarning,
        stacklevel=2,
    )


def refusal(device: Any = None) -> str | None:
    """Why no Triton kernel can run here (jax, the device, or a mesh), or None.

    Args:
        device: a jax device; None: the first one.
    """
    if backend() is None:
        return f"jax {jax.__version__} no longer has the Triton backend of Pallas"
    device = jax.devices()[0] if device is None else device
    if (compute_capability(device) or (0, 0)) < (8, 0):
        needs = "an NVIDIA GPU of compute capability 8.0 or more"
        return f"it needs {needs}, the device is {device.device_kind}"
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and (count := math.prod(mesh.axis_sizes)) > 1:
        return f"it serves one device, not a mesh of {count}"
    return None
