"""Text from a model: decoding, prompts and chat."""

from irqlora_jax.generate.decode import generate as generate
from irqlora_jax.generate.decode import stream as stream
