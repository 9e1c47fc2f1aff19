"""QTensor: a frozen weight matrix in 2, 3, 4 or 8 bits, and its dequantization."""

import dataclasses
import functools
from collections.abc import Callable
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float16, Float32, UInt8, UInt16

from irqlora_jax.quant import packing, stats
from irqlora_jax.quant.entropy import block_entropy
from irqlora_jax.quant.formats import get_format
from irqlora_jax.quant.outliers import Outliers
from irqlora_jax.quant.slabs import rows_of


@no_type_check  # JAX rebuilds pytrees with leaves of any kind, which runtime checks would reject
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        *("packed", "scale_codes", "scale_max", "scale_offset"),
        *("shift_codes", "shift_max"),
        *("outlier_values", "outlier_columns", "outlier_counts"),
        *("scale_update", "shift_update"),
    ),
    meta_fields=("shape", "format", "block_size", "layout", "second_level"),
)
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantized [out, in] matrix. Invariants:

    - A row is cut into blocks of `block_size` consecutive inputs. The last block of a row may be
      padded. Padding does not affect scales, shifts or entropies.
    - Block by block, weight ~ levels[code] * scale + shift, with the levels of `format`. A missing
      shift is 0. For integer formats shift = -zero * scale.
    - Scales, and the shifts of NormalFloat and FP4, are second-level quantized over groups of
      blocks counted row by row (`stats.py`); zero points are 8-bit fixed point. Codes of fewer than
      8 bits are packed over the rows (`packing.pack_rows`): `out` below is then fewer bytes.
    - Outliers (`outliers.py`) replace what their codes stand for. They are a list in row order.
      Without outliers there are no such arrays.
    - The updates are what training changed: they are added to the stored scales and shifts. They
      are floats, because 8 bits would lose 2 to 3 % of them. Missing updates are 0.
    - `layout` names the arrangement of the codes in `packed` (`packing.py`).
    - All arrays may have the same leading axes (layers under scan). `shape` never includes them.

    Attributes:
        packed: codes, [*lead, out, blocks, bytes of a block].
        scale_codes: [*lead, out, blocks].
        scale_max: [*lead, groups].
        scale_offset: [*lead].
        shift_codes: [*lead, out, blocks] codes of the shift or of the zero point, or None.
        shift_max: [*lead, groups], or None.
        shape: (out, in).
        format: name of the code book.
        block_size: weights that share a scale and a shift.
        layout: arrangement of the packed codes.
        second_level: how scales and shifts are stored.
        outlier_values: [*lead, n] weights, or None.
        outlier_columns: [*lead, n] columns of the outliers, or None.
        outlier_counts: [*lead, out] number of outliers in every row, or None.
        scale_update: [*lead, out, blocks] float16 or float32, or None.
        shift_update: [*lead, out, blocks] float16 or float32, or None.

    Examples:
        >>> from irqlora_jax import QuantConfig, quantize
        >>> weight = jnp.array([[-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]])
        >>> q = quantize(weight, QuantConfig(format="nf2", block_size=8, calibration="none"))
        >>> q.codes().tolist(), q.scale().tolist(), q.shift()
        ([[0, 1, 1, 1, 2, 2, 3, 3]], [[2.0]], None)
        >>> [f"{x:.3f}" for x in q.dequantize()[0, ::2].tolist()]
        ['-2.000', '-0.505', '0.505', '2.000']
        >>> q.nbytes  # 2 of codes, 1 of the scale, 8 that 256 blocks and the matrix share
        11
    """

    packed: UInt8[Array, "*lead out blocks bytes"]
    scale_codes: UInt8[Array, "*lead out blocks"]
    scale_max: Float[Array, "*lead groups"]
    scale_offset: Float32[Array, "*lead"]
    shift_codes: UInt8[Array, "*lead out blocks"] | None
    shift_max: Float[Array, "*lead groups"] | None
    shape: tuple[int, int]
    format: str
    block_size: int
    layout: str = packing.LAYOUT
    second_level: stats.SecondLevel = stats.DEFAULT
    outlier_values: Float16[Array, "*lead n"] | None = None
    outlier_columns: UInt16[Array, "*lead n"] | None = None
    outlier_counts: UInt16[Array, "*lead out"] | None = None
    scale_update: Float[Array, "*lead out blocks"] | None = None
    shift_update: Float[Array, "*lead out blocks"] | None = None

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "*lead out in"]:
        """The weights, computed in float32 and rounded to `dtype` at the end."""
        weights = self._weights(self.packed, self.scale(), self.shift(), dtype)
        if self.outliers is None:
            return weights
        put = Outliers.put
        for _ in range(self.scale_offset.ndim):
            put = jax.vmap(put)
        return put(self.outliers, weights)

    def dequantize_rows(self) -> Callable[[Array | int, int], Float32[Array, "count in"]]:
        """Returns a function (first row, number of rows) -> these rows of `dequantize()`.

        Scales and shifts are decoded once, for all rows. There must be no leading axes.
        """
        scale, shift = self.scale(), self.shift()

        def rows(start: Array | int, count: int) -> Array:
            stored = self.packed, scale, shift
            packed, own, moved = jax.tree.map(lambda x: rows_of(x, start, count), stored)
            weights = self._weights(packed, own, moved, jnp.float32)
            if self.outliers is None:
                return weights
            place = jnp.arange(self.shape[0], dtype=jnp.int32) - start
            return self.outliers.put_rows(weights, jnp.where(place < 0, count, place))

        return rows

    @property
    def outliers(self) -> Outliers | None:
        """The sparse part; None if there is none."""
        if self.outlier_values is None:
            return None
        assert self.outlier_columns is not None and self.outlier_counts is not None
        return Outliers(self.outlier_values, self.outlier_columns, self.outlier_counts)

    def codes(self) -> UInt8[Array, "*lead out in"]:
        """The codes in logical order. An outlier has the code of what took its place."""
        bits = get_format(self.format).bits
        return self._as_rows(packing.unpack(self.packed, bits, self.layout))

    def scale(self) -> Float32[Array, "*lead out blocks"]:
        """The scale of every block (the paper's s, absmax): the stored one and its update."""
        scale = self._stored_scale()
        return scale if self.scale_update is None else scale + self.scale_update.astype(jnp.float32)

    def shift(self) -> Float32[Array, "*lead out blocks"] | None:
        """The shift of every block (the paper's tau): the stored one and its update, or None.

        The stored shift of an integer format is its zero point times the stored scale.
        """
        stored = self._stored_shift()
        if self.shift_update is None:
            return stored
        update = self.shift_update.astype(jnp.float32)
        return update if stored is None else stored + update

    def without_updates(self) -> "QTensor":
        """The weight as it was quantized."""
        return dataclasses.replace(self, scale_update=None, shift_update=None)

    def entropy(self) -> Float32[Array, "*lead out blocks"]:
        """Entropy of the codes of every block in bits (eq. 7), without the padding."""
        return _entropy(self)

    def with_layout(self, layout: str) -> "QTensor":
        """Converts the codes to another layout, "planes" or "fragments". The weights do not change.

        This may temporarily need one byte per code for the unpacked codes.

        Raises:
            ValueError: no such layout, or it does not support this block size.
        """
        bits = get_format(self.format).bits
        packed = _repack(self.packed, bits, self.layout, layout)
        return dataclasses.replace(self, packed=packed, layout=layout)

    @property
    def grid(self) -> tuple[int, ...]:
        """[*lead, out, blocks]: the shape of `scale()`."""
        return self.packed.shape[:-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def _stored_scale(self) -> Array:
        return self._decode_groups(self.scale_codes, self.scale_max, self.scale_offset)

    def _stored_shift(self) -> Array | None:
        if self.shift_codes is None:
            return None
        fmt = get_format(self.format)
        if fmt.integer:
            return -stats.decode_zero(self.shift_codes, fmt.bits) * self._stored_scale()
        assert self.shift_max is not None
        offset = jnp.zeros_like(self.scale_offset)
        return self._decode_groups(self.shift_codes, self.shift_max, offset, center=False)

    def _weights(self, packed: Array, scale: Array, shift: Array | None, dtype: DTypeLike) -> Array:
        fmt = get_format(self.format)
        codes = packing.unpack(packed, fmt.bits, self.layout)
        weights = jnp.asarray(fmt.table)[codes] * scale[..., None]
        if shift is not None:
            weights = weights + shift[..., None]
        return self._as_rows(weights.astype(dtype))

    def _as_rows(self, blocks: Array) -> Array:
        rows = blocks.reshape(*blocks.shape[:-2], -1)
        return rows[..., : self.shape[1]]

    def _decode_groups(
        self, codes: Array, largest: Array, offset: Array, center: bool = True
    ) -> Array:
        level = self.second_level
        decode = functools.partial(stats.decode_groups, center=center, level=level)
        for _ in range(offset.ndim):
            decode = jax.vmap(decode)
        codes = packing.unpack_rows(codes, level.bits, self.shape[0])
        flat = codes.reshape(*offset.shape, -1)
        return decode(flat, largest, offset).reshape(codes.shape)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _repack(packed: Array, bits: int, layout: str, target: str) -> Array:
    return packing.pack(packing.unpack(packed, bits, layout), bits, target)


@jax.jit  # compiled once for each shape and format
def _entropy(weight: QTensor) -> Float32[Array, "*lead out blocks"]:
    rows = weight.packed.reshape(-1, *weight.packed.shape[-2:])
    ends = jnp.arange(weight.packed.shape[-2]) * weight.block_size
    valid = jnp.minimum(weight.shape[1] - ends, weight.block_size)
    bits = get_format(weight.format).bits

    def row_entropy(packed: Array) -> Array:
        return block_entropy(packing.unpack(packed, bits, weight.layout), 2**bits, valid)

    # A few rows at a time, so that the unpacked codes are never in memory all at once.
    return jax.lax.map(row_entropy, rows, batch_size=64).reshape(weight.packed.shape[:-1])
