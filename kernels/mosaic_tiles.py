"""How the Mosaic kernels cut their work (`mosaic_product.py`)."""

import dataclasses

from irqlora_jax.quant import packing

BLOCK = packing.FRAGMENT_BLOCK
ROWS = 64  # of the operand W or W^T that a warp group has
CHUNK = 64  # columns of a tile that leave at once
PLACES = 3  # in shared memory for weights that a warp group made (dX)
MULTIPROCESSORS = 132
SHARED = 224 << 10  # bytes of shared memory for tiles; a block has 3 KiB more for the rest


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
        batch: rows of x or g that a tile has: 8, 16, 32, 64, 128 or 256.
        warp_groups: that multiply, each of them 64 rows of W or, in dX, 64 columns.
        blocks: of 64 terms of the sums that are copied at once.
        stages: copies on their way or in use.
        together: steps between two points at which all products are done.
        splits: parts of the terms that are summed apart.
        band: tiles of W that are computed with the same rows of x or g before the next ones.
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
            raise ValueError(f"batch = {self.batch}: accepted is 8, 16, 32, 64, 128 or 256")
        for name in ("warp_groups", "blocks", "together", "splits", "band", "grid"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} = {value}: accepted is 1 or more")
        if self.stages < 2:
            raise ValueError(f"stages = {self.stages}: accepted is 2 or more")

    @property
    def width(self) -> int:
        """Rows of W that a tile has or, in dX, columns."""
        return ROWS * self.warp_groups

    def shared_memory(self, bits: int, transposed: bool = False) -> int:
        """Bytes of shared memory that a block of the kernel takes, but for its barriers."""
        codes = self.width * packing.packed_size(BLOCK, bits)
        stage = self.blocks * (codes + 4 * self.width + 2 * BLOCK * self.batch)
        result = self.width * min(self.batch, CHUNK) * (4 if self.splits > 1 else 2)
        places = PLACES * self.warp_groups * 2 * ROWS * BLOCK if transposed else 0
        return self.stages * stage + result + places


def neighbors(tiles: Tiles, bits: int, transposed: bool = False) -> list[Tiles]:
    """Tiles that differ in one respect and fit, to be timed beside them (benchmarks/kernels.py
    --tune)."""
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
    """Tiles for W of [n, k], and x of [m, k] or, transposed, g of [m, n].

    Args:
        m: rows of x or g.
        n: outputs.
        k: inputs.
        bits: of a code.
        transposed: whether they are for dX.
        grid: multiprocessors.
    """
    # TMA copies in units of 16 bytes: 3-bit blocks of 24 come in pairs. In dX the two warp groups
    # have one each; in y they are terms of a sum, which leaves too few stages for the widest tiles.
    # With few rows of x the weight is what is read, in longer lines then (in dX they stay as long).
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
        # Rounds of the grid, times the steps of a tile and what starting and ending one costs.
        return -(-tiles * splits // grid) * (-(-steps // splits) + 2.0) + 0.1 * splits

    splits = min(range(1, min(8, steps) + 1), key=cost) if m <= 256 else 1
    found = Tiles(batch, blocks=blocks, together=4 // blocks, splits=splits, grid=grid)
    every = (dataclasses.replace(found, stages=n) for n in range(2, 9 if batch <= 64 else 6))
    return max(
        (one for one in every if one.shared_memory(bits, transposed) <= SHARED),
        key=lambda one: one.stages,
    )
