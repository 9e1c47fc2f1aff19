"""Text files to tokens with a loss mask, and to batches."""

from irqlora_jax.data.batches import Batches as Batches
from irqlora_jax.data.batches import eval_batches as eval_batches
from irqlora_jax.data.batches import hold_out as hold_out
from irqlora_jax.data.examples import Example as Example
from irqlora_jax.data.examples import alpaca_prompt as alpaca_prompt
from irqlora_jax.data.examples import load_examples as load_examples
