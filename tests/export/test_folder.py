"""Exported folders: what travels along, a whole folder or none, a sentence for every fault."""

import errno
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import yaml

from irqlora_jax import hf
from irqlora_jax.config import parse_flags
from irqlora_jax.files import tensors
from irqlora_jax.model.llama import Llama
from irqlora_jax.runs.load import load_run
from irqlora_jax.runs.lock import LOCK_FILE, locked
from tests.models import NARROW, PLAIN, ROOT, TEMPLATE, random_base, word_tokenizer, write_run


@pytest.fixture(scope="module")
def plain_base() -> dict[str, Any]:
    return random_base(NARROW, PLAIN)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, plain_base: dict[str, Any]) -> Path:
    """A run with two checkpoints. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return write_run(folder, NARROW, base=plain_base, steps=(3, 5))


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory, plain_base: dict[str, Any]) -> Path:
    """What `irqlora quantize` leaves."""
    folder = tmp_path_factory.mktemp("bases") / "base"
    return write_run(folder, NARROW, adapter=None, base=plain_base)


# --- a base alone ---------------------------------------------------------------------------------


def test_a_base_alone_has_no_adapter(tmp_path: Path, base_folder: Path) -> None:
    merged = hf.export_merged(base_folder, tmp_path / "merged")
    dequantized = hf.export_dequantized(base_folder, tmp_path / "dequantized")
    files = {path.name for path in merged.iterdir()}
    assert files == {path.name for path in dequantized.iterdir()} and "adapter" not in files
    weights = "model.safetensors"
    assert (merged / weights).read_bytes() == (dequantized / weights).read_bytes()
    with pytest.raises(ValueError, match="base': has no adapter; expected"):
        hf.export_adapter(base_folder, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists() and not list(tmp_path.glob("*.part"))


# --- what travels along ---------------------------------------------------------------------------


def test_tokenizer_template_and_generation_settings(tmp_path: Path, base_folder: Path) -> None:
    out = hf.export_merged(base_folder, tmp_path / "out")
    tokenizer = hf.load_tokenizer(out)
    assert tokenizer("w7 w3 nothing")["input_ids"] == [7, 3, 0]
    chat = [{"role": "user", "content": "w4"}]
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "w4 "
    written = json.loads((out / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": 2}
    assert hf.read_config(out) == NARROW


def test_generation_settings_of_the_original_stay(
    tmp_path: Path, plain_base: dict[str, Any]
) -> None:
    folder = write_run(tmp_path / "base", NARROW, adapter=None, base=plain_base)
    stored = folder / "tokenizer" / "generation_config.json"
    settings = {"eos_token_id": [2, 5], "temperature": 0.6, "do_sample": True}
    stored.write_text(json.dumps(settings))
    out = hf.export_merged(folder, tmp_path / "out")
    assert json.loads((out / "generation_config.json").read_text()) == settings


def test_a_model_ends_with_every_token_that_one_of_its_files_names(tmp_path: Path) -> None:
    """config.json, generation_config.json, the tokenizer, and the template's end of a turn."""
    template = (
        "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' <turn> ' }}{% endfor %}"
    )
    tokenizer = word_tokenizer(
        NARROW.vocab_size - 1,
        eos_token="w9",
        chat_template=template,
        extra_special_tokens=["<turn>"],
    )
    folder = write_run(tmp_path / "base", NARROW, adapter=None, tokenizer=tokenizer)
    (folder / "tokenizer" / "generation_config.json").write_text('{"eos_token_id": [5, null, 99]}')
    turn = NARROW.vocab_size - 1
    assert load_run(folder).model.config.eos_token_ids == (2, 5, 9, turn)
    out = hf.export_merged(folder, tmp_path / "out")
    for file in ("config.json", "generation_config.json"):
        assert json.loads((out / file).read_text())["eos_token_id"] == [2, 5, 9, turn]
    assert load_run(out).model.config.eos_token_ids == (2, 5, 9, turn)
    (out / "generation_config.json").write_text('{"eos_token_id": [{"id": 5}]}')
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id = .*: expected"):
        load_run(out)


def front_matter(folder: Path) -> tuple[dict[str, Any], str]:
    text = (folder / "README.md").read_text()
    start, front, body = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front), body


def test_cards(tmp_path: Path, run: Path) -> None:
    out = hf.export_dequantized(run, tmp_path / "out")
    alone = hf.export_adapter(run, tmp_path / "alone", checkpoint=3)
    front, body = front_matter(out)
    assert front["base_model"] == "somewhere/base" and front["library_name"] == "transformers"
    assert {"ir-qlora", "iec", "nf4"} <= set(front["tags"]) and "icq" not in front["tags"]
    assert 'PeftModel.from_pretrained(base, "out/adapter")' in body
    assert "rank 6" in body and "format nf4" in body and "| step | 5 |" in body
    front, body = front_matter(out / "adapter")
    assert front["library_name"] == "peft"
    assert 'AutoModelForCausalLM.from_pretrained("out")' in body
    assert "dequantized weights, on which it was trained" in body
    assert "| step | 3 |" in front_matter(alone)[1]
    for folder in (out, out / "adapter", alone):
        assert "Scores" not in (folder / "README.md").read_text()
        for file in [*folder.glob("*.json"), *folder.glob("*.md"), *folder.glob("*.jinja")]:
            if file.name != "adapter_config.json":
                assert str(tmp_path) not in file.read_text() and str(run) not in file.read_text()


def test_a_card_holds_what_was_measured_and_names_folders_without_their_path(
    tmp_path: Path, plain_base: dict[str, Any]
) -> None:
    model = str(tmp_path / "secret" / "llama")
    folder = write_run(tmp_path / "run", NARROW, base=plain_base, model=model, steps=(3, 5))
    config = json.loads((folder / "config.json").read_text())
    config["data"]["train"] = str(tmp_path / "secret" / "alpaca.json")
    rate = {"match": "*.lora_B", "factor": 0.5, "weight_decay": None}
    config["train"]["rates"] = [rate, {"match": "layers.0.*", "factor": None, "weight_decay": 0.0}]
    (folder / "config.json").write_text(json.dumps(config))
    row = {"model": "finetuned", "entropy": 3.7, "loss": 1.25, "accuracy": None, "bits": 4.38}
    (folder / "results.json").write_text(json.dumps([row]))
    result = {"accuracy": 0.416, "count": 57, "text": "x", "by_subject": {"law": 0.25}, "ok": True}
    (folder / "eval-mmlu.json").write_text(json.dumps(result))
    out = hf.export_merged(folder, tmp_path / "out", checkpoint=3)
    front, body = front_matter(out)
    assert front["base_model"] == "llama"
    assert "| model | entropy | loss | bits |\n| --- | --- | --- | --- |" in body
    assert "| finetuned | 3.7 | 1.25 | 4.38 |" in body
    assert "| mmlu | accuracy | 0.416 |\n| mmlu | count | 57 |\n" in body
    assert "law" not in body and "True |" not in body and "accuracy | bits" not in body
    assert '; rates `{"match": "*.lora_B", "factor": 0.5}`, `{"match": "layers.0.*", "w' in body
    assert "those of step 3" in body and "train alpaca.json" in body
    assert "secret" not in (out / "README.md").read_text()


def test_a_card_of_pairs_names_the_loss_and_every_source(
    tmp_path: Path, plain_base: dict[str, Any]
) -> None:
    folder = write_run(tmp_path / "run", NARROW, base=plain_base)
    config = json.loads((folder / "config.json").read_text())
    source = {"weight": 2.0, "format": "preference"}
    config["data"] |= {"format": "preference", "train": [{"path": "/secret/a.jsonl", **source}]}
    config["train"]["dpo"] = {"loss": "ipo", "beta": 0.3}
    (folder / "config.json").write_text(json.dumps(config))
    body = front_matter(hf.export_merged(folder, tmp_path / "out"))[1]
    assert "train a.jsonl (weight 2, format preference)" in body and "secret" not in body
    assert "| dpo | loss ipo; beta 0.3; label_smoothing 0.0 |" in body


# --- complete or absent ---------------------------------------------------------------------------


def full_disk(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


def fail_late(error: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The fifth tensor is not written."""
    write, count = tensors._write_array, 0

    def sometimes(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == 5:
            error()
        write(*args)

    monkeypatch.setattr(tensors, "_write_array", sometimes)


@pytest.mark.parametrize("kind", ["adapter", "merged", "dequantized"])
@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (full_disk, OSError, "output_dir = .*out'.*No space left"),
        (interrupt, KeyboardInterrupt, None),
    ],
    ids=["full disk", "Ctrl-C"],
)
def test_a_failure_in_the_middle_leaves_nothing(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, kind: Any,
    fault: Callable[..., None], error: type[BaseException], words: str | None,
) -> None:  # fmt: skip
    fail_late(fault, monkeypatch)
    config = hf.ExportConfig(str(run), str(tmp_path / "new" / "deep" / "out"), kind, progress=False)
    with pytest.raises(error, match=words) as raised:
        hf.export(config)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_failure_after_the_model_leaves_nothing(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        assert (tmp_path / "out.part" / "model.safetensors").is_file()
        assert not (tmp_path / "out").exists()
        raise RuntimeError("in the middle")

    monkeypatch.setattr("irqlora_jax.export.card.Card.text", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        hf.export_merged(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_too_little_room_is_seen_before_anything_is_written(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = hf.load_base(hf.export_merged(run, tmp_path / "first"), None)[0]
    adapters = load_run(run).variables["params"]
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves((weights, adapters)))
    shutil.rmtree(tmp_path / "first")
    usage = lambda _: type("Usage", (), {"free": needed - 1})  # noqa: E731
    monkeypatch.setattr("shutil.disk_usage", usage)
    monkeypatch.setattr(sys.modules["irqlora_jax.export.folder"], "save_model", interrupt)
    with pytest.raises(OSError, match=r"out': needs 0\.00 GB, 0\.00 GB are free"):
        hf.export_merged(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_there_already_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("x")
    for out in (full, full / "thesis.tex"):
        with pytest.raises(FileExistsError, match=f"output_dir = '{out}': exists; expected"):
            hf.export_merged(nowhere, out)
    with pytest.raises(OSError, match=r"thesis\.tex/out': cannot be written"):
        hf.export_merged(nowhere, full / "thesis.tex" / "out")
    with pytest.raises(FileNotFoundError, match=r"run = .*nowhere"):
        hf.export_merged(nowhere, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "thesis.tex"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder like /proc")
def test_a_place_where_not_even_root_may_write_is_refused(run: Path) -> None:
    with pytest.raises(OSError, match="output_dir = '/proc/out': cannot be written"):
        hf.export_merged(run, "/proc/out")


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path: Path, base_folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    hf.export_merged(base_folder, tmp_path / "empty")
    hf.export_merged(base_folder, tmp_path / "a" / "b" / "out")
    assert (tmp_path / "empty" / "model.safetensors").is_file()
    assert (tmp_path / "a" / "b" / "out" / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]


def test_a_kill_leaves_a_part_folder_in_which_the_next_export_starts_again(
    tmp_path: Path, base_folder: Path
) -> None:
    code = f"""
import os, signal
from irqlora_jax import hf
from irqlora_jax.files import tensors
tensors._write_array = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
hf.export_merged({str(base_folder)!r}, {str(tmp_path / "out")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["out.part"]
    (tmp_path / "out.part" / "more").mkdir()
    with locked(tmp_path / "out.part"), pytest.raises(BlockingIOError, match="writes there"):
        hf.export_merged(base_folder, tmp_path / "out")
    (tmp_path / "out.part" / LOCK_FILE).touch()  # as after a kill
    hf.export_merged(base_folder, tmp_path / "out")
    hf.export_merged(base_folder, tmp_path / "again" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out"]
    assert file_contents(tmp_path / "out") == file_contents(tmp_path / "again" / "out")


def file_contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_part_folder_of_somebody_else_is_left_alone(tmp_path: Path, base_folder: Path) -> None:
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "mine").touch()
    with pytest.raises(FileExistsError, match=r"out\.part exists and is of no export"):
        hf.export_merged(base_folder, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out.part").iterdir()] == ["mine"]


# --- bad input ------------------------------------------------------------------------------------


def test_numbers_that_a_type_cannot_hold_are_refused(
    tmp_path: Path, plain_base: dict[str, Any]
) -> None:
    large = plain_base | {"norm": {"weight": jnp.full(40, 1e5)}}
    folder = write_run(tmp_path / "base", NARROW, adapter=None, base=large)
    with pytest.raises(ValueError, match=r"dtype = 'float16': cannot hold .*model\.norm\.weight"):
        hf.export_merged(folder, tmp_path / "out", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert hf.export_merged(folder, tmp_path / "out", dtype="bfloat16").is_dir()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shard_size": 0.0}, "shard_size = 0.0"),
        ({"shard_size": math.nan}, "shard_size = nan"),
        ({"fold": False}, "fold = False: expected true with kind merged"),
        ({"kind": "dequantized", "fold": False}, "fold = False: .* kind dequantized"),
        ({"base_model": "me/base"}, "base_model = 'me/base': expected null with kind merged"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        hf.ExportConfig("run", "out", **options)


def test_the_options_of_the_command_line() -> None:
    parse = functools.partial(parse_flags, hf.ExportConfig, script="irqlora export")
    flags = ["--run=a", "--output_dir=b"]
    assert parse(flags) == hf.ExportConfig("a", "b")
    more = ["--kind=adapter", "--checkpoint=7", "--fold=false", "--dtype=bfloat16"]
    expected = hf.ExportConfig("a", "b", "adapter", "bfloat16", 7, False)
    assert parse(flags + more) == expected
    assert parse([*flags, "--checkpoint=best"]).checkpoint == "best"
    assert parse([*flags, "--kind=gguf", "--type=q8_0"]).type == "q8_0"
    with pytest.raises(ValueError, match="kind"):
        parse([*flags, "--kind=onnx"])


def test_a_model_without_an_adapter_has_none_to_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.adapter = None"):
        hf.save_adapter(tmp_path, Llama(NARROW), {})
    assert not list(tmp_path.iterdir())
