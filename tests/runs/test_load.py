"""Damaged files of a run are named by whatever opens it."""

import shutil
from pathlib import Path

import pytest

from irqlora_jax import hf
from irqlora_jax.config import Config
from irqlora_jax.evaluate.results import identity
from irqlora_jax.files.small import read_json
from irqlora_jax.plan.measure import read_base_shapes
from irqlora_jax.runs.load import load_run, scores
from tests.models import (
    TEMPLATE,
    assert_same,
    byte_tokenizer,
    gguf_tokens,
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
