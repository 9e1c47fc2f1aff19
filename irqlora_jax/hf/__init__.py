"""Hugging Face files in and out."""

from irqlora_jax.hf.adapter import load_adapter as load_adapter
from irqlora_jax.hf.adapter import save_adapter as save_adapter
from irqlora_jax.hf.export import ExportConfig as ExportConfig
from irqlora_jax.hf.export import export as export
from irqlora_jax.hf.export import export_adapter as export_adapter
from irqlora_jax.hf.export import export_dequantized as export_dequantized
from irqlora_jax.hf.export import export_merged as export_merged
from irqlora_jax.hf.names import ADAPTER_LEAVES as ADAPTER_LEAVES
from irqlora_jax.hf.names import adapter_name as adapter_name
from irqlora_jax.hf.names import linear_path as linear_path
from irqlora_jax.hf.names import weight_name as weight_name
from irqlora_jax.hf.read import load_base as load_base
from irqlora_jax.hf.read import load_tokenizer as load_tokenizer
from irqlora_jax.hf.read import read_config as read_config
from irqlora_jax.hf.read import snapshot as snapshot
from irqlora_jax.hf.write import save_model as save_model
