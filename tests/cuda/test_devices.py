"""XLA can compile for every device of the table."""

import jax
import jax.numpy as jnp
import pytest

from irqlora_jax.plan.gpus import DEVICES, OPTIONS, compile_only_devices


@pytest.mark.parametrize("name", DEVICES)
def test_every_known_device_can_be_compiled_for(name: str) -> None:
    devices = compile_only_devices(DEVICES[name], 2)
    if devices is None:
        pytest.skip("needs jax-cuda13-plugin and jax-cuda13-pjrt")
    assert len(devices) == 2 and devices[0].device_kind == DEVICES[name].title
    where = jax.sharding.SingleDeviceSharding(devices[0])
    x = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16, sharding=where)
    program = (
        jax.jit(lambda x: jnp.tanh(x @ x.T)).trace(x).lower().compile(compiler_options=OPTIONS)
    )
    memory = program.memory_analysis()
    assert memory.argument_size_in_bytes == 64 * 256 * 2
    assert memory.output_size_in_bytes == 64 * 64 * 2
