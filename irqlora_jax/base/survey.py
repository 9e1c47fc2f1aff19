"""What quantization did to the weights, beside the plain quantizer: entropy, error, codes, shifts.

Measured while a base is made, since the weights are at hand then and never again. Some rows of
every matrix stand for all of it: a calibration is not searched anew, and the plain quantizer, which
is cheap, sees about one weight in a hundred of a large model.
"""

import collections
import dataclasses
from collections.abc import Sequence
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
"""Weights of a matrix that are looked at, in whole rows that lie evenly apart."""
BINS = 401
"""Of the histogram of the shifts. Odd, so that one is around 0."""
REACH = 1.0025
"""End of that histogram, in units of the scale; the bins are 0.005 wide."""


@dataclasses.dataclass(frozen=True)
class Measures:
    """Of one matrix and one quantizer.

    Attributes:
        entropy: mean of its blocks, in bits (eq. 7).
        error: |w - dequantized| / |w|, of the sample as a whole (Frobenius).
        codes: how often every code occurs.
        shifts: histogram of shift / scale, or of an integer format's zero points; None without.
    """

    entropy: float
    error: float
    codes: list[int]
    shifts: list[int] | None


@dataclasses.dataclass(frozen=True)
class Surveyed:
    """One matrix. `calibrated` is None where the quantizer is the plain one."""

    layer: int
    name: str
    format: str
    weights: int
    sampled: int
    plain: Measures
    calibrated: Measures | None


def bin_edges(format: str) -> Float[np.ndarray, " edges"]:
    """Edges of the bins of the shifts, in units of the scale; of zero points, in codes."""
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
    """Measures a matrix and what was made of it.

    Args:
        layer: its layer.
        name: of the projection.
        weight: the matrix itself.
        packed: what `quantize(weight, config)` gave.
        config: how that was made.
        sample: weights to look at, at most (at least one row).
    """
    count = min(max(1, sample // weight.shape[1]), weight.shape[0])
    rows = np.unique(np.linspace(0, weight.shape[0] - 1, count).round().astype(np.int32))
    part = jnp.asarray(weight[rows])  # a copy: the caller may fill the buffer anew
    calibrated = None
    if config == config.plain:
        plain = _measures(part, packed, rows)
    else:
        # Its scales are second-level quantized with the others of the sample, not of the matrix.
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
    off = weights.reshape(len(rows), -1)[:, :width] - part
    norm = jnp.sqrt(jnp.square(part).sum())
    error = jnp.sqrt(jnp.square(off).sum()) / jnp.where(norm > 0, norm, 1)
    counts = jnp.stack([(real == code).sum(dtype=jnp.int32) for code in range(2**fmt.bits)])
    return entropy, error, counts, None if shift is None else _histogram(packed, scale, rows)


def _histogram(packed: QTensor, scale: Array, rows: Array) -> Int32[Array, " bins"]:
    """What lies beyond the ends counts in the last bins; blocks whose scale is 0 do not count."""
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
    """All matrices of a base as plain numbers, for JSON.

    Returns:
        "format", "calibration", "block_size"; "weights" and "sampled", their numbers; and for
        "plain" and "calibrated" (left out where nothing was calibrated) "entropy" and "error", by
        projection a list over the layers (null where a layer is not quantized), "mean_entropy" of
        all blocks in bits, "codes", counted, and "shifts", the counts of the bins of `bin_edges`
        (left out without shifts). With rules also "formats", the number of matrices in each format;
        "format" is then the most frequent one, and only its matrices count in "codes" and "shifts".
    """
    formats = collections.Counter(one.format for one in found)
    format, _ = formats.most_common(1)[0]
    summary: dict[str, Any] = {
        "format": format,
        "calibration": config.calibration,
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
        # Histograms of one format only: codes of others mean other levels.
        same = [m for one, m in parts if one.format == format]
        summary[kind]["codes"] = _sum([m.codes for m in same])
        shifts = [m.shifts for m in same if m.shifts is not None]
        if shifts:
            summary[kind]["shifts"] = _sum(shifts)
    return summary


def _by_projection(
    values: Sequence[tuple[Surveyed, float]],
) -> dict[str, list[float | None]]:
    """By projection a list over the layers; None for a layer that is not quantized."""
    places = {(one.name, one.layer): round(value, 6) for one, value in values}
    names = dict.fromkeys(one.name for one, _ in values)
    layers = range(max(one.layer for one, _ in values) + 1)
    return {name: [places.get((name, layer)) for layer in layers] for name in names}


def _sum(histograms: Sequence[Sequence[int]]) -> list[int]:
    return np.sum(np.asarray(histograms, np.int64), axis=0).tolist()
