"""Where metrics go: the file, TensorBoard, Weights & Biases."""

import dataclasses
import json
import math
import sys
import types
from pathlib import Path

import pytest

from irqlora_jax.config import Config, LogConfig
from irqlora_jax.train.metrics import MetricsLog, check_packages

SAMPLES = [{"prompt": "Name a color.", "answer": "Röt"}]


def config_for(folder: Path, **log) -> Config:
    return Config("model", str(folder), log=LogConfig(**log))


def test_lines_of_steps_that_are_done_again_are_dropped(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0) as log:
        log.write(1, {"loss": 2.5})
        log.write(2, {"eval_loss": 2.0, "samples": SAMPLES})
        log.write(3, {"eval_loss": 1.0})
        assert log.evaluations == [(2, 2.0), (3, 1.0)]
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 2, "lo')  # the crash came here
    with MetricsLog(tmp_path, 2) as log:
        assert log.evaluations == [(2, 2.0)]
        log.write(3, {"loss": 1.5, "grad_norm": math.inf})
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows == [
        {"step": 1, "loss": 2.5},
        {"step": 2, "eval_loss": 2.0, "samples": SAMPLES},
        {"step": 3, "loss": 1.5, "grad_norm": None},
    ]


SEPARATORS = "\u2028 \u2029 \x85 \x0b \x0c \x1c \x1d \x1e \r \r\n \n"


def test_any_sample_survives_a_resume(tmp_path: Path) -> None:
    samples = [{"prompt": f"one{SEPARATORS}", "answer": f"{SEPARATORS}two"}]
    with MetricsLog(tmp_path, 0) as log:
        log.write(1, {"eval_loss": 2.0, "samples": samples})
        log.write(2, {"loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    with path.open("ab") as file:
        file.write('{"step": 2, "answer": "Rö'.encode()[:-1])  # the crash came inside of a letter
    with MetricsLog(tmp_path, 1) as log:
        assert log.evaluations == [(1, 2.0)]
    (line, _) = path.read_bytes().split(b"\n")
    assert json.loads(line) == {"step": 1, "eval_loss": 2.0, "samples": samples}


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match=r"metrics.jsonl: cannot be written \(Is a directory\)"):
        log.write(1, {"loss": 1.0})


def tensorboard_events(folder: Path) -> list:
    """All events, read as what TFRecord files are: length, its checksum, bytes, their checksum."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    config = config_for(tmp_path, tensorboard=True)
    check_packages(config.log)
    with MetricsLog(tmp_path, 0, config) as log:
        log.write(1, {"loss": 2.5, "learning_rate": 0.5})
        log.write(2, {"eval_loss": 2.0, "samples": SAMPLES})
    with MetricsLog(tmp_path, 1, config) as log:
        log.write(2, {"loss": 1.5})
    events = tensorboard_events(tmp_path)
    scalars = [
        (e.step, v.tag, v.simple_value)
        for e in events
        for v in e.summary.value
        if not v.tensor.string_val
    ]
    assert scalars == [
        *((1, "loss", 2.5), (1, "learning_rate", 0.5)),
        *((2, "eval_loss", 2.0), (2, "loss", 1.5)),
    ]
    (text,) = [
        v.tensor.string_val[0].decode()
        for e in events
        for v in e.summary.value
        if v.tensor.string_val
    ]
    assert "Name a color." in text and "Röt" in text
    # TensorBoard drops what the first part wrote from this step on.
    assert [e.step for e in events if e.session_log.status] == [2]


class FakeWandb(types.ModuleType):
    """Takes notes of what it is told."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__("wandb")
        self.started, self.rows, self.finished, self.broken = [], [], 0, broken

    def init(self, **options):
        self.started.append(options)
        return self

    def Table(self, columns, data):  # noqa: N802
        return (columns, data)

    def log(self, values, step):
        self.rows.append((step, values))
        if self.broken:
            raise ConnectionError("Authorization: secret-key")

    def finish(self):
        self.finished += 1


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, monkeypatch) -> None:
    config = config_for(tmp_path, wandb="colors")
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    check_packages(config.log)
    with MetricsLog(tmp_path, 0, config) as log:
        log.write(1, {"loss": 2.5, "samples": SAMPLES})
    with MetricsLog(tmp_path, 1, config) as log:
        log.write(2, {"loss": 1.5})
    first, second = fake.started
    assert first == second and first["id"] and first["resume"] == "allow"
    assert (first["project"], first["dir"]) == ("colors", str(tmp_path))
    assert first["config"] == dataclasses.asdict(config)
    table = (["prompt", "answer"], [["Name a color.", "Röt"]])
    assert fake.rows == [(1, {"loss": 2.5, "samples": table}), (2, {"loss": 1.5})]
    assert fake.finished == 2


def test_a_failing_network_is_reported_once_and_loses_nothing(
    tmp_path: Path, monkeypatch, said: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb(broken=True))
    with MetricsLog(tmp_path, 0, config_for(tmp_path, wandb="colors")) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": 1.0})
    assert len(fake.rows) == 1 and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert len(said) == 1 and "Weights & Biases failed (ConnectionError)" in said[0]
    assert "secret" not in said[0] and "metrics.jsonl" in said[0]

    def unreachable(**options):
        raise ConnectionError

    monkeypatch.setattr(fake, "init", unreachable)
    with MetricsLog(tmp_path, 3, config_for(tmp_path, wandb="colors")) as log:
        log.write(4, {"loss": 1.0})
    assert len(said) == 2


def test_a_missing_package_is_named(monkeypatch) -> None:
    check_packages(LogConfig())
    # An empty package is what `import wandb` finds in a folder that an earlier run left.
    for found in (types.ModuleType("wandb"), None):
        monkeypatch.setitem(sys.modules, "wandb", found)
        with pytest.raises(ValueError, match=r"log.wandb = 'colors': .*irqlora-jax\[wandb\]"):
            check_packages(LogConfig(wandb="colors"))
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"log.tensorboard = True: .*irqlora-jax\[tb\]"):
        check_packages(LogConfig(tensorboard=True))
