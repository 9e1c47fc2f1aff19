"""Names, shapes and stacking of the weights of a model: in our trees and in Hugging Face files.

A base holds its layers in stacks: arrays with a leading axis over consecutive layers that are
stored alike. One stack of all layers is called "layers". Where layers differ in format, the stacks
are called "layers_FIRST", FIRST being the first layer of the stack:

    {"layers_0": ..., "layers_1": ..., "layers_29": ..., "embed_tokens": ..., "norm": ...}

Adapters of all layers always form one stack "layers".
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from irqlora_jax.model.config import ATTENTION_NAMES as ATTENTION_NAMES
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.sharding import LINEAR_NAMES

Tree = dict[str, Any]
Keys = tuple[str, ...]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYERS, BIAS = "layers", "bias"


def linear_path(name: str) -> Keys:
    """Path of a linear layer in a decoder layer.

    Examples:
        >>> linear_path("q_proj"), linear_path("up_proj")
        (('self_attn', 'q_proj'), ('mlp', 'up_proj'))
    """
    return "self_attn" if name in ATTENTION_NAMES else "mlp", name


def matrix_name(path: Keys, layer: int) -> str:
    """Name of a matrix for `quant.rules`.

    Examples:
        >>> matrix_name(("self_attn", "q_proj"), 3)
        'layers.3.self_attn.q_proj'
    """
    return ".".join((LAYERS, str(layer), *path))


def leaf_path(path: Keys) -> Keys:
    """Where the array of a path of `weight_shapes` is. A bias is beside the weight.

    Examples:
        >>> leaf_path(("norm",)), leaf_path(("self_attn", "q_proj", "bias"))
        (('norm', 'weight'), ('self_attn', 'q_proj', 'bias'))
    """
    return path if path[-1] == BIAS else (*path, "weight")


def weight_name(path: Keys, layer: int | None = None) -> str:
    """Name of a weight in a Hugging Face file.

    Examples:
        >>> weight_name(("self_attn", "q_proj"), 3), weight_name(("lm_head",))
        ('model.layers.3.self_attn.q_proj.weight', 'lm_head.weight')
    """
    prefix = "" if path == ("lm_head",) else "model."
    middle = "" if layer is None else f"layers.{layer}."
    return f"{prefix}{middle}{'.'.join(leaf_path(path))}"


def adapter_name(path: Keys, layer: int, part: str) -> str:
    """Name of a part of an adapter in a PEFT file; `part` is a value of `Method.files`.

    Examples:
        >>> adapter_name(("mlp", "up_proj"), 0, "lora_A.weight")
        'base_model.model.model.layers.0.mlp.up_proj.lora_A.weight'
    """
    return f"base_model.model.model.layers.{layer}.{'.'.join(path)}.{part}"


def weight_shapes(config: LlamaConfig) -> tuple[dict[Keys, tuple[int, ...]], dict[Keys, tuple]]:
    """Shapes of the weights of a layer, and of the weights outside the layers.

    The key is the path of a linear layer or norm, or that of a bias, which ends with "bias".
    """
    norm, table = (config.hidden_size,), (config.vocab_size, config.hidden_size)
    layered: dict[Keys, tuple[int, ...]] = {}
    for name in LINEAR_NAMES:
        layered[linear_path(name)] = config.linear_shapes[name]
        if name in config.biased:
            layered[*linear_path(name), BIAS] = config.linear_shapes[name][:1]
    layered |= {("input_layernorm",): norm, ("post_attention_layernorm",): norm}
    if config.family.head_norms:
        layered |= {("self_attn", name): (config.head_dim,) for name in ("q_norm", "k_norm")}
    single = {("embed_tokens",): table, ("norm",): norm}
    if not config.tie_word_embeddings:
        single[("lm_head",)] = table
    return layered, single


def stack_names(kinds: Sequence[Any]) -> dict[str, range]:
    """The stacks of layers, by name: runs of consecutive layers of the same kind.

    Args:
        kinds: one value per layer; layers with equal values are stored alike.

    Examples:
        >>> stack_names(["nf3", "nf3"])
        {'layers': range(0, 2)}
        >>> stack_names(["nf4", "nf3", "nf3", "nf4"])
        {'layers_0': range(0, 1), 'layers_1': range(1, 3), 'layers_3': range(3, 4)}
    """
    depth = len(kinds)
    starts = [i for i in range(depth) if i == 0 or kinds[i] != kinds[i - 1]]
    if len(starts) == 1:
        return {LAYERS: range(depth)}
    ends = [*starts[1:], depth]
    return {f"{LAYERS}_{i}": range(i, end) for i, end in zip(starts, ends, strict=True)}


def stacks(base: Mapping[str, Any], depth: int) -> dict[str, range]:
    """The stacks of a base by name, and the layers of each.

    Args:
        base: the tree; if it has no layers yet, the result is a single stack.
        depth: number of layers.
    """
    prefix = f"{LAYERS}_"
    starts = sorted(int(name.removeprefix(prefix)) for name in base if name.startswith(prefix))
    if not starts:
        return {LAYERS: range(depth)}
    ends = [*starts[1:], depth]
    return {f"{prefix}{i}": range(i, end) for i, end in zip(starts, ends, strict=True)}


def linear_stacks(base: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Name of the projection, and stacked weight, of every linear layer of a base."""
    for name, stack in base.items():
        if name.partition("_")[0] == LAYERS:
            yield from linear_weights(stack).items()


def find_stack(base: Mapping[str, Any], layer: int, depth: int) -> tuple[Any, int]:
    """The stack that holds a layer, and the index of the layer in it."""
    for name, layers in stacks(base, depth).items():
        if layer in layers:
            return base[name], layer - layers.start
    raise IndexError(f"layer {layer} of {depth}")


def by_layer(base: Mapping[str, Any], depth: int) -> Tree:
    """A base with a stack for every layer: copies of the layers, which stay stacked in `base`."""
    tree = {name: part for name, part in base.items() if name.partition("_")[0] != LAYERS}
    for name, (layer,) in stack_names(range(depth)).items():
        stack, index = find_stack(base, layer, depth)
        tree[name] = jax.tree.map(lambda x, of=index: x[of : of + 1], stack)
    return tree


def linear_weights(layer: Mapping[str, Any]) -> Tree:
    """The weights of the linear layers of a decoder layer, or of a stack of them, by projection."""
    groups = (layer[group] for group in ("self_attn", "mlp"))
    named = (item for part in groups for item in part.items())
    return {name: linear["weight"] for name, linear in named if name in LINEAR_NAMES}


def others(part: Mapping[str, Any]) -> Tree:
    """What a group of a layer has besides the matrices of its linear layers: biases and norms."""
    found: Tree = {}
    for name, leaves in part.items():
        matrix = "weight" if name in LINEAR_NAMES else ""
        if rest := {leaf: x for leaf, x in leaves.items() if leaf != matrix}:
            found[name] = rest
    return found


def insert(tree: Tree, path: Keys, value: Any) -> None:
    """Puts a value into nested dictionaries, and creates those that are missing."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value
