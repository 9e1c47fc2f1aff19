"""Whether a mesh can split a base."""

from jax.sharding import Mesh

from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.sharding import LINEAR_NAMES, SPLIT_INPUTS


def check_mesh(mesh: Mesh, llama: LlamaConfig, block_size: int | None) -> None:
    """Refuses a mesh that cannot split a packed layer evenly.

    Args:
        mesh: of `make_mesh`.
        llama: the architecture.
        block_size: weights in a block; None for a base that is not quantized.

    Raises:
        ValueError: which axis cannot split which layer, and what could.
    """
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    size = block_size or 1

    def check(axes: str, parts: int, count: int, what: str) -> None:
        if count % parts:
            would = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0 and n <= 64)
            raise ValueError(
                f"{axes} = {parts} cannot split the {count} {what}: accepted is one of {would}"
            )

    check("mesh.tensor", tensor, llama.num_attention_heads, "attention heads")
    check("mesh.tensor", tensor, llama.num_key_value_heads, "key-value heads")
    for name in LINEAR_NAMES:
        out_features, in_features = llama.linear_shapes[name]
        if name in SPLIT_INPUTS:
            check("mesh.fsdp", fsdp, out_features, f"outputs of {name}")
            blocks = -(-in_features // size)
            if tensor > 1 and in_features % size:
                raise ValueError(
                    f"mesh.tensor = {tensor} cannot split the {in_features} inputs of {name} into "
                    f"whole blocks of {size}: accepted is 1, or a quant.block_size that divides "
                    "them"
                )
            check("mesh.tensor", tensor, blocks, f"blocks of {size} inputs of {name}")
        else:
            axes = "mesh.tensor x mesh.fsdp"
            check(axes, tensor * fsdp, out_features, f"outputs of {name}")
