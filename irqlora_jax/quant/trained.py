"""What is trained of a quantized matrix: ApiQ's clip factors, or EfficientQAT's weights and scales.

Each method is a frozen dataclass of options. `start` makes the leaves that are trained or needed
for it, and `numbers` computes from them the weight, scale and shift (or zero point) of each block.
`round_matrix` rounds the weight with them, and `encode.encode_with` stores it.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float32

from irqlora_jax.quant import stats
from irqlora_jax.quant.calibrations.plain import block_ends
from irqlora_jax.quant.formats import get_format
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.quant.straight_through import (
    clipped_integers,
    clipped_levels,
    round_to_integers,
    round_to_levels,
    straight_through,
)
from irqlora_jax.sharding import PAIR
from irqlora_jax.text import require

Leaves = dict[str, Array]
Match = Literal["layer", "linear"]


class Numbers(NamedTuple):
    """What a matrix is rounded with.

    Attributes:
        weight: [out, in].
        scale: [out, blocks].
        place: the shift of each block (None: 0), or the zero point of integers, [out, blocks].
    """

    weight: Array
    scale: Array
    place: Array | None


def _cut(weight: Float32[Array, "out in"], size: int) -> Float32[Array, "out blocks size"]:
    """The blocks. Copies of the last weight fill the last block, which keeps its range."""
    filled = jnp.pad(weight, ((0, 0), (0, -weight.shape[1] % size)), mode="edge")
    return filled.reshape(weight.shape[0], -1, size)


def round_matrix(numbers: Numbers, like: QTensor) -> Float32[Array, "out in"]:
    """The values nearest to the weights, with straight-through gradients. `like` has the format,
    the size of the blocks, and the outliers, which nothing changes: their gradient is 0."""
    weight, scale, place = numbers
    fmt, blocks = get_format(like.format), _cut(weight, like.block_size)
    if fmt.integer:
        assert place is not None
        values = round_to_integers(blocks, scale, place, fmt)
    else:
        values = round_to_levels(blocks, scale, place, fmt)
    values = values.reshape(weight.shape[0], -1)[:, : weight.shape[1]]
    return values if like.outliers is None else like.outliers.put(values)


def _require_common(options: "ApiqOptions | BlockOptions", section: str) -> None:
    for name in ("epochs", "batch"):
        value = getattr(options, name)
        require(value >= 1, f"{section}.{name}", value, "a whole number of at least 1")
    accepted = ("layer", "linear")
    require(options.match in accepted, f"{section}.match", options.match, "layer or linear")
    for field in dataclasses.fields(options):
        if field.name.endswith(("_lr", "_decay")):
            value = getattr(options, field.name)
            accepted = "a finite number of at least 0"
            require(0 <= value < math.inf, f"{section}.{field.name}", value, accepted)


@dataclasses.dataclass(frozen=True)
class ApiqOptions:
    """Options of ApiQ (arXiv 2402.05147). Its released code has the same defaults.

    It trains the clip factors of every block, and the LoRA pairs. Weights stay as they are.
    """

    epochs: int = 20
    """Passes over the calibration rows, always in the same order."""
    batch: int = 1
    """Rows of a step. ApiQ uses 128 rows of 1,024 or 2,048 tokens."""
    match: Match = "layer"
    """Outputs that are compared with full precision. "layer": of the decoder layer (ApiQ-bw).
    "linear": of each linear layer, first q, k and v, then o, then gate and up, then down
    (ApiQ-lw)."""
    same_inputs: bool = False
    """Also compare with the full-precision outputs for the inputs that the quantized model has."""
    clip_lr: float = 5e-3
    """Learning rate of the clip factors."""
    clip_decay: float = 0.1
    """Weight decay of the clip factors."""
    pair_lr: float = 5e-4
    """Learning rate of the LoRA pairs; 0: not trained."""
    pair_decay: float = 0.1
    """Weight decay of the LoRA pairs."""
    clip_start: float = 4.0
    """Start of the clip factors, before the sigmoid: a range of 98 %."""

    def __post_init__(self) -> None:
        _require_common(self, "quant.apiq")
        ok = math.isfinite(self.clip_start)
        require(ok, "quant.apiq.clip_start", self.clip_start, "a finite number")

    @property
    def rates(self) -> dict[str, tuple[float, float]]:
        """Learning rate and weight decay by leaf. Other leaves are not trained."""
        clip, pair = (self.clip_lr, self.clip_decay), (self.pair_lr, self.pair_decay)
        return {"down": clip, "up": clip} | dict.fromkeys(PAIR, pair)

    def factor(self, progress: float) -> float:
        """The factor of the learning rates after this fraction of the steps."""
        return 1.0

    def start(self, weight: Float32[Array, "out in"], stored: QTensor) -> Leaves:
        """The leaves of a matrix. The scales and shifts of `stored` have no influence.

        A range of integers includes 0, because zero points are stored without a sign.
        """
        blocks = _cut(weight, stored.block_size)
        low, high = block_ends(blocks.reshape(-1, stored.block_size), None)
        if get_format(stored.format).integer:
            low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
        grid = blocks.shape[:2]
        factor = jnp.full(grid, self.clip_start, jnp.float32)
        ends = {"low": low.reshape(grid), "high": high.reshape(grid)}
        return {"weight": weight, **ends, "down": factor, "up": factor}

    def numbers(self, leaves: Leaves, stored: QTensor, symmetric: bool) -> Numbers:
        """Weight, and scale and shift or zero point from the clip factors."""
        fmt = get_format(stored.format)
        given = leaves["low"], leaves["high"], leaves["down"], leaves["up"]
        if fmt.integer:
            return Numbers(leaves["weight"], *clipped_integers(*given, fmt, symmetric))
        shifted = stored.shift_codes is not None
        return Numbers(leaves["weight"], *clipped_levels(*given, fmt, shifted))


@dataclasses.dataclass(frozen=True)
class BlockOptions:
    """Options of EfficientQAT's block training, Block-AP (arXiv 2407.11062).

    It trains weights, scales and shifts (integers: zero points), and here also LoRA pairs. Defaults
    are those of its released code, except for the pairs, which it does not have: theirs are ApiQ's.
    """

    epochs: int = 2
    """Passes over the calibration rows, always in the same order."""
    batch: int = 2
    """Rows of a step. EfficientQAT uses 4,096 rows of 2,048 tokens."""
    match: Match = "layer"
    """Outputs that are compared with full precision. "layer": of the decoder layer. "linear": of
    each linear layer, first q, k and v, then o, then gate and up, then down."""
    same_inputs: bool = False
    """Also compare with the full-precision outputs for the inputs that the quantized model has."""
    weight_lr: float = 1e-5
    """Learning rate of the weights; 0: not trained. The paper has 2e-5 for 2 bits."""
    scale_lr: float = 1e-4
    """Learning rate of scales and shifts (integers: zero points); 0: not trained."""
    pair_lr: float = 5e-4
    """Learning rate of the LoRA pairs; 0: not trained."""
    weight_decay: float = 0.0
    """Weight decay of weights, scales and shifts."""
    pair_decay: float = 0.1
    """Weight decay of the LoRA pairs."""
    last_factor: float = 0.05
    """The learning rates fall along a cosine to this fraction of themselves."""

    def __post_init__(self) -> None:
        _require_common(self, "quant.block")
        ok = 0 <= self.last_factor <= 1
        require(ok, "quant.block.last_factor", self.last_factor, "a number from 0 to 1")

    @property
    def rates(self) -> dict[str, tuple[float, float]]:
        """Learning rate and weight decay by leaf. Other leaves are not trained."""
        scale, pair = (self.scale_lr, self.weight_decay), (self.pair_lr, self.pair_decay)
        own = {"weight": (self.weight_lr, self.weight_decay)}
        return own | dict.fromkeys(("scale", "shift", "zero"), scale) | dict.fromkeys(PAIR, pair)

    def factor(self, progress: float) -> float:
        """The factor of the learning rates after this fraction of the steps."""
        return self.last_factor + (1 - self.last_factor) * (1 + math.cos(math.pi * progress)) / 2

    def start(self, weight: Float32[Array, "out in"], stored: QTensor) -> Leaves:
        """The leaves of a matrix. They start with the values of `stored`.

        A weight that would get another code than it has in `stored` (e.g. after error feedback)
        starts at its stored value.
        """
        fmt, scale = get_format(stored.format), stored.scale()
        leaves = {"scale": scale}
        if stored.shift_codes is not None and fmt.integer:
            leaves["zero"] = stats.decode_zero(stored.shift_codes, fmt.bits)
        elif stored.shift_codes is not None:
            leaves["shift"] = stored.shift()  # type: ignore[assignment]
        values = stored.dequantize()
        place = leaves.get("zero", leaves.get("shift"))
        error = jnp.abs(round_matrix(Numbers(weight, scale, place), stored) - values)
        # Two levels differ by far more than rounding errors, which are below 1e-5 of the scale.
        width = jnp.repeat(jnp.abs(scale), stored.block_size, axis=1)[:, : weight.shape[1]]
        same = error <= 1e-3 * width
        return leaves | {"weight": jnp.where(same, weight, values)}

    def numbers(self, leaves: Leaves, stored: QTensor, symmetric: bool) -> Numbers:
        """Weight, scale, and shift or zero point. A zero point is rounded as it is stored."""
        if "zero" not in leaves:
            return Numbers(leaves["weight"], leaves["scale"], leaves.get("shift"))
        bits, zero = get_format(stored.format).bits, leaves["zero"]
        codes = stats.encode_zero(jnp.clip(zero, 0, 255 / 2 ** (8 - bits)).ravel(), bits)
        zero = straight_through(zero, stats.decode_zero(codes, bits).reshape(zero.shape))
        smallest = jnp.finfo(jnp.float32).tiny
        scale = straight_through(leaves["scale"], jnp.maximum(leaves["scale"], smallest))
        return Numbers(leaves["weight"], scale, zero)
