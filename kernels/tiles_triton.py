"""How the work of a Triton kernel is cut into tiles."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut up. All sizes are powers of two.

    Attributes:
        block_m: rows of x (or g) of a program, at least 16.
        block_n: rows of W: those of a program of `matmul`, and those of a step of
            `matmul_transposed`; at least 16.
        block_k: columns of W: those of a step of `matmul`, and those of a program of
            `matmul_transposed`. It is rounded up to whole blocks, and to products of 16 terms.
        splits: parts into which the sum is cut. Each is a program of its own, and the parts are
            added up in float32 and always in the same order. Any number.
        num_warps: of a program; 4 make a warp group.
        num_stages: tiles that are loaded ahead.
        permute: levels are looked up by byte permutations (PTX), 4 codes at a time, in a table
            rounded to float16. False, and when interpreted: by selects or by the code itself, from
            float32.
        decode: who decodes scales and shifts: "kernel", which then reads them as they are stored,
            or "xla", to float32 in front of it (`factors_triton.py`).
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
                raise ValueError(f"{name} = {value}: accepted is a power of two from {least} on")
        for name in ("splits", "num_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: accepted is 1 or more")
        if self.decode not in ("kernel", "xla"):
            raise ValueError(f"decode = {self.decode!r}: accepted is 'kernel' or 'xla'")


def neighbors(tiles: Tiles) -> list[Tiles]:
    """Tiles that differ in one respect, to be timed beside them (benchmarks/kernels.py --tune)."""
    changes: list[dict[str, Any]] = [{"num_warps": 4}, {"num_warps": 8}]
    changes += [{"num_stages": stages} for stages in (2, 4, 5)]
    changes += [{"block_k": 2 * tiles.block_k}, {"block_n": 2 * tiles.block_n}]
    changes += [{"splits": 2 * tiles.splits}, {"splits": max(1, tiles.splits // 2)}]
    changes += [{"decode": "xla" if tiles.decode == "kernel" else "kernel"}]
    found = [dataclasses.replace(tiles, **change) for change in changes]
    return [one for one in dict.fromkeys(found) if one != tiles]


def default_tiles(m: int, n: int, k: int, bits: int, transposed: bool = False) -> Tiles:
    """Tiles for m rows of activations and a weight of [n, k].

    Few rows take narrow tiles, and the sum is split until there are two programs for each
    multiprocessor of a large GPU, as long as the partial sums move fewer bytes than the weight.
    Each tile of rows would decode all scales and shifts again, so XLA does it for many of them.
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
    # A partial sum is written and read, 8 bytes in all.
    most = min(256 // programs, summed // step // 4, summed * bits // 8 // (8 * m))
    return dataclasses.replace(tiles, splits=max(1, most))
