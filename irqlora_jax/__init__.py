"""Finetune LLaMA models quantized to 2-4 bits with retained information (IR-QLoRA) in JAX.

base, config = hf.load_base(folder, QuantConfig(format="nf4", calibration="icq"))
model = Llama(config, adapter=AdapterConfig(method="iec", rank=64, alpha=16))
adapters = model.init_adapters(jax.random.key(0))
logits = model.apply({"params": adapters, "base": base}, tokens)
"""

from irqlora_jax import adapters, checkpoint, data, evaluate, generate, hf, quant, train
from irqlora_jax.config import AdapterConfig, Config, DataConfig, QuantConfig, TrainConfig
from irqlora_jax.llama import Llama, LlamaConfig
from irqlora_jax.quant.matmul import dequant_matmul
from irqlora_jax.quant.qtensor import QTensor, quantize

__all__ = [
    "AdapterConfig",
    "Config",
    "DataConfig",
    "Llama",
    "LlamaConfig",
    "QTensor",
    "QuantConfig",
    "TrainConfig",
    "adapters",
    "checkpoint",
    "data",
    "dequant_matmul",
    "evaluate",
    "generate",
    "hf",
    "quant",
    "quantize",
    "train",
]
