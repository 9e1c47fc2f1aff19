"""Bases and states come back bit by bit, or not at all."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

from irqlora_jax.base.file import read_base, read_base_config, read_source, save_base
from irqlora_jax.config import Config
from irqlora_jax.model.config import RopeScaling
from irqlora_jax.quant.calibrations.icq import IcqOptions
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.runs.checkpoints import Checkpoints
from irqlora_jax.runs.folder import check_folder
from tests.models import assert_same, tiny_llama

CONFIG = tiny_llama(rope_scaling=RopeScaling("llama3", 8.0), eos_token_ids=(2, 3))
QUANT = QuantConfig(format="nf3", icq=IcqOptions(steps=7))


def make(name: str) -> dict:
    parts = [
        quantize(jax.random.normal(jax.random.key(i), (40, 24)), QuantConfig(format=name))  # type: ignore[arg-type]
        for i in range(2)
    ]
    return {
        "embed_tokens": {"weight": jnp.ones((40, 24), jnp.bfloat16)},
        "layers": {"mlp": {"up_proj": {"weight": jax.tree.map(lambda *x: jnp.stack(x), *parts)}}},
        "norm": {"weight": jnp.ones(24, jnp.float16)},
    }


@pytest.mark.parametrize("name", ["nf4", "nf3", "int2"])
def test_round_trip(tmp_path, name: str) -> None:
    base = make(name)
    save_base(tmp_path / "base.safetensors", base, CONFIG, QUANT, "some/llama")
    again, config = read_base(tmp_path / "base.safetensors")
    assert config == CONFIG
    assert read_base_config(tmp_path / "base.safetensors") == (CONFIG, QUANT)
    assert read_source(tmp_path / "base.safetensors") == "some/llama"
    assert_same(again, base)
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]
    # The file is the arrays and little else (names and shapes).
    size = (tmp_path / "base.safetensors").stat().st_size
    assert 0 < size - sum(leaf.nbytes for leaf in jax.tree.leaves(base)) < 4096


def test_damaged_and_foreign_files_are_refused(tmp_path) -> None:
    path = tmp_path / "base.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_base(path)
    save_base(path, make("nf4"), CONFIG, QUANT)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"base.safetensors: damaged"):
        read_base(path)
    save_file({"a": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="base file version None: expected '2'"):
        read_base(path)


def state_of(step: int) -> dict[str, jax.Array]:
    return {"a": jax.random.normal(jax.random.key(step), (200, 200)), "step": jnp.int32(step)}


def same(a: dict, b: dict) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: 1.0, 6: None}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() is None and checkpoints.best() is None
        for step, loss in losses.items():
            checkpoints.save(step, state_of(step), loss)
            assert checkpoints.best() == min(step, 2)  # of equals the first
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "5", "6"]
    with Checkpoints(tmp_path, keep=1) as again:
        assert (again.find("best"), again.find("last"), again.find(5)) == (2, 6, 5)
        assert [again.loss(step) for step in (2, 5, 6)] == [1.0, 1.0, None]
        assert same(again.restore(2, state_of(0)), state_of(2))
        with pytest.raises(FileNotFoundError, match=r"checkpoint = 4: .* there are 2, 5, 6"):
            again.find(4)
        again.save(7, state_of(7), 0.5)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["7"]


def test_the_best_of_none(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
            checkpoints.find("best")
        checkpoints.save(1, state_of(1))
        with pytest.raises(FileNotFoundError, match=r"none in .* has an evaluation loss"):
            checkpoints.find("best")


FULL_DISK = """
import resource, sys
from pathlib import Path
import jax
from irqlora_jax.runs.checkpoints import Checkpoints

with Checkpoints(Path(sys.argv[1]), keep=1) as checkpoints:
    checkpoints.save(1, {"a": jax.random.normal(jax.random.key(1), (200, 200))}, 2.0)
    checkpoints.wait()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        checkpoints.save(2, {"a": jax.random.normal(jax.random.key(2), (200, 200))}, 1.0)
        checkpoints.wait()
    except OSError as error:
        print(error, checkpoints.latest(), checkpoints.best())
"""


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """Files may not grow over 20 kB, which fails as a full disk does: while writing."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "checkpoints: the checkpoint of step 2 could not be written (File too large)" in said
    assert said.endswith("that of step 1 is intact 1 1\n") and said.count("\n") == 1
    like = {"a": jax.ShapeDtypeStruct((200, 200), jnp.float32)}
    with Checkpoints(tmp_path, keep=1) as again:
        assert (again.latest(), again.best()) == (1, 1)
        stored = again.restore(1, like)["a"]
        np.testing.assert_array_equal(stored, jax.random.normal(jax.random.key(1), (200, 200)))
        again.save(2, {"a": stored}, 1.0)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with whole checkpoints of steps 1 and 2."""
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"adapters": state_of(step)}, 3.0 - step)
    return tmp_path


LIKE = {"adapters": {"a": jax.ShapeDtypeStruct((200, 200), jnp.float32)}}
LIKE["adapters"]["step"] = jax.ShapeDtypeStruct((), jnp.int32)
DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "empty": lambda file: file.write_bytes(b""),
    "deleted": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_a_sentence(
    two: Path, tmp_path: Path, damage: str
) -> None:
    """Any of its files: the state is still right, or the newest whole checkpoint is named."""
    newest, kept = two / "checkpoints" / "2", tmp_path / "kept"
    shutil.copytree(newest, kept)
    refused = set()
    for file in sorted(file.relative_to(kept) for file in kept.rglob("*") if file.is_file()):
        DAMAGES[damage](newest / file)
        with Checkpoints(two) as checkpoints:
            if checkpoints.latest() == 2:  # without orbax's mark it is an interrupted save
                try:
                    whole = checkpoints.restore(2, LIKE)
                    adapters = checkpoints.restore_adapters(2, LIKE["adapters"])
                    assert same(whole["adapters"], state_of(2)) and same(adapters, state_of(2))
                except ValueError as error:
                    refused.add(file.name)
                    text = str(error)
                    assert "checkpoints/2" in text and "checkpoint is of step 1" in text
                    assert "--resume_from 1" in text and "\n" not in text and len(text) < 900
        shutil.rmtree(newest)
        shutil.copytree(kept, newest)
    assert {"_CHECKPOINT_METADATA", "manifest.ocdbt"} <= refused


def test_arrays_that_are_not_the_saved_ones_are_named(two: Path) -> None:
    """Readable arrays of another step: only the checksums tell."""
    folder = two / "checkpoints"
    shutil.rmtree(folder / "2" / "default")
    shutil.copytree(folder / "1" / "default", folder / "2" / "default")
    with Checkpoints(two) as checkpoints:
        for restore, like in (
            (checkpoints.restore, LIKE),
            (checkpoints.restore_adapters, LIKE["adapters"]),
        ):
            with pytest.raises(ValueError, match=r"2: adapters/a is damaged .* is of step 1"):
                restore(2, like)


def test_a_changed_loss_does_not_change_the_best(two: Path) -> None:
    file = two / "checkpoints" / "1" / "_CHECKPOINT_METADATA"
    stored = json.loads(file.read_text())
    assert stored["custom_metadata"]["eval_loss"] == 2.0
    stored["custom_metadata"]["eval_loss"] = 0.5
    file.write_text(json.dumps(stored))
    with Checkpoints(two) as checkpoints:
        for check in (checkpoints.check_losses, lambda: checkpoints.find("best")):
            with pytest.raises(ValueError, match=r"1/_CHECKPOINT_METADATA: damaged .* the best"):
                check()
        checkpoints.check_losses(0)
        assert same(checkpoints.restore(2, LIKE)["adapters"], state_of(2))


def test_later_checkpoints_are_dropped(two: Path) -> None:
    with Checkpoints(two, keep=2) as checkpoints:
        checkpoints.drop_after(1)
        assert (checkpoints.latest(), checkpoints.losses()) == (1, {1: 2.0})
        checkpoints.save(2, {"adapters": state_of(3)})
    with Checkpoints(two) as again:
        assert same(again.restore(2, LIKE)["adapters"], state_of(3)) and again.loss(2) is None


@pytest.mark.parametrize("name", ["a[1]", "a?b", "a*", "a\\b"])
def test_paths_that_orbax_takes_for_patterns_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="expected a path without the characters"):
        Checkpoints(tmp_path / name)
    with pytest.raises(ValueError, match="expected a path without the characters"):
        check_folder(tmp_path / name, Config("model", str(tmp_path / name)))
    assert list(tmp_path.iterdir()) == []


def test_the_first_error_is_raised(two: Path, monkeypatch, said: list[str]) -> None:
    def close(self: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "close", close)
    with pytest.raises(FloatingPointError, match="diverged"), Checkpoints(two):
        raise FloatingPointError("diverged")
    assert len(said) == 1 and "No space left on device" in said[0] and "None" not in said[0]
    with pytest.raises(OSError, match=r"could not be written \(No space left on device\)"):
        Checkpoints(two).__exit__(None)
