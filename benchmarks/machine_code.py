"""The machine code of the kernels in kernels/ for absent GPUs: compiled, never run.

    python benchmarks/machine_code.py

Prints registers of a thread, spilled bytes, and instructions (on tensor cores, HMMA and HGMMA, and
in all) by GPU, kernel, format and rows, for the shape of a weight of LLaMA-7B. Needs
jax-cuda13-plugin and jax-cuda13-pjrt of jax's version, and nvidia-cuda-nvcc, nvidia-cuda-cuobjdump
and nvidia-cuda-nvdisasm.
"""

import dataclasses
import functools
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # do not use a GPU, even if there is one
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
from timing import table, versions

from irqlora_jax.kernels import matmul_mosaic, matmul_triton, search_integer_triton, search_triton
from irqlora_jax.plan.gpus import DEVICES, compile_only_devices
from irqlora_jax.quant.calibrations.icq_integer import range_candidates
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantized_shape
from tests.cuda import sass
from tests.cuda.abstract_gpu import abstract_gpu

GPUS = ("a100-80", "l4", "h200")  # an H100 runs the programs of an H200
FORMATS = ("nf4", "nf3", "nf2", "int4")
ROWS = (1, 16, 2048)
OUT, FEATURES = 11008, 4096


def kernels_of(gpu: str, function: Callable[..., Any], *shapes: Any) -> dict[str, sass.Machine]:
    """The kernels in the compiled program of a function."""
    devices = compile_only_devices(DEVICES[gpu])
    if devices is None:
        raise SystemExit("needs jax-cuda13-plugin and jax-cuda13-pjrt")
    where = jax.sharding.SingleDeviceSharding(devices[0])
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes)
    jax.clear_caches()
    name = {"a100-80": "A100"}.get(gpu, gpu.upper())
    with tempfile.TemporaryDirectory() as folder, abstract_gpu(name):
        return sass.compile_kernels(jax.jit(function).trace(*placed), Path(folder))[1]


def row(gpu: str, name: str, fmt: str, count: Any, found: dict[str, sass.Machine]) -> list[tuple]:
    """One row for our kernel; none if XLA had compiled it before."""
    names = (
        "forward_kernel",
        "transposed_kernel",
        "dequant_matmul",
        "search_shift",
        "search_integer",
    )
    ours = [one for key, one in found.items() if any(name in key for name in names)]
    if not ours:
        return []
    (machine,) = ours
    cores = [f"{machine.counts[word]} {word}" for word in ("HGMMA", "HMMA") if machine.counts[word]]
    cells = (machine.registers, machine.spills, ", ".join(cores), sum(machine.counts.values()))
    return [(gpu, name, fmt, str(count), *map(str, cells))]


def main() -> None:
    """Prints the table."""
    warnings.simplefilter("ignore")
    rows = []
    for gpu in GPUS:
        for fmt in FORMATS:
            weight = quantized_shape((OUT, FEATURES), QuantConfig(format=fmt))  # type: ignore[arg-type]
            fragments = dataclasses.replace(weight, layout="fragments")
            for count in ROWS:
                x = jax.ShapeDtypeStruct((count, FEATURES), jnp.bfloat16)
                g = jax.ShapeDtypeStruct((count, OUT), jnp.bfloat16)
                for name, function, given in (
                    ("triton, y", matmul_triton.matmul, x),
                    ("triton, dX", matmul_triton.matmul_transposed, g),
                ):
                    found = kernels_of(gpu, function, given, weight)
                    rows += row(gpu, name, fmt, count, found)
                if DEVICES[gpu].capability == (9, 0):
                    for name, function, given in (
                        ("mosaic, y", matmul_mosaic.matmul, x),
                        ("mosaic, dX", matmul_mosaic.matmul_transposed, g),
                    ):
                        found = kernels_of(gpu, function, given, fragments)
                        rows += row(gpu, name, fmt, count, found)
        for fmt in ("nf4", "nf3", "nf2", "fp4"):
            blocks = jax.ShapeDtypeStruct((2**16, 64), jnp.bfloat16)
            found = kernels_of(gpu, lambda w, fmt=fmt: search_triton.search_shift(w, fmt), blocks)
            rows += row(gpu, "search", fmt, "", found)
        for bits in (4, 3, 2):
            blocks = jax.ShapeDtypeStruct((2**16, 32), jnp.bfloat16)
            candidates = range_candidates(bits, False, 0.1, 50)
            search = functools.partial(search_integer_triton.search, candidates=candidates)
            rows += row(gpu, "search", f"int{bits}", "", kernels_of(gpu, search, blocks))
        print(f"{gpu} done", file=sys.stderr, flush=True)
    print(f"{versions()}; weights [{OUT}, {FEATURES}], bfloat16\n")
    columns = ("GPU", "kernel", "format", "rows", "registers", "spills", "tensor cores")
    print(table((*columns, "instructions"), rows))


if __name__ == "__main__":
    main()
