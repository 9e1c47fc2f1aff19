"""Codes of a quantized base as blocks of GGUF: the same codes, with scale and shift in float16.

Q4_1 stores a scale d, a minimum m and codes q of 4 bits for 32 weights, which are d q + m. So it
holds every integer of up to 4 bits. Where the zero point is the middle of the codes, Q4_0 (q - 8)
and Q8_0 (signed bytes) need no minimum.
"""

import jax
import jax.numpy as jnp
import numpy as np

from irqlora_jax.quant.formats import get_format
from irqlora_jax.quant.qtensor import QTensor

_BLOCK = 32


def exact_type(name: str, weight: QTensor) -> str:
    """The type that holds the codes of a matrix.

    Args:
        name: of the matrix, for messages.
        weight: the matrix, without leading axes.

    Raises:
        ValueError: no type has these codes; the message says what would do.
    """
    format = get_format(weight.format)
    if not format.integer:
        raise ValueError(
            f"type = 'exact': {name} has format {weight.format}; expected an integer format "
            "(int4, int3, int2, or a symmetric int8), or type f16, bf16, q8_0, q4_0 or q4_1"
        )
    if weight.outliers is not None:
        raise ValueError(
            f"type = 'exact': {name} has outliers, for which the blocks have no place; expected a "
            "base without outliers, or type f16, bf16 or q8_0"
        )
    if weight.block_size % _BLOCK or weight.shape[1] % _BLOCK:
        raise ValueError(
            f"type = 'exact': {name} has blocks of {weight.block_size} in rows of "
            f"{weight.shape[1]}; expected multiples of {_BLOCK}, or type f16, bf16 or q8_0"
        )
    middle = 2 ** (format.bits - 1) << (8 - format.bits)
    symmetric = weight.shift_update is None and bool((weight.shift_codes == middle).all())
    if format.bits == 8 and not symmetric:
        raise ValueError(
            f"type = 'exact': {name} has 8 bits and zero points; expected quant.symmetric true, or "
            "type f16, bf16 or q8_0"
        )
    return ("Q8_0" if format.bits == 8 else "Q4_0") if symmetric else "Q4_1"


def exact_blocks(weight: QTensor, kind: str) -> tuple[np.ndarray, float]:
    """The bytes of a matrix, [out, bytes of a row], and how far its weights are from ours.

    Args:
        weight: the matrix, without leading axes.
        kind: from `exact_type`.

    Returns:
        The bytes, and the largest difference relative to the largest weight. It comes from
        rounding scales and minima to float16 and is 0 where they are float16 numbers already.

    Raises:
        ValueError: a scale or minimum is out of the range of float16.
    """
    import gguf

    rows, columns = weight.shape
    bits, copies = get_format(weight.format).bits, weight.block_size // _BLOCK
    scale, shift = (_halves(x, copies, columns) for x in (weight.scale(), weight.shift()))
    codes = np.asarray(jax.jit(QTensor.codes)(weight)).reshape(-1, _BLOCK)
    if kind == "Q8_0":
        parts = [scale, (codes.astype(np.int16) - 128).astype(np.int8).view(np.uint8)]
    else:
        middle = 8 - 2 ** (bits - 1) if kind == "Q4_0" else 0
        low, high = np.split(codes + np.uint8(middle), 2, axis=1)
        parts = [scale, *([shift] * (kind == "Q4_1")), low | high << 4]
    data = np.concatenate(parts, axis=1).reshape(rows, -1)
    ours = np.asarray(jax.jit(QTensor.dequantize)(weight))
    theirs = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    if not np.isfinite(theirs).all():
        raise ValueError("type = 'exact': a scale is out of the range of float16; expected bf16")
    largest = float(np.abs(ours).max()) or 1.0
    return data, float(np.abs(ours - theirs).max()) / largest


def _halves(values: jax.Array | None, copies: int, columns: int) -> np.ndarray:
    """float16 numbers of all blocks of 32, as bytes [blocks, 2]."""
    assert values is not None
    with np.errstate(over="ignore"):
        repeated = np.asarray(jnp.repeat(values, copies, axis=1)).astype(np.float16)
    return repeated[:, : columns // _BLOCK].reshape(-1, 1).view(np.uint8)
