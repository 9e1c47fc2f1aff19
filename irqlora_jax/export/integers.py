"""What the layouts of GPTQ and compressed-tensors share: a weight is scale * (code - zero point).

Both pack codes without gaps into words of 32 bits, the first code in the lowest bits.
"""

import dataclasses

import numpy as np
from jaxtyping import Int32, UInt8

from irqlora_jax.export.packed import ELSE
from irqlora_jax.quant.formats import get_format
from irqlora_jax.quant.qtensor import QTensor

WORD = 32
"""Bits of a word."""


@dataclasses.dataclass(frozen=True)
class IntegerFacts:
    """Describes a quantized matrix.

    Attributes:
        shape: (out, in).
        bits: width of a code.
        block_size: weights that share a scale and a zero point.
        symmetric: whether every zero point is the middle of the codes.
        lowest: the smallest zero point.
        error: the largest relative change of a scale by its rounding to the type in the file.
    """

    shape: tuple[int, int]
    bits: int
    block_size: int
    symmetric: bool
    lowest: int
    error: float

    @property
    def grid(self) -> tuple[int, int]:
        """(out, blocks of a row)."""
        return self.shape[0], self.shape[1] // self.block_size


def integer_facts(start: str, weight: QTensor, dtype: str) -> IntegerFacts:
    """Checks that a matrix has whole zero points and whole blocks, and describes it.

    Args:
        start: of the message.
        weight: the matrix, without leading axes.
        dtype: type of the scales in the file.

    Raises:
        ValueError: it has something else; the message says what would do.
    """
    format, size = get_format(weight.format), weight.block_size
    if not format.integer:
        raise ValueError(f"{start} format {format.name}; expected int8, int4, int3 or int2, {ELSE}")
    if weight.shift_update is not None:
        raise ValueError(
            f"{start} trained shifts, which are no whole zero points; expected a base without "
            f"them, {ELSE}"
        )
    if weight.shape[1] % size:
        raise ValueError(
            f"{start} rows of {weight.shape[1]} in blocks of {size}; expected whole blocks, {ELSE}"
        )
    zeros = _zeros(weight)
    if (zeros % 1 != 0).any():
        raise ValueError(
            f"{start} zero points between whole numbers; expected quant.calibration none or gptq, "
            f"or icq with quant.icq.search range, or quant.symmetric true, {ELSE}"
        )
    scale = np.asarray(weight.scale())
    with np.errstate(over="ignore"):
        rounded = scale.astype(dtype).astype(np.float32)
    error = float((np.abs(rounded - scale) / np.maximum(np.abs(scale), 1e-30)).max())
    if not np.isfinite(error):
        raise ValueError(
            f"{start} scales out of the range of {dtype}; expected smaller ones, {ELSE}"
        )
    symmetric = bool((zeros == 2 ** (format.bits - 1)).all())
    return IntegerFacts(weight.shape, format.bits, size, symmetric, int(zeros.min()), error)


def zero_points(weight: QTensor) -> UInt8[np.ndarray, "out blocks"]:
    """The whole zero points of a matrix that `integer_facts` accepted."""
    return _zeros(weight).astype(np.uint8)


def _zeros(weight: QTensor) -> np.ndarray:
    bits = get_format(weight.format).bits
    return np.asarray(weight.shift_codes).astype(np.float32) / 2 ** (8 - bits)


def packed_words(count: int, bits: int) -> int:
    """Words for `count` codes."""
    return -(-count * bits // WORD)


def pack_words(codes: UInt8[np.ndarray, "rows n"], bits: int) -> Int32[np.ndarray, "rows words"]:
    """Packs the codes of each row without gaps. A code may lie in two words.

    Examples:
        >>> hex(int(pack_words(np.arange(8, dtype=np.uint8)[None], 4)[0, 0]))
        '0x76543210'
        >>> pack_words(np.full((1, 32), 7, np.uint8), 3).tolist()
        [[-1, -1, -1]]
    """
    bit = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    flat = bit.reshape(len(codes), -1)
    flat = np.pad(flat, [(0, 0), (0, -flat.shape[1] % WORD)])
    return np.packbits(flat, axis=1, bitorder="little").view(np.int32)
