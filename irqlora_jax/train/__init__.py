"""Finetuning: the whole run, and its pure training step."""

from irqlora_jax.runs.state import TrainState as TrainState
from irqlora_jax.runs.state import init_state as init_state
from irqlora_jax.runs.state import learning_rate as learning_rate
from irqlora_jax.runs.state import make_optimizer as make_optimizer
from irqlora_jax.runs.state import make_state as make_state
from irqlora_jax.train.finetune import RunResult as RunResult
from irqlora_jax.train.finetune import run as run
from irqlora_jax.train.step import sharded_state as sharded_state
from irqlora_jax.train.step import train_step as train_step
