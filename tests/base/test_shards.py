"""A large base in shards with an index: bit for bit what was written, or refused by name."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from irqlora_jax import hf
from irqlora_jax.base import shards
from irqlora_jax.base.file import (
    BASE_FILE,
    base_files,
    base_shapes,
    base_size,
    has_base,
    read_base,
    read_base_config,
    save_base,
)
from irqlora_jax.base.shards import plan_shards
from irqlora_jax.config import Config
from irqlora_jax.config.base import find_base
from irqlora_jax.plan.measure import read_base_shapes
from irqlora_jax.quant.config import QuantConfig, QuantRule
from irqlora_jax.report.run_data import read_run_data
from irqlora_jax.runs.folder import check_folder, is_start
from irqlora_jax.runs.load import is_base, load_run
from irqlora_jax.runs.quantize import link_base
from irqlora_jax.sharding import MeshConfig, make_mesh
from tests.base.test_file import flip, tensor_places
from tests.models import IEC, NARROW, PLAIN, assert_same, random_base, write_model, write_run

LIMIT = 9000
INDEX = "base.safetensors.index.json"


@pytest.fixture(scope="module")
def base() -> dict[str, Any]:
    return random_base(NARROW, PLAIN)


@pytest.fixture
def file(base: dict[str, Any], tmp_path: Path) -> Path:
    save_base(tmp_path / "base.safetensors", base, NARROW, PLAIN, "some/base", shard_bytes=LIMIT)
    return tmp_path / "base.safetensors"


def sizes(base: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(base))


# -------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("limit", [1, 1000, 5000, 10**9])
def test_shards_hold_every_layer_once_and_keep_to_the_limit(limit: int) -> None:
    arrays = {f"layers_0.{name}": np.zeros((5, 10 * i), np.uint8) for i, name in enumerate("abc")}
    arrays |= {f"layers_5.{name}": np.zeros((3, 100), np.uint16) for name in "ab"}
    arrays |= {"embed_tokens.weight": np.zeros((40, 30), np.float32)}
    plan = plan_shards(arrays, limit)
    held: dict[str, list[int]] = {name: [] for name in arrays}
    for shard in plan:
        assert len({name for name, *_ in shard}) == len(shard)
        for name, start, stop in shard:
            held[name] += range(start, stop)
        size = sum(arrays[n][start:stop].nbytes for n, start, stop in shard)
        one = len(shard) == 1 or all(stop - start == 1 for _, start, stop in shard)
        assert size <= limit or one
    assert held == {name: list(range(len(array))) for name, array in arrays.items()}
    assert (len(plan) == 1) == (limit == 10**9)
    assert limit > 1 or len(plan) == 5 + 3 + 1


# ------------------------------------------------------------------------------------------- values


def test_what_is_read_is_what_was_written(file: Path, base: dict[str, Any]) -> None:
    files = base_files(file.parent)
    assert len(files) == 5 and files[-1].name == INDEX
    assert sorted(path.name for path in file.parent.iterdir()) == [path.name for path in files]
    assert_same(read_base(file)[0], base)
    assert read_base_config(file) == (NARROW, PLAIN)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), base_shapes(file)[0])
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), base)
    assert 0 < base_size(file.parent) - sizes(base) < 40000
    # Anybody's reader finds the layers by their names.
    places = json.loads(files[-1].read_text())["weight_map"]
    name = "layers.mlp.up_proj.weight.packed"
    for layer in range(NARROW.num_hidden_layers):
        key = f"{name}[{layer}:{layer + 1}]"
        stored = load_file(file.parent / places[key])[key]
        packed = base["layers"]["mlp"]["up_proj"]["weight"].packed
        np.testing.assert_array_equal(stored[0], packed[layer])


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 4, 2)], ids=["data", "fsdp and tensor"])
def test_the_bytes_do_not_depend_on_the_mesh(
    file: Path, base: dict[str, Any], mesh: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "CHUNK", 500)
    split, _ = read_base(file, make_mesh(MeshConfig(*mesh), 8))
    assert_same(split, base)
    before = {path: path.read_bytes() for path in base_files(file.parent)}
    save_base(file, split, NARROW, PLAIN, "some/base", shard_bytes=LIMIT)
    assert {path: path.read_bytes() for path in base_files(file.parent)} == before


def test_stacks_of_several_kinds(tmp_path: Path) -> None:
    rules = (QuantRule("layers.0.mlp.*", format="int3"), QuantRule("*.v_proj", format="none"))
    quant = QuantConfig(format="nf3", calibration="none", outliers=0.01, rules=rules)
    base, path = hf.load_base(write_model(tmp_path, NARROW), quant)[0], tmp_path / BASE_FILE
    save_base(path, base, NARROW, quant, shard_bytes=1)
    assert_same(read_base(path)[0], base)


# ------------------------------------------------------------------------------------------- faults


def test_a_damaged_shard_is_refused_with_file_and_tensor(file: Path, base: dict[str, Any]) -> None:
    for shard in base_files(file.parent)[:-1]:
        places = tensor_places(shard)
        for name in list(places)[::5]:
            flip(shard, places[name][1])
            with pytest.raises(ValueError) as error:
                read_base(file)
            assert f"{shard}: {name} is damaged" in str(error.value)
            flip(shard, places[name][1])
    assert_same(read_base(file)[0], base)


def test_a_damaged_index_is_refused_or_has_no_effect(file: Path, base: dict[str, Any]) -> None:
    index, refused = file.with_name(INDEX), 0
    rng = np.random.default_rng(0)
    for place in rng.choice(index.stat().st_size, 60, replace=False):
        bits = int(rng.integers(1, 256))
        flip(index, int(place), bits)
        try:
            assert_same(read_base(file)[0], base)
        except (ValueError, FileNotFoundError) as error:
            assert str(file.parent) in str(error)
            refused += 1
        flip(index, int(place), bits)
    assert refused > 50


def test_shards_of_another_base_are_refused(
    file: Path, base: dict[str, Any], tmp_path: Path
) -> None:
    other = tmp_path / "other" / "base.safetensors"
    other.parent.mkdir()
    quant = dataclasses.replace(PLAIN, format="nf3")
    save_base(other, random_base(NARROW, quant), NARROW, quant, shard_bytes=LIMIT)
    ours, theirs = (base_files(path.parent)[1] for path in (file, other))
    whole = ours.read_bytes()
    ours.write_bytes(theirs.read_bytes())
    with pytest.raises(ValueError, match=r"base-00002-of-00004.safetensors: the header of layers"):
        read_base(file)
    ours.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"base-00002-of-00004.safetensors: not a whole"):
        read_base(file)
    ours.unlink()
    with pytest.raises(FileNotFoundError, match=r"lists base-00002-of-00004.safetensors, which"):
        base_shapes(file)
    values = json.loads(file.with_name(INDEX).read_text())
    values["weight_map"] |= dict.fromkeys(values["weight_map"], "../base.safetensors")
    file.with_name(INDEX).write_text(json.dumps(values))
    with pytest.raises(ValueError, match="expected a file in its folder"):
        read_base(file)


def test_an_interrupted_write_leaves_no_base(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does the base of before count, whose shards are partly overwritten."""
    file = tmp_path / "base.safetensors"
    for limit in (2**30, LIMIT):
        save_base(file, base, NARROW, PLAIN, shard_bytes=limit)
        count = len(base_files(tmp_path)) - 1

        def replace(source: Path, target: Path, replace: Any = os.replace) -> None:
            if "00002" in str(target):
                raise OSError("full")
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr("os.replace", replace)
            with pytest.raises(OSError, match="full"):
                save_base(file, base, NARROW, PLAIN, shard_bytes=LIMIT)
        assert not has_base(tmp_path) and not is_base(tmp_path), count
        names = {path.name for path in tmp_path.iterdir()}
        assert names and all(map(is_start, names))
        assert check_folder(tmp_path, Config("somewhere", str(tmp_path))) is None


def test_one_form_replaces_the_other(base: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "base.safetensors"
    for limit, count in ((LIMIT, 5), (2**30, 1), (3 * LIMIT, 3), (LIMIT, 5)):
        save_base(file, base, NARROW, PLAIN, shard_bytes=limit)
        assert len(list(tmp_path.iterdir())) == len(base_files(tmp_path)) == count
        assert_same(read_base(file)[0], base)


# -------------------------------------------------------------------------------------------- uses


@pytest.mark.parametrize("linked", [True, False], ids=["linked", "copied"])
def test_a_run_shares_the_shards(
    file: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError

    run = file.parent / "run"
    run.mkdir()
    (run / "base.safetensors").write_text("of an interrupted start")
    if not linked:
        monkeypatch.setattr("os.link", refuse)
    link_base(file.parent, run)
    ours, theirs = base_files(run), base_files(file.parent)
    assert [one.samefile(other) for one, other in zip(ours, theirs, strict=True)] == [linked] * 5
    assert_same(read_base(run / "base.safetensors")[0], base)


def test_everything_that_asks_for_a_base_finds_it(tmp_path: Path) -> None:
    base = random_base(NARROW, PLAIN)
    folder = write_run(tmp_path / "run", NARROW, PLAIN, base=base)
    before = read_run_data(folder)
    save_base(folder / "base.safetensors", base, NARROW, PLAIN, "somewhere/base", shard_bytes=LIMIT)
    assert not (folder / "base.safetensors").exists()
    assert is_base(folder)
    assert find_base("another", str(folder)) == folder / "base.safetensors"
    assert find_base(str(folder), "another") == folder / "base.safetensors"
    assert_same(load_run(folder).variables["base"], base)
    after = read_run_data(folder)
    assert not [line for line in after.problems if "base" in line]
    assert (after.storage, after.bits, after.llama) == (before.storage, before.bits, NARROW)
    adapter = dataclasses.replace(IEC, init_from="new")
    config = Config(str(folder), str(tmp_path / "new"), quant=PLAIN, adapter=adapter)
    shapes = jax.tree.map(lambda leaf: leaf.shape, read_base_shapes(config)[0])
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, base)
