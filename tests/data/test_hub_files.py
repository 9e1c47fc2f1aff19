"""Streams data sets from a stand-in of the hub, with the real clients of the hub."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pytest
from huggingface_hub import close_session, constants

from irqlora_jax import machine
from irqlora_jax.data.hub import download_files
from tests.data.test_sources import rows_of, same
from tests.data.test_streaming import load, write_parquet

NAME, COMMIT = "someone/data", "c" * 40
PARTS = """---
configs:
- {config_name: red, data_files: [{split: train, path: red/*.jsonl}, {split: test, path: more.jsonl}]}
- {config_name: blue, data_files: blue.parquet}
- {config_name: old, data_files: [old.csv]}
---
"""  # noqa: E501


class Answers(BaseHTTPRequestHandler):
    """The part of the hub's API with which files are found and downloaded."""

    server: "Hub"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.say(json.dumps(self.server.entries(body["paths"])).encode())

    def do_GET(self) -> None:
        path, files = self.path.partition("?")[0], self.server.files
        if not path.startswith((f"/api/datasets/{NAME}", f"/datasets/{NAME}/resolve/")):
            return self.say(b"{}", 200 if path == "/" else 404, {"X-Error-Code": "RepoNotFound"})
        if path.startswith("/api"):
            folder = path.partition(f"/tree/{COMMIT}")[2].strip("/")
            siblings = [{"rfilename": name} for name in files]
            known = {"id": NAME, "sha": COMMIT, "siblings": siblings, "private": False}
            listed = self.server.listing(folder)
            return self.say(json.dumps(listed if "/tree/" in path else known).encode())
        name = path.partition("/resolve/")[2].partition("/")[2]
        if name not in files:
            return self.say(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        self.server.fetched += [name] * (self.command == "GET")
        etag = hashlib.sha256(files[name]).hexdigest()
        self.say(files[name], 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def say(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")

    def log_message(self, format: str, *args: object) -> None:
        pass


class Hub(ThreadingHTTPServer):
    """A data set by path, and the names of the files that were downloaded."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files, self.fetched = files, []
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def entries(self, names: list[str]) -> list[dict]:
        return [
            {"type": "file", "path": n, "size": len(self.files[n]), "oid": "0" * 40}
            for n in names
            if n in self.files
        ]

    def listing(self, folder: str) -> list[dict]:
        below = [n for n in self.files if n.startswith(f"{folder}/" if folder else "")]
        names = [name[len(folder) :].strip("/") for name in below]
        folders = {name.partition("/")[0] for name in names if "/" in name}
        known = [{"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(folders)]
        return known + self.entries([n for n in below if Path(n).parent == Path(folder)])


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    parquet = Path(write_parquet(tmp_path / "blue.parquet", rows_of(30), 13)).read_bytes()
    server = Hub(
        {
            "README.md": PARTS.encode(),
            "red/b.jsonl": lines(rows_of(40)[20:]),
            "red/a.jsonl": lines(rows_of(40)[:20]),
            "more.jsonl": lines(rows_of(5)),
            "blue.parquet": parquet,
            "old.csv": b"input,output\na,b\n",
        }
    )
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.address)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False, raising=False)
    machine._answers.cache_clear()
    close_session()
    yield server
    server.shutdown()
    server.server_close()
    machine._answers.cache_clear()
    close_session()


def test_files_of_the_hub_are_streamed_from_the_disk(hub, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(lines(rows_of(40)))
    local = load(str(tmp_path / "rows.jsonl"))
    streamed = load(f"{NAME}:red", streaming=True)
    assert same(streamed.train, local.train)
    assert {"red/a.jsonl", "red/b.jsonl"} <= {*hub.fetched} <= {*hub.files} - {"more.jsonl"}
    # Again: the same files, without a download.
    hub.fetched.clear()
    assert load(f"{NAME}:red", streaming=True).train.digest == streamed.train.digest
    assert not [name for name in hub.fetched if name.endswith("jsonl")]
    assert len(load(f"{NAME}:red:test", streaming=True).train) == 5
    blue = load(f"{NAME}:blue", streaming=True)
    assert blue.parts[0].blocks == (13, 13, 4) and len(blue.train) == 30


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (f"{NAME}:old", ValueError, r"consists of \.csv; expected .* \.jsonl or \.parquet, with"),
        (f"{NAME}:red:valid", FileNotFoundError, r"no such part: .*\['test', 'train'\]\. Give ID"),
        ("someone/other", FileNotFoundError, "no such data set, or it is private; check the name"),
    ],
)
def test_what_the_hub_lacks_is_one_sentence(hub, source, error, message):
    with pytest.raises(error, match=message):
        load(source, streaming=True)


def test_without_a_network_nothing_is_guessed_from_the_cache(hub, monkeypatch):
    """The cache may hold some of the files only."""
    load(f"{NAME}:red", streaming=True)
    monkeypatch.setattr("irqlora_jax.data.hub.reaches_hub", lambda: False)
    with pytest.raises(FileNotFoundError, match="connect to the network, or give a local file"):
        download_files("a", [NAME, "red"], "train", [".jsonl"])
