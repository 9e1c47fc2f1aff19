"""Checks whether a mesh can split a base."""

from jax.sharding import Mesh

from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.tree import linear_path, matrix_name
from irqlora_jax.quant.config import KEPT, QuantConfig
from irqlora_jax.sharding import SPLIT_INPUTS


def check_mesh(mesh: Mesh, llama: LlamaConfig, quant: QuantConfig) -> None:
    """Checks that a mesh can split all packed layers evenly.

    Args:
        mesh: from `make_mesh`.
        llama: the architecture.
        quant: how the linear layers are stored.

    Raises:
        ValueError: an axis cannot split a layer. The message names both and the accepted sizes.
    """
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]

    def check(axes: str, parts: int, count: int, what: str) -> None:
        if count % parts:
            would = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0 and n <= 64)
            raise ValueError(
                f"{axes} = {parts} cannot split the {count} {what}: expected one of {would}"
            )

    check("mesh.tensor", tensor, llama.num_attention_heads, "attention heads")
    check("mesh.tensor", tensor, llama.num_key_value_heads, "key-value heads")
    for name, (out_features, in_features) in llama.linear_shapes.items():
        if name not in SPLIT_INPUTS:
            axes = "mesh.tensor x mesh.fsdp"
            check(axes, tensor * fsdp, out_features, f"outputs of {name}")
            continue
        check("mesh.fsdp", fsdp, out_features, f"outputs of {name}")
        for size in sorted(_block_sizes(llama, quant, name)):
            if tensor > 1 and in_features % size:
                raise ValueError(
                    f"mesh.tensor = {tensor} cannot split the {in_features} inputs of {name} into "
                    f"whole blocks of {size}: expected 1, or a quant.block_size that divides "
                    "them"
                )
            blocks = -(-in_features // size)
            check("mesh.tensor", tensor, blocks, f"blocks of {size} inputs of {name}")


def _block_sizes(llama: LlamaConfig, quant: QuantConfig, name: str) -> set[int]:
    """Block sizes of a projection over all layers; 1 for layers where it is not quantized."""
    path, layers = linear_path(name), range(llama.num_hidden_layers)
    configs = (quant.for_matrix(matrix_name(path, layer)) for layer in layers)
    return {1 if config.format == KEPT else config.block_size for config in configs}
