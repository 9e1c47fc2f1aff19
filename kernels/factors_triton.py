"""Scales and shifts of the blocks of a tile, inside of a Triton kernel.

They are stored as a byte each and a float32 every 256 blocks (`quant/stats.py`). Either the kernel
reads just that and decodes it, or it reads what XLA has decoded to float32 before. That takes a
program of its own, which at few rows of x is as long as the product, and writes and reads 8 bytes
for a byte: with a scale and a shift for 64 weights 0.28 bytes a weight in place of 0.03.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from irqlora_jax.quant import stats
from irqlora_jax.quant.formats import Format
from irqlora_jax.quant.qtensor import QTensor

Load = Callable[[Any], Array]


@dataclasses.dataclass(frozen=True)
class Factors:
    """Where scales and shifts come from.

    Attributes:
        format: code book.
        row_blocks: blocks of a row of W.
        shifted: whether there are shifts.
        decoded: whether XLA has decoded them before.
    """

    format: Format
    row_blocks: int
    shifted: bool
    decoded: bool

    def operands(self, weight: QTensor) -> list[Array]:
        """What a kernel reads of a matrix besides its codes."""
        if self.decoded:
            # Neighboring rows of W lie side by side, as they do in a tile.
            return [one.T for one in (weight.scale(), weight.shift()) if one is not None]
        found = [
            *(jnp.asarray(stats.DYNAMIC_MAP), weight.scale_offset.reshape(1)),
            *(weight.scale_codes, weight.scale_max, weight.shift_codes, weight.shift_max),
        ]
        return [one for one in found if one is not None]

    def fetch(
        self, load: Load, refs: Sequence[Any], row: Int32[Array, "rows 1 1"], block: Array
    ) -> list[Array]:
        """What is stored of these blocks, [1, blocks, 1], of these rows: [rows, blocks, 1] each."""
        if self.decoded:
            return [load(ref.at[block, row]) for ref in refs]
        # Codes lie as blocks do, maxima one for each group of them.
        group = jax.lax.div(row * self.row_blocks + block, stats.GROUP)
        return [load(ref.at[row, block] if ref.ndim == 2 else ref.at[group]) for ref in refs[2:]]

    def decode(
        self, load: Load, refs: Sequence[Any], stored: Sequence[Array]
    ) -> tuple[Float32[Array, "rows blocks 1"], Float32[Array, "rows blocks 1"] | None]:
        """Scales, and shifts or None, of what `fetch` has read."""
        if self.decoded:
            return stored[0], stored[1] if self.shifted else None
        table_ref, offset_ref = refs[:2]

        def spread(codes: Array, largest: Array) -> Array:
            return load(table_ref.at[codes.astype(jnp.int32)]) * largest

        scale = spread(*stored[:2]) + offset_ref[0]
        if not self.shifted:
            return scale, None
        if self.format.integer:
            return scale, -stats.decode_zero(stored[2], self.format.bits) * scale
        return scale, spread(*stored[2:])
