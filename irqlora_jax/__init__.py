"""Finetune LLaMA models quantized to 2-4 bits with retained information (IR-QLoRA) in JAX.

base, config = hf.load_base(folder, QuantConfig(format="nf4", calibration="icq"))
model = Llama(config, adapter=AdapterConfig(method="iec", rank=64, alpha=16))
adapters = model.init_adapters(jax.random.key(0))
logits = model.apply({"params": adapters, "base": base}, tokens)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from irqlora_jax import adapters, data, evaluate, generate, hf, quant, train
    from irqlora_jax.adapters.config import AdapterConfig
    from irqlora_jax.config import Config, TrainConfig
    from irqlora_jax.data.calibrate import CalibrateConfig, CalibrationRows
    from irqlora_jax.data.config import DataConfig, DataSource
    from irqlora_jax.model.config import LlamaConfig
    from irqlora_jax.model.llama import Llama
    from irqlora_jax.quant.config import QuantConfig
    from irqlora_jax.quant.encode import quantize
    from irqlora_jax.quant.matmul import dequant_matmul
    from irqlora_jax.quant.qtensor import QTensor

# Imported at first use, so that `irqlora --help` need not wait for jax.
_MODULES = ("adapters", "data", "evaluate", "generate", "hf", "quant", "train")
_NAMES = {
    "AdapterConfig": "adapters.config",
    "CalibrateConfig": "data.calibrate",
    "CalibrationRows": "data.calibrate",
    "Config": "config",
    "DataConfig": "data.config",
    "DataSource": "data.config",
    "Llama": "model.llama",
    "LlamaConfig": "model.config",
    "QTensor": "quant.qtensor",
    "QuantConfig": "quant.config",
    "TrainConfig": "config",
    "dequant_matmul": "quant.matmul",
    "quantize": "quant.encode",
}

__all__ = [
    "AdapterConfig",
    "CalibrateConfig",
    "CalibrationRows",
    "Config",
    "DataConfig",
    "DataSource",
    "Llama",
    "LlamaConfig",
    "QTensor",
    "QuantConfig",
    "TrainConfig",
    "adapters",
    "data",
    "dequant_matmul",
    "evaluate",
    "generate",
    "hf",
    "quant",
    "quantize",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("irqlora-jax")
        except PackageNotFoundError:
            return "unknown (not installed)"
    if name in _MODULES:
        return importlib.import_module(f"irqlora_jax.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"irqlora_jax.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'irqlora_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
