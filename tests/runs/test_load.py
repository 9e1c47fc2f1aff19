"""Damaged files of a run are named by whatever opens it."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax import hf
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.config import Config
from irqlora_jax.evaluate.results import identity
from irqlora_jax.files.small import read_json
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import stacks
from irqlora_jax.plan.measure import read_base_shapes
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.runs import load
from irqlora_jax.runs.load import Run, load_run, scores, unpacked
from tests.models import (
    NARROW,
    TEMPLATE,
    assert_same,
    byte_tokenizer,
    gguf_tokens,
    random_adapters,
    random_base,
    tiny_llama,
    write_gguf,
    write_model,
    write_run,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("written") / "run")


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("content", ["", "\0\0\0", "{", "[]", "3"])
def test_damaged_files_are_named(folder: Path, content: str) -> None:
    for name in ("config.json", "tokenizer/tokenizer.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match=name) as error:
            load_run(folder)
        assert "\n" not in str(error.value)
        (folder / name).write_text(text)
    assert load_run(folder).step == 3


@pytest.mark.parametrize("name", ["config.json", "tokenizer/tokenizer_config.json"])
def test_a_run_without_a_file_is_no_other_model(folder: Path, name: str) -> None:
    """Without these, the base alone or another tokenizer would be used in silence."""
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}: no such file"):
        load_run(folder)


@pytest.mark.parametrize("content", ["", "\0\0\0", "{", "{}", "3", '[{"loss": 3}]', "[3]"])
def test_damaged_scores_are_named(folder: Path, content: str) -> None:
    assert scores(folder) == {}
    (folder / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results.json: "):
        scores(folder)
    (folder / "results.json").unlink()
    (folder / "eval-mmlu.json").write_text("[")
    with pytest.raises(ValueError, match=r"eval-mmlu.json: not valid JSON"):
        scores(folder)


def test_a_gguf_file_is_a_model_like_its_folder(tmp_path: Path) -> None:
    """Loaded, planned, exported; the file itself is what names it in results."""
    file = tmp_path / "model.gguf"
    llama = tiny_llama(vocab_size=258, bos_token_id=0, eos_token_ids=(1,))
    meant = write_gguf(file, llama, **gguf_tokens(byte_tokenizer(template=TEMPLATE)))
    folder = write_model(tmp_path / "folder", llama, meant, dtype="float32")
    byte_tokenizer(template=TEMPLATE).save_pretrained(folder)
    found, expected = load_run(file), load_run(folder)
    assert found.model == expected.model
    assert_same(found.variables, expected.variables)
    assert found.tokenizer("12!")["input_ids"] == expected.tokenizer("12!")["input_ids"]
    planned = [read_base_shapes(Config(str(model), "run")) for model in (file, folder)]
    assert planned[0] == planned[1]
    before = identity(found, False)
    file.write_bytes(file.read_bytes() + b"0")
    assert identity(found, False) != before
    out = hf.export_merged(file, tmp_path / "merged")
    assert read_json(out / "generation_config.json")["eos_token_id"] == 1
    assert_same(load_run(out).variables, expected.variables)


@pytest.mark.parametrize("each_layer", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dense_weights_compute_what_packed_ones_do(
    written: Path, dtype: str, each_layer: bool
) -> None:
    run = load_run(written, compute_dtype=dtype)
    dense = unpacked(run, each_layer=each_layer)
    leaves = jax.tree.leaves(dense.variables["base"], is_leaf=lambda x: isinstance(x, QTensor))
    assert not any(isinstance(leaf, QTensor) for leaf in leaves)
    depth = run.model.config.num_hidden_layers
    found = {name: len(each) for name, each in stacks(dense.variables["base"], depth).items()}
    single = {f"layers_{layer}": 1 for layer in range(depth)}
    assert found == (single if each_layer else {"layers": depth})
    for name, layers in found.items():
        weight = dense.variables["base"][name]["mlp"]["up_proj"]["weight"]
        assert weight.dtype == dtype and weight.ndim == 3 and len(weight) == layers
    assert dense == dataclasses.replace(run, variables=dense.variables)
    assert dense.variables["params"] is run.variables["params"]
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    one, other = (each.model.apply(each.variables, tokens) for each in (run, dense))
    np.testing.assert_allclose(one, other, atol=1e-5 if dtype == "float32" else 0.02)


def test_trained_scales_become_part_of_dense_weights(tmp_path: Path) -> None:
    adapter = AdapterConfig(method="lora", rank=2, targets=("q_proj", "down_proj"), scales=64)
    model = Llama(NARROW, adapter)
    base = random_base(NARROW, QuantConfig(format="nf3", calibration="none"))
    variables = {"params": random_adapters(model, 0.2), "base": base}
    run = Run(tmp_path, None, model, variables, None, None)
    dense = unpacked(run)
    leaves = jax.tree.leaves(dense.variables["base"], is_leaf=lambda x: isinstance(x, QTensor))
    assert not any(isinstance(leaf, QTensor) for leaf in leaves)
    assert set(dense.variables["params"]["layers"]["mlp"]["down_proj"]) == {"lora_A", "lora_B"}
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    one, other = (each.model.apply(each.variables, tokens) for each in (run, dense))
    np.testing.assert_allclose(one, other, atol=1e-5)
    fixed = Llama(NARROW, dense.model.adapter).apply({**dense.variables, "base": base}, tokens)
    assert np.abs(fixed - other).max() > 1e-3  # the scales matter


def test_weights_stay_packed_without_memory_or_on_another_device(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(written)
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(unpacked(run).variables["base"]))
    for memory, stays in ((2 * needed, False), (2 * needed - 2, True)):
        monkeypatch.setattr(load, "free_memory", lambda memory=memory: memory)
        assert (unpacked(run) is run) == stays
    monkeypatch.setattr(load, "free_memory", lambda: 2**60)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert unpacked(run) is run
