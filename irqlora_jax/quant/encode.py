"""From a float matrix to a QTensor."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Float32

from irqlora_jax.quant import packing, stats
from irqlora_jax.quant.calibrations import CALIBRATIONS, Calibrated
from irqlora_jax.quant.calibrations.plain import block_ends
from irqlora_jax.quant.codes import Feedback, codes_with_feedback, encode_codes
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.entropy import FLOAT_MAX, FLOAT_TINY
from irqlora_jax.quant.formats import Format, get_format
from irqlora_jax.quant.inputs import InputMoments, as_moments
from irqlora_jax.quant.outliers import (
    Outliers,
    check_outliers,
    find_largest,
    outlier_count,
    split,
)
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.quant.slabs import cut_blocks, map_slabs, rows_of, slab_rows
from irqlora_jax.text import require


def quantize(
    weight: Float[Array, "out in"],
    config: QuantConfig,
    *,
    shift: Float[Array, "out blocks"] | None = None,
    minus: tuple[Float[Array, "out rank"], Float[Array, "rank in"]] | None = None,
    gram: Float[Array, "in in"] | InputMoments | None = None,
    damping: float = 0.01,
) -> QTensor:
    """Quantizes a matrix (float32, bfloat16 or float16), or a matrix minus a low-rank product.

    Outliers (`quant.outliers`) are taken out first; 0 takes their places. For the rest there are
    three stages. The calibration chooses scales and shifts, these are second-level
    quantized, and the codes are computed with the stored values. So the weights are read twice: a
    search cannot write codes, because stored values depend on 256 blocks and on the matrix mean.

    While JAX traces a function (e.g. for `jax.jit`), the values are unknown. Then NaN and infinity
    are not refused, and give a meaningless QTensor.

    Args:
        weight: the matrix.
        config: format, block size and calibration.
        shift: exact shifts to use instead of a search (NormalFloat and FP4).
        minus: B and A, to quantize weight - B A, which is never materialized without outliers.
        gram: X^T X of inputs X [tokens, in] of the layer, needed if `config.needs_inputs`. Rounding
            with error feedback (`feedback.py`) uses all of it, and begins with the columns that
            have the largest moments. An outlier receives no errors, and passes on those that reach
            it. The calibration "importance" uses the diagonal. `InputMoments` keep the factor for
            other matrices with the same inputs, and have their own damping.
        damping: for the feedback, as a fraction of the mean diagonal of `gram`.

    Raises:
        ValueError: NaN or infinite weights, shifts or factors (the message says where the first one
            is, and how many there are); format "none"; shifts for an integer format; no second
            moments although they are needed, or the reverse; second moments of another shape, or as
            in `feedback_factor`; outliers beyond float16.

    Examples:
        >>> weight = jax.random.normal(jax.random.key(0), (32, 128))
        >>> q = quantize(weight, QuantConfig(format="nf2"))
        >>> q.packed.shape, q.scale().shape  # [out, blocks, bytes of a block], [out, blocks]
        ((32, 2, 16), (32, 2))
        >>> plain = quantize(weight, QuantConfig(format="nf2", calibration="none"))
        >>> bool(q.entropy().mean() > plain.entropy().mean())
        True
    """
    require(not config.rules, "quant.rules", config.rules, "none here: use config.for_matrix(NAME)")
    fmt = get_format(config.format)
    if shift is not None and fmt.integer:
        raise ValueError(f"shift: not accepted with quant.format {fmt.name}")
    needs = config.needs_inputs
    if needs != (gram is not None):
        what = "X^T X of the layer's inputs" if needs else "None"
        require(False, "gram", "None" if needs else "a matrix", f"{what} with {config.label}")
    left, right = (None, None) if minus is None else minus
    given = {"weight": weight, "shift": shift, "minus[0]": left, "minus[1]": right}
    for name, matrix in given.items():
        if matrix is not None:
            _check_finite(name, matrix)
    feedback = inputs = None
    if gram is not None:
        own, columns = as_moments(gram, damping), weight.shape[1]
        shape, accepted = own.gram.shape, f"shape {(columns, columns)}"
        require(shape == (columns, columns), "gram", shape, accepted)
        feedback = own.feedback if config.needs_factor else None
        inputs = own.diagonal
    if config.outliers:
        largest = jnp.maximum(weight.max(), -weight.min())
        check_outliers(weight.shape, None if isinstance(largest, Tracer) else float(largest))
    return _quantize(weight, shift, config, minus, feedback, inputs)


def encode_with(
    weight: Float[Array, "out in"],
    config: QuantConfig,
    scale: Float[Array, "out blocks"],
    place: Float[Array, "out blocks"] | None = None,
    *,
    outliers: Outliers | None = None,
) -> QTensor:
    """Packs a matrix with given scales and shifts, e.g. trained ones.

    They are second-level quantized, and the codes are computed with the stored values.

    Args:
        weight: the matrix.
        config: format and block size. The calibration is not used.
        scale: the scale of every block.
        place: the shift of every block (NormalFloat and FP4; None: no shifts), or its zero point
            (integers), which is rounded to 8 bits.
        outliers: these outliers, instead of the largest weights.

    Raises:
        ValueError: NaN, infinite or missing values, another shape, format "none"; for integers, a
            zero point that 8 bits cannot store, or a scale that is not positive; outliers whose
            number is not `config.outliers` of the weights.

    Examples:
        >>> weight = jnp.array([[-0.4, 0.1, 0.5, 1.0, 1.4, 1.9, 2.4, 3.0]])
        >>> config = QuantConfig(format="int2", block_size=8)
        >>> encode_with(weight, config, jnp.array([[1.0]]), jnp.array([[0.0]])).codes().tolist()
        [[0, 0, 0, 1, 1, 2, 2, 3]]
    """
    require(not config.rules, "quant.rules", config.rules, "none here: use config.for_matrix(NAME)")
    fmt = get_format(config.format)
    grid = weight.shape[0], -(-weight.shape[1] // config.block_size)
    kind = "zero point" if fmt.integer else "shift"
    require(place is not None or not fmt.integer, kind, place, f"one per block of {fmt.name}")
    given = {"scale": scale} if place is None else {"scale": scale, kind: place}
    for name, values in given.items():
        require(values.shape == grid, name, values.shape, f"shape {grid}")
    for name, values in {"weight": weight, **given}.items():
        _check_finite(name, values)
    flat = {name: values.astype(jnp.float32).ravel() for name, values in given.items()}
    found = Calibrated(scale=flat["scale"], shift=flat.get("shift"))
    if fmt.integer:
        zero, largest = flat[kind], 255 / 2 ** (8 - fmt.bits)
        _check_range("scale", flat["scale"], FLOAT_TINY, FLOAT_MAX)
        _check_range(kind, zero, 0.0, largest)
        zero = stats.decode_zero(stats.encode_zero(zero, fmt.bits), fmt.bits)
        found = Calibrated(scale=flat["scale"], zero=zero)
    if outliers is not None:
        wanted = outlier_count(weight.shape, config.outliers)
        accepted = f"{wanted} with quant.outliers {config.outliers:g}"
        require(outliers.values.size == wanted, "outliers", outliers.values.size, accepted)
    return _quantize(weight, None, config, given=found, outliers=outliers)


def _check_range(name: str, values: Array, low: float, high: float) -> None:
    fine = (values.min() >= low) & (values.max() <= high)
    if not isinstance(fine, Tracer):
        ends = float(values.min()), float(values.max())
        require(bool(fine), f"{name} (least, largest)", ends, f"numbers from {low:g} to {high:g}")


def _check_finite(name: str, matrix: Array) -> None:
    # The extremes need no array of the size of the matrix. They are NaN if any value is.
    fine = jnp.isfinite(matrix.min()) & jnp.isfinite(matrix.max())
    if isinstance(fine, Tracer) or bool(fine):
        return
    finite = jnp.isfinite(matrix)
    first = [int(i) for i in jnp.unravel_index(jnp.argmin(finite), finite.shape)]
    count = f"{finite.size - int(finite.sum())} of {finite.size} are NaN or infinite"
    require(False, f"{name}{first}", float(matrix[tuple(first)]), f"finite values ({count})")


def quantized_shape(shape: tuple[int, int], config: QuantConfig) -> QTensor:
    """The result of `quantize` for a shape, with jax.ShapeDtypeStruct in place of arrays."""
    # Tracing a search takes long, and it does the same for any number of blocks.
    one = jax.ShapeDtypeStruct((1, config.block_size), jnp.float32)
    chosen = jax.eval_shape(functools.partial(_calibrate_block, config=config), one)
    blocks = shape[0] * -(-shape[1] // config.block_size)
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct((blocks,), x.dtype), chosen)
    weight = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(functools.partial(_quantize, config=config), weight, None, given=given)


@functools.partial(jax.jit, static_argnames="config")  # for its cache of traces
def _calibrate_block(block: Float32[Array, "1 size"], config: QuantConfig) -> Calibrated:
    return _calibrate(block, get_format(config.format), config, None, False, None)


def stored_bits(shape: tuple[int, int], config: QuantConfig) -> int:
    """Bits of the result of `quantize` for a shape.

    Examples:
        >>> few = {"scale_rule": "uniform", "scale_bits": 4, "scale_dtype": "float16"}
        >>> config = QuantConfig(format="nf2", block_size=16, calibration="none", **few)
        >>> stored_bits((256, 256), config) == 256 * 256 * (2 + 4 / 16 + 16 / (16 * 256)) + 32
        True
    """
    leaves = jax.tree.leaves(quantized_shape(shape, config))
    return sum(8 * leaf.size * leaf.dtype.itemsize for leaf in leaves)


class _Statistics(NamedTuple):
    """The stored scales and shifts of all blocks, and the values used to compute the codes.

    Attributes:
        stored: the leaves of a QTensor except `packed`, with the blocks in row order.
        scale: [n].
        zero: [n], integer formats.
        shift: [n]; None means 0.
    """

    stored: dict[str, Array | None]
    scale: Array
    zero: Array | None
    shift: Array | None


@functools.partial(jax.jit, static_argnames="config")
def _quantize(
    weight: Array,
    shift: Array | None,
    config: QuantConfig,
    minus: tuple[Array, Array] | None = None,
    feedback: Feedback | None = None,
    inputs: Array | None = None,
    given: Calibrated | None = None,
    outliers: Outliers | None = None,
) -> QTensor:
    fmt, size = get_format(config.format), config.block_size
    rows, columns = weight.shape
    per_row = -(-columns // size)
    count = slab_rows((rows, columns))
    kept = None
    some = outlier_count((rows, columns), config.outliers)
    if outliers is not None:
        weight = outliers.take_out(weight)
    elif some:
        if minus is not None:
            weight = map_slabs(functools.partial(_rows, weight, minus, count), rows, count)
            minus = None
        size_or_harm = jnp.abs(weight)
        if config.outlier_rule == "sensitivity" and feedback is not None:
            size_or_harm = _harm(weight, feedback, config, some)
        kept = find_largest(size_or_harm, some)
        outliers = split(weight, kept, some)
        weight = jnp.where(kept, 0, weight)
    sparse = {} if outliers is None else outliers._asdict()

    def blocks_from(start: Array | int) -> Array:
        """The blocks of a slab in the type of the weight, to avoid a float32 copy."""
        return cut_blocks(_rows(weight, minus, count, start), size)

    valid = None
    if per_row * size > columns:
        ends = jnp.minimum(columns - jnp.arange(per_row) * size, size)
        valid = jnp.tile(ends, count)
    moments = None if inputs is None else cut_blocks(inputs[None], size)

    def calibrate(start: Array | int) -> Calibrated:
        found = _calibrate(blocks_from(start), fmt, config, valid, shift is not None, moments)
        return jax.tree.map(lambda x: x.reshape(count, per_row), found)

    found = given or jax.tree.map(jnp.ravel, map_slabs(calibrate, rows, count))
    if shift is not None:
        found = found._replace(shift=shift.astype(jnp.float32).reshape(-1))
    level = config.second_level
    statistics = _encode_statistics(found, fmt, level, exact=config.codes_from == "exact")
    grid = (rows, per_row)
    scale, zero, tau = jax.tree.map(lambda x: x.reshape(grid), statistics[1:])

    def encode(start: Array | int) -> Array:
        own = jax.tree.map(lambda x: rows_of(x, start, count), (scale, zero, tau))
        blocks = blocks_from(start).astype(jnp.float32)
        if feedback is None or not config.feedback:
            codes = encode_codes(blocks, fmt, *jax.tree.map(jnp.ravel, own))
        else:
            part = blocks.reshape(count, -1)[:, :columns]
            own_kept = None if kept is None else rows_of(kept, start, count)
            codes = cut_blocks(codes_with_feedback(part, own_kept, fmt, size, feedback, *own), size)
        return packing.pack(codes, fmt.bits).reshape(count, per_row, -1)

    stored = dict(statistics.stored)
    for name, value in stored.items():
        if value is not None and name.endswith("_codes"):
            zeros = name == "shift_codes" and fmt.integer
            stored[name] = packing.pack_rows(value.reshape(grid), 8 if zeros else level.bits)
    return QTensor(
        packed=map_slabs(encode, rows, count),
        **stored,  # type: ignore[arg-type]
        **{f"outlier_{name}": value for name, value in sparse.items()},
        shape=(rows, columns),
        format=fmt.name,
        block_size=size,
        second_level=level,
    )


def _rows(
    weight: Array, minus: tuple[Array, Array] | None, count: int, start: Array | int
) -> Array:
    """Rows of a matrix in its type, or of its difference to a low-rank product in float32."""
    part = rows_of(weight, start, count)
    if minus is None:
        return part
    left, right = minus
    # Accelerators would otherwise multiply float32 with reduced precision.
    update = jnp.matmul(rows_of(left, start, count), right, precision="highest")
    return part.astype(jnp.float32) - update


def _harm(weight: Array, feedback: Feedback, config: QuantConfig, some: int) -> Array:
    """|w - q| / U_cc: how much each weight would harm the outputs if it were no outlier (SpQR).

    q has the scales of the plain quantizer without likely outliers, the weights of largest |w| /
    U_cc. With all weights, the largest weight of a block would fit its scale, and have no error.
    """
    fmt, size = get_format(config.format), config.block_size
    rows, columns = weight.shape
    count = slab_rows((rows, columns))
    diagonal = jnp.zeros(columns).at[feedback.order].set(jnp.diagonal(feedback.factor))[None]
    likely = find_largest(jnp.abs(weight).astype(jnp.float32) / diagonal, some)
    plain = dataclasses.replace(config.plain, outliers=0.0)
    core = _quantize(jnp.where(likely, 0, weight), None, plain)
    zero = stats.decode_zero(core.shift_codes, fmt.bits) if fmt.integer else None

    def error(start: Array | int) -> Array:
        part = rows_of(weight, start, count).astype(jnp.float32)
        stored = jax.tree.map(lambda x: rows_of(x, start, count), (core.scale(), zero))
        scale, own_zero = jax.tree.map(jnp.ravel, stored)
        codes = encode_codes(cut_blocks(part, size), fmt, scale, own_zero, None)
        levels = jnp.asarray(fmt.table)[codes]
        levels = levels if own_zero is None else levels - own_zero[:, None]
        return jnp.abs((levels * scale[:, None]).reshape(count, -1)[:, :columns] - part)

    return map_slabs(error, rows, count) / diagonal


def _calibrate(
    blocks: Array,
    fmt: Format,
    config: QuantConfig,
    valid: Array | None,
    shift_is_given: bool,
    inputs: Array | None,
) -> Calibrated:
    """Stage 1: what the calibration chooses for each block."""
    if shift_is_given:
        low, high = block_ends(blocks, valid)
        return Calibrated(low=low, high=high)
    chosen = CALIBRATIONS[config.calibration]
    given = inputs if chosen.needs == "inputs" else None
    return chosen.search(blocks, fmt, config.symmetric, config.options, valid, given)


def _encode_statistics(
    found: Calibrated, fmt: Format, level: stats.SecondLevel, exact: bool
) -> _Statistics:
    """Stage 2: encodes scales and shifts for storage.

    Args:
        found: what the calibration chose.
        fmt: the format.
        level: how they are stored.
        exact: compute the codes with the values in `found`, not with the stored ones.
    """
    shift, scale = found.shift, found.scale
    shift_codes = shift_max = None
    if shift is not None:
        shift_codes, shift_max, offset = stats.encode_groups(shift, False, level)
        if not exact:
            shift = stats.decode_groups(shift_codes, shift_max, offset, False, level)
    if scale is None:
        # The scale that belongs to the stored shift.
        scale = _largest(found.low, found.high, shift)  # type: ignore[arg-type]
    scale_codes, scale_max, scale_offset = stats.encode_groups(scale, True, level)
    if not exact:
        scale = stats.decode_groups(scale_codes, scale_max, scale_offset, True, level)
    if found.zero is not None:
        shift_codes = stats.encode_zero(found.zero, fmt.bits)
    stored = {
        "scale_codes": scale_codes,
        "scale_max": scale_max,
        "scale_offset": scale_offset,
        "shift_codes": shift_codes,
        "shift_max": shift_max,
    }
    return _Statistics(stored, scale, found.zero, shift)


def _largest(low: Array, high: Array, shift: Array | None) -> Array:
    """max|w - shift| of every block. Rounding is monotonic, so the ends of a block determine it."""
    if shift is not None:
        low, high = low - shift, high - shift
    return jnp.maximum(-low, high)
