"""x @ W^T and g @ W on Hopper GPUs, with W in 2, 3 or 4 bits until it is in registers (Mosaic GPU).

In the layout "fragments" a thread loads just the codes of its part of an operand of the tensor
cores (wgmma); they become levels by byte permutes (`byte_table.py`), and weights by one
multiply-add for two of them. No dequantized weight is ever in the memory of the GPU.
`mosaic_product.py` has the loops.
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

from irqlora_jax.kernels import measured, mosaic_tiles
from irqlora_jax.kernels.mosaic_product import product
from irqlora_jax.machine import compute_capability
from irqlora_jax.quant import packing
from irqlora_jax.quant.formats import get_format
from irqlora_jax.quant.matmul import Implementation, was_faster
from irqlora_jax.quant.qtensor import QTensor

Tiles, default_tiles = mosaic_tiles.Tiles, mosaic_tiles.default_tiles
BLOCK = mosaic_tiles.BLOCK


def refusal(x: Array, weight: QTensor, device: Any = None) -> str | None:
    """Why the kernel cannot serve x and W on a device (by default jax's first); None if it can."""
    device = jax.devices()[0] if device is None else device
    capability = compute_capability(device)
    if capability != (9, 0):
        return f"it needs compute capability 9.0, {device.device_kind} has {_dotted(capability)}"
    mesh = jax.sharding.get_abstract_mesh()
    sizes = [size for name, size in mesh.shape.items() if name not in mesh.manual_axes]
    if math.prod(sizes) > 1:  # within shard_map all axes are manual
        return f"it runs on one device, the mesh has {math.prod(sizes)}"
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes x in bfloat16 or float16, this one is {x.dtype}"
    if weight.block_size != BLOCK:
        return f"it takes blocks of {BLOCK}, this weight has block_size = {weight.block_size}"
    if weight.layout != packing.FRAGMENTS:
        return (
            f"it takes layout 'fragments', not {weight.layout!r}: weight.with_layout('fragments')"
        )
    if weight.packed.ndim != 3:
        return f"it takes one weight, this one has leading axes {weight.packed.shape[:-3]}"
    return _missing()


def matmul(
    x: Float[Array, "*batch in"], weight: QTensor, tiles: Tiles | None = None
) -> Float[Array, "*batch out"]:
    """x @ weight^T in the type of x, bfloat16 or float16; sums are float32.

    The levels, and the scale and the shift of a block, are rounded to the type of x before they are
    multiplied and added, which rounds once.

    Args:
        x: activations.
        weight: in the layout "fragments", in blocks of 64.
        tiles: how to cut the work; by default as was measured to be the fastest here
            (`measured.py`), or `default_tiles`.
    """
    return _product("matmul", x, weight, tiles)


def matmul_transposed(
    g: Float[Array, "*batch out"], weight: QTensor, tiles: Tiles | None = None
) -> Float[Array, "*batch in"]:
    """g @ weight in the type of g, rounded and summed as in `matmul`, arguments as there."""
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
    # The copies are made of tiles of 8 x 64, and want lines of a multiple of 16 bytes.
    rows = jnp.pad(rows, ((0, -m % 8), (0, -terms % BLOCK)))
    codes = weight.packed.reshape(n, -1)
    codes = jnp.pad(codes, ((0, 0), (0, -codes.shape[1] % 16)))
    dtype = jnp.dtype(x.dtype).name
    sizes = rows.shape[0], out, terms
    kernel = product(*sizes, fmt.bits, fmt.levels, dtype, tiles, transposed)
    found = kernel(codes, affine(weight, x.dtype), rows)
    if tiles.splits > 1:
        # One after the other, not as a reduction whose order is the compiler's.
        found = functools.reduce(jnp.add, list(found)).T.astype(x.dtype)
    return found[:m, :out].reshape(*x.shape[:-1], out)


def affine(weight: QTensor, dtype: DTypeLike) -> UInt32[Array, "blocks padded"]:
    """Scale (low half) and shift (high half) of every block, a column for each row of W.

    Columns are padded to a multiple of 4: TMA wants lines of a multiple of 16 bytes.
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
    """What the installed jax lacks."""
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


MOSAIC = Implementation("mosaic", refusal, matmul, matmul_transposed, was_faster("mosaic"))
