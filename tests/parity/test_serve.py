"""The server against the client of OpenAI: chats, completions, streams, several at once, errors."""

import asyncio
import contextlib
import functools
import json
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from irqlora_jax.cli import main  # noqa: E402
from irqlora_jax.config import Config  # noqa: E402
from irqlora_jax.data.config import DataConfig  # noqa: E402
from irqlora_jax.generate.conversation import TextStream, decode_stream  # noqa: E402
from irqlora_jax.generate.decode import generate  # noqa: E402
from irqlora_jax.generate.rows import Rows  # noqa: E402
from irqlora_jax.model.llama import Llama  # noqa: E402
from irqlora_jax.runs.load import Run  # noqa: E402
from irqlora_jax.serve.app import make_app  # noqa: E402
from irqlora_jax.serve.command import start_service  # noqa: E402
from tests.models import (  # noqa: E402
    byte_tokenizer,
    random_variables,
    tiny_llama,
    word_tokenizer,
    write_model,
)

TEMPLATE = "<s>{% for m in messages %}w{{ m.role | length }} {{ m.content }} {% endfor %}"
SIZE, CONTEXT = 3, 64
MODEL = Llama(
    tiny_llama(
        num_hidden_layers=1,
        bos_token_id=1,
        eos_token_ids=(2,),
        max_position_embeddings=CONTEXT,
    )
)
TOKENIZER = word_tokenizer(40, chat_template=TEMPLATE)
BYTES = tiny_llama(vocab_size=258, eos_token_ids=(1,))
PROMPTS = ("w5 w8", "w30", "w9 w9 w9 w3 w17", "w12 w4", "w33 w34 w35", "w7", "w21 w22")


@contextlib.contextmanager
def served(service, key=None):
    """Runs the application on a free port. Yields its address."""
    server = uvicorn.Server(
        uvicorn.Config(make_app(service, key), port=0, log_config=None, lifespan="off")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def variables():
    return random_variables(MODEL, 0.2)


@pytest.fixture(scope="module")
def service(variables):
    run = Run(Path("tiny"), None, MODEL, variables, TOKENIZER, None)
    service = start_service(run, lambda: Rows(MODEL, variables, SIZE, CONTEXT))
    yield service
    service.worker.stop()
    service.worker.join(10)


@pytest.fixture(scope="module")
def address(service):
    with served(service) as address:
        yield address


def connect(address, key="none"):
    # No proxy of the environment, and no second try that would hide an error.
    http = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=address, api_key=key, max_retries=0, http_client=http)


@pytest.fixture(scope="module")
def client(address):
    with connect(address) as client:
        yield client


@pytest.fixture(scope="module")
def expected(variables):
    """The greedy text after a prompt, without the server."""

    @functools.cache
    def text(prompt, count=12):
        tokens = TOKENIZER(prompt, add_special_tokens=False)["input_ids"]
        (new,) = generate(MODEL, variables, [tokens], count, eos_token_ids=(2,))
        return "".join(decode_stream(TOKENIZER, new, prompt=tokens))

    return text


def complete(client, prompt, **more):
    settings = {"model": "tiny", "temperature": 0, "max_tokens": 12} | more
    return client.completions.create(prompt=prompt, **settings)


def chat(client, *contents, **more):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    settings = {"model": "tiny", "temperature": 0, "max_completion_tokens": 12} | more
    return client.chat.completions.create(messages=messages, **settings)


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="expected 'tiny'"):
        client.models.retrieve("gpt-4")


def test_a_completion_is_the_text_of_generate(client, expected):
    answer = complete(client, "w5 w8")
    (choice,) = answer.choices
    assert choice.text == expected("<s> w5 w8") and len(choice.text.split()) > 5
    assert choice.finish_reason == "length" and answer.object == "text_completion"
    used = answer.usage
    assert (used.prompt_tokens, used.completion_tokens, used.total_tokens) == (3, 12, 15)
    # Prompts as tokens, and several of them.
    tokens = TOKENIZER("w5 w8", add_special_tokens=False)["input_ids"]
    answer = complete(client, [[1, *tokens], [1, *tokens, 9]])
    assert answer.choices[0].text == choice.text != answer.choices[1].text
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage.prompt_tokens == 7 and answer.usage.completion_tokens == 24
    # The default of the API.
    assert complete(client, "w5 w8", max_tokens=None).usage.completion_tokens == 16


def test_a_chat_is_written_with_the_template(client, expected):
    answer = chat(client, "w5", "w6", "w7")
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and answer.object == "chat.completion"
    assert choice.message.content == expected("<s> w4 w5 w9 w6 w4 w7").lstrip()
    assert answer.usage.prompt_tokens == 7 and choice.finish_reason == "length"
    # Parts of text, a system message, and no limit but that of the context.
    parts = [{"type": "text", "text": "w5 "}, {"type": "text", "text": "w8"}]
    messages = [{"role": "developer", "content": "w3"}, {"role": "user", "content": parts}]
    answer = client.chat.completions.create(model="tiny", messages=messages, temperature=0)
    assert answer.choices[0].message.content == expected("<s> w6 w3 w4 w5 w8", 58).lstrip()
    assert answer.usage.prompt_tokens == 6
    finish = "length" if answer.usage.completion_tokens == 58 else "stop"
    assert answer.choices[0].finish_reason == finish


def test_a_stream_is_the_answer_in_pieces(client):
    whole = chat(client, "w5 w8")
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = chat(client, "w5 w8", **options)
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == whole.choices[0].message.content
    assert sum(map(bool, pieces)) > 5
    finishes = [chunk.choices[0].finish_reason for chunk in chunks]
    assert finishes[-1] == "length" and set(finishes[:-1]) == {None}
    assert last.usage == whole.usage and last.choices == []
    assert all(chunk.usage is None and chunk.id == last.id for chunk in chunks)
    chunks = list(complete(client, "w5 w8", stream=True))
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text == complete(client, "w5 w8").choices[0].text
    assert all(chunk.usage is None for chunk in chunks)


def test_stop_strings_end_a_text_also_across_tokens(client, expected):
    text = expected("<s> w5 w8")
    words = text.split()
    # The end of a word and the start of the next one, which are two tokens.
    place = text.index(f"{words[2]} {words[3]}") + len(words[2]) - 1
    stop = text[place : place + 3]
    first = text.index(stop)
    for stops in (stop, [stop, "nothing"], ["w" * 9, stop]):
        answer = complete(client, "w5 w8", stop=stops)
        assert answer.choices[0].text == text[:first]
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens < 12
        pieces = [c.choices[0].text for c in complete(client, "w5 w8", stop=stops, stream=True)]
        assert "".join(pieces) == text[:first]
    # The text ends with the start of a stop string, which is part of it then.
    assert complete(client, "w5 w8", stop=text[-2:] + "!").choices[0].text == text


def test_an_end_of_text_is_a_stop(variables, service, client):
    for prompt in range(3, 40):
        tokens = [1, prompt]
        (new,) = generate(MODEL, variables, [tokens], 50, eos_token_ids=(2,))
        if new[-1] == 2:
            break
    else:
        pytest.fail("no prompt of one token ends by itself")
    answer = complete(client, tokens, max_tokens=50)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(new)


def test_a_text_does_not_depend_on_those_beside_it(client, expected):
    alone = {prompt: complete(client, prompt).choices[0].text for prompt in PROMPTS}
    assert len(set(alone.values())) > 4
    assert alone == {prompt: expected(f"<s> {prompt}") for prompt in PROMPTS}

    def ask(number):
        prompt = PROMPTS[number % len(PROMPTS)]
        if number % 3 == 2:  # sampled texts among the greedy ones
            return prompt, complete(client, prompt, temperature=1, seed=number, top_p=0.9)
        return prompt, complete(client, prompt, max_tokens=12)

    with ThreadPoolExecutor(7) as pool:
        answers = list(pool.map(ask, range(21)))
    for number, (prompt, answer) in enumerate(answers):
        if number % 3 != 2:
            assert answer.choices[0].text == alone[prompt]


def test_requests_share_a_batch(client, service, monkeypatch):
    together = []
    step = Rows.step

    def counted(rows):
        together.append(len(service.worker._active))
        return step(rows)

    monkeypatch.setattr(Rows, "step", counted)
    complete(client, list(PROMPTS))
    assert max(together) == SIZE
    # 7 texts of 12 tokens, of which a start gives the first, in 3 rows.
    assert len(together) < 7 * 11 / 2


def test_a_seed_repeats_a_sampled_text(client):
    def drawn(**settings):
        answer = complete(client, "w5 w8", temperature=1.5, **settings)
        return [choice.text for choice in answer.choices]

    one, two = drawn(seed=3, n=2)
    assert [one] == drawn(seed=3) and one != two
    assert drawn(seed=-1) == drawn(seed=2**32 - 1)
    assert len({drawn()[0] for _ in range(4)}) > 1
    answer = complete(client, ["w9", "w5 w8"], temperature=1.5, seed=3)
    assert answer.choices[1].text == one
    # Almost no probability leaves the most likely token.
    assert drawn(top_p=1e-6) == [complete(client, "w5 w8").choices[0].text]


BAD = {
    "too long": ({"prompt": "w5 " * 80}, "prompt", "81 tokens; expected fewer than the context"),
    "unknown token": ({"prompt": [1, 40]}, "prompt", "token 40: expected 0 <= token < 40"),
    "no prompt": ({"prompt": []}, "prompt", "expected a text"),
    "log probabilities": ({"logprobs": 0}, "logprobs", "returns no log probabilities"),
    "penalty": ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
    "echo": ({"echo": True}, "echo", "not supported"),
    "best_of": ({"best_of": 2}, "best_of", "not supported"),
    "temperature": ({"temperature": -1}, "temperature", "expected 0 <= temperature <= 2"),
    "text for a number": ({"temperature": "1"}, "temperature", "'1'"),
    "top_p": ({"top_p": 0}, "top_p", "0 < top_p <= 1"),
    "max_tokens": ({"max_tokens": 0}, "max_tokens", "at least 1"),
    "n": ({"n": 200}, "n", "at most 128 texts"),
    "stop": ({"stop": ["a", ""]}, "stop", "a list of up to 4 texts"),
    "five stops": ({"stop": list("abcde")}, "stop", "a list of up to 4 texts"),
    "stream options": ({"stream_options": {}}, "stream_options", "with stream = true"),
    "misspelled": ({"extra_body": {"temprature": 1}}, "temprature", "an unknown parameter"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_completions(client, case):
    settings, param, message = BAD[case]
    with pytest.raises(openai.BadRequestError, match=message) as raised:
        complete(client, **({"prompt": "w5"} | settings))
    assert raised.value.param == param and raised.value.type == "invalid_request_error"
    if case == "too long":
        assert raised.value.code == "context_length_exceeded"


BAD_CHATS = {
    "logprobs": ({"logprobs": True}, "logprobs", "returns no log probabilities"),
    "tools": ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    "json": ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    "too long": ({"messages": [{"role": "user", "content": "w5 " * 80}]}, "messages", "expected f"),
    "no messages": ({"messages": []}, "messages", "a list of messages"),
    "role": ({"messages": [{"role": "tool", "content": "w5"}]}, "messages[0].role", "'tool'"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        *("messages[0].content[0]", "expected text"),
    ),
}


@pytest.mark.parametrize("text", [r'"prompt": "\ud800"', r'"\udfff": 1', r'"stop": ["a\ud83d"]'])
def test_half_of_a_surrogate_pair_is_refused(address, text):
    body = '{"model": "tiny", ' + text + "}"
    answer = httpx.post(f"{address}/completions", content=body)
    assert answer.status_code == 400
    assert "half of a surrogate pair" in answer.json()["error"]["message"]


@pytest.mark.parametrize("case", BAD_CHATS)
def test_bad_chats(client, case):
    settings, param, message = BAD_CHATS[case]
    given = {"messages": [{"role": "user", "content": "w5"}]} | settings
    with pytest.raises(openai.BadRequestError, match=message) as raised:
        client.chat.completions.create(model="tiny", **given)
    assert raised.value.param == param


def test_neutral_values_are_taken_and_harmless_parameters_are_named_once(client, said):
    neutral = {"presence_penalty": 0, "logit_bias": {}, "logprobs": False, "user": "me"}
    for _ in range(2):
        answer = chat(client, "w5", **neutral, stop=None)
        assert answer.choices[0].message.content == chat(client, "w5").choices[0].message.content
    assert [line for line in said if "user is ignored" in line] == said


def test_another_model_and_other_paths_are_not_found(client, address):
    with pytest.raises(openai.NotFoundError, match="expected 'tiny'") as raised:
        complete(client, "w5", model="gpt-4")
    assert raised.value.code == "model_not_found"
    with httpx.Client(trust_env=False) as plain:
        found = plain.get(f"{address}/nothing")
        assert found.status_code == 404 and "GET /v1/nothing" in found.json()["error"]["message"]
        assert plain.get(f"{address}/completions").status_code == 405
        for body in (b"{", b"\xff", b"[" * 100_000, b"[]", b""):
            found = plain.post(f"{address}/completions", content=body)
            assert found.status_code == 400 and "JSON" in found.json()["error"]["message"]


def test_a_key_is_asked_for(service):
    with served(service, "right") as address:
        with connect(address, "right") as client:
            assert complete(client, "w5").choices[0].text
        for wrong in ("left", "right2"):
            with (
                connect(address, wrong) as client,
                pytest.raises(openai.AuthenticationError, match="Authorization: Bearer") as raised,
            ):
                client.models.list()
            assert raised.value.code == "invalid_api_key" and wrong not in str(raised.value)


@pytest.fixture
def slow(monkeypatch):
    """Every step takes at least 50 ms, and is counted."""
    steps = []

    def step(rows, original=Rows.step):
        steps.append(1)
        time.sleep(0.05)
        return original(rows)

    monkeypatch.setattr(Rows, "step", step)
    return steps


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_text(service, address, slow, stream):
    asked = {"prompt": "w5 w8", "max_tokens": 60, "temperature": 0, "stream": stream}

    async def leave():
        async with httpx.AsyncClient(trust_env=False) as client:
            asking = asyncio.create_task(client.post(f"{address}/completions", json=asked))
            while not slow:
                await asyncio.sleep(0.001)
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asking

    asyncio.run(asyncio.wait_for(leave(), 10))
    patience = time.perf_counter() + 5
    while service.worker._active and time.perf_counter() < patience:
        time.sleep(0.01)
    assert not service.worker._active and 0 < len(slow) < 40


def test_a_failing_model_is_an_error_and_not_the_end(client, monkeypatch, said, expected):
    def fail(rows):
        raise RuntimeError("out of\nmemory")

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "step", fail)
        with pytest.raises(openai.InternalServerError, match="RuntimeError: out of memory"):
            complete(client, "w5 w8")
        with pytest.raises(openai.APIError, match="out of memory"):
            list(complete(client, "w5 w8", stream=True))
    assert complete(client, "w5 w8").choices[0].text == expected("<s> w5 w8")
    assert any("out of memory" in line for line in said)


class Scripted:
    """Rows in which every text is the same."""

    size, slots, cache_bytes = 2, 200, 0

    def __init__(self, tokens):
        self.tokens, self.places, self.prompts = tokens, [0, 0], []

    def start(self, row, prompt, sampling):
        self.places[row] = 0
        self.prompts.append(prompt)
        return self.tokens[0]

    def step(self):
        self.places = [place + 1 for place in self.places]
        return [self.tokens[place % len(self.tokens)] for place in self.places]


def test_requests_are_refused_while_too_many_texts_wait():
    class Slow(Scripted):
        def step(self):
            time.sleep(0.002)
            return super().step()

    run = Run(Path("tiny"), None, Llama(BYTES), {}, byte_tokenizer(), None)
    service = start_service(run, lambda: Slow([70]), max_waiting=2)
    begin = lambda client, n=1: complete(client, "one", max_tokens=190, stream=True, n=n)  # noqa: E731
    with served(service) as address, connect(address) as client:
        streams = [begin(client, n) for n in (1, 2, 1)]  # two texts have a row
        with pytest.raises(openai.RateLimitError, match="2 texts wait already") as error:
            begin(client)
        assert error.value.code == "rate_limit_exceeded"
        assert error.value.body["type"] == "rate_limit_error"
        streams.pop().close()  # a text that waited makes room when its client goes away
        patience = time.perf_counter() + 5
        while service.worker.waiting == 2 and time.perf_counter() < patience:
            time.sleep(0.001)
        streams.append(begin(client))
        assert [list(stream)[-1].choices[0].finish_reason for stream in streams] == ["length"] * 3
    service.worker.stop()


def test_answers_end_before_the_next_speaker_and_have_whole_characters():
    tokenizer = byte_tokenizer()
    tokens = tokenizer(" \n na\u00efve \u20ac!### Human: no", add_special_tokens=False)["input_ids"]
    config = Config("model", "run", data=DataConfig("file", format="oasst1"))
    run = Run(Path("tiny"), config, Llama(BYTES), {}, tokenizer, None)
    rows = Scripted(tokens)
    service = start_service(run, lambda: rows)
    with served(service) as address, connect(address) as client:
        answer = chat(client, "one", "first", "two", max_completion_tokens=99)
        assert answer.choices[0].message.content == "na\u00efve \u20ac!"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens == len(tokens) - 3
        asked = tokenizer.decode(rows.prompts[0])
        assert asked == "<s>### Human: one### Assistant: first### Human: two### Assistant:"
        stream = chat(client, "one", max_completion_tokens=99, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(pieces) == "na\u00efve \u20ac!" and "\u20ac" in pieces
        # A completion is the bare text.
        text = complete(client, "one", max_tokens=99).choices[0].text
        assert text.startswith(" \n na\u00efve \u20ac!### Human: no \n")
        with pytest.raises(openai.BadRequestError, match="roles user, assistant: expected system"):
            chat(client, "one", "first")
    service.worker.stop()


def test_a_model_that_continues_text_takes_no_chats():
    run = Run(Path("tiny"), None, Llama(BYTES), {}, byte_tokenizer(), None)
    service = start_service(run, lambda: Scripted([5]))
    with (
        served(service) as address,
        connect(address) as client,
        pytest.raises(openai.BadRequestError, match="expected a request to /v1/completions"),
    ):
        chat(client, "one")
    service.worker.stop()


def test_a_model_that_cannot_start_again_answers_no_more(variables, monkeypatch, said):
    made = []

    def make():
        if made:
            raise RuntimeError("no memory")
        made.append(Rows(MODEL, variables, SIZE, CONTEXT))
        return made[0]

    service = start_service(Run(Path("tiny"), None, MODEL, variables, TOKENIZER, None), make)
    monkeypatch.setattr(TextStream, "push", lambda *_: 1 / 0)
    with served(service) as address, connect(address) as client:
        with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
            complete(client, "w5 w8")
        service.worker.join(10)
        with pytest.raises(openai.InternalServerError, match="the server is stopping"):
            complete(client, "w5 w8")
    assert "no more requests are answered: the model failed: RuntimeError: no memory" in said


def test_a_stopped_worker_ends_all_texts(variables, slow):
    run = Run(Path("tiny"), None, MODEL, variables, TOKENIZER, None)
    service = start_service(run, lambda: Rows(MODEL, variables, SIZE, CONTEXT))
    with served(service) as address, connect(address) as client, ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(complete, client, "w5 w8", max_tokens=60) for _ in range(5)]
        while len(service.worker._active) < SIZE:
            time.sleep(0.01)
        service.worker.stop()
        for answer in asked:
            assert isinstance(answer.exception(10), openai.InternalServerError)
        with pytest.raises(openai.InternalServerError, match="the server is stopping"):
            complete(client, "w5")
    service.worker.join(10)
    assert not service.worker._thread.is_alive()


@pytest.fixture
def folder(tmp_path):
    llama = tiny_llama(num_hidden_layers=1, eos_token_ids=(2,), max_position_embeddings=CONTEXT)
    return write_model(tmp_path / "tiny", llama, tokenizer=TOKENIZER)


def test_the_command_serves_a_folder_until_an_interrupt(folder, said, monkeypatch):
    monkeypatch.setenv("SERVE_KEY", "right")
    found = []

    def use():
        while not any("/v1" in line for line in said):
            time.sleep(0.01)
        (line,) = said
        with connect(re.search(r"http\S+/v1", line)[0], "right") as client:
            found.append(complete(client, "w5").choices[0].text)
            running = complete(client, "w5", stream=True, max_tokens=60)
            found.append(next(iter(running)))
            os.kill(os.getpid(), signal.SIGINT)
            with contextlib.suppress(openai.APIError):
                list(running)

    flags = ["--port=0", "--max_batch=2", "--context=1000", "--api_key=SERVE_KEY"]
    with ThreadPoolExecutor(1) as pool:
        used = pool.submit(use)
        assert main(["serve", f"--run={folder}", *flags]) == 0
        used.result()
    assert len(found) == 2 and said[-1] == "stopped"
    # 1 layer, 2 rows of 64 tokens, 2 heads of 8 float32, keys and values.
    assert "tiny at http://127.0.0.1:" in said[0] and "2 texts of up to 64 tokens" in said[0]
    assert "0.02 MiB" in said[0] and "right" not in "".join(said)


def test_bad_settings_of_the_command(folder, capsys, monkeypatch):
    def refused(*flags):
        assert main(["serve", f"--run={folder}", *flags]) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") == 1 and not out
        return err

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"port = {port}: cannot listen" in refused(f"--port={port}")
    assert "host = '192.0.2.1'" in refused("--host=192.0.2.1")
    err = refused("--api_key=sk-secret")
    assert "the name of a variable" in err and "secret" not in err
    assert "max_waiting = 0: expected a whole number of at" in refused("--max_waiting=0")
    assert "--port" in refused("--port=70000") or "port = 70000" in refused("--port=70000")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "irqlora-jax[serve]"' in refused()


def test_events_are_those_of_the_api(address):
    body = {"prompt": "w5 w8", "max_tokens": 3, "temperature": 0, "stream": True}
    with httpx.Client(trust_env=False) as plain:
        answer = plain.post(f"{address}/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(each.removeprefix("data: ")) for each in events]
    assert {tuple(chunk) for chunk in chunks} == {("id", "object", "created", "model", "choices")}
