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
        from_weight: (parameters, frozen weight, scale) -> the parameters with the leaves whose
            start depends on the weight. None: `init` gives all of them.
        apply: (parameters, x [*batch, in], dropped, scale, weight) -> the update of the output
            [*batch, out]. `dropped` is x after dropout, or x itself without dropout.
            `weight` is the frozen weight, a QTensor or a float array [out, in].
        gain: (parameters, weight, scale) -> a factor [out] of the output, the update included, and
            so of the rows of the merged weight; None: no factor.
        files: name of every leaf in a PEFT file, after the name of the layer. If a file has only
            lora_A and lora_B, the other leaves keep their values from `init`.
        fold: (parameters, (out, in)) -> the pair {"lora_A": [r, in], "lora_B": [out, r]} with
            exactly the same update, of any rank r; None if there is no such pair.
        rank: parameters -> how many components of the pair of `fold`, from the first one on, can be
            other than 0, if the parameters decide that. Exported pairs have only these. None: all.
        delta: (parameters, (out, in)) -> the update of the weight [out, in] at scale 1; None: from
            `reduced` or `fold`. A method needs at least one of the three.
        reduced: (parameters, (out, in)) -> the update [out, in / k] at scale 1, for a method whose
            update is the same for each k consecutive inputs. Then `absorb.py` can put it into the
            shifts of a quantized weight.
        factor: (options, (out, in)) -> factor of the update besides `adapter.scale`.
        prepare: (parameters, key, progress, options) -> the LoRA pair that a training step uses in
            their place, such as a pair with random gates. `key` is of the step and the layer,
            `progress` the share of the steps that are done. It runs once a step, before the layers,
            and the gradient passes through it. Evaluation uses `apply`.
        penalty: (parameters, options) -> what one layer adds to the loss.
        pack: parameters -> smaller arrays, under the same names, that an adapter of our own stores
            in their place (float or uint8). None: the parameters themselves.
        unpack: (packed arrays, parameters from `init`) -> parameters with the same `fold`.
        learned: parameters -> numbers by name that the report shows for each layer.
        peft: AdapterConfig -> the fields of PEFT's adapter_config.json for a file with the leaves
            of the method; None if PEFT does not know them.
        file_factor: (options, (out, in)) -> factor of lora_B in such a file, if PEFT scales the
            update differently. Files of the authors' code, without these fields, are read as they
            are. None: there are no such files, and the factor is 1.
        has_pair: the update starts from a LoRA pair lora_A [rank, in] and lora_B [out, rank] among
            the parameters, so an `Initialization` can fit the pair.
        scalings: accepted values of `adapter.scaling`.
        frozen: options -> the leaves that get no gradient.
        splits: how a mesh splits each leaf (default: LoRA's pair). "out" or "in" for a dimension
            that follows the outputs or inputs of the layer, None for one that is not split. Leaves
            without an entry are copied to every device.
        faster: leaves that learn with the larger learning rate of LoRA+ (`train.lora_plus_ratio`).
        options: default options, a frozen dataclass; None for a method without options. A method
            with options needs a field with its name in `AdapterConfig`.
    """

    name: str
    title: str
    description: str
    init: Callable[[PRNGKeyArray, Shape, int, Any, DTypeLike], Params]
    apply: Callable[[Params, Array, Array, float, Any], Array]
    files: Mapping[str, str]
    from_weight: Callable[[Params, Any, Any], Params] | None = None
    gain: Callable[[Params, Any, Any], Array] | None = None
    fold: Callable[[Params, Shape], Params] | None = None
    rank: Callable[[Params], Array] | None = None
    delta: Callable[[Params, Shape], Array] | None = None
    reduced: Callable[[Params, Shape], Array] | None = None
    factor: Callable[[Any, Shape], float] = lambda options, shape: 1.0
    peft: Callable[[Any], Mapping[str, Any]] | None = None
    file_factor: Callable[[Any, Shape], float] | None = None
    has_pair: bool = True
    scalings: tuple[str, ...] = ("rank", "sqrt_rank")
    prepare: Callable[[Params, PRNGKeyArray, Array, Any], Params] | None = None
    penalty: Callable[[Params, Any], Array] | None = None
    pack: Callable[[Params], Params] | None = None
    unpack: Callable[[Params, Params], Params] | None = None
    learned: Callable[[Params], Params] | None = None
    frozen: Callable[[Any], tuple[str, ...]] = lambda options: ()
    splits: Splits = dataclasses.field(default_factory=lambda: PAIR)
    faster: tuple[str, ...] = ("lora_B",)
    options: Any = None

    def __post_init__(self) -> None:
        if self.fold is None and self.delta is None and self.reduced is None:
            raise ValueError(f"adapter {self.name!r}: needs fold, delta or reduced, has none")
        if (self.pack is None) != (self.unpack is None):
            raise ValueError(f"adapter {self.name!r}: needs both pack and unpack, or neither")

    def weight_update(self, params: Params, shape: Shape) -> Float32[Array, "out in"]:
        """The update of the weight at scale 1, computed in float32."""
        wide = {name: value.astype(jnp.float32) for name, value in params.items()}
        if self.delta is not None:
            return self.delta(wide, shape)
        if self.reduced is not None:
            update = self.reduced(wide, shape)
            return jnp.repeat(update, shape[1] // update.shape[1], axis=1)
        assert self.fold is not None
        pair = self.fold(wide, shape)
        # Accelerators would otherwise multiply float32 with reduced precision.
        return jnp.matmul(pair["lora_B"], pair["lora_A"], precision="highest")

    def merged(
        self, params: Params, weight: Float32[Array, "out in"], scale: Float32[Array, ""]
    ) -> Float32[Array, "out in"]:
        """The weight with the update inside, computed in float32."""
        rows, columns = weight.shape
        new = weight + scale * self.weight_update(params, (rows, columns))
        return new if self.gain is None else new * self.gain(params, weight, scale)[:, None]


@dataclasses.dataclass(frozen=True)
class Initialization:
    """How the parameters are initialized.

    Attributes:
        name: value of `adapter.init`.
        title: short name for tables; "" for the method's own `init`.
        fit: (weight [out, in], QuantConfig, rank, scale, options, key, dtype, gram=, damping=, and
            fisher= if it needs that) -> the quantized weight, lora_A and lora_B, fitted to the
            weight together. `gram` is X^T X [in, in] of inputs of the layer or `InputMoments`, or
            None if neither the initialization nor the quantizer needs it; `damping` is its
            damping. A fitted base belongs to one run. None: uses the method's own `init`, and the
            quantizer alone.
        options: default options; None for an initialization without options.
        needs: options -> "inputs" if `fit` needs `gram`; "fisher" if it needs `fisher`, the sum of
            the squared gradients [out, in] of the rows of a text.
        trained: the pair of `fit` is only a start, which `quant.training` has to train.
    """

    name: str
    title: str
    fit: Callable[..., tuple[Any, Float[Array, "rank in"], Float[Array, "out rank"]]] | None = None
    options: Any = None
    needs: Callable[[Any], Literal["nothing", "inputs", "fisher"]] = lambda options: "nothing"
    trained: bool = False


LEARNED = "learned/"
"""Metrics with what a method learned begin with it: learned/QUANTITY/PROJECTION/LAYER."""
DEFAULT = Initialization("default", "")
