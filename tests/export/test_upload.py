"""Uploads to a stand-in of the Hugging Face hub: what arrives, and what is said if it does not."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import close_session, constants

from irqlora_jax import cli, hf, machine
from tests.models import FLOAT, NARROW, PLAIN, random_base, write_config, write_run

TOKEN = "hf_secret"
# The client's own call of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(
        tmp_path_factory.mktemp("runs") / "run", NARROW, base=random_base(NARROW, PLAIN)
    )


class Hub(ThreadingHTTPServer):
    """The part of the hub's API with which a folder is uploaded.

    Attributes:
        repositories: whether each one is private.
        files: what was committed, by repository and path.
        tokens: of all requests that change something. Large files go to a signed address instead.
        refused: status of the answer to a path that contains a word.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refused: dict[str, int] = {}
        super().__init__(("127.0.0.1", 0), Answers)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """The status and the content of an answer."""
        status = next((code for word, code in self.refused.items() if word in path), 0)
        if status:
            return status, {"error": f"no: {TOKEN}"}
        if method == "PUT":
            self.large[path.rpartition("/")[2]] = body
            return 200, {}
        name = "/".join(path.removeprefix("/api/models/").strip("/").split("/")[:2])
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            # Versions of the client differ in how they ask for a private one.
            private = asked.get("private", asked.get("visibility") == "private")
            status = 409 if name in self.repositories else 200
            self.repositories.setdefault(name, bool(private))
            return status, {"url": f"{self.address}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            large = (".safetensors", "tokenizer.json")
            given = [file["path"] for file in json.loads(body)["files"]]
            modes = {each: "lfs" if each.endswith(large) else "regular" for each in given}
            files = [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]
            return 200, {"files": files}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{self.address}/lfs/{each['oid']}"}}
            return 200, {"transfer": "basic", "objects": objects}
        if "/commit/" in path:
            files = self.files.setdefault(name, {})
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.large[value["oid"]]
            return 200, {"commitUrl": f"{self.address}/{name}/commit/0", "commitOid": "0"}
        if method == "GET" and name in self.repositories:
            return 200, {"id": name, "private": self.repositories[name], "siblings": []}
        return 404, {"error": path}


class Answers(BaseHTTPRequestHandler):
    """Gives the answers of a `Hub`."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def respond(self) -> None:
        """Answers any method."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path = self.path.partition("?")[0]
        if self.command == "POST":
            self.server.tokens.add(self.headers.get("Authorization"))
        status, content = self.server.answer(self.command, path, body)
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_HEAD = respond  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "*")
        machine._answers.cache_clear()
        close_session()  # it knows the settings of before
        yield server
        close_session()
        machine._answers.cache_clear()
        server.shutdown()
        thread.join()


def export(run: Path, folder: Path, *flags: str) -> int:
    given = [f"--run={run}", f"--output_dir={folder}", "--progress=false", *flags]
    return cli.main(["export", *given])


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("kind", ["adapter", "merged", "dequantized"])
def test_all_files_arrive(run: Path, tmp_path: Path, hub: Hub, kind: str, capsys) -> None:
    assert export(run, tmp_path / "out", f"--kind={kind}", "--push_to_hub=me/model") == 0
    local = contents(tmp_path / "out")
    assert hub.files == {"me/model": local} and hub.repositories == {"me/model": False}
    assert any(name.endswith(".safetensors") for name in local)
    # Large files travel apart, by the sum of their content.
    sums = {hashlib.sha256(data).hexdigest(): data for data in local.values()}
    assert hub.large and hub.large.items() <= sums.items()
    assert hub.tokens == {f"Bearer {TOKEN}"}
    out, err = capsys.readouterr()
    assert f"uploaded to {hub.address}/me/model" in out and TOKEN not in out + err
    card = local["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    # write_run names a model of the hub.
    assert front["base_model"] == "somewhere/base"
    assert '"me/model"' in card and "# me/model\n" in card and str(tmp_path) not in card
    if kind == "dequantized":
        assert '(base, "me/model", subfolder="adapter")' in card
        settings = json.loads(local["adapter/adapter_config.json"])
        assert settings["base_model_name_or_path"] == "me/model"
    assert not any(TOKEN.encode() in data for data in local.values())
    assert not any(str(tmp_path).encode() in data for data in local.values())


def test_from_python_into_a_private_repository_that_is_there(
    run: Path, tmp_path: Path, hub: Hub
) -> None:
    hub.repositories["me/model"] = True
    hub.files["me/model"] = {"other": b"stays"}
    options = {"push_to_hub": "me/model", "private": True}
    folder = hf.export_adapter(run, tmp_path / "out", fold=False, **options)
    assert hub.files["me/model"] == contents(folder) | {"other": b"stays"}
    code = 'irq.hf.load_adapter(snapshot_download("me/model"), model)'
    assert code in (folder / "README.md").read_text()
    hf.export_adapter(run, tmp_path / "second", push_to_hub="me/new", private=True)
    assert hub.repositories["me/new"]


def test_no_path_of_this_machine_is_uploaded(tmp_path: Path, hub: Hub) -> None:
    model = write_config(tmp_path / "base", NARROW)
    run = write_run(tmp_path / "run", NARROW, FLOAT, model=str(model))
    here = hf.export_adapter(run, tmp_path / "here")
    settings = json.loads((here / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(model)
    hf.export_adapter(run, tmp_path / "out", push_to_hub="me/model")
    files = hub.files["me/model"]
    assert not any(str(tmp_path).encode() in data for data in files.values())
    # The hub takes only names of models on the hub there.
    assert "base_model" not in yaml.safe_load(files["README.md"].decode().split("---")[1])


def failing(run: Path, folder: Path, capsys, *flags: str) -> str:
    assert export(run, folder, "--kind=adapter", *flags) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and TOKEN not in out + err
    return err


@pytest.mark.parametrize(
    ("word", "status", "message"),
    [
        ("/repos/create", 401, "does not know the token; log in"),
        ("/repos/create", 403, "write access to me/model"),
        ("/preupload/", 403, "write access to me/model"),
        ("/info/lfs/", 400, "refused the upload (status 400)"),
        ("/lfs/", 403, "write access to me/model"),
        ("/commit/", 400, "refused the upload (status 400)"),
    ],
)
def test_a_failed_upload_leaves_the_export(
    run: Path, tmp_path: Path, hub: Hub, capsys, word: str, status: int, message: str
) -> None:
    folder = tmp_path / "out"
    hub.refused[word] = status
    err = failing(run, folder, capsys, "--push_to_hub=me/model")
    assert "push_to_hub = 'me/model'" in err and message in err
    assert f"`hf upload me/model {folder}` uploads it" in err
    assert hub.files == {}
    kept = contents(folder)
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= kept.keys()
    # As the export without an upload, except for the names in the card.
    hf.export_adapter(run, tmp_path / "plain")
    plain = contents(tmp_path / "plain")
    assert kept["adapter_model.safetensors"] == plain["adapter_model.safetensors"]
    assert kept.keys() == plain.keys()


def test_nothing_private_is_put_into_a_public_repository(
    run: Path, tmp_path: Path, hub: Hub, capsys
) -> None:
    hub.repositories["me/model"] = False
    err = failing(run, tmp_path / "out", capsys, "--push_to_hub=me/model", "--private=true")
    assert "the repository is public, and private = true" in err and hub.files == {}


def test_without_progress_the_client_shows_none_either(
    run: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled

    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    hidden = []
    record = lambda *_, **__: hidden.append(are_progress_bars_disabled())  # noqa: E731
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", record)
    for number, progress in enumerate((False, True)):
        options = {"push_to_hub": "me/model", "progress": progress}
        hf.export_adapter(run, tmp_path / str(number), **options)
    assert hidden == [True, False] and not are_progress_bars_disabled()


def test_an_error_of_another_kind_shows_no_token(
    run: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError(f"Illegal header value b'Bearer {TOKEN}'")

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", fail)
    with pytest.raises(OSError, match=r"did not end \(RuntimeError\)") as raised:
        hf.export_adapter(run, tmp_path / "out", push_to_hub="me/model")
    assert TOKEN not in str(raised.value)
    assert raised.value.__cause__ is None and raised.value.__context__ is None


@pytest.mark.parametrize("name", ["model", "me/my/model", "me/mo del", "me/-x", "", "me/a..b"])
def test_a_bad_name_is_refused(run: Path, tmp_path: Path, capsys, name: str) -> None:
    err = failing(run, tmp_path / "out", capsys, f"--push_to_hub={name}")
    assert "push_to_hub" in err and "OWNER/NAME" in err
    assert list(tmp_path.iterdir()) == []


def test_what_prevents_an_upload_is_said_before_the_export(
    run: Path, tmp_path: Path, hub: Hub, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = "--push_to_hub=me/model"
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE is set" in failing(run, tmp_path / "out", capsys, flag)
    with monkeypatch.context() as patch:
        patch.delenv("HF_TOKEN")
        patch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "nowhere"))
        assert "`hf auth login` or set HF_TOKEN" in failing(run, tmp_path / "out", capsys, flag)
    machine._answers.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        assert "the hub does not answer" in failing(run, tmp_path / "out", capsys, flag)
    assert "false without push_to_hub" in failing(run, tmp_path / "out", capsys, "--private=true")
    assert list(tmp_path.iterdir()) == []
    assert hub.tokens == set()
