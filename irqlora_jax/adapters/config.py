"""Configuration of the adapter."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal

from irqlora_jax.adapters import INITIALIZATIONS, METHODS
from irqlora_jax.adapters.bayesian import BayesianOptions
from irqlora_jax.adapters.binary import BinaryOptions
from irqlora_jax.adapters.cloq import CloqOptions
from irqlora_jax.adapters.iec import IecOptions
from irqlora_jax.adapters.loftq import LoftqOptions
from irqlora_jax.adapters.lokr import LokrOptions
from irqlora_jax.adapters.lqlora import LqloraOptions
from irqlora_jax.adapters.method import Initialization, Method, Shape
from irqlora_jax.adapters.qahira import QahiraOptions
from irqlora_jax.adapters.qalora import QaloraOptions
from irqlora_jax.adapters.qalora_iec import QaloraIecOptions
from irqlora_jax.adapters.qbara import QbaraOptions
from irqlora_jax.adapters.scales import SPLITS
from irqlora_jax.sharding import LINEAR_NAMES, Splits
from irqlora_jax.text import require

RENAMED: dict[str, tuple[str, ...]] = {
    "connections": ("iec", "connections"),
    "loftq_iterations": ("loftq", "iterations"),
    "from": ("init_from",),
}
"""Other names of fields: those of version 0.1.0, and "from", which Python reserves."""
NEW = "new"
"""The value of `adapter.init_from` that starts a new adapter on the base of a run."""
if TYPE_CHECKING:
    MethodName = str
    InitializationName = str
else:
    MethodName = Literal[*METHODS]
    InitializationName = Literal[*INITIALIZATIONS]


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The trained update of the frozen layers."""

    method: MethodName = "iec"
    """"lora": low-rank pair (QLoRA). "iec": LoRA with IR-QLoRA's parameter-free connections.
    "dora": LoRA with a trained length for each row of the weight (DoRA). "lokr": a Kronecker
    product of two small matrices (LoKr; KronA if both are full). "bayesian": LoRA that learns its
    rank and the bits of its factors (Bayesian-LoRA). "binary": LoRA with factors of one bit
    (BNN++). Methods with pooled inputs, which can be merged into the quantized base without loss:
    "qalora" (QA-LoRA), "qalora_iec" (QA-LoRA with IEC, IR-QLoRA's code for integers), "qbara"
    (Q-BaRA), "qahira" (QA-HiRA)."""
    rank: int = 64
    """Rank r of the update."""
    alpha: float = 16.0
    """The update is multiplied by alpha / rank, or by alpha / sqrt(rank) (`scaling`)."""
    scaling: Literal["rank", "sqrt_rank"] = "rank"
    """What divides alpha. "rank": the rank, as in LoRA. "sqrt_rank": its square root (rsLoRA), so
    that the update does not become smaller with a larger rank."""
    dropout: float = 0.0
    """Dropout probability of the input features of the matrix A."""
    targets: tuple[str, ...] = LINEAR_NAMES
    """Names of the adapted linear layers."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the adapters and the optimizer state."""
    init: InitializationName = "default"
    """Initial adapter. "default": the update is 0. "loftq": fit the quantized weights and the pair
    to the weights together (LoftQ), so that the update corrects most of the quantization error. In
    Python: `hf.load_loftq`. "cloq": the same for the outputs of the layer, on calibration text
    (CLoQ). "lqlora": as LoftQ, but the pair takes the largest singular directions of the weights
    before these are quantized, and gradients can weigh the errors (LQ-LoRA). "trained": the update
    starts at 0, and `quant.training` trains it layer by layer (ApiQ). With all four, the base
    belongs to this run alone."""
    init_from: str | None = None
    """Start from a trained adapter of the same base: the folder of a run (its newest checkpoint),
    the folder of a PEFT adapter, or its id on the hub. Unset fields of its method, rank, alpha,
    scaling and targets come from the adapter. The optimizer starts anew. "new": `model` is a run,
    of which only the base is used. Also written adapter.from."""
    scales: int = 0
    """Also train the scale and the shift of every block of the targets. Give quant.block_size; 0:
    they stay as quantized. EfficientQAT trains them, without an adapter, in its second phase."""
    iec: IecOptions = IecOptions()
    lokr: LokrOptions = LokrOptions()
    bayesian: BayesianOptions = BayesianOptions()
    binary: BinaryOptions = BinaryOptions()
    loftq: LoftqOptions = LoftqOptions()
    cloq: CloqOptions = CloqOptions()
    lqlora: LqloraOptions = LqloraOptions()
    qalora: QaloraOptions = QaloraOptions()
    qalora_iec: QaloraIecOptions = QaloraIecOptions()
    qbara: QbaraOptions = QbaraOptions()
    qahira: QahiraOptions = QahiraOptions()

    def __post_init__(self) -> None:
        require(self.method in METHODS, "adapter.method", self.method, ", ".join(METHODS))
        require(self.rank >= 1, "adapter.rank", self.rank, "a whole number of at least 1")
        require(0 < self.alpha < math.inf, "adapter.alpha", self.alpha, "a positive finite number")
        require(0 <= self.dropout < 1, "adapter.dropout", self.dropout, "0 <= dropout < 1")
        require(len(self.targets) > 0, "adapter.targets", self.targets, "at least one name")
        known = ("float32", "bfloat16")
        require(self.dtype in known, "adapter.dtype", self.dtype, " or ".join(known))
        starts = ", ".join(INITIALIZATIONS)
        require(self.init in INITIALIZATIONS, "adapter.init", self.init, starts)
        known, own = self.chosen.scalings, f"with adapter.method {self.method}"
        accepted = f"{' or '.join(known)} {own}"
        require(self.scaling in known, "adapter.scaling", self.scaling, accepted)
        ok = self.chosen.has_pair or self.start.fit is None
        require(ok, "adapter.init", self.init, f"default {own}, which has no pair to fit")
        require(self.scales >= 0, "adapter.scales", self.scales, "quant.block_size, or 0")
        ok = not self.scales or self.chosen.prepare is None
        require(ok, "adapter.scales", self.scales, f"0 with adapter.method {self.method}")
        ok = self.init_from is None or bool(self.init_from.strip())
        accepted = "a folder, the id of an adapter on the hub, new, or null"
        require(ok, "adapter.init_from", self.init_from, accepted)
        ok = self.init_from is None or self.init == "default"
        accepted = "default with adapter.init_from, which gives the adapter"
        require(ok, "adapter.init", self.init, accepted)
        for name in self.targets:
            require(name in LINEAR_NAMES, "adapter.targets", name, ", ".join(LINEAR_NAMES))
        for other in METHODS.values():
            if other.name != self.method and other.options is not None:
                given = getattr(self, other.name, other.options)
                accepted = f"the default with adapter.method {self.method}, which does not use it"
                require(given == other.options, f"adapter.{other.name}", given, accepted)

    @property
    def chosen(self) -> Method:
        """The method."""
        return METHODS[self.method]

    @property
    def start(self) -> Initialization:
        """The initialization."""
        return INITIALIZATIONS[self.init]

    @property
    def needs(self) -> str:
        """The statistic of a text that the initialization needs: nothing, inputs or fisher."""
        return self.start.needs(getattr(self, self.init, self.start.options))

    @property
    def source(self) -> str | None:
        """Folder of the trained adapter that the training starts from; None for a new adapter."""
        return None if self.init_from == NEW else self.init_from

    @property
    def start_title(self) -> str:
        """The adapter that the training starts from, for tables; "" if its update is 0."""
        return self.start.title if self.source is None else "earlier adapter"

    @property
    def options(self) -> Any:
        """The options of the method; None if it has none."""
        return getattr(self, self.method, self.chosen.options)

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / sqrt(rank)."""
        return self.alpha / (self.rank if self.scaling == "rank" else math.sqrt(self.rank))

    def scale_for(self, shape: Shape) -> float:
        """The factor of the update of a layer [out, in]."""
        return self.scale * self.chosen.factor(self.options, shape)

    @property
    def splits(self) -> Splits:
        """How a mesh splits each leaf."""
        return {**self.chosen.splits, **SPLITS} if self.scales else self.chosen.splits
