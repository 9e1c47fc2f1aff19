"""A whole training step as a function of shapes alone, to look at what the compiler makes of it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.config import TrainConfig
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantized_shape
from irqlora_jax.quant.matmul import MatmulName, preferred_layout
from irqlora_jax.runs.state import init_state, make_optimizer
from irqlora_jax.train.step import train_step
from tests.models import tiny_llama

LAYERS = 3
# No two arrays of the step have as many numbers as the weights of all layers.
LLAMA = tiny_llama(
    vocab_size=320,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=LAYERS,
    head_dim=64,
)
SHAPES = tuple(LLAMA.linear_shapes.values())


def step_and_shapes(
    dtype: str,
    llama: LlamaConfig = LLAMA,
    rows: int = 2,
    length: int = 72,
    chunk: int = 1024,
    matmul: MatmulName | None = None,
) -> tuple[Callable[..., Any], Any, Any, Any]:
    """`train_step` of an NF4 model with ICQ and IEC, and the shapes of state, base and batch.

    Embeddings and output matrix are of the type that is computed in, as files have them; codes lie
    as `matmul` takes them.
    """
    settings = TrainConfig(batch_size=rows, compute_dtype=dtype, loss_chunk=chunk)  # type: ignore[arg-type]
    adapter = AdapterConfig(rank=8)
    model = Llama(llama, adapter=adapter, compute_dtype=dtype, remat=True, matmul=matmul)
    optimizer = make_optimizer(settings)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    shapes = jax.eval_shape(Llama(llama).init, jax.random.key(0), tokens)["base"]
    base: Any = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    for group in ("self_attn", "mlp"):
        for name, leaf in base["layers"][group].items():
            weight = quantized_shape(llama.linear_shapes[name], QuantConfig())
            stacked = lambda x: jax.ShapeDtypeStruct(  # noqa: E731
                (llama.num_hidden_layers, *x.shape), x.dtype
            )
            weight = dataclasses.replace(weight, layout=preferred_layout(matmul))
            leaf["weight"] = jax.tree.map(stacked, weight)
    state = jax.eval_shape(lambda: init_state(model, optimizer, 0))
    step = functools.partial(train_step, model=model, optimizer=optimizer, config=settings)
    batch = {"tokens": tokens, "targets": jax.ShapeDtypeStruct((rows, length), bool)}
    return step, state, base, batch
