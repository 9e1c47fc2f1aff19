"""The programs that export writes files for, as model cards describe them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Program:
    """A kind of export in the form of another program.

    Attributes:
        library: name of the library on the hub.
        about: a sentence about the files; {type} is their type.
        use: how to load the model; {name} is the folder.
        use_adapter: the same, with the adapter beside it.
        adapter: where the adapter is then.
    """

    library: str
    about: str
    use: str
    use_adapter: str
    adapter: str = "adapter/"


_LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```"""
_LOAD_ADAPTER = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
model = PeftModel.from_pretrained(model, "{name}/adapter")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```"""
_SERVE = """```sh
vllm serve {name}
```"""
_SERVE_ADAPTER = """```sh
vllm serve {name} --enable-lora --lora-modules adapter={name}/adapter
```"""

PROGRAMS = {
    "gguf": Program(
        "gguf",
        "`model.gguf` is for llama.cpp and its relatives ({type}).",
        "```sh\nllama-cli -m {name}/model.gguf\n```",
        "```sh\nllama-cli -m {name}/model.gguf --lora {name}/adapter.gguf\n```",
        "adapter.gguf",
    ),
    "bitsandbytes": Program(
        "transformers",
        "Codes and scales are stored as bitsandbytes stores them; the other weights are {type}.",
        _LOAD,
        _LOAD_ADAPTER,
    ),
    "gptq": Program(
        "transformers",
        "The codes have the layout of GPTQ, for vLLM and GPTQModel. Scales are float16, and the "
        "other weights {type}.",
        _SERVE,
        _SERVE_ADAPTER,
    ),
    "compressed-tensors": Program(
        "transformers",
        "The codes are packed as compressed-tensors packs them (pack-quantized), for transformers "
        "and vLLM. Scales and the other weights are {type}.",
        f"{_LOAD}\n\n{_SERVE}",
        f"{_LOAD_ADAPTER}\n\n{_SERVE_ADAPTER}",
    ),
}
"""By kind of export."""
