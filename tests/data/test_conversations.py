"""Conversations are tokenized as the template writes them; only the assistant is learned."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from irqlora_jax.data import load_examples
from irqlora_jax.data.chat import read_chat_template, render_chat
from tests.data.small_data import config, learned, make_tokenizer, write_file

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}"
    "{% generation %}{{ ' ' + m.content + ' ' + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|eot_id|>' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
VICUNA = (  # no special token within: spaces part the turns
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content }}"
    "{% else %}{{ ' ASSISTANT:' }}{% generation %}{{ ' ' + m.content + '\n' }}"
    "{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3, "vicuna": VICUNA}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def chat_tokenizer(kind="byte", chat=None, **settings):
    tokenizer = make_tokenizer(kind, **settings)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = chat
    return tokenizer


def unmarked(template):
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def messages(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def load(folder, conversations, tokenizer, **settings):
    path = write_file(folder, "a.json", [{"messages": each} for each in conversations])
    return load_examples(path, config("chat", **settings), tokenizer)


TALK = messages("the cat", "sat on", "and the", "mat")


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chatml", "sat on<|im_end|>mat<|im_end|>"),
        ("llama2", " sat on </s> mat </s>"),
        ("llama3", "sat on<|eot_id|>mat<|eot_id|>"),
        ("vicuna", " sat on\n mat\n"),
    ],
)
def test_the_assistants_turns_and_their_ends_are_learned(tmp_path, name, text, marked):
    template = TEMPLATES[name] if marked else unmarked(TEMPLATES[name])
    tokenizer = chat_tokenizer(chat=template)
    (example,) = load(tmp_path, [TALK], tokenizer)
    assert learned(example, tokenizer) == text
    whole = tokenizer.apply_chat_template(TALK)["input_ids"]
    assert example.tokens.tolist() == whole
    everything = load(tmp_path, [TALK], tokenizer, train_on_source=True)[0]
    assert not everything.targets[0] and everything.targets[1:].all()


# Spaces at the seams, several bytes for a character, and turns of nothing.
content = st.text(st.sampled_from("the cat\n🙂é▁ ."), max_size=10)


@settings(max_examples=40, deadline=None)
@given(contents=st.lists(content, min_size=2, max_size=6))
@pytest.mark.parametrize("kind", ["byte", "piece"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_are_those_of_the_template_that_marks_them(tmp_path_factory, name, kind, contents):
    marked = chat_tokenizer(kind, TEMPLATES[name])
    tokenizer = chat_tokenizer(kind, unmarked(TEMPLATES[name]))
    talk = messages(*contents)
    wanted = marked.apply_chat_template(talk, return_assistant_tokens_mask=True)
    if not any(wanted["assistant_masks"]):
        return
    (example,) = load(tmp_path_factory.mktemp("chat"), [talk], tokenizer)
    assert example.tokens.tolist() == wanted["input_ids"]
    assert example.targets.astype(int).tolist() == wanted["assistant_masks"]


def test_spaces_that_a_tokenizer_leaves_out_of_its_offsets_are_learned(tmp_path):
    # The answer is white space that no end-of-turn token follows.
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    talk = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "   "}]
    tokenizer = chat_tokenizer(chat=template)
    (wanted,) = load(tmp_path, [talk], tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    offsets = tokenizer("cat   ", return_offsets_mapping=True)["offset_mapping"]
    assert any(start == stop for start, stop in offsets)
    (example,) = load(tmp_path, [talk], tokenizer)
    assert example.targets.tolist() == wanted.targets.tolist()
    assert learned(example, tokenizer) == "   "


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("adds", ["<s> $A", "<s> $A </s>", None])
def test_bos_stands_where_the_template_writes_it(tmp_path, name, adds):
    (example,) = load(tmp_path, [TALK], chat_tokenizer(chat=TEMPLATES[name], template=adds))
    count = {"chatml": 0, "llama2": 2, "llama3": 1, "vicuna": 1}[name]
    assert example.tokens.tolist().count(1) == count
    assert example.tokens[0] == 1 or not count
    assert example.tokens.tolist().count(2) == (2 if name == "llama2" else 0)


def test_sharegpt_and_null_fields_are_the_same_conversation(tmp_path):
    tokenizer = chat_tokenizer(chat=CHATML)
    spelled = [
        {"messages": messages("the cat", "sat", system="blue")},
        {
            "conversations": [
                {"from": "system", "value": "blue"},
                {"from": "human", "value": "the cat", "weight": None},
                {"from": "gpt", "value": "sat"},
            ],
            "messages": None,
        },
        {"messages": [m | {"tool_calls": None} for m in messages("the cat", "sat", system="blue")]},
        {"conversations": messages("the cat", "sat", system="blue")},
    ]
    path = write_file(tmp_path, "a.jsonl", spelled)
    examples = load_examples(path, config("chat"), tokenizer)
    assert len({tuple(example.tokens) for example in examples}) == 1
    assert learned(examples[0], tokenizer) == "sat<|im_end|>"


def test_extra_fields_of_a_message_reach_the_template(tmp_path):
    template = "{% for m in messages %}{{ m.mood or '' }}{{ m.content + '<|im_end|>' }}{% endfor %}"
    talk = [{"role": "assistant", "content": "cat", "mood": "blue "}]
    tokenizer = chat_tokenizer(chat=template)
    (example,) = load(tmp_path, [talk], tokenizer)
    assert tokenizer.decode(example.tokens) == "blue cat<|im_end|>"


TOOLS = [{"type": "function", "function": {"name": "color", "parameters": {"of": None}}}]
CALLS = (  # tools in front, and calls of them
    "{% if tools %}{{ tools | tojson + '\n' }}{% endif %}{% for m in messages %}"
    "{{ m.role + ':' }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% else %}"
    "{{ m.content }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), None, [], ""])
def test_the_tools_of_a_row_reach_the_template(tmp_path, tools):
    tokenizer = chat_tokenizer(chat=CALLS)
    rows = [{"messages": TALK, "tools": tools}, {"messages": TALK}]
    one, other = load_examples(write_file(tmp_path, "a.json", rows), config("chat"), tokenizer)
    wanted = tokenizer.apply_chat_template(TALK, tools=TOOLS if tools else None)["input_ids"]
    assert one.tokens.tolist() == wanted
    assert other.tokens.tolist() == tokenizer.apply_chat_template(TALK)["input_ids"]
    assert learned(one, tokenizer) == learned(other, tokenizer) == "sat on<|im_end|>mat<|im_end|>"


@pytest.mark.parametrize("tools", ["color", "{}", {"name": "color"}, ["color"], 3])
def test_tools_that_are_no_list_of_objects_are_refused(tmp_path, tools):
    path = write_file(tmp_path, "a.jsonl", [{"messages": TALK}, {"messages": TALK, "tools": tools}])
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: tools = .*: expected a list of obj"):
        load_examples(path, config("chat"), chat_tokenizer(chat=CALLS))


def test_a_call_of_a_tool_needs_no_content_and_is_learned(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "color"}}]}
    tokenizer = chat_tokenizer(chat=CALLS)
    for message in (call, call | {"content": None}):
        talk = [{"role": "user", "content": "the cat"}, message]
        (example,) = load(tmp_path, [talk], tokenizer)
        assert learned(example, tokenizer) == "color<|im_end|>"


@pytest.mark.parametrize("name", TEMPLATES)
def test_messages_of_weight_0_are_not_learned(tmp_path, name):
    tokenizer = chat_tokenizer(chat=unmarked(TEMPLATES[name]))

    def find(one, two, **settings):
        talk = [TALK[0], TALK[1] | one, TALK[2], TALK[3] | two]
        return load(tmp_path, [talk], tokenizer, **settings)[0]

    both, former, latter = find({}, {"weight": 1}), find({}, {"weight": 0}), find({"weight": 0}, {})
    assert former.tokens.tolist() == latter.tokens.tolist() == both.tokens.tolist()
    assert "sat" in learned(former, tokenizer) and "mat" in learned(latter, tokenizer)
    assert not (former.targets & latter.targets).any()
    assert (former.targets | latter.targets).tolist() == both.targets.tolist()
    rest = find({}, {"weight": 0.0}, train_on_source=True)
    assert rest.targets[1:].tolist() == (~latter.targets[1:]).tolist()


def test_a_template_in_a_file_replaces_the_tokenizers(tmp_path):
    (tmp_path / "chat.jinja").write_text(LLAMA3)
    own = chat_tokenizer(chat=CHATML)
    (example,) = load(tmp_path, [TALK], own, chat_template=str(tmp_path / "chat.jinja"))
    wanted = chat_tokenizer(chat=LLAMA3).apply_chat_template(TALK)["input_ids"]
    assert example.tokens.tolist() == wanted
    bare = chat_tokenizer(chat=None)
    (example,) = load(tmp_path, [TALK], bare, chat_template=str(tmp_path / "chat.jinja"))
    assert example.tokens.tolist() == wanted
    assert own.chat_template == CHATML and bare.chat_template is None
    assert read_chat_template(str(tmp_path / "chat.jinja")) == LLAMA3
    assert read_chat_template(None) is None


def test_a_tokenizer_without_a_template_says_what_to_give(tmp_path):
    with pytest.raises(ValueError, match=r"no chat template; give a file .* data.chat_template"):
        load(tmp_path, [TALK], chat_tokenizer())
    with pytest.raises(FileNotFoundError, match=r"data.chat_template = '.*x.jinja': there is no"):
        load(tmp_path, [TALK], chat_tokenizer(), chat_template=str(tmp_path / "x.jinja"))


REWRITES = {
    # Thoughts of all turns but the last are taken out.
    "text up to message 2": CHATML.replace(
        "{% generation %}",
        "{% generation %}{% if loop.last %}{{ 'the thought' }}{% endif %}",
    ),
    # The prompt opens a thought that the text does not have.
    "prompt for message 2": CHATML.replace(
        "'<|im_start|>assistant\n' }}{% endif %}", "'<|im_start|>assistant\nthink' }}{% endif %}"
    ),
}


@pytest.mark.parametrize("what", REWRITES)
def test_templates_that_change_earlier_turns_are_refused(tmp_path, what):
    tokenizer = chat_tokenizer(chat=REWRITES[what])
    with pytest.raises(ValueError, match=rf"a.json, row 2: the chat template's {what} is not a p"):
        load(tmp_path, [[{"role": "user", "content": "the"}], TALK], tokenizer)


@pytest.mark.parametrize(
    ("template", "talk", "message"),
    [
        (
            LLAMA2,
            messages("a", "b", system="c"),
            "row 1: .* failed for the conversation: Only user",
        ),
        ("{% for m in messages %}\n{{ m.content", TALK, "is not a Jinja template: .* in line 2"),
        ("{{ messages[7].content.x }}", TALK, "row 1: the chat template failed for the conv"),
        (CHATML, [], "row 1: messages is empty: expected a list of messages"),
        (CHATML, "hi", "row 1: messages is str: expected a list of messages"),
        (CHATML, ["hi"], "row 1, message 1 is of type str: expected an object"),
        (CHATML, [{"role": "user"}], "row 1, message 1: content = None: expected text"),
        (CHATML, [*TALK, {"content": "x"}], "row 1, message 5: role = None: expected text"),
        (CHATML, [{"from": "gpt", "value": 3}], "row 1, message 1: value = 3: expected text"),
        (CHATML, [TALK[0], TALK[1] | {"weight": 2}], "row 1, message 2: weight = 2: expected 0 or"),
        (CHATML, [TALK[0], TALK[1] | {"weight": "0"}], "message 2: weight = '0': expected 0 or 1"),
        (CHATML, [{"role": "assistant", "content": 3, "tool_calls": [{}]}], "content = 3: expect"),
        (CHATML, [{"role": "assistant", "tool_calls": []}], "1: content = None: expected text"),
        (CHATML, [TALK[0], TALK[1] | {"weight": 0}], "none of its 1 rows has a token to learn"),
        (CHATML, messages("hi"), "none of its 1 rows has a token to learn"),
    ],
)
def test_bad_conversations_are_refused(tmp_path, template, talk, message):
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path, [talk], chat_tokenizer(chat=template))
    assert "\n" not in str(error.value)
    path = write_file(tmp_path, "b.jsonl", [{"prompt": "hi", "answer": "x"}])
    with pytest.raises(ValueError, match="has no column 'messages': its columns are prompt, ans"):
        load_examples(path, config("chat"), chat_tokenizer(chat=CHATML))


STOPPED = {
    "nested loops": "{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(99) }}",
    "a long number": "{{ 10 ** (10 ** 10) }}",
    "comparing lists": (
        "{% set a = namespace(x=[], y=[]) %}{% for i in range(60) %}{% set a.x = [a.x, a.x] %}"
        "{% set a.y = [a.y, a.y] %}{% endfor %}{{ a.x == a.y }}"
    ),
    "multiplication": "{{ 'x' * 10 ** 10 }}",
    "a wide format": "{{ '%9999999999d' % 1 }}",
    "doubling": (
        "{% set a = namespace(x='x') %}{% for i in range(99) %}"
        "{% set a.x = a.x ~ a.x %}{% endfor %}"
    ),
    "a long text": "{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
    "a loop of 10**12": "{% for i in range(10**12) %}{% endfor %}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("name", STOPPED)
def test_a_template_that_would_not_end_is_stopped(tmp_path, monkeypatch, name):
    """In any thread, for a template is a program that comes with a model."""
    monkeypatch.setattr("irqlora_jax.data.template.SECONDS", 1)
    started = time.perf_counter()
    with ThreadPoolExecutor() as pool:
        found = pool.submit(load, tmp_path, [TALK], chat_tokenizer(chat=STOPPED[name])).exception()
    assert time.perf_counter() - started < 10  # on a busy machine, too
    assert isinstance(found, ValueError) and "\n" not in str(found)
    assert re.search("row 1: the chat template (was stopped: it|failed for the conv)", str(found))
    # The next conversation has a process that answers.
    assert len(load(tmp_path, [TALK], chat_tokenizer(chat=CHATML))) == 1


EVERYTHING = """\
{%- set ns = namespace(first=true, seen='') -%}
{{- bos_token }}{% if tools is not none %}{{ tools | tojson(indent=2) }}{% endif %}
  {% for m in messages %}
    {%- if loop.index0 > 2 %}{% break %}{% endif -%}
    {%- set ns.seen = ns.seen ~ m['role'][:1] -%}
    {{ '%s: ' % m.role }}{{ m.get('content', '') | trim | replace('a', 'ä') }}\t{{ loop.last }}
    {{ dict(a=1, b=[m.role]) | tojson }}{{ m.items() | list | length }}{{ m.missing is defined }}
  {% endfor %}
{% macro f(x) %}<{{ x | upper }}>{% endmacro %}
{{ f(ns.seen) }}{{ ns.seen | length }}{{ documents is none }}{{ add_generation_prompt }}
{{ strftime_now('%Y') | int > 2000 }}{{ {'é': none, 'f': 1.5} }}{{ eos_token }}{{ unk_token }}
"""


@pytest.mark.parametrize(
    "template", [*TEMPLATES.values(), *map(unmarked, TEMPLATES.values()), EVERYTHING]
)
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [True, False])
def test_texts_are_those_of_transformers(template, prompt, tools):
    tokenizer = chat_tokenizer(chat=template)
    given = TOOLS if tools else None
    talks = [
        TALK,
        messages("é\u2028\x00🙂", ' "a"\\n '),
        [
            TALK[0],
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"n": 1.0, "deep": {"k": [None, True]}}],
            },
        ],
    ]
    talks = talks if template == EVERYTHING else talks[:2]
    wanted = tokenizer.apply_chat_template(
        talks, tools=given, add_generation_prompt=prompt, tokenize=False
    )
    assert render_chat(tokenizer, talks, None, prompt=prompt, tools=given) == wanted


def test_what_is_cut_off_is_not_learned(tmp_path, caplog):
    tokenizer = chat_tokenizer(chat=LLAMA3)
    whole = load(tmp_path, [TALK], tokenizer)[0]
    before = int(np.flatnonzero(whole.targets)[0])  # tokens in front of the first answer
    short = [{"role": "assistant", "content": "b"}]
    (only,) = load(tmp_path, [TALK, short], tokenizer, source_length=2, target_length=before - 2)
    assert learned(only, tokenizer) == "b<|eot_id|>"
    assert "1 of 2 rows were cut" in caplog.text and "1 of 2 rows have no token" in caplog.text
    (first,) = load(tmp_path, [TALK], tokenizer, source_length=2, target_length=before - 1)
    assert first.tokens.tolist() == whole.tokens[: before + 1].tolist()
    assert first.targets.sum() == 1 and first.targets[-1]


def test_the_first_token_is_never_learned(tmp_path):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = chat_tokenizer(chat=template)
    (example,) = load(tmp_path, [[{"role": "assistant", "content": "the cat sat"}]], tokenizer)
    assert not example.targets[0] and example.targets[1:].all()
    assert json.dumps(tokenizer.decode(example.tokens)) == '"the cat sat"'
