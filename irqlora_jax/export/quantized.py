"""Writes a run as a quantized base with the trained update inside (`adapters/absorb.py`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from irqlora_jax.adapters.absorb import absorb
from irqlora_jax.base.file import Base, read_base_config, read_calibrate, save_base
from irqlora_jax.base.updates import changed_base
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import Tree, linear_stacks
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.runs.folder import BASE_FILE, SURVEY_FILE
from irqlora_jax.runs.load import Run
from irqlora_jax.runs.quantize import save_tokenizer
from irqlora_jax.runs.recorded import check_recorded, write_recorded


def absorbed_base(model: Llama, variables: Mapping[str, Tree], dtype: str) -> Base:
    """The base with the trained update of every target inside. The codes do not change.

    Args:
        model: with an adapter.
        variables: {"params": adapters, "base": base}.
        dtype: type of the stored updates, float32 or float16.

    Raises:
        ValueError: an update cannot be absorbed; the layer is named.
    """
    adapter = model.adapter
    assert adapter is not None

    def change(params: Any, weight: Any) -> QTensor:
        return absorb(adapter, params, weight, jnp.dtype(dtype))

    return changed_base(model, variables, change)


def save_quantized(folder: Path, run: Run, dtype: str) -> None:
    """Writes base.safetensors, quantization.json and tokenizer/, as `irqlora quantize` does.

    Args:
        folder: existing folder to write to.
        run: a run with an adapter.
        dtype: type of the stored updates, float32 or float16.

    Raises:
        ValueError: as for `absorbed_base`, or an update is out of the range of `dtype`.
    """
    try:
        base = absorbed_base(run.model, run.variables, dtype)
    except ValueError as error:
        raise ValueError(f"kind = 'quantized': {error}") from error
    for target, weight in linear_stacks(base):
        updates = getattr(weight, "scale_update", None), getattr(weight, "shift_update", None)
        if not all(u is None or bool(jnp.isfinite(u).all()) for u in updates):
            raise ValueError(f"dtype = {dtype!r}: {target} is out of its range; expected float32")
    source = run.folder / BASE_FILE
    quant, calibrate = read_base_config(source)[1], read_calibrate(source)
    save_tokenizer(run.tokenizer, run.folder, folder)
    check_recorded(run.folder, SURVEY_FILE)
    if (run.folder / SURVEY_FILE).is_file():
        text = (run.folder / SURVEY_FILE).read_text(encoding="utf-8")
        write_recorded(folder, SURVEY_FILE, text)
    file, config = folder / BASE_FILE, run.model.config
    save_base(file, base, config, quant, run.source, calibrate=calibrate)
