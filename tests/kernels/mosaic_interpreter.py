"""Runs Mosaic kernels on a CPU, in the interpreter of jax 0.12, more strictly than a GPU does."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

from irqlora_jax.kernels import matmul_mosaic_fragments
from irqlora_jax.quant import packing

HALVES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@contextlib.contextmanager
def interpreted(detect_races: bool = True) -> Iterator[None]:
    """Kernels that are traced in this context run on the CPU, with one thread for each warp group.

    Unwritten memory is NaN. A product is computed as late as allowed: when the kernel waits for it.
    Skips the test if jax has no such interpreter.

    Args:
        detect_races: whether a race between threads is an error.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("this jax cannot interpret ragged edges and transposed operands")
    kernel, wgmma, registers, flying = plgpu.kernel, plgpu.wgmma, [], []

    def in_python(body, *, scratch_types, num_threads, **options):
        def with_registers(*refs):
            registers.append(refs[-1])
            body(*refs[:-1])
            assert not flying

        _, _, inputs, *_ = scratch_types
        return kernel(
            with_registers,
            scratch_types=[*scratch_types, plgpu.SMEM((num_threads, 64, 64), inputs.dtype)],
            num_threads=num_threads,
            interpret=plgpu.InterpretGPUParams(
                detect_races=detect_races, uninitialized_memory="nan"
            ),
            **options,
        )

    def wait(left):
        while len(flying) > left:
            sums, weights, inputs = flying.pop(0)
            if isinstance(weights, jax.Array):
                # The interpreter does not take operands from registers.
                copy = registers[-1].at[lax.axis_index("group")]
                copy[...] = weights
                weights = copy
            wgmma(sums, weights, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plgpu, "kernel", in_python)
        patch.setattr(plgpu, "wgmma", lambda *operands: flying.append(operands))
        patch.setattr(plgpu, "wgmma_wait", wait)
        patch.setattr(matmul_mosaic_fragments, "permuted", looked_up)
        yield


def looked_up(levels, bits: int, dtype: str):
    """`matmul_mosaic_fragments.permuted`, with operations that the interpreter has."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def fragment(codes, scales):
        codes = packing.unpack(codes[...], bits, "fragments")
        both = scales[...]
        # The race detector needs this between reads and a copy that overwrites the same memory.
        plgpu.commit_smem()
        low, high = ((both >> shift).astype(jnp.uint16) for shift in (np.uint32(0), np.uint32(16)))
        scale, shift = (
            lax.bitcast_convert_type(one, jnp.dtype(dtype)).astype(jnp.float32)
            for one in (low, high)
        )
        found = jnp.zeros(codes.shape, jnp.float32)
        for i, level in enumerate(np.asarray(levels, HALVES[dtype]).astype(np.float32)):
            found = jnp.where(codes == i, level, found)
        return (found * scale[:, None] + shift[:, None]).astype(dtype)

    return fragment
