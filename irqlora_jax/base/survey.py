"""Compares a quantized base with the plain quantizer: entropy, error, codes, shifts.

This happens while a base is made, because the float weights are available only then. A sample of
rows represents each matrix. The calibration is not searched again. The plain quantizer is cheap: it
runs only on the sample, which is about 1 % of the weights of a large model.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from irqlora_jax.quant import packing, stats
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.quant.entropy import block_entropy
from irqlora_jax.quant.formats import get_format
from irqlora_jax.quant.qtensor import QTensor

SAMPLE = 2**18
"""Maximum number of sampled weights of a matrix, in whole, evenly spaced rows."""
BINS = 401
"""Number of bins in the histogram of shifts. It is odd, so that one bin is centered at 0."""
REACH = 1.0025
"""End of this histogram, in units of the scale. The bins are 0.005 wide."""


@dataclasses.dataclass(frozen=True)
class Measures:
    """Measurements of one matrix with one quantizer.

    Attributes:
        entropy: mean entropy of the blocks, in bits (eq. 7).
        error: |w - dequantized| / |w| over the whole sample (Frobenius norm).
        codes: number of occurrences of each code.
        shifts: histogram of shift / scale, or of an integer format's zero points; None if absent.
    """

    entropy: float
    error: float
    codes: list[int]
    shifts: list[int] | None


@dataclasses.dataclass(frozen=True)
class Surveyed:
    """Measurements of one matrix. `calibrated` is None with the plain quantizer."""

    layer: int
    name: str
    format: str
    weights: int
    sampled: int
    plain: Measures
    calibrated: Measures | None


def read_surveyed(values: Mapping[str, Any]) -> Surveyed:
    """The reverse of `dataclasses.asdict`."""
    own = {name: values[name] and Measures(**values[name]) for name in ("plain", "calibrated")}
    return Surveyed(**{**values, **own})


def bin_edges(format: str) -> Float[np.ndarray, " edges"]:
    """Bin edges for shifts (in units of the scale) or zero points (in codes)."""
    fmt = get_format(format)
    return np.linspace(0, 2**fmt.bits, BINS + 1) if fmt.integer else _symmetric_edges()


def _symmetric_edges() -> Float[np.ndarray, " edges"]:
    return np.linspace(-REACH, REACH, BINS + 1)


def survey(
    layer: int,
    name: str,
    weight: Float[Array | np.ndarray, "out in"],
    packed: QTensor,
    config: QuantConfig,
    sample: int = SAMPLE,
) -> Surveyed:
    """Measures the quantization of a matrix.

    Args:
        layer: index of the layer.
        name: of the projection.
        weight: the matrix before quantization.
        packed: result of `quantize(weight, config)`.
        config: configuration of `packed`.
        sample: maximum number of weights to sample (but at least one row).
    """
    count = min(max(1, sample // weight.shape[1]), weight.shape[0])
    rows = np.unique(np.linspace(0, weight.shape[0] - 1, count).round().astype(np.int32))
    part = jnp.asarray(weight[rows])  # a copy: the caller may reuse the buffer
    calibrated = None
    if config == config.plain:
        plain = _measures(part, packed, rows)
    else:
        # The second-level quantization of its scales sees only the sample, not the whole matrix.
        other = quantize(part, config.plain)
        plain = _measures(part, other, np.arange(len(rows), dtype=np.int32))
        calibrated = _measures(part, packed, rows)
    return Surveyed(layer, name, config.format, weight.size, part.size, plain, calibrated)


def _measures(part: Array, packed: QTensor, rows: Int32[np.ndarray, " rows"]) -> Measures:
    entropy, error, codes, shifts = jax.device_get(_measure(part, packed, rows))
    shifts = None if shifts is None else shifts.tolist()
    return Measures(float(entropy), float(error), codes.tolist(), shifts)


@jax.jit
def _measure(
    part: Float[Array, "rows in"], packed: QTensor, rows: Int[Array, " rows"]
) -> tuple[
    Float32[Array, ""], Float32[Array, ""], Int32[Array, " levels"], Int32[Array, " bins"] | None
]:
    fmt, size, width = get_format(packed.format), packed.block_size, packed.shape[1]
    codes = packing.unpack(packed.packed[rows], fmt.bits, packed.layout)
    valid = jnp.minimum(width - jnp.arange(codes.shape[1]) * size, size)
    entropy = block_entropy(codes, 2**fmt.bits, jnp.broadcast_to(valid, codes.shape[:2])).mean()
    scale, shift = packed.scale()[rows], packed.shift()
    weights = jnp.asarray(fmt.table)[codes] * scale[..., None]
    if shift is not None:
        weights = weights + shift[rows][..., None]
    real = codes.reshape(len(rows), -1)[:, :width]
    weights = weights.reshape(len(rows), -1)[:, :width]
    if packed.outliers is not None:
        count = len(rows)
        place = jnp.full(packed.shape[0], count).at[rows].set(jnp.arange(count))
        weights = packed.outliers.put_rows(weights, place)
    off = weights - part
    norm = jnp.sqrt(jnp.square(part).sum())
    error = jnp.sqrt(jnp.square(off).sum()) / jnp.where(norm > 0, norm, 1)
    counts = jnp.bincount(real.ravel(), length=2**fmt.bits).astype(jnp.int32)
    return entropy, error, counts, None if shift is None else _histogram(packed, scale, rows)


def _histogram(packed: QTensor, scale: Array, rows: Array) -> Int32[Array, " bins"]:
    """Counts values beyond the ends in the outermost bins, and ignores blocks with scale 0."""
    fmt, edges = get_format(packed.format), bin_edges(packed.format)
    if fmt.integer:
        assert packed.shift_codes is not None
        value = stats.decode_zero(packed.shift_codes[rows], fmt.bits)
    else:
        shift = packed.shift()
        assert shift is not None
        value = shift[rows] / jnp.where(scale == 0, 1, scale)
    inner = jnp.asarray(edges[1:-1], jnp.float32)
    place = jnp.searchsorted(inner, value.reshape(-1), side="right")
    return jnp.zeros(BINS, jnp.int32).at[place].add((scale != 0).reshape(-1).astype(jnp.int32))


def summarize(found: Sequence[Surveyed], config: QuantConfig) -> dict[str, Any]:
    """Summarizes all matrices of a base as plain numbers for JSON.

    Returns:
        "format", "calibration", "rounding", "training", "block_size", the numbers of "weights" and
        "sampled" weights, and one dict each for "plain" and "calibrated" (absent if nothing was
        calibrated): "entropy" and "error" (by projection, lists over the layers with null for a
        layer that is not quantized),
        "mean_entropy" of all blocks in bits, the counts "codes", and "shifts" (counts of the bins
        of `bin_edges`; absent without shifts). With rules, "formats" has the number of matrices in
        each format, "format" is the most frequent one, and "codes" and "shifts" count only it.
    """
    formats = collections.Counter(one.format for one in found)
    format, _ = formats.most_common(1)[0]
    summary: dict[str, Any] = {
        "format": format,
        "calibration": config.calibration,
        "rounding": config.rounding,
        "training": config.training,
        "block_size": config.block_size,
        "weights": sum(one.weights for one in found),
        "sampled": sum(one.sampled for one in found),
    }
    if config.rules:
        summary["formats"] = dict(formats)
    total = summary["weights"]
    kinds = {"plain": [(one, one.plain) for one in found]}
    if any(one.calibrated is not None for one in found):
        kinds["calibrated"] = [(one, one.calibrated or one.plain) for one in found]
    for kind, parts in kinds.items():
        means = {"mean_entropy": sum(m.entropy * one.weights for one, m in parts) / total}
        summary[kind] = means | {
            measure: _by_projection([(one, getattr(m, measure)) for one, m in parts])
            for measure in ("entropy", "error")
        }
        # Histograms of one format only: in other formats a code stands for another level.
        same = [m for one, m in parts if one.format == format]
        summary[kind]["codes"] = _sum([m.codes for m in same])
        shifts = [m.shifts for m in same if m.shifts is not None]
        if shifts:
            summary[kind]["shifts"] = _sum(shifts)
    return summary


def summarize_outputs(
    errors: Mapping[tuple[int, str], tuple[float, float]],
) -> dict[str, dict[str, list[float | None]]]:
    """Lists the errors of the outputs over the layers, by projection: of the "plain" quantizer and
    of the "own" one of this base.

    Args:
        errors: by layer and projection (`base.layerwise.OutputErrors`).
    """
    return {
        kind: _by_place({place: pair[i] for place, pair in errors.items()})
        for i, kind in enumerate(("plain", "own"))
    }


def _by_projection(
    values: Sequence[tuple[Surveyed, float]],
) -> dict[str, list[float | None]]:
    return _by_place({(one.layer, one.name): value for one, value in values})


def _by_place(values: Mapping[tuple[int, str], float]) -> dict[str, list[float | None]]:
    """Lists values over the layers by projection; None for a layer that is not quantized."""
    names = dict.fromkeys(name for _, name in values)
    layers = range(max(layer for layer, _ in values) + 1)
    found = {place: round(value, 6) for place, value in values.items()}
    return {name: [found.get((layer, name)) for layer in layers] for name in names}


def _sum(histograms: Sequence[Sequence[int]]) -> list[int]:
    return np.sum(np.asarray(histograms, np.int64), axis=0).tolist()
