"""Bases of two processes: the same bytes as of one, from a share of the reads."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from irqlora_jax import hf
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.base.file import base_files, has_base, read_base, save_base
from irqlora_jax.config import QuantizeConfig
from irqlora_jax.data.calibrate import CalibrateConfig, CalibrationRows
from irqlora_jax.files.checksums import checksums
from irqlora_jax.quant.budget import AllocationOptions
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.runs.quantize import quantize_model
from tests.models import random_tensors, tiny_llama, word_tokenizer, write_model
from tests.processes import run_processes

MODEL = tiny_llama(
    vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_key_value_heads=4
)
"""An odd number of matrices of each kind, so that processes also make different kinds at a time."""
BASES = {
    "icq": QuantConfig(format="nf4", block_size=16),
    "int3": QuantConfig(format="int3", block_size=16, calibration="none"),
    "kept": QuantConfig(format="none"),
    "text": QuantConfig(format="nf3", block_size=16, calibration="importance"),
}
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (4, 1, 2), "mixed": (2, 2, 2)}
PAIRS = AdapterConfig(rank=3, alpha=6.0)
ROWS = CalibrationRows(
    np.random.default_rng(5).integers(0, 48, (5, 12)).astype(np.int32),
    CalibrateConfig(batch_size=1, damping=0.05),
)
FEW = AllocationOptions(formats=("nf3", "nf4"), block_sizes=(16,), scale_bits=(8,))
BUDGET = QuantConfig(block_size=16, calibration="none", budget=4.0, allocation=FEW)

SCRIPT = """
import json
from pathlib import Path

import jax
from irqlora_jax import hf
from irqlora_jax.base import source
from irqlora_jax.base.file import base_files, read_base, save_base
from irqlora_jax.base.make import load_base, load_loftq
from irqlora_jax.config import QuantizeConfig
from irqlora_jax.files.checksums import checksums
from irqlora_jax.files.tensors import Header
from irqlora_jax.processes import first_only, is_first, wait_for_all
from irqlora_jax.runs.quantize import quantize_model
from irqlora_jax.sharding import MeshConfig, make_mesh
from tests.base.test_distributed_base import BASES, BUDGET, MESHES, MODEL, PAIRS, ROWS

found, read, rows = {}, [], Header.rows

def counted(self, name, *place):
    part = rows(self, name, *place)
    read.append((name, part.nbytes))
    return part

Header.rows = counted

def failure(work):
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def check(name, make, mesh):
    read.clear()
    with jax.set_mesh(mesh):
        made = make(mesh)
    mine = {str(leaf.sharding.num_devices) for leaf in jax.tree.leaves(made)}
    found[name] = {"sums": checksums(made), "devices": sorted(mine), "read": list(read)}
    return made

meshes = {name: make_mesh(MeshConfig(*shape), 8) for name, shape in MESHES.items()}
for name, mesh in meshes.items():
    base = check(f"icq {name}", lambda mesh: load_base("model", BASES["icq"], mesh=mesh)[0], mesh)
for form, name in (("int3", "tensor"), ("kept", "mixed"), ("kept", "fsdp")):
    own = lambda mesh: load_base("model", BASES[form], mesh=mesh)[0]
    check(f"{form} {name}", own, meshes[name])
key = jax.random.key(3)
own = lambda mesh: load_loftq("model", BASES["int3"], PAIRS, key, mesh=mesh)[:2]
check("pairs", own, meshes["fsdp"])
text = {"calibrate": ROWS, "keep": Path("kept")}
for name, where in (("text", "mixed"), ("text again", "fsdp")):
    check(name, lambda mesh: load_base("model", BASES["text"], mesh=mesh, **text)[0], meshes[where])

quantize_model(QuantizeConfig("model", "whole", BUDGET, progress=False))

for name, limit in (("small", 2**30), ("large", 4000)):
    path = Path(name) / "base.safetensors"
    first_only(path.parent.mkdir)
    with jax.set_mesh(meshes["mixed"]):
        save_base(path, base, MODEL, BASES["icq"], "model", shard_bytes=limit)
    for where in ("fsdp", "mixed"):
        check(f"{name} {where}", lambda mesh: read_base(path, mesh)[0], meshes[where])

shard = base_files(Path("large"))[1]
data = shard.read_bytes()
wait_for_all()
first_only(lambda: shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1])))
found["damaged"] = failure(lambda: read_base(path, meshes["mixed"]))
wait_for_all()
first_only(shard.unlink)
found["missing"] = failure(lambda: read_base(path, meshes["mixed"]))
wait_for_all()
first_only(lambda: shard.write_bytes(data))
found["nan"] = failure(lambda: load_base("nan", BASES["icq"], mesh=meshes["mixed"]))
first_only(lambda: Path("full").mkdir())
first_only(lambda: Path("full/base-00002-of-00002.safetensors.part").mkdir())
plain = {"shard_bytes": 12000}
found["full"] = failure(
    lambda: save_base(Path("full/base.safetensors"), base, MODEL, BASES["icq"], **plain)
)
Path(f"found-{jax.process_index()}.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    write_model(folder / "model", MODEL, tokenizer=word_tokenizer(MODEL.vocab_size))
    tensors = random_tensors(MODEL)
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 2] = np.nan
    write_model(folder / "nan", MODEL, tensors)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each process found."""
    run_processes(SCRIPT, 2, 4, folder)
    return [json.loads((folder / f"found-{i}.json").read_text()) for i in range(2)]


def of_one(folder: Path, name: str) -> dict[str, str]:
    """Checksums of the base of one process with one device."""
    rows = ROWS if name == "text" else None
    return checksums(hf.load_base(folder / "model", BASES[name], calibrate=rows)[0])


@pytest.mark.parametrize("name", BASES)
def test_a_base_is_the_same_for_every_mesh(
    folder: Path, found: list[dict[str, Any]], name: str
) -> None:
    expected = of_one(folder, name)
    for process in found:
        names = [each for each in process if each.partition(" ")[0] == name]
        assert len(names) == {"icq": 4, "kept": 2, "text": 2}.get(name, 1)
        for each in names:
            assert process[each]["sums"] == expected, each
            assert process[each]["devices"] == ["8"]


def test_pairs_are_the_same(folder: Path, found: list[dict[str, Any]]) -> None:
    key = jax.random.key(3)
    expected = checksums(hf.load_loftq(folder / "model", BASES["int3"], PAIRS, key)[:2])
    for process in found:
        assert process["pairs"]["sums"] == expected


def linear_bytes(read: list[Any]) -> tuple[int, int]:
    """Bytes that were read of linear layers, and of the others."""
    linear = sum(size for name, size in read if "_proj" in name)
    return linear, sum(size for _, size in read) - linear


def test_each_process_reads_its_share(found: list[dict[str, Any]]) -> None:
    weights = sum(x * y for x, y in MODEL.linear_shapes.values()) * MODEL.num_hidden_layers
    tables = 2 * MODEL.vocab_size * MODEL.hidden_size
    norms = (2 * MODEL.num_hidden_layers + 1) * MODEL.hidden_size
    for name, parts in (("data", 1), ("fsdp", 2), ("mixed", 1)):
        both = [linear_bytes(process[f"icq {name}"]["read"]) for process in found]
        assert sum(linear for linear, _ in both) == 4 * weights
        assert max(linear for linear, _ in both) <= 4 * weights * 0.55  # 21 matrices
        assert [rest for _, rest in both] == [4 * (tables // parts + norms)] * 2
    for process in found:  # the mixed mesh needs every weight in each process, by columns too
        assert linear_bytes(process["kept mixed"]["read"])[0] == 4 * weights
        assert linear_bytes(process["kept fsdp"]["read"])[0] == 4 * weights // 2


def test_both_forms_hold_the_base(
    folder: Path, found: list[dict[str, Any]], tmp_path: Path
) -> None:
    expected = of_one(folder, "icq")
    for process in found:
        for name in ("small fsdp", "small mixed", "large fsdp", "large mixed"):
            assert process[name]["sums"] == expected
    files = base_files(folder / "large")
    assert len(files) > 4 and files[-1].name == "base.safetensors.index.json"
    base, llama = read_base(folder / "large" / "base.safetensors")
    assert checksums(base) == expected and llama == MODEL
    for name, limit in (("small", 2**30), ("large", 4000)):
        save_base(
            tmp_path / "base.safetensors", base, MODEL, BASES["icq"], "model", shard_bytes=limit
        )
        ours = base_files(tmp_path)
        assert [file.name for file in ours] == [file.name for file in base_files(folder / name)]
        for file in ours:
            assert file.read_bytes() == (folder / name / file.name).read_bytes()


def test_faults_are_named_in_both_processes(folder: Path, found: list[dict[str, Any]]) -> None:
    words = {
        "damaged": ("base-00002-of-", "is damaged (checksum"),
        "missing": ("base.safetensors.index.json: lists base-00002-of-",),
        "nan": ("model.layers.1.self_attn.k_proj.weight has NaN",),
        "full": ("base-00002-of-",),
    }
    for name, parts in words.items():
        for process in found:
            assert all(part in (process[name] or "") for part in parts), (name, process[name])
    assert not has_base(folder / "full")


def test_quantize_writes_the_files_of_one_process(
    folder: Path, found: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = QuantizeConfig(str(folder / "model"), str(tmp_path / "base"), BUDGET, progress=False)
    quantize_model(config)
    ours, theirs = tmp_path / "base", folder / "whole"
    names = sorted(path.name for path in ours.iterdir())
    assert names == sorted(path.name for path in theirs.iterdir())
    one, other = (load_file(path / "base.safetensors") for path in (ours, theirs))
    for name in one.keys() | other.keys():
        np.testing.assert_array_equal(one[name], other[name])
    for name in ("quantization.json", "budget.json"):
        assert (ours / name).read_text() == (theirs / name).read_text()
    lines = [sorted((path / "errors.jsonl").read_text().splitlines()) for path in (ours, theirs)]
    assert lines[0] == lines[1]
