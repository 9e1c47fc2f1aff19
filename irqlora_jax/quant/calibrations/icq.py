"""ICQ for NormalFloat and FP4: the shift of a block that maximizes the entropy of its codes.

IR-QLoRA's information calibration quantization (section 3.2). The mutual information between a
block and its codes is the entropy of the codes (eq. 5 to 7). So for each block, the search tries
all candidates around the median and keeps the one of highest entropy (eq. 8, 9). `icq_integer.py`
has the variant for integers, and `entropy.py` the code that both use.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Int32, Integer

from irqlora_jax.quant.calibrations.calibration import Calibrated, Calibration
from irqlora_jax.quant.calibrations.icq_integer import search_range as search_integer_range
from irqlora_jax.quant.calibrations.icq_integer import search_zero_point
from irqlora_jax.quant.choose import Implementation, choose, kernel, serves_all
from irqlora_jax.quant.entropy import (
    FLOAT_MAX,
    above_levels,
    bits_of,
    histogram_weight,
    in_chunks,
    inside,
    lower_median,
    masked,
    product,
    require_range,
    spaced,
    sweep,
    try_all,
    try_each,
)
from irqlora_jax.quant.entropy import block_entropy as block_entropy
from irqlora_jax.quant.formats import Format, get_format
from irqlora_jax.text import require

# Standard deviation in units of the scale, from the table of NF4: 1 / Q(0.9677083).
SIGMA = 1 / 1.8481308


def search_shift(
    blocks: Float[Array, "n block"],
    format: Format | str,
    search_range: float = 0.1,
    steps: int = 100,
    valid: Int[Array, " n"] | None = None,
    implementation: Literal["xla", "triton"] | None = None,
) -> tuple[Float32[Array, " n"], Float32[Array, " n"]]:
    """Searches the shift (the paper's tau) of every block; also returns the entropy of its codes.

    The 2 * steps + 1 candidates are tau0 + f * max|w - tau0|. Here tau0 is the lower median, f is
    evenly spaced in +-search_range * sigma, and sigma is the standard deviation that NormalFloat
    assumes. Each candidate has its own scale, max|w - tau|.

    Args:
        blocks: weights.
        format: code book, not an integer one.
        search_range: the paper's lambda, below 1.
        steps: the paper's n.
        valid: number of real elements in each block (at least 1); None: all.
        implementation: "triton": one GPU kernel (kernels/search_triton.py). "xla". None: the kernel
            if it was measured to be faster, else XLA. Both find the same floats.

    Raises:
        ValueError: an integer format, a search range outside of (0, 1), or an implementation that
            cannot serve; the message says why.

    Examples:
        >>> blocks = jnp.array([[0.0, 0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0]])
        >>> shift, entropy = search_shift(blocks, "nf3")
        >>> f"{float(shift[0]):.3f}, {float(entropy[0]):.3f} bits"
        '0.262, 2.500 bits'
    """
    return shift_and_ends(blocks, format, search_range, steps, valid, implementation)[:2]


@functools.partial(jax.jit, static_argnames=("format", "search_range", "steps", "implementation"))
def shift_and_ends(
    blocks: Float[Array, "n block"],
    format: Format | str,
    search_range: float = 0.1,
    steps: int = 100,
    valid: Int[Array, " n"] | None = None,
    implementation: Literal["xla", "triton"] | None = None,
) -> tuple[Float32[Array, " n"], Float32[Array, " n"], Float32[Array, " n"], Float32[Array, " n"]]:
    """`search_shift`, plus the smallest and largest weight of every block. These determine the
    scale, so the quantizer need not read the weights again for it."""
    format = get_format(format) if isinstance(format, str) else format
    if format.integer:
        raise ValueError(f"format = {format.name!r}: expected a NormalFloat or FP4 format")
    require_range(search_range)
    chosen = choose(implementation, _SEARCHES, blocks, format, operation="search")
    return chosen.forward(blocks, format, search_range, steps, valid)


def _xla_search(
    blocks: Array, format: Format, search_range: float, steps: int, valid: Array | None
) -> tuple[Array, Array, Array, Array]:
    factors = spaced(-search_range * SIGMA, search_range * SIGMA, 2 * steps + 1)
    search = functools.partial(_best_shift, factors=factors, format=format)
    on_cpu = functools.partial(search, swept=True)
    return in_chunks(on_cpu, functools.partial(search, swept=False), 4, blocks, valid)


def _place(blocks: Array, format: Format) -> tuple[str, tuple[int, int]]:
    return format.name, (0, blocks.shape[1])


_SEARCHES = (
    kernel("triton", "search_triton", "search_shift", place=_place),
    Implementation("xla", serves_all, _xla_search),
)


def _crossings(midpoints: Float32[np.ndarray, " points"], reach: float) -> int:
    """Maximum number of decision points that a weight crosses as f goes from -reach to reach.

    Let x = (w - tau) / m with m = max|w - tau|. Per unit of tau, x moves by at most (1 + |x|) / m,
    and m >= (1 - |f|) * max|w - tau0|. So sign(x) * log(1 + |x|) moves by at most
    -2 log(1 - reach).
    """
    place = np.sign(midpoints) * np.log1p(np.abs(midpoints.astype(np.float64)))
    width = -2 * math.log1p(-reach) * 1.001 + 1e-6
    distance = place[None] - place[:, None]
    return int(((distance >= 0) & (distance <= width)).sum(axis=1).max())


def _best_shift(
    w: Float32[Array, "block b"],
    count: Int32[Array, " b"] | None,
    *,
    factors: np.ndarray,
    format: Format,
    swept: bool,
) -> tuple[Float32[Array, " b"], Float32[Array, " b"], Float32[Array, " b"], Float32[Array, " b"]]:
    block, b = w.shape
    n = jnp.full(b, block, jnp.int32) if count is None else count
    w = masked(w, count, np.inf)
    median = lower_median(w, n)[None]
    low, high = w.min(0, keepdims=True), masked(w, count, -np.inf).max(0, keepdims=True)
    spread = jnp.minimum(jnp.maximum(high - median, median - low), FLOAT_MAX)
    table = jnp.asarray(factors, jnp.float32)

    def shift_at(i: Array) -> Array:
        return product(jnp.take(table, i, mode="clip"), spread) + median

    def unit_at(i: Array) -> Array:
        """The normalized weights that the quantizer compares with the midpoints."""
        shift = shift_at(i)
        scale = jnp.maximum(jnp.abs(high - shift), jnp.abs(low - shift))
        return (w - shift) * (1 / jnp.where(scale == 0, 1, scale))

    def codes_at(i: Array) -> Integer[Array, "block b"]:
        x = unit_at(i)
        codes = jnp.zeros(w.shape, jnp.int8)
        for point in format.midpoints:
            codes += (x > point).astype(jnp.int8)
        return masked(codes, count, 0)

    scan = functools.partial(try_each, codes_at, len(factors), 2**format.bits, n)
    # The sweep needs candidates that differ by far more than a rounding error.
    step = float(factors[-1] - factors[0]) / (len(factors) - 1)
    if not swept:
        points = format.midpoints.tolist()
        index, weight = try_all(
            lambda i: masked(unit_at(i), count, -np.inf), points, len(factors), n
        )
    elif step < 1e-5:
        index, weight = scan()
    else:
        unit = (w - median) * (1 / jnp.where(spread == 0, 1, spread))
        swept_ = functools.partial(_sweep, unit, n, codes_at, unit_at, format.midpoints, factors)
        coarse = (spread > 0) & (jnp.abs(median) * 2.0**-22 > step * spread)
        index, weight = lax.cond(coarse.any(), scan, swept_)
    shift = jnp.clip(shift_at(index[None])[0], -FLOAT_MAX, FLOAT_MAX)
    return shift, bits_of(weight, n, block), low[0], high[0]


def _sweep(
    unit: Float32[Array, "block b"],
    n: Int32[Array, " b"],
    codes_at: Callable[[Array], Integer[Array, "block b"]],
    unit_at: Callable[[Array], Array],
    midpoints: Float32[np.ndarray, " points"],
    factors: np.ndarray,
) -> tuple[Int32[Array, " b"], Int32[Array, " b"]]:
    """`sweep` over the shifts.

    As the shift grows, (w - shift) / scale never grows, so a weight crosses a decision point at
    most once. A linear equation gives the crossing. Rounding displaces it by less than half a
    candidate, so evaluating the nearest candidate decides between that one and the next.
    """
    block = unit.shape[0]
    last = len(factors) - 1
    step = float(factors[-1] - factors[0]) / last
    codes = codes_at(jnp.int32(0))
    bottom = unit.min(0, keepdims=True)
    top = jnp.where(inside(unit, n), unit, -np.inf).max(0, keepdims=True)
    center = (bottom + top) / 2
    points = jnp.asarray(midpoints)

    def event(crossed: Array) -> tuple[Array, Array, int]:
        point_index = codes.astype(jnp.int32) - 1 - crossed
        point = jnp.take(points, point_index, mode="clip")
        # Solves x = point with the scale top - shift, or else with the scale shift - bottom.
        shift = (unit - point * top) / (1 - point)
        shift = jnp.where(shift <= center, shift, (unit + point * bottom) / (1 + point))
        nearest = jnp.round((shift - float(factors[0])) * (1 / step))
        nearest = jnp.clip(nearest, 0, last).astype(jnp.int32)
        index = nearest + (unit_at(nearest) > point).astype(jnp.int32)
        return jnp.where(point_index >= 0, index, last + 1), point_index, -1

    above = above_levels(codes, len(midpoints) + 1)
    n_events = _crossings(midpoints, float(factors[-1]))
    return sweep(
        above, event, n_events, last + 1, lambda i, above: (i, histogram_weight(above, n, block)), n
    )


@dataclasses.dataclass(frozen=True)
class IcqOptions:
    """Options of the ICQ search."""

    range: float = 0.1
    """Half-width of the search (the paper's lambda). NormalFloat and FP4: in standard deviations of
    the block. Integers: as a fraction of the block's range."""
    steps: int | None = None
    """The search tries 2 * steps + 1 candidates (the paper's n). Null: 100; for integers 50."""
    search: Literal["range", "zero_point"] = "range"
    """Integers only. "range": vary the range, as in the released code. "zero_point": vary the zero
    point at a fixed scale, as in the paper's text."""

    def __post_init__(self) -> None:
        require(0 < self.range < 1, "quant.icq.range", self.range, "a number between 0 and 1")
        accepted = "a whole number of at least 1, or null"
        require(self.steps is None or self.steps >= 1, "quant.icq.steps", self.steps, accepted)
        known = ("range", "zero_point")
        require(self.search in known, "quant.icq.search", self.search, " or ".join(known))


def _refusal(format: Format, symmetric: bool, options: IcqOptions) -> str | None:
    if options.search == "range" or (format.integer and not symmetric):
        return None
    why = "quant.symmetric true" if format.integer else f"quant.format {format.name}"
    return f"quant.icq.search = {options.search!r}: expected range with {why}"


def _calibrate(
    blocks: Array,
    format: Format,
    symmetric: bool,
    options: IcqOptions,
    valid: Array | None,
    inputs: Array | None,
) -> Calibrated:
    width, steps = options.range, options.steps
    if not format.integer:
        shift, _, low, high = shift_and_ends(blocks, format, width, steps or 100, valid)
        return Calibrated(shift=shift, low=low, high=high)
    if options.search == "zero_point":
        found = search_zero_point(blocks, format.bits, width, steps or 50, valid)
    else:
        found = search_integer_range(blocks, format.bits, symmetric, width, steps or 50, valid)
    return Calibrated(scale=found[0], zero=found[1])


ICQ = Calibration(
    name="icq",
    title="ICQ",
    description="ICQ (information calibration quantization)",
    search=_calibrate,
    options=IcqOptions(),
    refusal=_refusal,
    most_bits=4,
)
