"""Real matrix sizes for tests and benchmarks of kernels. Does not need jax."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """A projection of a LLaMA model.

    Attributes:
        out: its outputs, the rows of its weight.
        features: its inputs, the columns of its weight.
    """

    out: int
    features: int


ROWS = (1, 16, 64, 512, 2048, 4096, 8192)
"""Rows of activations: decoding one text or several, and training."""

MODELS: dict[str, dict[str, Shape]] = {
    "llama-7b": {
        "q, k, v, o": Shape(4096, 4096),
        "gate, up": Shape(11008, 4096),
        "down": Shape(4096, 11008),
    },
    "llama-13b": {
        "q, k, v, o": Shape(5120, 5120),
        "gate, up": Shape(13824, 5120),
        "down": Shape(5120, 13824),
    },
    "llama-65b": {
        "q, k, v, o": Shape(8192, 8192),
        "gate, up": Shape(22016, 8192),
        "down": Shape(8192, 22016),
    },
    "llama3-8b": {
        "q, o": Shape(4096, 4096),
        "k, v": Shape(1024, 4096),
        "gate, up": Shape(14336, 4096),
        "down": Shape(4096, 14336),
    },
}
"""By model and projection."""
