"""QTensor: a frozen weight matrix in 2, 3 or 4 bits, and how to make and unmake one."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8

from irqlora_jax.config import QuantConfig
from irqlora_jax.quant import icq, icq_integer, joint, packing, stats
from irqlora_jax.quant.entropy import block_entropy, quotient
from irqlora_jax.quant.formats import Format, get_format
from irqlora_jax.quant.slabs import map_slabs, rows_of, slab_rows


@no_type_check  # JAX rebuilds pytrees with leaves of any kind, which runtime checks would refuse
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        *("packed", "scale_codes", "scale_max", "scale_offset"),
        *("shift_codes", "shift_max"),
    ),
    meta_fields=("shape", "format", "block_size", "layout"),
)
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantized [out, in] matrix. Invariants:

    - A row is cut into blocks of `block_size` consecutive inputs; the last block of a row that is
      no multiple is padded, and padding counts in no scale, shift or entropy.
    - Block by block, weight ~ levels[code] * scale + shift, with the levels of `format`. A missing
      shift is 0. For integer formats shift = -zero * scale.
    - Scales, and the shifts of NormalFloat and FP4, are second-level quantized over groups of 256
      blocks counted row by row (`stats.py`); zero points are 8-bit fixed point.
    - `layout` names the arrangement of the codes in `packed` (`packing.py`).
    - All arrays may carry the same leading axes (layers under scan); `shape` never does.

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

    Examples:
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
    scale_max: Float32[Array, "*lead groups"]
    scale_offset: Float32[Array, "*lead"]
    shift_codes: UInt8[Array, "*lead out blocks"] | None
    shift_max: Float32[Array, "*lead groups"] | None
    shape: tuple[int, int]
    format: str
    block_size: int
    layout: str = packing.LAYOUT

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "*lead out in"]:
        """The weights, computed in float32 and rounded to `dtype` at the end."""
        return self._weights(self.packed, self.scale(), self.shift(), dtype)

    def dequantize_rows(self) -> Callable[[Array | int, int], Float32[Array, "count in"]]:
        """A function of the first row and a number of rows that gives those of `dequantize`.

        Scales and shifts are decoded once, for all rows. Without leading axes only.
        """
        scale, shift = self.scale(), self.shift()

        def rows(start: Array | int, count: int) -> Array:
            stored = self.packed, scale, shift
            packed, own, moved = jax.tree.map(lambda x: rows_of(x, start, count), stored)
            return self._weights(packed, own, moved, jnp.float32)

        return rows

    def codes(self) -> UInt8[Array, "*lead out in"]:
        """The codes in logical order."""
        bits = get_format(self.format).bits
        return self._as_rows(packing.unpack(self.packed, bits, self.layout))

    def scale(self) -> Float32[Array, "*lead out blocks"]:
        """The stored scale of every block (the paper's s, absmax)."""
        return self._decode_groups(self.scale_codes, self.scale_max, self.scale_offset)

    def shift(self) -> Float32[Array, "*lead out blocks"] | None:
        """The stored shift of every block (the paper's tau), None without one."""
        if self.shift_codes is None:
            return None
        fmt = get_format(self.format)
        if fmt.integer:
            return -stats.decode_zero(self.shift_codes, fmt.bits) * self.scale()
        assert self.shift_max is not None
        return self._decode_groups(
            self.shift_codes, self.shift_max, jnp.zeros_like(self.scale_offset)
        )

    def entropy(self) -> Float32[Array, "*lead out blocks"]:
        """Entropy of the codes of every block in bits (eq. 7), without the padding."""
        rows = self.packed.reshape(-1, *self.packed.shape[-2:])
        ends = jnp.arange(self.packed.shape[-2]) * self.block_size
        valid = jnp.minimum(self.shape[1] - ends, self.block_size)
        bits = get_format(self.format).bits

        def row_entropy(packed: Array) -> Array:
            return block_entropy(packing.unpack(packed, bits, self.layout), 2**bits, valid)

        # Some rows at a time, so that the unpacked codes never exist as a whole.
        return jax.lax.map(row_entropy, rows, batch_size=64).reshape(self.packed.shape[:-1])

    def with_layout(self, layout: str) -> "QTensor":
        """The same weights with their codes arranged in another way, "planes" or "fragments".

        On the way the unpacked codes may exist as a whole, a byte for each.

        Raises:
            ValueError: no such layout, or none for blocks of this size.
        """
        bits = get_format(self.format).bits
        packed = _repack(self.packed, bits, self.layout, layout)
        return dataclasses.replace(self, packed=packed, layout=layout)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

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

    def _decode_groups(self, codes: Array, largest: Array, offset: Array) -> Array:
        decode = stats.decode_groups
        for _ in range(offset.ndim):
            decode = jax.vmap(decode)
        flat = codes.reshape(*offset.shape, -1)
        return decode(flat, largest, offset).reshape(codes.shape)


def quantize(
    weight: Float[Array, "out in"],
    config: QuantConfig,
    *,
    shift: Float[Array, "out blocks"] | None = None,
    less: tuple[Float[Array, "out rank"], Float[Array, "rank in"]] | None = None,
) -> QTensor:
    """Quantizes a matrix (float32, bfloat16 or float16), or what two factors leave of it.

    The weights are read twice, by the search and for the codes. A search cannot write the codes:
    they belong to the stored scale and shift, which depend on 256 blocks and on the matrix's mean.

    Args:
        weight: the matrix.
        config: format, block size and calibration.
        shift: exact shifts to take instead of searching them (NormalFloat and FP4).
        less: B and A, to quantize weight - B A, which never exists as a whole.

    Raises:
        ValueError: NaN or infinite weights or factors; format "none"; shifts for an integer format.

    Examples:
        >>> weight = jax.random.normal(jax.random.key(0), (32, 128))
        >>> q = quantize(weight, QuantConfig(format="nf2"))
        >>> q.packed.shape, q.scale().shape  # [out, blocks, bytes of a block], [out, blocks]
        ((32, 2, 16), (32, 2))
        >>> plain = quantize(weight, QuantConfig(format="nf2", calibration="none"))
        >>> bool(q.entropy().mean() > plain.entropy().mean())
        True
    """
    fmt = get_format(config.format)
    if shift is not None and fmt.integer:
        raise ValueError(f"shift: not accepted with quant.format {fmt.name}")
    for matrix in (weight, *(less or ())):
        if not bool(jnp.isfinite(matrix.min()) & jnp.isfinite(matrix.max())):
            raise ValueError("NaN or infinite weights cannot be quantized")
    return _quantize(weight, shift, config, less)


def quantized_shape(shape: tuple[int, int], config: QuantConfig) -> QTensor:
    """What `quantize` makes of a matrix of this shape, with jax.ShapeDtypeStruct for its arrays."""
    weight = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(functools.partial(_quantize, config=config), weight, None)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _repack(packed: Array, bits: int, layout: str, target: str) -> Array:
    return packing.pack(packing.unpack(packed, bits, layout), bits, target)


def _encode(
    scaled: Float32[Array, "n size"], fmt: Format, zero: Float32[Array, " n"] | None
) -> UInt8[Array, "n size"]:
    """Nearest level of weights already divided by their scale (and shifted, if not integer)."""
    if fmt.integer:
        assert zero is not None
        # A whole zero point is added after rounding, as in the released code (ties!).
        whole = jnp.floor(zero)[:, None]
        codes = jnp.round(scaled + (zero[:, None] - whole)) + whole
        return jnp.clip(codes, 0, 2**fmt.bits - 1).astype(jnp.uint8)
    rank = jnp.zeros(scaled.shape, jnp.uint8)
    for midpoint in fmt.midpoints:
        rank += (scaled > midpoint).astype(jnp.uint8)
    if fmt.order == tuple(range(len(fmt.order))):
        return rank
    return jnp.asarray(fmt.order, jnp.uint8)[rank]


class _Found(NamedTuple):
    """What a calibration says of blocks, [rows, blocks]. `zero` belongs to integers, `tau` to
    shifted NormalFloat and FP4. Where it gives no scale, the least and the largest weight do, as
    the larger distance from the shift."""

    scale: Array | None = None
    zero: Array | None = None
    tau: Array | None = None
    low: Array | None = None
    high: Array | None = None


@functools.partial(jax.jit, static_argnames="config")
def _quantize(
    weight: Array,
    shift: Array | None,
    config: QuantConfig,
    less: tuple[Array, Array] | None = None,
) -> QTensor:
    fmt = get_format(config.format)
    size = config.block_size
    out_features, in_features = weight.shape
    per_row = -(-in_features // size)
    pad = per_row * size - in_features
    count = slab_rows((out_features, in_features))
    valid = None
    if pad:
        ends = jnp.minimum(in_features - jnp.arange(per_row) * size, size)
        valid = jnp.tile(ends, count)

    def blocks_from(start: Array | int) -> Array:
        """Those of a slab. Of a weight's own type, so that no copy in float32 need exist."""
        rows = rows_of(weight, start, count)
        if less is not None:
            left, right = less
            # Accelerators would otherwise multiply float32 in fewer bits.
            update = jnp.matmul(rows_of(left, start, count), right, precision="highest")
            rows = rows.astype(jnp.float32) - update
        return jnp.pad(rows, ((0, 0), (0, pad))).reshape(-1, size)

    def calibrate(start: Array | int) -> _Found:
        found = _calibrated(blocks_from(start), fmt, config, valid, shift is not None)
        return jax.tree.map(lambda x: x.reshape(count, per_row), found)

    found = map_slabs(calibrate, out_features, count)
    scale, zero, tau, low, high = jax.tree.map(jnp.ravel, found)
    if shift is not None:
        tau = shift.astype(jnp.float32).reshape(-1)
    shift_codes = shift_max = None
    if tau is not None:
        shift_codes, shift_max, none = stats.encode_groups(tau, center=False)
        if config.codes_from == "stored":
            tau = stats.decode_groups(shift_codes, shift_max, none)
    if scale is None:
        # With stored codes the scale belongs to the stored shift too.
        scale = _largest(low, high, tau)
    scale_codes, scale_max, scale_offset = stats.encode_groups(scale, center=True)
    if config.codes_from == "stored":
        scale = stats.decode_groups(scale_codes, scale_max, scale_offset)
    if zero is not None:
        shift_codes = stats.encode_zero(zero, fmt.bits)

    grid = (out_features, per_row)
    exact = jax.tree.map(lambda x: x.reshape(grid), (scale, zero, tau))

    def encode(start: Array | int) -> Array:
        scale, zero, tau = jax.tree.map(lambda x: rows_of(x, start, count).ravel(), exact)
        blocks = blocks_from(start).astype(jnp.float32)
        centered = blocks if tau is None else blocks - tau[:, None]
        safe = jnp.where(scale == 0, 1, scale)[:, None]
        # bitsandbytes multiplies by the reciprocal, the integer code divides; ties depend on it.
        scaled = quotient(centered, safe) if fmt.integer else centered * (1 / safe)
        return packing.pack(_encode(scaled, fmt, zero), fmt.bits).reshape(count, per_row, -1)

    return QTensor(
        packed=map_slabs(encode, out_features, count),
        scale_codes=scale_codes.reshape(grid),
        scale_max=scale_max,
        scale_offset=scale_offset,
        shift_codes=None if shift_codes is None else shift_codes.reshape(grid),
        shift_max=shift_max,
        shape=(out_features, in_features),
        format=fmt.name,
        block_size=size,
    )


def _calibrated(
    blocks: Array, fmt: Format, config: QuantConfig, valid: Array | None, shifted: bool
) -> _Found:
    """Block by block; `shifted`: the shifts are known."""
    if fmt.integer:
        scale, zero = _integer_range(blocks, fmt, config, valid)
        return _Found(scale=scale, zero=zero)
    if config.calibration == "joint" and not shifted:
        scale, tau = _joint(blocks, fmt, config, valid)
        return _Found(scale=scale, tau=tau)
    if config.calibration == "icq" and not shifted:
        steps = config.search_steps or 100
        tau, _, low, high = icq.shift_and_ends(blocks, fmt, config.search_range, steps, valid)
        return _Found(tau=tau, low=low, high=high)
    low, high = _ends(blocks.astype(jnp.float32), valid)
    return _Found(low=low, high=high)


def _ends(blocks: Array, valid: Array | None) -> tuple[Array, Array]:
    """The least and the largest weight of every block."""
    low, high = blocks, blocks
    if valid is not None:
        inside = jnp.arange(blocks.shape[1])[None, :] < valid[:, None]
        low, high = jnp.where(inside, blocks, jnp.inf), jnp.where(inside, blocks, -jnp.inf)
    return low.min(axis=1), high.max(axis=1)


def _largest(low: Array, high: Array, tau: Array | None) -> Array:
    """max|w - tau| of every block. Rounding is monotonic, so the two ends of a block decide it."""
    if tau is not None:
        low, high = low - tau, high - tau
    return jnp.maximum(-low, high)


def _integer_range(
    blocks: Array, fmt: Format, config: QuantConfig, valid: Array | None
) -> tuple[Array, Array]:
    bits, symmetric = fmt.bits, config.symmetric
    if config.calibration == "none":
        return icq_integer.plain_range(blocks, bits, symmetric, valid)
    if config.calibration == "joint":
        return _joint(blocks, fmt, config, valid)
    width, steps = config.search_range, config.search_steps or 50
    if config.search == "zero_point":
        found = icq_integer.search_zero_point(blocks, bits, width, steps, valid)
    else:
        found = icq_integer.search_range(blocks, bits, symmetric, width, steps, valid)
    return found[:2]


def _joint(
    blocks: Array, fmt: Format, config: QuantConfig, valid: Array | None
) -> tuple[Array, Array]:
    weight, steps = config.error_weight, config.refine_steps
    return joint.search(blocks, fmt, config.symmetric, weight, steps, valid)
