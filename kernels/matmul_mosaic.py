"""x @ W^T and g @ W on Hopper GPUs (Mosaic GPU). W keeps its 2, 3 or 4 bits until the registers.

In the layout "fragments", a thread loads exactly the codes of its part of a tensor core operand
(wgmma). Byte permutes turn codes into levels (`matmul_mosaic_byte_table.py`), and one multiply-add
turns two levels into weights. No dequantized weight is ever in the memory of the GPU.
`matmul_mosaic_product.py` has the loops.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt32

from irqlora_jax.kernels import measured
from irqlora_jax.kernels.matmul_mosaic_product import product
from irqlora_jax.kernels.matmul_mosaic_tiles import BLOCK, Tiles, default_tiles
from irqlora_jax.machine import compute_capability
from irqlora_jax.quant import packing
from irqlora_jax.quant.formats import get_format
from irqlora_jax.quant.qtensor import QTensor


def refusal(x: Array, weight: QTensor, device: Any = None) -> str | None:
    """Why the kernels cannot serve x and W on a device (None: jax's first); None if they can."""
    device = jax.devices()[0] if device is None else device
    capability = compute_capability(device)
    if capability != (9, 0):
        return f"it needs compute capability 9.0, {device.device_kind} has {_dotted(capability)}"
    mesh = jax.sharding.get_abstract_mesh()
    sizes = [size for name, size in mesh.shape.items() if name not in mesh.manual_axes]
    if math.prod(sizes) > 1:  # inside shard_map all axes are manual
        return f"it runs on one device, the mesh has {math.prod(sizes)}"
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes x in bfloat16 or float16, this one is {x.dtype}"
    if get_format(weight.format).bits == 8:
        return "it takes codes of 2, 3 and 4 bits, not 8"
    if weight.block_size != BLOCK:
        return f"it takes blocks of {BLOCK}, this weight has block_size = {weight.block_size}"
    if weight.layout != packing.FRAGMENTS:
        return (
            f"it takes layout 'fragments', not {weight.layout!r}: weight.with_layout('fragments')"
        )
    if weight.outliers is not None:
        return "it takes no weights with outliers"
    if weight.scale_update is not None:
        return "it takes no weights with updates of their scales"
    if weight.packed.ndim != 3:
        return f"it takes one weight, this one has leading axes {weight.packed.shape[:-3]}"
    return _missing()


def matmul(
    x: Float[Array, "*batch in"], weight: QTensor, tiles: Tiles | None = None
) -> Float[Array, "*batch out"]:
    """x @ weight^T in the type of x, bfloat16 or float16. Sums are float32.

    Levels, scales and shifts are first rounded to the type of x. One multiply-add, which rounds
    once, makes the weight from them.

    Args:
        x: activations.
        weight: in the layout "fragments", with blocks of 64.
        tiles: how the work is cut; None: the tiles that `measured.json` has for this place, or
            else `default_tiles`.
    """
    return _product("matmul", x, weight, tiles)


def matmul_transposed(
    g: Float[Array, "*batch out"], weight: QTensor, tiles: Tiles | None = None
) -> Float[Array, "*batch in"]:
    """g @ weight in the type of g, with the roundings, sums and arguments of `matmul`."""
    return _product("matmul_transposed", g, weight, tiles)


def _product(operation: str, x: Array, weight: QTensor, tiles: Tiles | None) -> Array:
    transposed = operation != "matmul"
    rows, fmt = x.reshape(-1, x.shape[-1]), get_format(weight.format)
    m, (n, k) = rows.shape[0], weight.shape
    out, terms = (k, n) if transposed else (n, k)
    if m == 0:
        return jnp.zeros((*x.shape[:-1], out), x.dtype)
    if tiles is None:
        kind = jax.devices()[0].device_kind
        tuned = measured.tuned_tiles(operation, "mosaic", kind, fmt.name, weight.shape, m)
        tiles = dataclasses.replace(default_tiles(m, n, k, fmt.bits, transposed), **tuned)
    # Copies move tiles of 8 x 64, and need lines of a multiple of 16 bytes.
    rows = jnp.pad(rows, ((0, -m % 8), (0, -terms % BLOCK)))
    codes = weight.packed.reshape(n, -1)
    codes = jnp.pad(codes, ((0, 0), (0, -codes.shape[1] % 16)))
    dtype = jnp.dtype(x.dtype).name
    sizes = rows.shape[0], out, terms
    kernel = product(*sizes, fmt.bits, fmt.levels, dtype, tiles, transposed)
    found = kernel(codes, affine(weight, x.dtype), rows)
    if tiles.splits > 1:
        # One after the other: in a reduction the compiler would choose the order.
        found = functools.reduce(jnp.add, list(found)).T.astype(x.dtype)
    return found[:m, :out].reshape(*x.shape[:-1], out)


def affine(weight: QTensor, dtype: DTypeLike) -> UInt32[Array, "blocks padded"]:
    """Scale (low half) and shift (high half) of every block, with one column for each row of W.

    The columns are padded to a multiple of 4, because TMA needs lines of a multiple of 16 bytes.
    """
    scale, shift = weight.scale(), weight.shift()
    low = lax.bitcast_convert_type(scale.astype(dtype), jnp.uint16).astype(jnp.uint32)
    both = low
    if shift is not None:
        high = lax.bitcast_convert_type(shift.astype(dtype), jnp.uint16).astype(jnp.uint32)
        both = low | (high << 16)
    return jnp.pad(both.T, ((0, 0), (0, -both.shape[0] % 4)))


@functools.cache
def _missing() -> str | None:
    """A sentence that names what the kernels need and the installed jax lacks, or None."""
    try:
        from jax.experimental.mosaic import gpu as mgpu
        from jax.experimental.pallas import mosaic_gpu as plgpu
    except ImportError as error:
        return f"it needs jax.experimental.pallas.mosaic_gpu: {error}"
    names = ("kernel", "inline_mgpu", "load", "planar_snake", "LoweringSemantics")
    missing = [name for name in names if not hasattr(plgpu, name)]
    if not hasattr(mgpu, "WGMMA_LAYOUT_UPCAST_4X"):
        missing.append("WGMMA_LAYOUT_UPCAST_4X")
    return f"jax {jax.__version__} has no {', '.join(missing)} in Mosaic GPU" if missing else None


def _dotted(capability: tuple[int, int] | None) -> str:
    return "none" if capability is None else ".".join(map(str, capability))
