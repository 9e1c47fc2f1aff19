"""Named chat templates write what the published models read."""

import dataclasses

import pytest

from irqlora_jax.config import Config
from irqlora_jax.data import alpaca_prompt, load_examples, read_chat_template
from irqlora_jax.data.chat import render_chat
from irqlora_jax.data.config import DataConfig
from irqlora_jax.data.templates import CHAT_TEMPLATES, SOURCE, set_chat_template
from irqlora_jax.generate.conversation import Style, find_style
from tests.data.small_data import config, learned, write_file
from tests.data.test_conversations import chat_tokenizer, messages

# The conversation of the documentation of transformers.
FIRST, ANSWER = "Hello, how are you?", "I'm doing great. How can I help you today?"
SECOND = "I'd like to show off how chat templating works!"
TALK = messages(FIRST, ANSWER, SECOND)
SYSTEM = "You are a friendly chatbot who always responds in the style of a pirate"

# What the templates of the models on the hub write for it, with their own special tokens:
# ChatML; meta-llama/Llama-2-7b-chat-hf; meta-llama/Meta-Llama-3-8B-Instruct; Stanford Alpaca's
# prompt; mistralai/Mistral-7B-Instruct-v0.3; HuggingFaceH4/zephyr-7b-beta.
ALPACA = alpaca_prompt(FIRST) + ANSWER + "</s>"
PLAIN = {
    "chatml": f"<|im_start|>user\n{FIRST}<|im_end|>\n<|im_start|>assistant\n{ANSWER}<|im_end|>\n"
    f"<|im_start|>user\n{SECOND}<|im_end|>\n",
    "llama-2": f"<s>[INST] {FIRST} [/INST] {ANSWER} </s><s>[INST] {SECOND} [/INST]",
    "llama-3": f"<s><|start_header_id|>user<|end_header_id|>\n\n{FIRST}<|eot_id|>"
    f"<|start_header_id|>assistant<|end_header_id|>\n\n{ANSWER}<|eot_id|>"
    f"<|start_header_id|>user<|end_header_id|>\n\n{SECOND}<|eot_id|>",
    "alpaca": f"<s>{ALPACA}\n\n### Instruction:\n{SECOND}",
    "mistral": f"<s>[INST] {FIRST}[/INST] {ANSWER}</s>[INST] {SECOND}[/INST]",
    "zephyr": f"<|user|>\n{FIRST}</s>\n<|assistant|>\n{ANSWER}</s>\n<|user|>\n{SECOND}</s>\n",
}
PROMPTS = {
    "chatml": "<|im_start|>assistant\n",
    "llama-2": "",
    "llama-3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "alpaca": "\n\n### Response:",
    "mistral": "",
    "zephyr": "<|assistant|>\n",
}
WITH_SYSTEM = {
    "chatml": f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{FIRST}<|im_end|>\n",
    "llama-2": f"<s>[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n{FIRST} [/INST]",
    "llama-3": f"<s><|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|>"
    f"<|start_header_id|>user<|end_header_id|>\n\n{FIRST}<|eot_id|>",
    "alpaca": f"<s>{SYSTEM}\n\n### Instruction:\n{FIRST}",
    "mistral": f"<s>[INST] {SYSTEM}\n\n{FIRST}[/INST]",
    "zephyr": f"<|system|>\n{SYSTEM}</s>\n<|user|>\n{FIRST}</s>\n",
}


def render(name, talk, *, prompt=False):
    return render_chat(chat_tokenizer(), [talk], read_chat_template(name), prompt=prompt)[0]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_templates_write_the_published_formats(name):
    assert render(name, TALK) == PLAIN[name]
    assert render(name, TALK, prompt=True) == PLAIN[name] + PROMPTS[name]
    assert render(name, messages(FIRST, system=SYSTEM)) == WITH_SYSTEM[name]


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("chatml", "<|im_end|>"),
        ("llama-2", " </s>"),
        ("llama-3", "<|eot_id|>"),
        ("alpaca", "</s>"),
        ("mistral", "</s>"),
        ("zephyr", "</s>"),
    ],
)
def test_answers_are_learned_up_to_the_end_of_their_turn(tmp_path, name, ends):
    tokenizer = chat_tokenizer()
    rows = [{"messages": messages("the cat", "sat on", "and the", "mat")}]
    path = write_file(tmp_path, "a.jsonl", rows)
    settings = config("chat", chat_template=name, source_length=900)
    (example,) = load_examples(path, settings, tokenizer)
    space = " " if name in ("llama-2", "mistral") else ""
    assert learned(example, tokenizer) == f"{space}sat on{ends}{space}mat{ends}"


@pytest.mark.parametrize("name", ["llama-2", "mistral"])
@pytest.mark.parametrize("roles", ["aa", "uu", "ut", "us", "su s".replace(" ", "")])
def test_formats_of_turns_refuse_others(name, roles):
    names = {"u": "user", "a": "assistant", "t": "tool", "s": "system"}
    talk = [{"role": names[role], "content": "x"} for role in roles]
    with pytest.raises(ValueError, match="failed for the conversation: expected user and assist"):
        render(name, talk)


def test_the_tokenizer_of_a_run_keeps_the_template(tmp_path):
    from transformers import AutoTokenizer

    tokenizer, data = chat_tokenizer(), DataConfig(format="chat", chat_template="zephyr")
    set_chat_template(tokenizer, data, read_chat_template("zephyr"))
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == CHAT_TEMPLATES["zephyr"]
    assert again.init_kwargs[SOURCE] == "zephyr"
    run = Config(model="m", output_dir="o", data=data)
    assert find_style(run, again) == Style("chat")
    # A file that changed or is gone does not matter.
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }}")
    data = DataConfig(format="chat", chat_template=str(file))
    set_chat_template(tokenizer, data, read_chat_template(str(file)))
    file.unlink()
    assert tokenizer.init_kwargs[SOURCE] == "mine.jinja"  # exports show no path
    assert find_style(Config(model="m", output_dir="o", data=data), tokenizer) == Style("chat")
    assert tokenizer.chat_template == "{{ messages[0].content }}"


def test_other_formats_leave_the_tokenizer_alone():
    tokenizer = chat_tokenizer(chat="own")
    data = DataConfig(format="alpaca", chat_template="zephyr")
    set_chat_template(tokenizer, data, read_chat_template("zephyr"))
    assert tokenizer.chat_template == "own" and SOURCE not in tokenizer.init_kwargs


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("chatml", "no single token for <|im_start|>, <|im_end|>, and"),
        ("llama-3", "<|start_header_id|>, <|end_header_id|>, <|eot_id|>"),
        ("zephyr", None),
    ],
)
def test_tokens_that_a_tokenizer_lacks_are_said(said, name, words):
    from tests.data.small_data import make_tokenizer

    data = DataConfig(format="chat", chat_template=name)
    tokenizer = make_tokenizer("byte")
    set_chat_template(tokenizer, data, read_chat_template(name))
    assert len(said) == (words is not None)
    assert words is None or words in said[0]
    # An answer still ends: at the text, if not at a token.
    stops = {"chatml": ("<|im_end|>",), "llama-3": ("<|eot_id|>",), "zephyr": ()}[name]
    run = Config(model="m", output_dir="o", data=data)
    later = dataclasses.replace(run, data=DataConfig(format="chat"))  # goes on from the run
    for each in (run, later, None):  # None: of an export
        assert find_style(each, tokenizer).stops == stops
    set_chat_template(chat_tokenizer(), data, read_chat_template(name))
    assert len(said) == (words is not None)


def test_a_missing_end_of_text_is_said(said):
    tokenizer = chat_tokenizer(eos=False)
    set_chat_template(tokenizer, DataConfig(format="chat", chat_template="zephyr"), "x")
    assert "the tokenizer has no eos, which ends a turn" in said[0]


def test_an_unknown_template_is_refused():
    with pytest.raises(FileNotFoundError, match=r"'chatlm': there is no such file; .* chatml, lla"):
        read_chat_template("chatlm")
