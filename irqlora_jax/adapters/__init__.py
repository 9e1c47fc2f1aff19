"""Adapters: one file per method (`method.py` is the contract), and their initializations."""

from irqlora_jax.adapters.bayesian import BAYESIAN
from irqlora_jax.adapters.binary import BINARY
from irqlora_jax.adapters.cloq import CLOQ
from irqlora_jax.adapters.iec import IEC
from irqlora_jax.adapters.loftq import LOFTQ
from irqlora_jax.adapters.lora import LORA
from irqlora_jax.adapters.method import DEFAULT, Initialization
from irqlora_jax.adapters.method import Method as Method

METHODS: dict[str, Method] = {one.name: one for one in (LORA, IEC, BAYESIAN, BINARY)}
INITIALIZATIONS: dict[str, Initialization] = {one.name: one for one in (DEFAULT, LOFTQ, CLOQ)}
