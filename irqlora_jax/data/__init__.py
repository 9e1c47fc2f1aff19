"""Reads text data sets, tokenizes them with a loss mask, and makes batches."""

from irqlora_jax.data.batches import Batches as Batches
from irqlora_jax.data.batches import batches_by_length as batches_by_length
from irqlora_jax.data.batches import eval_batches as eval_batches
from irqlora_jax.data.batches import hold_out as hold_out
from irqlora_jax.data.batches import longest_row as longest_row
from irqlora_jax.data.batches import make_batches as make_batches
from irqlora_jax.data.batches import pad as pad
from irqlora_jax.data.batches import prefetch as prefetch
from irqlora_jax.data.chat import read_chat_template as read_chat_template
from irqlora_jax.data.encode import encode as encode
from irqlora_jax.data.encode import encode_pairs as encode_pairs
from irqlora_jax.data.encode import encode_source as encode_source
from irqlora_jax.data.examples import Example as Example
from irqlora_jax.data.examples import load_examples as load_examples
from irqlora_jax.data.formats import alpaca_prompt as alpaca_prompt
from irqlora_jax.data.preference import Pair as Pair
from irqlora_jax.data.preference import load_pairs as load_pairs
from irqlora_jax.data.rows import Row as Row
from irqlora_jax.data.rows import read_rows as read_rows
