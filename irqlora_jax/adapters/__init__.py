"""Adapters: one file a method, each with init, apply and fold (see `lora.py`)."""

from types import ModuleType

from irqlora_jax.adapters import iec, lora

METHODS: dict[str, ModuleType] = {"lora": lora, "iec": iec}
