"""Configuration of the adapter."""

import dataclasses
from typing import Literal

from irqlora_jax.sharding import LINEAR_NAMES
from irqlora_jax.text import require


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The trained low-rank update of the frozen layers."""

    method: Literal["lora", "iec"] = "iec"
    """"lora": QLoRA's pair of matrices. "iec": with the parameter-free connections of IR-QLoRA."""
    rank: int = 64
    """Inner dimension r."""
    alpha: float = 16.0
    """The update is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Probability of dropping an input feature in front of the matrix A."""
    targets: tuple[str, ...] = LINEAR_NAMES
    """Names of the adapted linear layers."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which adapters and optimizer state are kept."""
    init: Literal["default", "loftq"] = "default"
    """Where the training starts. "default": the update is 0. "loftq": the quantized weights and the
    pair are fitted to the weights together (LoftQ), so that the update corrects most of what
    quantization costs; the base then belongs to this run alone. In Python: `hf.load_loftq`."""
    loftq_iterations: int = 3
    """Turns of LoftQ, of which the best is kept."""
    connections: Literal["both", "u1", "u2"] = "both"
    """IEC only: which of the two connections is learned, that around A ("u1"), that around B ("u2")
    or both (IR-QLoRA, table 4). The scalar of the other one stays 0."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, "adapter.rank", self.rank, "a whole number of at least 1")
        require(self.alpha > 0, "adapter.alpha", self.alpha, "a positive number")
        require(0 <= self.dropout < 1, "adapter.dropout", self.dropout, "0 <= dropout < 1")
        require(len(self.targets) > 0, "adapter.targets", self.targets, "at least one name")
        ok = self.method == "iec" or self.connections == "both"
        require(ok, "adapter.connections", self.connections, "both with adapter.method lora")
        turns = self.loftq_iterations
        ok = turns >= 1
        require(ok, "adapter.loftq_iterations", turns, "a whole number of at least 1")
        for name in self.targets:
            require(name in LINEAR_NAMES, "adapter.targets", name, ", ".join(LINEAR_NAMES))
