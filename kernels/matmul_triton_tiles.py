"""How the Triton products cut their work into tiles."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut. All sizes are powers of two.

    Attributes:
        block_m: rows of x (or g) in a program, at least 16.
        block_n: rows of W, in a program of `matmul` or in a step of `matmul_transposed`; at least
            16.
        block_k: columns of W, in a step of `matmul` or in a program of `matmul_transposed`. It is
            rounded up to whole blocks, and to products of 16 terms.
        splits: parts of the sum, any number. Each part is a program of its own. The parts are
            added in float32, always in the same order.
        num_warps: warps of a program; 4 make a warp group.
        num_stages: tiles that are loaded ahead.
        permute: whether byte permutations (PTX) look levels up, 4 codes at a time, in a table that
            is rounded to float16. If not, or if interpreted, selects find them in float32; for
            integers the code is the level.
        decode: who decodes scales and shifts: "kernel", which reads them as they are stored, or
            "xla", which decodes them to float32 before the kernel (`matmul_triton_factors.py`).
    """

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    splits: int = 1
    num_warps: int = 8
    num_stages: int = 3
    permute: bool = True
    decode: str = "kernel"

    def __post_init__(self) -> None:
        for name, least in (("block_m", 16), ("block_n", 16), ("block_k", 1), ("num_warps", 1)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ValueError(f"{name} = {value}: expected a power of two from {least} on")
        for name in ("splits", "num_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected 1 or more")
        if self.decode not in ("kernel", "xla"):
            raise ValueError(f"decode = {self.decode!r}: expected 'kernel' or 'xla'")


def neighbors(tiles: Tiles) -> list[Tiles]:
    """Tiles that differ in one field, which `benchmarks/kernels.py --tune` times too."""
    changes: list[dict[str, Any]] = [{"num_warps": 4}, {"num_warps": 8}]
    changes += [{"num_stages": stages} for stages in (2, 4, 5)]
    changes += [{"block_k": 2 * tiles.block_k}, {"block_n": 2 * tiles.block_n}]
    changes += [{"splits": 2 * tiles.splits}, {"splits": max(1, tiles.splits // 2)}]
    changes += [{"decode": "xla" if tiles.decode == "kernel" else "kernel"}]
    found = [dataclasses.replace(tiles, **change) for change in changes]
    return [one for one in dict.fromkeys(found) if one != tiles]


def default_tiles(m: int, n: int, k: int, bits: int, transposed: bool = False) -> Tiles:
    """Tiles for m rows of activations and a weight of [n, k].

    Few rows take narrow tiles. Then the sum is split until a large GPU has two programs for each
    multiprocessor, but only while the partial sums move fewer bytes than the weight. In the kernel
    each tile of rows decodes all scales and shifts again, so for many rows XLA decodes them.
    """
    rows = max(16, min(128, 1 << (m - 1).bit_length()))
    wide = rows > 64
    warps, decode = (8, "xla") if wide else (4, "kernel")
    if transposed:
        tiles = Tiles(rows, 64 if wide else 32, 128, num_warps=warps, decode=decode)
        summed, step, apart = n, tiles.block_n, -(-k // tiles.block_k)
    else:
        shape = (128, 64) if wide else (64, 128)
        tiles = Tiles(rows, *shape, num_warps=warps, decode=decode)
        summed, step, apart = k, tiles.block_k, -(-n // tiles.block_n)
    programs = -(-m // rows) * apart
    # Each partial sum is written and read: 8 bytes.
    most = min(256 // programs, summed // step // 4, summed * bits // 8 // (8 * m))
    return dataclasses.replace(tiles, splits=max(1, most))
