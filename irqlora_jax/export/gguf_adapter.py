"""Writes an adapter as a GGUF file for llama.cpp, which computes plain LoRA pairs.

Source: convert_lora_to_gguf.py of llama.cpp.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from irqlora_jax.adapters.scales import split
from irqlora_jax.export.gguf import architecture_fields, gguf_name, row_order
from irqlora_jax.export.peft import folded
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import LAYERS, Tree, linear_path


def save_gguf_adapter(file: Path, model: Llama, adapters: Tree) -> None:
    """Writes the folded pairs of all layers in float32.

    Args:
        file: path of the file.
        model: the model of the adapter.
        adapters: its parameters. Trained scales are left out: they belong to the base.

    Raises:
        ValueError: no LoRA pair computes the update.
    """
    import gguf

    adapter, config = model.adapter, model.config
    if adapter is None or adapter.chosen.fold is None:
        title = "None" if adapter is None else adapter.chosen.title
        raise ValueError(f"no LoRA pair computes the update of {title}")
    writer = gguf.GGUFWriter(file, architecture_fields(config)["general.architecture"])
    try:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        # llama.cpp multiplies with alpha / rank of each pair, so the pairs are scaled to this.
        writer.add_float32("adapter.lora.alpha", float(adapter.rank))
        for name in adapter.targets:
            path, shape = linear_path(name), config.linear_shapes[name]
            _, own = split(adapters[LAYERS][path[0]][path[1]])
            order = row_order(config, path, shape[0])
            for layer in range(config.num_hidden_layers):
                pair = jax.tree.map(np.asarray, folded(own, jnp.int32(layer), adapter, shape))
                a, b = pair["lora_A"], pair["lora_B"]
                factor = np.float32(adapter.scale * len(a) / adapter.rank)
                stem = gguf_name(path, layer)
                writer.add_tensor(f"{stem}.lora_a", np.ascontiguousarray(a))
                writer.add_tensor(f"{stem}.lora_b", np.ascontiguousarray((b * factor)[order]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
