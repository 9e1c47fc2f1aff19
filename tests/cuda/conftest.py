"""Absent GPUs: tests compile programs for them and never run these.

    pytest tests/cuda

These tests need jax-cuda13-plugin and jax-cuda13-pjrt of jax's version and, for the machine code of
kernels, nvidia-cuda-nvcc, nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm (install all with
--no-deps). Without these packages they are skipped.
"""

import shutil
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from irqlora_jax.plan.gpus import DEVICES, compile_only_devices

if shutil.which("nvidia-smi") is None:
    # Otherwise jax looks for the driver, and drops the CUDA plugin if there is none.
    jax.config.update("jax_platforms", "cpu")


@pytest.fixture(autouse=True, scope="module")
def no_compilation_cache():
    """jax cannot read programs for absent devices back from the cache.

    jax asks for the setting once a process, so each change is followed by a reset.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    reset_cache()


NAMES = ("h200", "a100-80", "l4", "t4")


def absent(name: str, count: int = 1) -> list[Any]:
    """Devices of `irqlora_jax.plan.gpus.DEVICES`; skips the test without the CUDA plugin."""
    found = compile_only_devices(DEVICES[name], count)
    if found is None:
        pytest.skip("needs jax-cuda13-plugin and jax-cuda13-pjrt")
    return found


@pytest.fixture(params=NAMES)
def gpu(request: pytest.FixtureRequest) -> Any:
    """One absent device, of each kind in turn. Compile with `irqlora_jax.plan.gpus.OPTIONS`."""
    return absent(request.param)[0]


@pytest.fixture
def h200() -> Any:
    """One absent H200."""
    return absent("h200")[0]


@pytest.fixture
def a100() -> Any:
    """One absent A100 with 80 GB."""
    return absent("a100-80")[0]


@pytest.fixture
def l4() -> Any:
    """One absent L4."""
    return absent("l4")[0]


@pytest.fixture
def t4() -> Any:
    """One absent T4."""
    return absent("t4")[0]
