"""Where a model comes from: local folders, the hub, and the tokenizer beside the weights."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import close_session

from irqlora_jax import hf, machine
from irqlora_jax.machine import reaches_hub


@pytest.mark.parametrize(
    "source", ["/no/such/folder", "./no/such", "../base", "nowhere", Path("owner/name"), "a/b/c"]
)
def test_a_missing_folder_is_not_looked_for_on_the_hub(
    source: str | Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        hf.load_base(source, None)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(NotADirectoryError, match=r"model\.safetensors'.*a file.*folder"):
        hf.load_base(tmp_path / "model.safetensors", None)


def hub_errors() -> dict[str, tuple[Exception, str]]:
    from huggingface_hub import errors

    leak = "Illegal header value b'Bearer hf_secret'"

    def made(kind: type[Exception]) -> Exception:
        return kind.__new__(kind, leak)  # their __init__ needs a response of the HTTP client

    return {
        "gated": (made(errors.GatedRepoError), "license.*hf auth login"),
        "unknown": (made(errors.RepositoryNotFoundError), "neither a local folder.*private"),
        "offline": (made(errors.LocalEntryNotFoundError), "not be reached.*local folder"),
        "bad header": (RuntimeError(leak), "not be reached.*local folder"),
    }


@pytest.mark.parametrize("case", ["gated", "unknown", "offline", "bad header"])
def test_a_failing_hub_is_one_sentence_without_the_token(
    monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    error, pattern = hub_errors()[case]

    def refuse(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=pattern) as raised:
        hf.snapshot("owner/name")
    assert "owner/name" in str(raised.value)
    assert "secret" not in str(raised.value)
    assert raised.value.__cause__ is None
    assert raised.value.__context__ is None


def test_only_needed_files_are_fetched_from_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def fetch(repo: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.update(repo=repo, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert hf.snapshot("meta-llama/Llama-3.2-1B") == tmp_path
    assert asked["repo"] == "meta-llama/Llama-3.2-1B"
    wanted = [
        *("config.json", "model.safetensors", "model-00001-of-00002.safetensors"),
        *("model.safetensors.index.json", "tokenizer.json", "tokenizer.model"),
        *("tokenizer_config.json", "chat_template.jinja"),
    ]
    unwanted = ["pytorch_model.bin", "original/consolidated.00.pth", "consolidated.safetensors"]
    patterns = asked["patterns"]
    assert list(filter_repo_objects(wanted + unwanted, allow_patterns=patterns)) == wanted


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A hub that accepts connections and never answers."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://{host}:{port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "*")
        close_session()  # it knows the proxies of before
        yield server
    close_session()


def test_a_hub_that_never_answers_is_not_waited_for(hub: socket.socket) -> None:
    started = time.perf_counter()
    assert not reaches_hub(0.2)
    assert time.perf_counter() - started < 2


def test_a_hub_that_refuses_or_answers(hub: socket.socket) -> None:
    def answer() -> None:
        connection, _ = hub.accept()
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        connection.close()

    thread = threading.Thread(target=answer)
    thread.start()
    assert reaches_hub()
    thread.join()
    hub.close()
    machine._answers.cache_clear()  # an answer holds for up to a minute
    started = time.perf_counter()
    assert not reaches_hub()
    assert time.perf_counter() - started < 2


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "left": 1, "right": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_tokenizer_is_read_from_its_folder(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    assert hf.load_tokenizer(tmp_path)("right left up")["input_ids"] == [2, 1, 0]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer \(tokenizer.json"):
        hf.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "hint"), [("tokenizer.json", "cannot be read"), ("tokenizer.model", "sentencepiece")]
)
def test_a_broken_tokenizer_is_refused(tmp_path: Path, name: str, hint: str) -> None:
    (tmp_path / name).write_text("?")
    with pytest.raises(ValueError, match=hint) as raised:
        hf.load_tokenizer(tmp_path)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("value", ["text", [], {"a": 1}])
def test_settings_of_a_wrong_type_are_refused(tmp_path: Path, value: Any) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": value}))
    with pytest.raises(ValueError, match="the tokenizer cannot be read") as raised:
        hf.load_tokenizer(tmp_path)
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


def test_importing_does_not_load_what_reading_a_folder_does_not_need() -> None:
    heavy = ("transformers", "huggingface_hub", "datasets", "torch", "jsonargparse")
    code = f"import sys, irqlora_jax.hf; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
