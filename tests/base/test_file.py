"""base.safetensors: what is read is what was written, or the file is refused."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from irqlora_jax.base.file import base_shapes, read_base, read_base_config, save_base
from irqlora_jax.runs.quantize import link_base
from irqlora_jax.sharding import MeshConfig, make_mesh
from tests.models import NARROW, PLAIN, assert_same, random_base


@pytest.fixture(scope="module")
def base() -> dict[str, Any]:
    return random_base(NARROW, PLAIN)


@pytest.fixture
def file(base: dict[str, Any], tmp_path: Path) -> Path:
    save_base(tmp_path / "base.safetensors", base, NARROW, PLAIN, "somewhere/base")
    return tmp_path / "base.safetensors"


def tensor_places(file: Path) -> dict[str, tuple[int, int]]:
    """First and last byte of every tensor in the file."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    offsets = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: (8 + size + first, 7 + size + end) for name, (first, end) in offsets.items()}


def flip(file: Path, place: int, bits: int = 1) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= bits
    file.write_bytes(data)


def test_the_same_base_is_the_same_bytes(file: Path, base: dict[str, Any], tmp_path: Path) -> None:
    for place in range(4):  # by chance the order of 8 names would be the same once in 40320 times
        other = tmp_path / f"{place}.safetensors"
        save_base(other, base, NARROW, PLAIN, "somewhere/base")
        assert other.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("split", [False, True], ids=["one device", "mesh"])
def test_a_changed_byte_is_refused_with_file_and_tensor(
    file: Path, base: dict[str, Any], split: bool
) -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=2), 2) if split else None
    places = tensor_places(file)
    assert len(places) > 20
    for name, ends in places.items():
        for place in ends:
            flip(file, place)
            with pytest.raises(ValueError) as error:
                read_base(file, mesh)
            assert f"{file}: {name} is damaged" in str(error.value)
            flip(file, place)
    assert_same(read_base(file, mesh)[0], base)


def test_a_change_of_the_header_is_refused_or_has_no_effect(
    file: Path, base: dict[str, Any]
) -> None:
    size = int.from_bytes(file.read_bytes()[:8], "little")
    rng, refused = np.random.default_rng(0), 0
    for place in (*range(8), *rng.choice(size, 150, replace=False) + 8):
        bits = int(rng.integers(1, 256))
        flip(file, int(place), bits)
        try:
            assert_same(read_base(file)[0], base)
            assert read_base_config(file) == (NARROW, PLAIN)
        except ValueError as error:
            assert str(file) in str(error)
            refused += 1
        flip(file, int(place), bits)
    assert refused > 140  # the others change blanks


def test_a_file_without_checksums_still_opens(file: Path, base: dict[str, Any]) -> None:
    with safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert json.loads(metadata.pop("checksums")).keys() == tensors.keys()
    del metadata["checksum"]
    save_file(tensors, file, metadata)
    assert_same(read_base(file)[0], base)
    assert jax.tree.map(lambda leaf: leaf.shape, base_shapes(file)[0]) == jax.tree.map(
        lambda leaf: leaf.shape, base
    )


@pytest.mark.parametrize("linked", [True, False], ids=["linked", "copied"])
def test_a_run_keeps_the_weights_of_a_base_that_is_a_symbolic_link(
    file: Path,
    base: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    linked: bool,
) -> None:
    """As in the hub's cache: snapshots/REVISION/base.safetensors -> ../../blobs/HASH."""

    def refuse(*_: Any) -> None:
        raise OSError

    snapshot, blob, run = tmp_path / "snapshots" / "1", tmp_path / "blobs" / "0", tmp_path / "run"
    for folder in (snapshot, blob.parent, run):
        folder.mkdir(parents=True)
    file.rename(blob)
    (snapshot / "base.safetensors").symlink_to(Path("..", "..", "blobs", "0"))
    if not linked:
        monkeypatch.setattr("os.link", refuse)
    link_base(snapshot, run)
    stored = run / "base.safetensors"
    assert not stored.is_symlink() and stored.samefile(blob) == linked
    blob.unlink()
    assert_same(read_base(stored)[0], base)
