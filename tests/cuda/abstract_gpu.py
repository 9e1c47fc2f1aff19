"""The context in which jax lowers a Triton kernel without a GPU."""

import contextlib
from typing import Any

import jax


def abstract_gpu(name: str = "H200") -> contextlib.AbstractContextManager[Any]:
    """A context in which Pallas lowers for a GPU. Before jax 0.11 none is needed.

    Args:
        name: name of the GPU without "NVIDIA".
    """
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(f"NVIDIA {name}", None, "gpu")
    axes = ("data", "fsdp", "tensor")  # as irqlora_jax/sharding.py names them
    auto = (jax.sharding.AxisType.Auto,) * len(axes)
    mesh = jax.sharding.AbstractMesh((1,) * len(axes), axes, auto, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)
