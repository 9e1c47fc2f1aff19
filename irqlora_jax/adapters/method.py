"""The contract of an adapter: how a linear layer is updated, trained, stored and merged.

An adapter is one file that defines a `Method`, plus one entry in `METHODS`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from irqlora_jax.sharding import PAIR, Splits

Params = dict[str, Array]
"""The trained arrays of one linear layer, by leaf name."""
Shape = tuple[int, int]
"""(out, in) of a linear layer."""


@dataclasses.dataclass(frozen=True)
class Method:
    """Everything that the rest of the package knows about an adapter.

    Attributes:
        name: value of `adapter.method`.
        title: short name for tables, such as "LoRA".
        description: the name for use in a sentence of a model card, with an article.
        init: (key, (out, in), rank, options, dtype) -> parameters whose update is 0.
        apply: (parameters, x [*batch, in], dropped, scale, weight) -> the update of the output
            [*batch, out]. `dropped` is x after dropout, or x itself without dropout.
            `weight` is the frozen weight, a QTensor or a float array [out, in].
        files: name of every leaf in a PEFT file, after the name of the layer. If a file has only
            lora_A and lora_B, the other leaves keep their values from `init`.
        fold: parameters -> the pair {"lora_A": [rank, in], "lora_B": [out, rank]} with exactly the
            same update; None if there is no such pair.
        delta: (parameters, (out, in)) -> the update of the weight [out, in] at scale 1; None:
            lora_B lora_A of `fold`. Required for a method without `fold`.
        prepare: (parameters, key, progress, options) -> the LoRA pair that a training step uses in
            their place, such as a pair with random gates. `key` is of the step and the layer,
            `progress` the share of the steps that are done. It runs once a step, before the layers,
            and the gradient passes through it. Evaluation uses `apply`.
        penalty: (parameters, options) -> what one layer adds to the loss.
        pack: parameters -> smaller arrays, under the same names, that an adapter of our own stores
            in their place (float or uint8). None: the parameters themselves.
        unpack: (packed arrays, parameters from `init`) -> parameters with the same `fold`.
        learned: parameters -> numbers by name that the report shows for each layer.
        frozen: options -> the leaves that get no gradient.
        splits: how a mesh splits each leaf (default: LoRA's pair). "out" or "in" for a dimension
            that follows the outputs or inputs of the layer, None for one that is not split. Leaves
            without an entry are copied to every device.
        options: default options, a frozen dataclass; None for a method without options. A method
            with options needs a field with its name in `AdapterConfig`.
    """

    name: str
    title: str
    description: str
    init: Callable[[PRNGKeyArray, Shape, int, Any, DTypeLike], Params]
    apply: Callable[[Params, Array, Array, float, Any], Array]
    files: Mapping[str, str]
    fold: Callable[[Params], Params] | None = None
    delta: Callable[[Params, Shape], Array] | None = None
    prepare: Callable[[Params, PRNGKeyArray, Array, Any], Params] | None = None
    penalty: Callable[[Params, Any], Array] | None = None
    pack: Callable[[Params], Params] | None = None
    unpack: Callable[[Params, Params], Params] | None = None
    learned: Callable[[Params], Params] | None = None
    frozen: Callable[[Any], tuple[str, ...]] = lambda options: ()
    splits: Splits = dataclasses.field(default_factory=lambda: PAIR)
    options: Any = None

    def __post_init__(self) -> None:
        if self.fold is None and self.delta is None:
            raise ValueError(f"adapter {self.name!r}: needs fold or delta, has neither")
        if (self.pack is None) != (self.unpack is None):
            raise ValueError(f"adapter {self.name!r}: needs both pack and unpack, or neither")

    def weight_update(self, params: Params, shape: Shape) -> Float32[Array, "out in"]:
        """The update of the weight at scale 1, computed in float32."""
        wide = {name: value.astype(jnp.float32) for name, value in params.items()}
        if self.delta is not None:
            return self.delta(wide, shape)
        assert self.fold is not None
        pair = self.fold(wide)
        # Accelerators would otherwise multiply float32 with reduced precision.
        return jnp.matmul(pair["lora_B"], pair["lora_A"], precision="highest")


@dataclasses.dataclass(frozen=True)
class Initialization:
    """How the parameters are initialized.

    Attributes:
        name: value of `adapter.init`.
        title: short name for tables; "" for the method's own `init`.
        fit: (weight [out, in], QuantConfig, rank, scale, options, key, dtype, gram=, damping=) ->
            the quantized weight, lora_A and lora_B, fitted to the weight together. `gram` is
            X^T X [in, in] of inputs of the layer, or None if neither the initialization nor the
            quantizer needs it; `damping` is its damping. A fitted base belongs to one run. None:
            uses the method's own `init`, and the quantizer alone.
        options: default options; None for an initialization without options.
        needs: "inputs" if `fit` needs `gram`.
    """

    name: str
    title: str
    fit: Callable[..., tuple[Any, Float[Array, "rank in"], Float[Array, "out rank"]]] | None = None
    options: Any = None
    needs: Literal["nothing", "inputs"] = "nothing"


DEFAULT = Initialization("default", "")
