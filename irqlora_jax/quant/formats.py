"""Code books: the numbers that codes of 2, 3, 4 or 8 bits stand for.

A format does not define how codes are stored; `packing.py` does.
"""

import dataclasses
from statistics import NormalDist

import numpy as np
from jaxtyping import Float32

from irqlora_jax.text import shorten


@dataclasses.dataclass(frozen=True)
class Format:
    """A code book. Code i stands for `levels[i]`, in units of the block's scale.

    Attributes:
        name: as in the configuration.
        bits: width of a code.
        levels: 2**bits values. NormalFloat and FP4 lie in [-1, 1]; the levels of an integer format
            are the codes themselves, 0 .. 2**bits - 1.
        integer: true for int8, int4, int3, int2.
    """

    name: str
    bits: int
    levels: tuple[float, ...]
    integer: bool = False

    @property
    def table(self) -> Float32[np.ndarray, " levels"]:
        """The levels as an array."""
        return np.asarray(self.levels, np.float32)

    @property
    def order(self) -> tuple[int, ...]:
        """Codes in ascending order of levels. FP4 codes are sign and magnitude; -0 is before 0."""
        return tuple(int(i) for i in np.lexsort((~np.signbit(self.table), self.table)))

    @property
    def midpoints(self) -> Float32[np.ndarray, " gaps"]:
        """Decision points between neighboring levels. A value equal to one takes the lower level.

        The sign bit distinguishes the two zeros of FP4. Every x < 0 takes the negative one, so the
        point between them is the largest normal float32 below 0.
        """
        levels = np.sort(self.table)
        points = ((levels[1:].astype(np.float64) + levels[:-1]) / 2).astype(np.float32)
        twin = levels[1:] == levels[:-1]
        return np.where(twin, -np.finfo(np.float32).tiny, points)


# NormalFloat as published (QLoRA, appendix E; IR-QLoRA, tables 11 to 13), so that codes can be
# exchanged bit by bit. The levels are quantiles of the normal distribution: NF4 and NF3 by the
# asymmetric rule with an exact zero, NF2 by the symmetric one (tests/quant/test_formats.py).
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_NF3 = (
    *(-1.0, -0.4786292016506195, -0.217141792178154, 0.0),
    *(0.16093020141124725, 0.33791524171829224, 0.5626170039176941, 1.0),
)
_NF2 = (-1.0, -0.25256848335266113, 0.2525685131549835, 1.0)


def _asymmetric(bits: int) -> tuple[float, ...]:
    """The asymmetric rule: quantiles of the normal distribution, one more above 0 than below, and
    0 itself. No table of 8 bits was published; LQ-LoRA computes it by this rule in float32."""
    quantile, end, half = NormalDist().inv_cdf, 0.9677083, 2 ** (bits - 1)
    above = [quantile(p) for p in np.linspace(end, 0.5, half + 1)[:-1]]
    below = [-quantile(p) for p in np.linspace(end, 0.5, half)[:-1]]
    return tuple(float(level / above[0]) for level in sorted([*above, *below, 0.0]))


_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # by bit pattern (bitsandbytes, E2M1)

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("nf4", 4, _NF4),
        Format("nf3", 3, _NF3),
        Format("nf2", 2, _NF2),
        Format("fp4", 4, tuple(s * v / 12 for s in (1.0, -1.0) for v in _FP4_TWELFTHS)),
        *(Format(f"int{b}", b, tuple(map(float, range(2**b))), integer=True) for b in (4, 3, 2)),
        Format("nf8", 8, _asymmetric(8)),
        Format("int8", 8, tuple(map(float, range(2**8))), integer=True),
    )
}


def get_format(name: str) -> Format:
    """Returns the format with this name.

    Raises:
        ValueError: no such format; the message lists the known ones.

    Examples:
        >>> nf2 = get_format("nf2")
        >>> nf2.bits, nf2.levels
        (2, (-1.0, -0.25256848335266113, 0.2525685131549835, 1.0))
        >>> get_format("fp4").order[:9]  # by rising level: its codes have a sign bit
        (11, 10, 13, 12, 15, 14, 9, 8, 0)
    """
    if name not in FORMATS:
        raise ValueError(f"quant.format = {shorten(name)}: expected {', '.join(FORMATS)}")
    return FORMATS[name]
