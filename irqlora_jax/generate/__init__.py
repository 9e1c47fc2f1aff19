"""Generates text with a model: decoding, prompt styles, samples and chat."""

from irqlora_jax.generate.decode import generate as generate
from irqlora_jax.generate.decode import stream as stream
