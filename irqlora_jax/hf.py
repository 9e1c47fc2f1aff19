"""Hugging Face files in and out: the public names. Nothing inside the package imports this file."""

from irqlora_jax.base.make import load_base as load_base
from irqlora_jax.base.make import load_fitted as load_fitted
from irqlora_jax.base.make import load_loftq as load_loftq
from irqlora_jax.data.calibrate import read_calibration as read_calibration
from irqlora_jax.export.folder import ExportConfig as ExportConfig
from irqlora_jax.export.folder import export as export
from irqlora_jax.export.folder import export_adapter as export_adapter
from irqlora_jax.export.folder import export_dequantized as export_dequantized
from irqlora_jax.export.folder import export_merged as export_merged
from irqlora_jax.export.model import save_model as save_model
from irqlora_jax.export.peft import load_adapter as load_adapter
from irqlora_jax.export.peft import save_adapter as save_adapter
from irqlora_jax.files.hub import load_tokenizer as load_tokenizer
from irqlora_jax.files.hub import read_config as read_config
from irqlora_jax.files.hub import read_values as read_values
from irqlora_jax.files.hub import snapshot as snapshot
from irqlora_jax.model.tree import adapter_name as adapter_name
from irqlora_jax.model.tree import linear_path as linear_path
from irqlora_jax.model.tree import weight_name as weight_name
