"""Scales and shifts for the blocks of a tile, inside a Triton kernel.

Each is stored as one byte, with a float32 for every 256 blocks (`quant/stats.py`). Either the
kernel reads and decodes the bytes, or XLA decodes them to float32 before and the kernel reads that.
XLA's decoding is a program of its own, which takes as long as the product if x has few rows. It
also moves 8 bytes where the kernel reads 1: with a scale and a shift for each 64 weights, 0.28
bytes a weight and not 0.03.
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
    """How a kernel gets scales and shifts.

    Attributes:
        format: code book.
        row_blocks: blocks in a row of W.
        shifted: whether W has shifts.
        decoded: whether XLA decodes them before the kernel.
    """

    format: Format
    row_blocks: int
    shifted: bool
    decoded: bool

    def operands(self, weight: QTensor) -> list[Array]:
        """The arrays that a kernel reads besides the codes."""
        if self.decoded:
            # Transposed: then neighboring rows of W are contiguous, as in a tile.
            return [one.T for one in (weight.scale(), weight.shift()) if one is not None]
        stored = [weight.scale_codes, weight.scale_max, weight.shift_codes, weight.shift_max]
        stored = [one for one in stored if one is not None]
        return [jnp.asarray(stats.DYNAMIC_MAP), weight.scale_offset.reshape(1), *stored]

    def fetch(
        self, load: Load, refs: Sequence[Any], row: Int32[Array, "rows 1 1"], block: Array
    ) -> list[Array]:
        """Loads what `decode` needs of these blocks, [1, blocks, 1]; results [rows, blocks, 1]."""
        if self.decoded:
            return [load(ref.at[block, row]) for ref in refs]
        # There is one code for each block [row, block], and one maximum for each group of blocks.
        group = jax.lax.div(row * self.row_blocks + block, stats.GROUP)
        return [load(ref.at[row, block] if ref.ndim == 2 else ref.at[group]) for ref in refs[2:]]

    def decode(
        self, load: Load, refs: Sequence[Any], stored: Sequence[Array]
    ) -> tuple[Float32[Array, "rows blocks 1"], Float32[Array, "rows blocks 1"] | None]:
        """Scales, and shifts or None, from the result of `fetch`."""
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
