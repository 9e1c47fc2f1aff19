"""Describes GPUs by name, and makes devices to compile for without such a GPU.

The CUDA plugin of jax can compile for a GPU from its description. This needs no driver, only the
wheels jax-cuda13-plugin and jax-cuda13-pjrt (or jax[cuda13]).
"""

import dataclasses
import difflib
import os
import re
from typing import Any

from jax.experimental import topologies

from irqlora_jax.text import refusal


@dataclasses.dataclass(frozen=True)
class Device:
    """Properties of a GPU from its driver and its data sheet.

    Attributes:
        title: name for people.
        capability: CUDA compute capability.
        mib: total memory in MiB, as reported by the driver.
        cores: number of streaming multiprocessors.
        bandwidth: memory bandwidth in GB/s.
        cache: size of the L2 cache in MiB.
        clock: boost clock in GHz.
        link: GB/s to other GPUs of the host in each direction, of NVLink or PCI Express.
    """

    title: str
    capability: tuple[int, int]
    mib: int
    cores: int
    bandwidth: int
    cache: int
    clock: float
    link: int = 32

    @property
    def memory(self) -> int:
        """Total memory in bytes."""
        return self.mib << 20

    @property
    def flops(self) -> float:
        """Floating-point operations a second in float32, without tensor cores."""
        lanes = 64 if self.capability < (8, 6) else 128
        return 2e9 * self.cores * lanes * self.clock


DEVICES = {
    "t4": Device("T4", (7, 5), 15360, 40, 320, 4, 1.59, 16),
    "3090": Device("GeForce RTX 3090", (8, 6), 24576, 82, 936, 6, 1.70),
    "4090": Device("GeForce RTX 4090", (8, 9), 24564, 128, 1008, 72, 2.52),
    "5090": Device("GeForce RTX 5090", (12, 0), 32607, 170, 1792, 96, 2.41, 64),
    "a10": Device("A10", (8, 6), 23028, 72, 600, 6, 1.70),
    "l4": Device("L4", (8, 9), 23034, 58, 300, 48, 2.04),
    "a6000": Device("RTX A6000", (8, 6), 49140, 84, 768, 6, 1.80),
    "6000-ada": Device("RTX 6000 Ada", (8, 9), 49140, 142, 960, 96, 2.51),
    "l40s": Device("L40S", (8, 9), 46068, 142, 864, 96, 2.52),
    "a100-40": Device("A100 40 GB", (8, 0), 40960, 108, 1555, 40, 1.41, 300),
    "a100-80": Device("A100 80 GB", (8, 0), 81920, 108, 2039, 40, 1.41, 300),
    "h100": Device("H100 80 GB", (9, 0), 81559, 132, 3350, 50, 1.98, 450),
    "h200": Device("H200", (9, 0), 143771, 132, 4800, 50, 1.98, 450),
    "b200": Device("B200", (10, 0), 183359, 148, 8000, 126, 1.97, 900),
}
"""GPUs by the names that `--plan` accepts."""

# By compute capability: bytes of shared memory, and threads, of a multiprocessor.
_SHARED = {(7, 5): 64 << 10, (8, 0): 164 << 10, (9, 0): 228 << 10, (10, 0): 228 << 10}
_THREADS = {(7, 5): 1024, (8, 0): 2048, (9, 0): 2048, (10, 0): 2048}


def find_device(name: str) -> Device:
    """Finds a GPU by name. Case, blanks and a leading "rtx" or "nvidia" do not matter.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    plain = re.sub(r"^(nvidia|geforce|rtx|[\s_-])+", "", name.lower())
    plain = re.sub(r"[\s_]+", "-", plain.removesuffix("gb").strip())
    if plain in DEVICES:
        return DEVICES[plain]
    several = [one for one in DEVICES if plain and one.startswith(f"{plain}-")]
    if several:
        raise refusal("plan", name, " or ".join(several))
    near = difflib.get_close_matches(plain, DEVICES, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise refusal("plan", name, f"one of {', '.join(DEVICES)}{hint}")


@dataclasses.dataclass(frozen=True)
class Fleet:
    """The devices of a plan.

    Attributes:
        device: the GPU.
        count: GPUs of each host.
        hosts: number of hosts.
        given: whether the numbers were given; else the mesh decides.
    """

    device: Device
    count: int = 1
    hosts: int = 1
    given: bool = False


def parse_fleet(name: str) -> Fleet:
    """Reads NAME, COUNTxNAME (one host) or HOSTSxCOUNTxNAME.

    Raises:
        ValueError: an unknown name, or a number below 1.

    Examples:
        >>> fleet = parse_fleet("2x8xh100")
        >>> fleet.hosts, fleet.count, fleet.device.title
        (2, 8, 'H100 80 GB')
    """
    found = re.fullmatch(r"(?:(\d+)\s*x\s*)?(\d+)\s*x\s*(.+)", name.strip(), re.IGNORECASE)
    if found is None:
        return Fleet(find_device(name))
    hosts, count = int(found[1] or 1), int(found[2])
    if hosts < 1 or count < 1:
        raise refusal("plan", name, "numbers of at least 1, as in 8xa100-80 or 2x8xh100")
    return Fleet(find_device(found[3]), count, hosts, True)


def compile_only_devices(device: Device, count: int = 1, hosts: int = 1) -> list[Any] | None:
    """Makes devices for compilation only; programs cannot run on them.

    Compile with `OPTIONS`, because autotuning needs a real device.

    Args:
        device: the GPU.
        count: GPUs of each host.
        hosts: number of hosts.

    Returns:
        The devices, or None if jax has no CUDA plugin.
    """
    try:
        found = topologies.get_topology_desc(
            platform="cuda", target_config=_description(device), topology=f"1x{hosts}x{count}"
        )
    except NotImplementedError:
        return None
    return list(found.devices)


OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
"""Compiler options for `compile_only_devices`."""


DEFAULT_FRACTION = 0.75
"""Fraction of a GPU's memory that jax uses unless XLA_CLIENT_MEM_FRACTION sets another one."""


def usable_fraction() -> float:
    """Fraction of a GPU's memory that jax uses."""
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        if os.environ.get(name):
            return float(os.environ[name])
    return DEFAULT_FRACTION


def _description(device: Device) -> str:
    """Writes a GpuTargetConfigProto of XLA as text."""
    major, minor = device.capability
    shared = _SHARED.get(device.capability, 100 << 10)
    # From Ampere on, the driver reserves 1 KiB of each block.
    own = shared - (1 << 10 if major >= 8 else 0)
    features = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
  threads_per_block_limit: 1024 threads_per_warp: 32
  threads_per_core_limit: {_THREADS.get(device.capability, 1536)}
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {own}
  shared_memory_per_core: {shared} registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: {device.cores} fpus_per_core: {128 if minor else 64}
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {device.bandwidth * 10**9} l2_cache_size: {device.cache << 20}
  device_memory_size: {device.memory} clock_rate_ghz: {device.clock}
  device_vendor: "NVIDIA Corporation" device_address_bits: 64
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{device.title}"
"""
