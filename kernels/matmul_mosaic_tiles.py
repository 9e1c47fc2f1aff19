"""How the Mosaic kernels cut their work (`matmul_mosaic_product.py`)."""

import dataclasses

from irqlora_jax.quant import packing

BLOCK = packing.FRAGMENT_BLOCK
ROWS = 64  # rows of a warp group's operand, W or W^T
CHUNK = 64  # columns of a tile's result that are written at once
PLACES = 3  # places in shared memory for the weights that a warp group makes (dX)
MULTIPROCESSORS = 132
SHARED = 224 << 10  # bytes of shared memory for tiles; a block has 3 KiB more


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
        batch: rows of x or g in a tile: 8, 16, 32, 64, 128 or 256.
        warp_groups: warp groups that multiply, each 64 rows of W or, in dX, 64 columns.
        blocks: blocks of 64 terms that are copied at once. This is a step.
        stages: how many copies are under way or in use.
        together: steps between two points at which all products are done.
        splits: parts of the terms, each with a sum of its own.
        band: tiles of W that are computed with the same rows of x or g before the next rows.
        grid: blocks of the kernel, one for each multiprocessor.
    """

    batch: int
    warp_groups: int = 2
    blocks: int = 1
    stages: int = 4
    together: int = 4
    splits: int = 1
    band: int = 8
    grid: int = MULTIPROCESSORS

    def __post_init__(self) -> None:
        if self.batch not in (8, 16, 32, 64, 128, 256):
            raise ValueError(f"batch = {self.batch}: expected 8, 16, 32, 64, 128 or 256")
        for name in ("warp_groups", "blocks", "together", "splits", "band", "grid"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} = {value}: expected 1 or more")
        if self.stages < 2:
            raise ValueError(f"stages = {self.stages}: expected 2 or more")

    @property
    def width(self) -> int:
        """Rows of W in a tile or, in dX, columns."""
        return ROWS * self.warp_groups

    def shared_memory(self, bits: int, transposed: bool = False) -> int:
        """Bytes of shared memory that a block of the kernel takes, without its barriers."""
        codes = self.width * packing.packed_size(BLOCK, bits)
        stage = self.blocks * (codes + 4 * self.width + 2 * BLOCK * self.batch)
        result = self.width * min(self.batch, CHUNK) * (4 if self.splits > 1 else 2)
        places = PLACES * self.warp_groups * 2 * ROWS * BLOCK if transposed else 0
        return self.stages * stage + result + places


def neighbors(tiles: Tiles, bits: int, transposed: bool = False) -> list[Tiles]:
    """Tiles that differ in one field and fit, which `benchmarks/kernels.py --tune` times too."""
    changes: list[dict[str, int]] = [{"band": 4}, {"band": 16}, {"stages": tiles.stages - 1}]
    changes += [{"blocks": n, "together": max(1, 4 // n)} for n in (1, 2, 4)]
    changes += [{"splits": 2 * tiles.splits}, {"splits": max(1, tiles.splits // 2)}]
    changes += [{"batch": size} for size in (64, 128, 256)] if tiles.batch >= 64 else []
    found = [dataclasses.replace(tiles, **c) for c in changes if c.get("stages", 2) >= 2]
    pairs = bits == 3 and not transposed  # blocks of 24 bytes come in pairs (`default_tiles`)
    return [
        one
        for one in dict.fromkeys(found)
        if one != tiles
        and one.shared_memory(bits, transposed) <= SHARED
        and not (pairs and (one.blocks % 2 or one.batch > 128))
    ]


def default_tiles(
    m: int, n: int, k: int, bits: int, transposed: bool = False, grid: int = MULTIPROCESSORS
) -> Tiles:
    """Tiles for W of [n, k] with x of [m, k] or, if transposed, with g of [m, n].

    Args:
        m: rows of x or g.
        n: outputs.
        k: inputs.
        bits: width of a code.
        transposed: whether the tiles are for dX.
        grid: number of multiprocessors.
    """
    # TMA copies units of 16 bytes, so 3-bit blocks of 24 bytes come in pairs. In dX each of the two
    # warp groups takes one block of the pair. In y both are terms of a sum, and then the widest
    # tiles leave room for too few stages. With few rows of x, most reads are of the weight: more
    # blocks make their lines longer (in dX the lines stay the same).
    pairs = bits == 3 and not transposed
    sizes = (8, 16, 32, 64, 128) if pairs else (8, 16, 32, 64, 128, 256)
    batch = next((size for size in sizes if m <= size), sizes[-1])
    blocks = 4 if batch <= 64 else 2 if pairs else 1
    if transposed:
        blocks = min(blocks, 2)
    out, terms = (k, n) if transposed else (n, k)
    steps = -(-terms // (BLOCK * blocks))
    tiles = -(-m // batch) * -(-out // (2 * ROWS))

    def cost(splits: int) -> float:
        # Rounds of the grid, times the steps of a tile, with an overhead for its start and end.
        return -(-tiles * splits // grid) * (-(-steps // splits) + 2.0) + 0.1 * splits

    splits = min(range(1, min(8, steps) + 1), key=cost) if m <= 256 else 1
    found = Tiles(batch, blocks=blocks, together=4 // blocks, splits=splits, grid=grid)
    every = (dataclasses.replace(found, stages=n) for n in range(2, 9 if batch <= 64 else 6))
    return max(
        (one for one in every if one.shared_memory(bits, transposed) <= SHARED),
        key=lambda one: one.stages,
    )
