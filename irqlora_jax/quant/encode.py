"""From a float matrix to a QTensor."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from irqlora_jax.quant import packing, stats
from irqlora_jax.quant.calibrations import icq, icq_integer, joint
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.entropy import quotient
from irqlora_jax.quant.formats import Format, get_format
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.quant.slabs import map_slabs, rows_of, slab_rows


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
