"""Adapters: one file per method (`method.py` is the contract), and their initializations."""

from irqlora_jax.adapters.bayesian import BAYESIAN
from irqlora_jax.adapters.binary import BINARY
from irqlora_jax.adapters.cloq import CLOQ
from irqlora_jax.adapters.dora import DORA
from irqlora_jax.adapters.iec import IEC
from irqlora_jax.adapters.loftq import LOFTQ
from irqlora_jax.adapters.lokr import LOKR
from irqlora_jax.adapters.lora import LORA
from irqlora_jax.adapters.lqlora import LQLORA
from irqlora_jax.adapters.method import DEFAULT, Initialization
from irqlora_jax.adapters.method import Method as Method
from irqlora_jax.adapters.qahira import QAHIRA
from irqlora_jax.adapters.qalora import QALORA
from irqlora_jax.adapters.qalora_iec import QALORA_IEC
from irqlora_jax.adapters.qbara import QBARA
from irqlora_jax.adapters.trained import TRAINED

_LORAS = (LORA, IEC, DORA, LOKR, BAYESIAN, BINARY)
_POOLED = (QALORA, QALORA_IEC, QBARA, QAHIRA)
METHODS: dict[str, Method] = {one.name: one for one in (*_LORAS, *_POOLED)}
_STARTS = DEFAULT, LOFTQ, CLOQ, LQLORA, TRAINED
INITIALIZATIONS: dict[str, Initialization] = {one.name: one for one in _STARTS}
