"""Prompts as a model learned them, text that streams, conversations, answers to many prompts."""

import dataclasses
import io
import json
from pathlib import Path

import pytest

from irqlora_jax import hf
from irqlora_jax.config import Config, parse_flags
from irqlora_jax.data import alpaca_prompt, encode, encode_source, load_examples
from irqlora_jax.data.config import DataConfig
from irqlora_jax.evaluate import prompts as prompts_module
from irqlora_jax.evaluate import tasks as tasks_module
from irqlora_jax.evaluate.prompts import read_prompts
from irqlora_jax.evaluate.tasks import EvalConfig, evaluate_run
from irqlora_jax.generate import chat as chat_module
from irqlora_jax.generate.chat import ChatConfig, chat
from irqlora_jax.generate.conversation import (
    Style,
    TextStream,
    Turn,
    decode_stream,
    encode_messages,
    encode_turns,
    find_style,
)
from irqlora_jax.generate.decode import generate
from irqlora_jax.model.llama import Llama
from irqlora_jax.runs.load import Run, read_checkpoint, read_evaluation
from tests.models import STORIES, byte_tokenizer, needs_stories, random_variables, tiny_llama

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


TOKENIZER = byte_tokenizer()
CONTEXT = 128
MODEL = Llama(
    tiny_llama(
        vocab_size=258,
        num_hidden_layers=1,
        bos_token_id=0,
        eos_token_ids=(1,),
        max_position_embeddings=CONTEXT,
    )
)


def ids(text):
    return encode(TOKENIZER, [text])[0]


def text_of(tokens):
    return TOKENIZER.decode(tokens)


@pytest.fixture(scope="module")
def variables():
    return random_variables(MODEL, 0.02)


def config(format, **data):
    return Config("model", "run", data=DataConfig("file", format=format, **data))


TURNS = (Turn("one", "first", (*ids(" first"), 1)), Turn("two", "second", tuple(ids(" second"))))


def test_prompts_of_conversations():
    def written(kind, **settings):
        tokens = encode_turns(Style(kind), TOKENIZER, "three", turns=TURNS, **settings)
        assert tokens[0] == 0 and tokens.count(0) == 1
        return text_of(tokens)

    assert written("oasst1") == (
        "<s>### Human: one### Assistant:first### Human: two### Assistant:second"
        "### Human: three### Assistant:"
    )
    assert written("hh_rlhf", system="Be kind.").startswith("<s>Be kind.\n\n\n\nHuman: one\n\nAss")
    assert written("text") == "<s>onefirst\ntwosecond\nthree"
    # Every answer as the model gave it, and ended once.
    assert written("pairs") == "<s>one first</s>two second</s>three"
    assert written("alpaca", context="four") == (
        f"<s>{alpaca_prompt('one')} first</s>{alpaca_prompt('two')} second</s>"
        f"{alpaca_prompt('three', 'four')}"
    )
    assert written("text", context="four").endswith("three\n\nfour")


def test_chat_templates():
    tokenizer = byte_tokenizer(template=TEMPLATE)
    style = find_style(None, tokenizer)
    assert style == Style("chat")
    tokens = encode_turns(style, tokenizer, "three", turns=TURNS[:1], system="Be kind.")
    assert text_of(tokens) == (
        "<s>[system]Be kind.</s>[user]one</s>[assistant]first</s>[user]three</s>[assistant]"
    )
    broken = Style("chat", "{{ raise_exception('no\nsystem') }}")
    with pytest.raises(ValueError, match=r"the chat template failed for the .* no system"):
        encode_turns(broken, tokenizer, "three")


def test_the_style_is_what_the_run_learned(tmp_path):
    assert find_style(None, TOKENIZER) == Style("text")
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    assert find_style(config("chat", chat_template=str(file)), TOKENIZER) == Style("chat", TEMPLATE)
    with pytest.raises(FileNotFoundError, match=r"data\.chat_template"):
        find_style(config("chat", chat_template="nowhere"), TOKENIZER)
    for learned in ("alpaca", "oasst1", "hh_rlhf", "text"):
        assert find_style(config(learned), TOKENIZER).kind == learned
    assert find_style(config("flan_v2"), TOKENIZER).kind == "pairs"
    # Preference pairs are messages if there is a template.
    assert find_style(config("preference"), TOKENIZER).kind == "pairs"
    assert find_style(config("preference"), byte_tokenizer(template=TEMPLATE)).kind == "chat"


@pytest.mark.parametrize(
    ("format", "row", "message", "answer"),
    [
        ("alpaca", {"instruction": "Hi", "input": "x", "output": "Yes."}, ("Hi", "x"), "Yes."),
        ("input_output", {"input": "Hi", "output": "Yes."}, ("Hi", ""), " Yes."),
        ("oasst1", {"text": "### Human: Hi### Assistant: Yes."}, ("Hi", ""), " Yes."),
        ("hh_rlhf", {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes."}, ("Hi", ""), " Yes."),
        (
            "chat",
            {"messages": [{"role": "user", "content": "Hi"},
                          {"role": "assistant", "content": "Yes."}]},
            ("Hi", ""), "Yes.",
        ),
    ],
)  # fmt: skip
def test_a_prompt_is_what_the_training_puts_in_front_of_the_answer(
    tmp_path, format, row, message, answer
):
    tokenizer = byte_tokenizer(template=TEMPLATE)
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    learned = config(format)
    (example,) = load_examples(str(file), learned.data, tokenizer)
    style = find_style(learned, tokenizer)
    prompt = encode_turns(style, tokenizer, message[0], context=message[1])
    assert example.tokens.tolist() == [*prompt, *ids(answer), 1]


HARD = (
    "na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve \N{EURO SIGN}\N{PILE OF POO}\N{GRINNING FACE} ok"
)


def test_streamed_text_has_whole_characters():
    for prompt in ((), ids("\N{GRINNING FACE}")):
        pieces = list(decode_stream(TOKENIZER, ids(HARD), prompt=prompt))
        assert "".join(pieces) == HARD and len(pieces) == len(HARD)
    # What no character is is shown in the end.
    broken = list(decode_stream(TOKENIZER, ids("a\N{EURO SIGN}")[:-1]))
    assert broken == ["a", "\N{REPLACEMENT CHARACTER}"]
    assert list(decode_stream(TOKENIZER, [])) == []


@needs_stories
@pytest.mark.parametrize("prompt", ["", "Once", "\N{GRINNING FACE}"])
def test_streamed_text_has_the_spaces_of_sentencepiece(prompt):
    tokenizer = hf.load_tokenizer(STORIES)
    start = encode_source(tokenizer, [prompt])[0]
    whole = encode_source(tokenizer, [f"{prompt} upon {HARD}\n a time"])[0]
    assert whole[: len(start)] == start
    text = "".join(decode_stream(tokenizer, whole[len(start) :], prompt=start))
    decoded = tokenizer.decode(whole, skip_special_tokens=True)
    assert tokenizer.decode(start, skip_special_tokens=True) + text == decoded
    assert HARD in text


def test_stops_end_the_text_and_the_tokens():
    taken = []

    def new(text):
        for token in ids(text):
            taken.append(token)
            yield token

    stop = "### Human:"
    pieces = list(decode_stream(TOKENIZER, new("Yes ### no### Human: more"), stops=(stop,)))
    assert "".join(pieces) == "Yes ### no"
    assert not any("### H" in piece for piece in pieces)
    assert text_of(taken).endswith(stop)
    # Half a stop at the end is text.
    assert "".join(decode_stream(TOKENIZER, new("Yes### Hum"), stops=(stop,))) == "Yes### Hum"


def test_text_is_held_back_while_it_may_start_a_stop():
    text = TextStream(TOKENIZER, stops=("a!", "aab?"))
    assert [text.push(token) for token in ids("xaaba")] == ["x", "", "", "", "aab"]
    assert (text.push(*ids("!")), text.stopped, text.end()) == ("", True, "")
    text = TextStream(TOKENIZER, stops=("a!",))
    assert [text.push(token) for token in ids("ba")] == ["b", ""]
    assert (text.end(), text.stopped) == ("a", False)


def messages(*texts, system=()):
    roles = ["system"] * len(system) + ["user", "assistant"] * len(texts)
    pairs = zip(roles, (*system, *texts), strict=False)
    return [{"role": role, "content": text} for role, text in pairs]


def test_messages_are_written_as_in_the_training_data(tmp_path):
    def written(kind, *given, **settings):
        tokens = encode_messages(Style(kind), TOKENIZER, messages(*given, **settings))
        assert tokens[0] == 0 and tokens.count(0) == 1
        return text_of(tokens)

    # The rows of the data set have the same text.
    assert written("oasst1", "one", "first", "two") == (
        "<s>### Human: one### Assistant: first### Human: two### Assistant:"
    )
    assert written("hh_rlhf", "one", "first", "two", system=("Be", "kind")).startswith(
        "<s>Be\n\nkind\n\n\n\nHuman: one\n\nAssistant: first\n\nHuman: two"
    )
    # Prompts and answers are tokens of their own: a space is between the two where one was learned.
    assert written("pairs", "one", "first", "two") == "<s>one first</s>two"
    assert written("pairs", "one\n", "first", "two") == "<s>one\nfirst</s>two"
    assert written("alpaca", "one", "first", "two") == (
        f"<s>{alpaca_prompt('one')}first</s>{alpaca_prompt('two')}"
    )
    for format, row in (
        ("alpaca", {"instruction": "one", "output": "first"}),
        ("flan_v2", {"inputs": "one", "targets": "first"}),
    ):
        file = tmp_path / f"{format}.jsonl"
        file.write_text(json.dumps(row))
        (example,) = load_examples(str(file), config(format).data, TOKENIZER)
        style = find_style(config(format), TOKENIZER)
        given = encode_messages(style, TOKENIZER, messages("one", "first", "two"))
        assert given[: len(example.tokens)] == example.tokens.tolist()


def test_a_chat_template_gets_the_messages():
    given = messages("one", "first", "two", system=("Be kind.",))
    tokens = encode_messages(Style("chat"), byte_tokenizer(template=TEMPLATE), given)
    assert text_of(tokens) == (
        "<s>[system]Be kind.</s>[user]one</s>[assistant]first</s>[user]two</s>[assistant]"
    )
    with pytest.raises(ValueError, match="the chat template failed"):
        refusing = byte_tokenizer(template="{{ raise_exception('no system') }}")
        encode_messages(Style("chat"), refusing, given)


@pytest.mark.parametrize("roles", ["assistant", "user user", "user system user", "system", ""])
def test_other_orders_of_roles_are_refused(roles):
    given = [{"role": role, "content": "one"} for role in roles.split()]
    with pytest.raises(ValueError, match=f"roles {', '.join(roles.split())}: expected system mess"):
        encode_messages(Style("oasst1"), TOKENIZER, given)


class Terminal:
    """Scripted lines; exceptions among them are raised. Remembers what was written."""

    def __init__(self, *lines, interrupt_at=None):
        self.lines, self.written, self.interrupt_at = list(lines), [], interrupt_at

    def read(self, prompt):
        line = self.lines.pop(0) if self.lines else EOFError()
        if isinstance(line, BaseException | type):
            raise line
        return line

    def write(self, text):
        self.written.append(text)
        if self.interrupt_at is not None and len(self.written) == self.interrupt_at:
            raise KeyboardInterrupt

    @property
    def text(self):
        return "".join(self.written)


@pytest.fixture
def talk(monkeypatch, variables):
    """Runs a conversation with the tiny model, and gives the prompts that it was asked."""

    def talk(terminal, learned=None, answers=None, tokenizer=TOKENIZER, **settings):
        run = Run(Path("model"), learned, MODEL, variables, tokenizer, None)
        monkeypatch.setattr(chat_module, "load_run", lambda *_, **__: run)
        asked, stream = [], chat_module.stream

        def scripted(model, variables, prompt, limit, **drawing):
            if prompt == [0]:  # the check of the settings
                return stream(model, variables, prompt, limit, **drawing)
            asked.append(list(prompt))
            if answers is None:
                return stream(model, variables, prompt, limit, **drawing)
            return iter(answers.pop(0)[:limit])

        monkeypatch.setattr(chat_module, "stream", scripted)
        own = () if terminal is None else (terminal.read, terminal.write)
        chat(ChatConfig("model", **settings), *own)
        return asked

    return talk


def test_a_conversation_is_remembered_until_reset(talk):
    terminal = Terminal("one", " ", "two", "/reset", "three", "/quit", "four")
    asked = talk(terminal, config("oasst1"), [ids(" A"), ids(" B### Human: no"), ids(" C")])
    assert [text_of(tokens) for tokens in asked] == [
        "<s>### Human: one### Assistant:",
        "<s>### Human: one### Assistant: A### Human: two### Assistant:".replace(": A", ":A"),
        "<s>### Human: three### Assistant:",
    ]
    assert terminal.lines == ["four"]
    *_, first, second, forgotten, third = terminal.text.splitlines()
    assert (first, second, forgotten, third) == ("A", "B", "[conversation cleared]", "C")


def test_answers_are_those_of_generate_and_follow_the_seed(talk, variables):
    terminal = Terminal("abc", EOFError)
    (prompt,) = talk(terminal, temperature=0.0, top_p=None, max_new_tokens=6)
    (new,) = generate(MODEL, variables, [prompt], 6, eos_token_ids=(1,))
    said = "".join(decode_stream(TOKENIZER, new, prompt=prompt))
    assert terminal.text.partition("an answer\n")[2] == said + "\n\n"

    def drawn(seed):
        terminal = Terminal("abc", "abc")
        talk(terminal, seed=seed, max_new_tokens=12)
        return terminal.text

    assert drawn(1) == drawn(1) != drawn(2)


def test_piped_messages_get_nothing_but_answers_on_stdout(talk, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n/reset\ntwo\n"))
    asked = talk(None, config("text"), [ids("A"), ids("B")])
    assert len(asked) == 2
    out, err = capsys.readouterr()
    assert out == "A\nB\n" and "[conversation cleared]" in err and "/reset clears" in err
    assert ">" not in out + err


def test_an_interrupt_stops_the_answer_and_then_the_conversation(talk):
    # The greeting is the first piece, " A" the second, "B" the third.
    terminal = Terminal("one", "two", KeyboardInterrupt, "three", interrupt_at=3)
    asked = talk(terminal, config("text"), [ids(" AB never"), ids("C")])
    assert "[stopped]" in terminal.text and "never" not in terminal.text
    assert terminal.lines == ["three"]
    # What had been written by then is remembered.
    assert text_of(asked[1]).startswith("<s>one ") and text_of(asked[1]).endswith("\ntwo")


def test_the_oldest_turns_are_dropped_and_that_is_said(talk):
    lines = ["a" * 30, "b" * 30, "c" * 30, "d" * 30]
    terminal = Terminal(*lines)
    asked = talk(terminal, config("text"), [ids("1" * 10) for _ in lines], max_new_tokens=20)
    assert all(len(tokens) <= CONTEXT - 20 for tokens in asked)
    assert text_of(asked[1]) == "<s>" + "a" * 30 + "1" * 10 + "\n" + "b" * 30
    assert text_of(asked[3]) == "<s>" + "c" * 30 + "1" * 10 + "\n" + "d" * 30
    assert terminal.text.count("[context full: the oldest") == 2


def test_a_message_beyond_the_context_is_not_sent(talk):
    terminal = Terminal("a" * 200, "b")
    asked = talk(terminal, config("text"), [ids("1")])
    assert [text_of(tokens) for tokens in asked] == ["<s>b"]
    assert "too long" in terminal.text


def test_a_full_context_ends_the_answer(talk):
    terminal = Terminal("a" * 80)
    (prompt,) = talk(terminal, config("text"), [ids("1" * 200)], max_new_tokens=500)
    assert terminal.text.count("1") == CONTEXT - len(prompt)
    assert "[the context of the model is full]" in terminal.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
    ],
)
def test_bad_settings_are_refused_before_the_first_message(talk, settings, message):
    terminal = Terminal("one")
    with pytest.raises(ValueError, match=message):
        talk(terminal, **settings)
    assert terminal.lines == ["one"]


def test_checkpoints_as_people_write_them():
    assert [read_checkpoint(v) for v in ("last", "best", "100", 100)] == ["last", "best", 100, 100]
    for value in ("", "-1", -1, True, "1.5"):
        with pytest.raises(ValueError, match="expected last, best or the number of a step"):
            read_checkpoint(value)
    flags = ["--run=r", "--task=mmlu", "--checkpoint=100", "--baseline"]
    asked = parse_flags(EvalConfig, flags, "irqlora eval")
    assert asked.checkpoint == 100 and asked.baseline


def test_a_prompt_is_a_line_of_a_text_file_with_any_characters(tmp_path):
    lines = [f"one{c}two" for c in "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"]
    for end in ("\n", "\r\n"):
        (tmp_path / "p.txt").write_bytes(end.join(lines).encode())
        assert [prompt.text for prompt in read_prompts(str(tmp_path / "p.txt"))] == lines


def test_prompts_are_read(tmp_path):
    text, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("one\n\n two\n")
    rows.write_text('{"prompt": "one"}\n{"instruction": "two", "input": "three"}\n')
    assert [(p.text, p.context) for p in read_prompts(str(text))] == [("one", ""), (" two", "")]
    assert [(p.text, p.context) for p in read_prompts(str(rows))] == [("one", ""), ("two", "three")]
    assert len(read_prompts(str(rows), 1)) == 1
    rows.write_text('{"prompt": "one"}\n{"text": "two"}\n')
    with pytest.raises(ValueError, match="line 2 has no column 'prompt' or 'instruction': its col"):
        read_prompts(str(rows))
    text.write_text("\n")
    with pytest.raises(ValueError, match=r"p\.txt has no prompts"):
        read_prompts(str(text))
    with pytest.raises(FileNotFoundError, match=r"prompts = 'nowhere\.txt': no such file"):
        read_prompts("nowhere.txt")
    with pytest.raises(ValueError, match=r"expected a .txt, .jsonl or .json file"):
        read_prompts(__file__)


@pytest.fixture
def answer(monkeypatch, variables, tmp_path):
    """Answers prompts with `evaluate_run` and the tiny model, in tmp_path."""
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)

    def answer(lines, learned=None, **settings):
        run = Run(tmp_path / "model", learned, MODEL, variables, TOKENIZER, None)
        monkeypatch.setattr(tasks_module, "load_run", lambda *_, **__: run)
        (tmp_path / "prompts.txt").write_text("\n".join(lines))
        given = {"prompts": "prompts.txt", "max_new_tokens": 8, "batch_size": 2}
        given |= {"output": "eval-generate-model.jsonl"} | settings
        return evaluate_run(EvalConfig("model", "generate", progress=False, **given))

    return answer


LINES = ["abc", "d" * 40, "e", "f" * 39, "g" * 12]


def written(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_answers_stand_in_the_order_of_their_prompts(answer, variables, tmp_path):
    result = answer(LINES)
    rows = written("eval-generate-model.jsonl")
    assert [(row["index"], row["prompt"]) for row in rows] == list(enumerate(LINES))
    for row in rows:
        prompt = [0, *ids(row["prompt"])]
        (new,) = generate(MODEL, variables, [prompt], 8, eos_token_ids=(1,))
        assert row["output"] == "".join(decode_stream(TOKENIZER, new, prompt=prompt))
        assert row["tokens"] == len(new) and row["finished"] == (new[-1] == 1)
    assert result["prompts"] == 5 and result["tokens"] == sum(row["tokens"] for row in rows)
    assert read_evaluation(Path("eval-generate-model.json")) == json.loads(json.dumps(result))
    assert not list(tmp_path.glob("*.part")) and not list((tmp_path / "model").iterdir())


def test_a_folder_that_is_no_run_gets_no_file_unasked(answer, tmp_path, said):
    before = sorted(tmp_path.rglob("*"))
    result = answer([], prompts=None, prompt="abc", output=None)
    assert result["prompt"] == "abc" and any("--output FILE" in line for line in said)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "prompts.txt"])
    with pytest.raises(ValueError, match=r"output = None: '.*model' is not a run; expected a .jso"):
        answer(["a"], output=None)


def test_interrupted_answers_are_kept(answer, monkeypatch, said):
    drawing = {"temperature": 1.0, "seed": 3}
    answer(LINES, output="whole.jsonl", **drawing)
    calls = []

    def interrupted(*arguments, **settings):
        calls.append(len(arguments[2]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*arguments, **settings)

    monkeypatch.setattr(prompts_module, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer(LINES, output="out.jsonl", **drawing)
    assert "out.jsonl.part; the same command resumes" in said[-1]
    assert len(written("out.jsonl.part")) == 3 and not Path("out.jsonl").exists()
    # A line that was broken off does not count.
    with Path("out.jsonl.part").open("a") as file:
        file.write('{"index": 4, "pro')
    answer(LINES, output="out.jsonl", **drawing)
    assert calls == [2, 2, 2, 1]
    assert written("out.jsonl") == written("whole.jsonl")
    # Other settings begin anew.
    calls[:] = [0, 0, 0]
    Path("out.jsonl").rename("out.jsonl.part")
    answer(LINES, output="out.jsonl", temperature=1.0, seed=4)
    assert len(calls) == 6 and written("out.jsonl") != written("whole.jsonl")
    assert Path("out.json").is_file()


def test_long_prompts_are_cut_and_counted(answer, said):
    result = answer(["a" * 300, "b"], max_new_tokens=500, output="out.json")
    assert result["truncated"] == 1 and "1 of 2 prompts were cut" in said[0]
    rows = written("out.json")
    # A quarter of the context is left for the answer; the other one has all of it.
    assert rows[0]["tokens"] <= 32
    assert rows[1]["tokens"] > 32 or rows[1]["finished"]
    assert Path("out.summary.json").is_file()


def test_answers_stop_at_the_next_human_turn(answer, monkeypatch):
    said = [*ids(" Yes.### Human: no"), 1]
    monkeypatch.setattr(prompts_module, "generate", lambda *_, **__: [said])
    answer(["Hi"], config("oasst1"), output="out.jsonl")
    (row,) = written("out.jsonl")
    assert row["output"] == "Yes." and row["finished"]
    assert row["tokens"] == len(ids(" Yes.### Human:"))


def test_one_prompt(answer, variables, said):
    result = answer([], prompts=None, prompt="abc")
    prompt = [0, *ids("abc")]
    (new,) = generate(MODEL, variables, [prompt], 8, eos_token_ids=(1,))
    assert (
        result["text"] == said[0] == "abc" + "".join(decode_stream(TOKENIZER, new, prompt=prompt))
    )
    with pytest.raises(ValueError, match="prompt: has 129 tokens: expected fewer than"):
        answer([], prompts=None, prompt="a" * 128)
    with pytest.raises(ValueError, match="expected null with --prompts"):
        answer(["a"], prompt="abc")


def test_the_names_of_results_tell_evaluations_apart(answer, tmp_path):
    stems = {
        tasks_module._file_stem(dataclasses.replace(EvalConfig("r", "mmlu"), **settings))
        for settings in (
            *({}, {"baseline": True}, {"checkpoint": "best"}, {"checkpoint": 100}),
            {"task": "questions"},
        )
    }
    assert len(stems) == 5
    learned = config("text")
    answer(["abc"], learned, output=None)
    assert (tmp_path / "model" / "eval-generate.jsonl").is_file()
