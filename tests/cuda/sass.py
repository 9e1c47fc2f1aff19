"""Registers, spills and instructions of a kernel that is assembled for an NVIDIA GPU.

Needs `ptxas`, `cuobjdump` and `nvdisasm` of CUDA 13: the packages nvidia-cuda-nvcc,
nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
"""

import collections
import dataclasses
import importlib.util
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from irqlora_jax.plan.gpus import OPTIONS


@dataclasses.dataclass(frozen=True)
class Machine:
    """Machine code of one kernel.

    Attributes:
        registers: registers of a thread.
        spills: bytes that a thread stores in memory and loads again because registers are full.
        counts: number of instructions by their first word, such as HGMMA, HMMA, PRMT.
        code: the instructions as text.
        serialized: whether the assembler lets each tensor core product (HGMMA) finish before the
            next instruction, because it cannot tell which instructions use its registers.
    """

    registers: int
    spills: int
    counts: collections.Counter[str]
    code: str
    serialized: bool = False


def compile_kernels(traced: Any, folder: Path) -> tuple[Any, dict[str, Machine]]:
    """Compiles `jax.jit(f).trace(..)` for an absent GPU; returns the program and kernels by name.

    Args:
        traced: with shapes that lie on a device of `irqlora_jax.plan.gpus.compile_only_devices`.
        folder: an empty one, for files.
    """
    # XLA of jax 0.12 writes PTX only with the second option.
    options = OPTIONS | {"xla_dump_to": str(folder), "xla_dump_emitter_re": "ptx"}
    # XLA compiles Mosaic's kernels separately. An environment variable says where to put their PTX.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOSAIC_GPU_DUMP_TO", str(folder))
        compiled = traced.lower(lowering_platforms=("cuda",)).compile(compiler_options=options)
    found: dict[str, Machine] = {}
    for path in folder.glob("*.ptx"):
        if ".entry" in (text := path.read_text()):
            found |= assemble(text, folder)
    return compiled, found


def assemble(ptx: str, folder: Path) -> dict[str, Machine]:
    """Assembles a text in PTX; returns its kernels by name."""
    (target,) = re.findall(r"^\.target (\w+)", ptx, re.M)
    source, code = folder / "code.ptx", folder / "code.cubin"
    source.write_text(ptx)
    log = _run("ptxas", "-v", f"-arch={target}", str(source), "-o", str(code))
    found = {}
    usage = r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    usage += r".*?Used (\d+) registers"
    bodies = dict(
        re.findall(r"Function : (\S+)\n(.*?)(?=\n\s+Function : |\Z)", disassemble(code), re.S)
    )
    for name, stores, loads, registers in re.findall(usage, log, re.S):
        words = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@\S+ )?([A-Z][A-Z0-9_]*)", bodies[name])
        spills = int(stores) + int(loads)
        counts = collections.Counter(words)
        found[name] = Machine(int(registers), spills, counts, bodies[name], "C7510" in log)
    return found


def overwritten_operands(machine: Machine) -> list[str]:
    """Instructions that use registers of a tensor core product in flight (HGMMA).

    They write a register that the product reads, or read or write a register of its sums. A product
    may use its registers until the wait for its group (WARPGROUP.DEPBAR). This function follows all
    paths through the kernel.
    """
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", machine.code)
    code = [(int(address, 16), re.sub(r"^@!?U?P\w+ +", "", text), text) for address, text in lines]
    at = {address: i for i, (address, _, _) in enumerate(code)}
    nothing: _Registers = (frozenset(), frozenset())
    found: set[str] = set()
    seen: set[tuple[Any, ...]] = set()
    # Next instruction, groups in flight, and the group that is still open. Groups are registers.
    paths: list[tuple[int, tuple[_Registers, ...], _Registers]] = [(0, (), nothing)]
    while paths:
        state = i, flying, open_ = paths.pop()
        if i >= len(code) or state in seen:
            continue
        seen.add(state)
        _, text, whole = code[i]
        word = text.split()[0]
        if product := re.match(r"HGMMA\.64x(\d+)x16\.F32\S* R(\d+), (?:R(\d+),)?", text):
            columns, total, operand = (int(one or 0) for one in product.groups())
            operands, sums = open_
            if operand:
                operands |= set(range(operand, operand + 4))
            open_ = operands, sums | set(range(total, total + columns // 2))
            if "gsb0" in text:
                flying, open_ = (*flying, open_), nothing
        elif word == "WARPGROUP.DEPBAR.LE":
            left = int(text.rsplit(",", 1)[1], 16)
            flying = flying[len(flying) - left :] if left < len(flying) else flying
        else:
            used = {int(one) for one in re.findall(r"\bR(\d+)\b", text)}
            written: set[int] = set()
            if target := re.match(r"(?!ST|SYNCS|BAR|BRA)\S+ (?:P\w+, )?R(\d+)\b", text):
                width = 4 if ".128" in word else 2 if re.search(r"\.64|WIDE|CS2R$", word) else 1
                written = set(range(int(target[1]), int(target[1]) + width))
            for operands, sums in (*flying, open_):
                if written & operands or (written | used) & sums:
                    found.add(whole)
        jump = re.search(r"0x([0-9a-f]+)$", text) if word.startswith("BRA") else None
        if jump:
            paths.append((at[int(jump[1], 16)], flying, open_))
        if not (
            word.startswith(("BRA", "EXIT")) and text == whole and not re.search(r"\bU?P\d", text)
        ):
            paths.append((i + 1, flying, open_))
    return sorted(found)


_Registers = tuple[frozenset[int], frozenset[int]]
"""Registers of a product: of its operand, and of its sums."""


def disassemble(code: Path) -> str:
    """The instructions of all kernels in a file of machine code."""
    return _run("cuobjdump", "-sass", str(code))


def _run(name: str, *arguments: str) -> str:
    folder = _tools()
    environment = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}"
    }  # cuobjdump calls nvdisasm
    command = [str(folder / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def _tools() -> Path:
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        folder = Path(root) / "cu13/bin"
        if all((folder / name).exists() for name in ("ptxas", "cuobjdump", "nvdisasm")):
            return folder
    pytest.skip("needs nvidia-cuda-nvcc, nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm")
