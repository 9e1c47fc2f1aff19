"""Chat templates by name, for base models without one.

Each writes the format that its published models expect. Turns end with a token that stops the
generation: eos, or a token that the template brings with it (`END`).
"""

import logging
from pathlib import Path
from typing import Any

from irqlora_jax.data.config import DataConfig

logger = logging.getLogger(__name__)

SOURCE = "chat_template_source"
"""Key in the tokenizer's settings: the `data.chat_template` that a run was trained with. Of a file,
only the name: exports have these settings too. Runs of earlier versions, whose template is only in
its file, do not have it."""

# Roles must alternate, and a system message stands in front of the first turn.
_ALTERNATING = (
    "{% set system = messages[0].content if messages and messages[0].role == 'system' else '' %}"
    "{% for message in (messages[1:] if system else messages) %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0)"
    " or message.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('expected user and assistant by turns, perhaps after a system message') }}"
    "{% endif %}"
)

CHAT_TEMPLATES = {
    # OpenAI's ChatML, as Qwen and many others use it.
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    # Llama 2 chat.
    "llama-2": (
        _ALTERNATING + "{% if message.role == 'user' %}"
        "{% set text = message.content %}"
        "{% if loop.first and system %}"
        "{% set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + text %}"
        "{% endif %}"
        "{{ bos_token }}{{ '[INST] ' + text | trim + ' [/INST]' }}"
        "{% else %}"
        "{{ ' ' + message.content | trim + ' ' }}{{ eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    # Llama 3 instruct (3.1 and later also write the date).
    "llama-3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}"
        "{{ message.content | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
        "{% endif %}"
    ),
    # Stanford Alpaca's prompt without an input, here with several turns.
    "alpaca": (
        "{% set system = messages[0].content if messages and messages[0].role == 'system' else "
        "'Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.' %}"
        "{{ bos_token }}{{ system }}"
        "{% for message in messages %}"
        "{% if message.role == 'user' %}"
        "{{ '\\n\\n### Instruction:\\n' + message.content }}"
        "{% elif message.role == 'assistant' %}"
        "{{ '\\n\\n### Response:' + message.content }}{{ eos_token }}"
        "{% elif not (loop.first and message.role == 'system') %}"
        "{{ raise_exception('expected the roles user and assistant, and system in front') }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\n\\n### Response:' }}{% endif %}"
    ),
    # Mistral instruct (tokenizer of version 3). The system message stands in the first turn.
    "mistral": (
        "{{ bos_token }}" + _ALTERNATING + "{% if message.role == 'user' %}"
        "{{ '[INST] ' + (system + '\\n\\n' if loop.first and system else '') }}"
        "{{ message.content + '[/INST]' }}"
        "{% else %}"
        "{{ ' ' + message.content | trim }}{{ eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    # Zephyr.
    "zephyr": (
        "{% for message in messages %}"
        "{{ '<|' + message.role + '|>\\n' + message.content }}{{ eos_token }}{{ '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
}
"""Jinja templates by name."""
END = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>"}
"""Text at the end of a turn, where this is not the tokenizer's eos."""
_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}


def find_end(tokenizer: Any, name: str | None) -> str:
    """The text that ends a turn, if the tokenizer has no token for it; else "".

    Args:
        tokenizer: a transformers tokenizer.
        name: value of `data.chat_template`.
    """
    end = END.get(name or "", "")
    return end if end and len(tokenizer(end, add_special_tokens=False)["input_ids"]) > 1 else ""


def set_chat_template(tokenizer: Any, config: DataConfig, template: str | None) -> None:
    """Gives the tokenizer of a run the template that the run is trained with, and warns if it lacks
    tokens of the template.

    Args:
        tokenizer: a transformers tokenizer, which is changed.
        config: the data of the run.
        template: text of `config.chat_template`; None: the tokenizer keeps its own.
    """
    if template is None or not {"chat", "preference"} & {*config.formats}:
        return
    name = config.chat_template
    tokenizer.chat_template = template
    tokenizer.init_kwargs[SOURCE] = Path(name or "").name
    lacking = [
        token
        for token in _TOKENS.get(name or "", ())
        if len(tokenizer(token, add_special_tokens=False)["input_ids"]) > 1
    ]
    if lacking:
        logger.warning(
            f"data.chat_template = '{name}': the tokenizer has no single token for "
            f"{', '.join(lacking)}, and writes each with several tokens; llama-2, mistral, alpaca "
            "and zephyr need no tokens but bos and eos"
        )
    if name in CHAT_TEMPLATES and name not in END and tokenizer.eos_token_id is None:
        logger.warning(
            f"data.chat_template = '{name}': the tokenizer has no eos, which ends a turn of this "
            "template"
        )
