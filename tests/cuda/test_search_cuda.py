"""The search kernels compiled for absent GPUs: resources, rounding, cost."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.kernels import search_integer_triton
from irqlora_jax.kernels.search_triton import refusal, search_shift
from irqlora_jax.plan.gpus import DEVICES, OPTIONS, compile_only_devices
from irqlora_jax.quant.calibrations import icq, icq_integer
from irqlora_jax.quant.entropy import spaced
from irqlora_jax.quant.formats import get_format
from tests.cuda import sass
from tests.cuda.abstract_gpu import abstract_gpu

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)
ROWS = 2**16
LLAMA_7B = 6.48e9  # weights of the linear layers
NAMES = {"h200": "H200", "a100-80": "A100", "l4": "L4"}  # as NVIDIA calls them


def on(name: str, *shapes: tuple[tuple[int, ...], Any]) -> list[jax.ShapeDtypeStruct]:
    devices = compile_only_devices(DEVICES[name])
    if devices is None:
        pytest.skip("needs jax-cuda13-plugin and jax-cuda13-pjrt")
    where = jax.sharding.SingleDeviceSharding(devices[0])
    return [jax.ShapeDtypeStruct(*shape, sharding=where) for shape in shapes]


def compiled(name: str, folder: Path, function: Any, *shapes: Any) -> tuple[Any, list[str]]:
    """The program, and the PTX of its kernels."""
    options = OPTIONS | {"xla_dump_to": str(folder), "xla_dump_emitter_re": ".*"}
    with abstract_gpu(NAMES[name]):
        lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
    program = lowered.compile(compiler_options=options)
    texts = [path.read_text() for path in folder.glob("*.ptx")]
    return program, [text for text in texts if ".entry" in text]


def kernel(texts: list[str], entry: str = "search_shift") -> str:
    (text,) = [text for text in texts if f".entry {entry}" in text]
    return text


def search_integer(bits: int, symmetric: bool | None) -> Any:
    """The kernel's search of the range or, with symmetric = None, of the zero point."""
    if symmetric is None:
        candidates = icq_integer.zero_point_candidates(bits, 0.1, 50)
    else:
        candidates = icq_integer.range_candidates(bits, symmetric, 0.1, 50)
    return lambda w, n=None: search_integer_triton.search(w, candidates, n)


@pytest.mark.parametrize(
    ("name", "fmt", "block", "dtype", "partial"),
    [
        ("h200", "nf4", 64, "float32", False),
        ("h200", "fp4", 256, "float16", True),
        ("h200", "nf2", 16, "float32", False),
        ("a100-80", "nf4", 64, "bfloat16", True),
        ("l4", "nf4", 64, "float32", True),
        ("l4", "nf3", 128, "float32", False),
    ],
)
def test_it_fits_into_registers(name, fmt, block, dtype, partial, tmp_path: Path) -> None:
    shapes = on(name, ((ROWS, block), jnp.dtype(dtype)), ((ROWS,), jnp.int32))[: 1 + partial]
    program, texts = compiled(
        name, tmp_path, lambda w, n=None: search_shift(w, fmt, valid=n), *shapes
    )
    machine = sass.assemble(kernel(texts), tmp_path)["search_shift"]
    assert machine.spills == 0
    # A core with 65536 registers holds at least 24 programs of one warp, 6 for each scheduler.
    assert machine.registers <= 80
    counts = machine.counts
    assert not any(counts[word] for word in ("LDL", "STL", "LDS", "STS"))
    # No product and sum are fused: each comparison takes one instruction of both kinds.
    assert counts["FFMA"] == 0
    assert counts["FMUL"] >= len(get_format(fmt).midpoints)
    assert counts["FADD"] >= len(get_format(fmt).midpoints)
    # Memory for the sorted weights, an end for each block, and the sums.
    assert program.memory_analysis().temp_size_in_bytes < 4 * ROWS * (block + 3) + 2**20


def test_reciprocals_equal_xlas(tmp_path: Path) -> None:
    """The kernel divides 1 by the scale, XLA takes the reciprocal: the same instruction, MUFU.RCP.

    At the ends of float32 the assembler multiplies by a power of two before and after it.
    """
    (blocks,) = on("h200", ((ROWS, 64), jnp.float32))
    _, ours = compiled("h200", tmp_path / "ours", lambda w: search_shift(w, "nf4"), blocks)
    _, theirs = compiled("h200", tmp_path / "xla", lambda w: icq.search_shift(w, "nf4"), blocks)
    text = kernel(ours)
    assert set(re.findall(r"(?:div|rcp)\.[\w.]+", text)) == {"div.full.f32"}
    one = set(re.findall(r"mov\.b32\s+(%r\d+), 0f3F800000;", text)) | {"0f3F800000"}
    assert set(re.findall(r"div\.full\.f32\s+\S+, (\S+),", text)) <= one
    assert set(re.findall(r"rcp\.[\w.]+", "".join(theirs))) == {"rcp.approx.f32"}
    assert not any(".ftz" in text for text in (*ours, *theirs))
    reciprocals = [text for text in theirs if "rcp.approx.f32" in text]
    assert all("MUFU.RCP" in listing(text, tmp_path) for text in (kernel(ours), *reciprocals))


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop: the instructions from `start` to the branch back at `stop`."""

    start: int
    stop: int
    text: str

    @property
    def size(self) -> int:
        return (self.stop - self.start) // 16 + 1

    def holds(self, other: "Loop") -> bool:
        return self != other and self.start <= other.start and other.stop <= self.stop


def listing(ptx: str, folder: Path) -> str:
    sass.assemble(ptx, folder)
    return sass.disassemble(folder / "code.cubin")


def loops(text: str) -> list[Loop]:
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", text, re.M)
    found = []
    for address, line in lines:
        stop = int(address, 16)
        branch = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", line)
        if branch and (start := int(branch[1], 16)) < stop:
            body = [text for at, text in lines if start <= int(at, 16) <= stop]
            found.append(Loop(start, stop, "\n".join(body)))
    return found


def passes(fmt: str, block: int, dtype: Any, warps: int = 16) -> float:
    """Mean number of passes for a candidate: one, and the most extra passes of 32 blocks."""
    points = get_format(fmt).midpoints
    w = np.random.default_rng(0).standard_normal((32 * warps, block)).astype(np.float32)
    w = np.sort(np.asarray(jnp.asarray(w * 0.02).astype(dtype).astype(jnp.float32)), axis=1)
    median, low, high = w[:, (block - 1) // 2], w[:, :1], w[:, -1:]
    spread = np.maximum(w[:, -1] - median, median - w[:, 0])
    factors = spaced(-0.1 / 1.8481308, 0.1 / 1.8481308, 201)
    below = []
    for factor in factors:
        shift = (factor * spread + median)[:, None]
        unit = (w - shift) / np.maximum(np.abs(high - shift), np.abs(low - shift))
        below.append((unit[:, :, None] <= points).sum(1))
    moves = np.diff(below, axis=0)
    assert (moves >= 0).all()
    return float(1 + moves.reshape(len(moves), warps, -1).max(2).mean())


@pytest.mark.parametrize(("block", "seconds"), [(32, 0.7), (64, 0.4)])
def test_cost_of_llama_7b(block, seconds, tmp_path: Path) -> None:
    """On an H200: 132 cores x 4 schedulers x 1 instruction a clock, at 1.7 GHz."""
    (blocks,) = on("h200", ((ROWS, block), jnp.float32))
    _, texts = compiled("h200", tmp_path, lambda w: search_shift(w, "nf4"), blocks)
    found = loops(listing(kernel(texts), tmp_path))
    (step,) = [one for one in found if "REDUX" in one.text and "MUFU" not in one.text]
    (candidate,) = [one for one in found if one.holds(step)]
    search = 201 * (candidate.size - step.size + passes("nf4", block, jnp.bfloat16) * step.size)
    # Sorting: the loops over chunks of 8, or pairs of chunks, times how often they run.
    chunks = block // 8
    levels = chunks.bit_length() - 1
    sorting = [one for one in found if "STG" in one.text and not any(map(one.holds, found))]
    first, mirror, halve, finish = sorted(sorting, key=lambda one: one.start)
    sort = first.size * chunks + levels * (mirror.size * chunks // 2 + finish.size * chunks)
    sort += levels * (levels - 1) // 2 * halve.size * chunks // 2
    per_weight = (search + sort) / (32 * block)
    rate = 132 * 4 * 1.7e9
    sizes = [one.size for one in (step, candidate, first, mirror, halve, finish)]
    print(
        f"block {block}: loops {sizes}, sort {sort}, search {search:.0f}, {per_weight:.1f} a weight"
    )
    assert sort < 0.1 * search
    assert LLAMA_7B * per_weight / rate < seconds


@pytest.mark.parametrize(
    ("name", "bits", "symmetric", "block", "dtype", "partial"),
    [
        ("h200", 4, False, 32, "bfloat16", False),
        ("h200", 4, None, 64, "float32", True),
        ("a100-80", 3, True, 64, "float32", True),
        ("l4", 2, False, 256, "float16", True),
        ("l4", 4, False, 256, "bfloat16", True),
    ],
)
def test_integers_fit_into_registers(
    name, bits, symmetric, block, dtype, partial, tmp_path: Path
) -> None:
    shapes = on(name, ((ROWS, block), jnp.dtype(dtype)), ((ROWS,), jnp.int32))[: 1 + partial]
    program, texts = compiled(name, tmp_path, search_integer(bits, symmetric), *shapes)
    machine = sass.assemble(kernel(texts, "search_integer"), tmp_path)["search_integer"]
    print(f"{name}, int{bits}, {symmetric}: {machine.registers} registers")
    assert machine.spills == 0
    assert machine.registers <= 64  # 32 programs of one warp on each core
    counts = machine.counts
    assert not any(counts[word] for word in ("LDL", "STL", "LDS", "STS"))
    assert counts["FFMA"] == 0  # no product and sum are fused
    # Memory for the copy of the weights, the index, the sum and the ends.
    assert program.memory_analysis().temp_size_in_bytes < 4 * ROWS * (block + 6) + 2**20


def test_quotients_of_integers_equal_xlas(tmp_path: Path) -> None:
    """Both use the same instruction, which does not round correctly on a GPU."""
    (blocks,) = on("h200", ((ROWS, 32), jnp.bfloat16))
    _, ours = compiled("h200", tmp_path / "ours", search_integer(4, False), blocks)
    search = functools.partial(icq_integer.search_range, bits=4, symmetric=False)
    _, theirs = compiled("h200", tmp_path / "xla", search, blocks)
    for texts in (ours, theirs):
        assert set(re.findall(r"(?:div|rcp)\.[\w.]+", "".join(texts))) == {"div.full.f32"}
        assert not any(".ftz" in text for text in texts)


@pytest.mark.parametrize(("bits", "block"), [(4, 32), (4, 64), (3, 32), (2, 32)])
def test_cost_of_llama_7b_in_integers(bits, block, tmp_path: Path) -> None:
    """As `test_cost_of_llama_7b`, but every thread takes the same path."""
    (blocks,) = on("h200", ((ROWS, block), jnp.bfloat16))
    _, texts = compiled("h200", tmp_path, search_integer(bits, False), blocks)
    found = loops(listing(kernel(texts, "search_integer"), tmp_path))
    (candidate,) = [one for one in found if any(map(one.holds, found))]
    (count,) = [one for one in found if candidate.holds(one)]
    (copy,) = [one for one in found if one not in (candidate, count)]
    turns = block // 8
    search = 101 * (candidate.size - count.size + turns * count.size)
    per_weight = (search + turns * copy.size) / (32 * block)
    seconds = LLAMA_7B * per_weight / (132 * 4 * 1.7e9)
    print(
        f"int{bits}, block {block}: candidate {candidate.size - count.size}, 8 weights"
        f" {count.size}, copy {copy.size}: {per_weight:.1f} a weight, {seconds:.2f} s"
    )
    assert seconds < 0.6


def test_older_gpus_are_refused(t4: Any) -> None:
    found = refusal(jax.ShapeDtypeStruct((8, 64), jnp.float32), "nf4", t4)
    assert found is not None and "8.0 or more, the device is T4" in found
