"""Reading Hugging Face folders: exactness, and one clear sentence for every fault."""

import dataclasses
import json
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from irqlora_jax import hf, messages
from irqlora_jax.base import make
from irqlora_jax.base.source import _find_weights
from irqlora_jax.files.tensors import read_ahead, read_into
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.calibrations.icq import IcqOptions
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.runs.load import read_architecture
from tests import models
from tests.models import (
    NARROW,
    assert_same,
    random_tensors,
    word_tokenizer,
    write_config,
    write_model,
)

LLAMA = dataclasses.replace(models.LLAMA, num_hidden_layers=3)
PLAIN = QuantConfig(format="nf4", block_size=32, calibration="none")
Q1 = "model.layers.1.self_attn.q_proj.weight"
Q2 = "model.layers.2.self_attn.q_proj.weight"
Tensors = dict[str, np.ndarray]


def linears(base: dict[str, Any]) -> list[tuple[str, Any]]:
    """Name without the layer, and the stacked weight, of every linear layer."""
    layers = base["layers"]
    return [
        (f"{block}.{name}", layers[block][name]["weight"])
        for block in ("self_attn", "mlp")
        for name in layers[block]
    ]


@pytest.mark.parametrize("quant", [None, PLAIN])
def test_shards_and_a_single_file_are_the_same_model(
    tmp_path: Path, quant: QuantConfig | None
) -> None:
    tensors = random_tensors(LLAMA)
    single, config = hf.load_base(write_model(tmp_path / "a", LLAMA, tensors), quant)
    sharded, _ = hf.load_base(str(write_model(tmp_path / "b", LLAMA, tensors, shards=4)), quant)
    assert config == LLAMA
    assert_same(single, sharded)


@pytest.mark.parametrize(
    ("quant", "llama"),
    [
        (PLAIN, LLAMA),
        (QuantConfig(format="int3", block_size=16, calibration="none"), LLAMA),
        (QuantConfig(format="nf2", block_size=32, icq=IcqOptions(steps=3)), NARROW),
    ],
    ids=["nf4-none", "int3-none", "nf2-icq"],
)
def test_every_linear_layer_is_what_quantize_makes_of_it_alone(
    tmp_path: Path, quant: QuantConfig, llama: LlamaConfig
) -> None:
    tensors = random_tensors(llama, ml_dtypes.bfloat16)
    base, _ = hf.load_base(write_model(tmp_path, llama, tensors), quant)
    assert len(linears(base)) == 7
    for name, stacked in linears(base):
        assert isinstance(stacked, QTensor)
        for i in range(llama.num_hidden_layers):
            matrix = jnp.asarray(tensors[f"model.layers.{i}.{name}.weight"], jnp.float32)
            alone = quantize(matrix, quant)
            assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), alone)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("quant", [None, QuantConfig(format="none"), PLAIN])
def test_what_is_not_quantized_keeps_the_numbers_and_the_type_of_the_file(
    tmp_path: Path, dtype: Any, quant: QuantConfig | None
) -> None:
    tensors = random_tensors(LLAMA, dtype)
    base, _ = hf.load_base(write_model(tmp_path, LLAMA, tensors), quant)
    layers = base["layers"]
    loaded = {
        "model.embed_tokens.weight": base["embed_tokens"]["weight"],
        "model.norm.weight": base["norm"]["weight"],
        "lm_head.weight": base["lm_head"]["weight"],
    }
    for i in range(3):
        for name in ("input_layernorm", "post_attention_layernorm"):
            loaded[f"model.layers.{i}.{name}.weight"] = layers[name]["weight"][i]
        if quant is not PLAIN:
            for name, stacked in linears(base):
                loaded[f"model.layers.{i}.{name}.weight"] = stacked[i]
    assert len(loaded) == (len(tensors) if quant is not PLAIN else 9)
    for name, weight in loaded.items():
        assert weight.dtype == dtype
        np.testing.assert_array_equal(np.asarray(weight), tensors[name])


def test_the_tree_has_the_shapes_of_the_model(tmp_path: Path) -> None:
    base, config = hf.load_base(write_model(tmp_path, LLAMA), None)
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    fresh = jax.eval_shape(Llama(config).init, jax.random.key(0), tokens)["base"]
    assert jax.tree.map(jnp.shape, base) == jax.tree.map(jnp.shape, fresh)


def test_tied_embeddings_have_no_head(tmp_path: Path) -> None:
    tied = dataclasses.replace(LLAMA, tie_word_embeddings=True)
    tensors = random_tensors(tied)
    base, _ = hf.load_base(write_model(tmp_path / "a", tied, tensors), PLAIN)
    assert "lm_head" not in base
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    repeated, _ = hf.load_base(write_model(tmp_path / "b", tied, tensors), PLAIN)
    assert_same(base, repeated)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_head_of_its_own_is_used_although_the_config_ties_it(tmp_path: Path, dtype: Any) -> None:
    tied = dataclasses.replace(LLAMA, tie_word_embeddings=True)
    tensors = random_tensors(LLAMA, dtype)
    folder = write_model(tmp_path / "own", tied, tensors, tokenizer=word_tokenizer(43))
    plain, untied = hf.load_base(write_model(tmp_path / "untied", LLAMA, tensors), PLAIN)
    base, config = hf.load_base(folder, PLAIN)
    assert config == untied == LLAMA
    assert_same(base, plain)
    # The trainer and the plan know it before the weights are read; exports say it.
    assert read_architecture(folder, PLAIN) == LLAMA
    out = hf.export_merged(folder, tmp_path / "out")
    assert hf.read_config(out) == LLAMA
    np.testing.assert_array_equal(
        load_file(out / "model.safetensors")["lm_head.weight"], tensors["lm_head.weight"]
    )


def test_a_head_that_differs_in_one_value_or_in_its_type(tmp_path: Path) -> None:
    tied = dataclasses.replace(LLAMA, tie_word_embeddings=True)
    tensors = random_tensors(tied, np.float16)
    table = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = table.astype(np.float32)
    assert hf.load_base(write_model(tmp_path, tied, tensors), None)[1] == tied
    tensors["lm_head.weight"][-1, -1] += 1
    assert hf.load_base(write_model(tmp_path, tied, tensors), None)[1] == LLAMA
    tensors["lm_head.weight"] = table[:-1].copy()
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(42, 40\)"):
        hf.load_base(write_model(tmp_path, tied, tensors), None)
    tensors["lm_head.weight"] = table.astype(np.int8)
    with pytest.raises(ValueError, match=r"lm_head.weight has type I8"):
        hf.load_base(write_model(tmp_path, tied, tensors), None)


def edit_index(folder: Path, **changes: str) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] |= changes
    file.write_text(json.dumps(index))


def add_to_shard(file: Path, name: str, value: np.ndarray) -> None:
    tensors = load_file(file)
    save_file(tensors | {name: value}, file)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_tensor_in_two_shards_comes_from_the_one_in_weight_map(
    tmp_path: Path, number: int
) -> None:
    tensors = random_tensors(LLAMA)
    plain, _ = hf.load_base(write_model(tmp_path / "a", LLAMA, tensors), None)
    folder = write_model(tmp_path / "b", LLAMA, tensors, shards=3)
    files = [folder / f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    for file in files:
        if file != files[number - 1]:
            add_to_shard(file, "model.norm.weight", np.full(40, 7, np.float32))
    add_to_shard(files[number - 1], "model.norm.weight", tensors["model.norm.weight"])
    edit_index(folder, **{"model.norm.weight": files[number - 1].name})
    assert_same(hf.load_base(folder, None)[0], plain)


def test_a_tensor_in_two_shards_but_not_in_weight_map_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path, LLAMA, shards=3)
    for i in (1, 3):
        file = folder / f"model-{i:05}-of-00003.safetensors"
        add_to_shard(file, "model.layers.0.self_attn.rotary_emb.inv_freq", np.ones(5, np.float32))
    words = r"inv_freq is in model-00001-of-00003.safetensors and in model-00003-of-00003"
    with pytest.raises(ValueError, match=words):
        hf.load_base(folder, None)


@pytest.mark.parametrize("form", ["absolute", "..", "a/../.."])
def test_an_index_that_leaves_its_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    folder = write_model(tmp_path / "model", LLAMA, shards=3)
    write_model(tmp_path / "other", LLAMA)
    file = "other/model.safetensors"
    named = str(tmp_path / file) if form == "absolute" else f"{form}/{file}"
    edit_index(folder, **{Q1: named})
    monkeypatch.setattr("irqlora_jax.base.source.read_headers", lambda file: pytest.fail("opened"))
    with pytest.raises(ValueError) as error:
        hf.load_base(folder, None)
    assert f"index.json: lists '{named}': expected a file in its folder" in str(error.value)


def test_old_rotary_tables_are_ignored(tmp_path: Path) -> None:
    tensors = random_tensors(LLAMA)
    plain, _ = hf.load_base(write_model(tmp_path / "a", LLAMA, tensors), None)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)
    old, _ = hf.load_base(write_model(tmp_path / "b", LLAMA, tensors), None)
    assert_same(plain, old)


@pytest.mark.parametrize("show", [True, False])
def test_the_progress_is_shown_on_request(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    show: bool,
) -> None:
    """Reading is slowed, because a fast machine reads this model before the first line is due."""

    def slow_read(*args: Any) -> None:
        time.sleep(0.05)
        read_into(*args)

    monkeypatch.setattr(make, "read_into", slow_read)
    monkeypatch.setattr(messages, "QUIET", 0.01)
    hf.load_base(write_model(tmp_path, LLAMA), None, progress=show)
    shown = capsys.readouterr().err
    assert ("weights, 00:0" in shown) == show
    assert show or not shown


# --- faults of a folder ---------------------------------------------------------------------------


def edit(change: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = random_tensors(LLAMA)
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def edit_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: write_config(folder, LLAMA, **changes) and None


def put(name: str, value: float) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].reshape(-1)[7] = value

    return edit(change)


def instead_of_weights(**files: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        for name, text in files.items():
            (folder / name.replace("_dot_", ".")).write_text(text)

    return apply


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def garble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a safetensors file")


def lose_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    write_model(folder, LLAMA, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()


def bad_index(text: str) -> Callable[[Path], None]:
    return instead_of_weights(**{"model_dot_safetensors_dot_index_dot_json": text})


FOLDER_FAULTS: dict[str, tuple[Callable[[Path], Any], type[Exception], list[str]]] = {
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        FileNotFoundError,
        ["no config.json"],
    ),
    "config is not JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        ValueError,
        ["config.json", "not valid JSON"],
    ),
    "config is a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        ValueError,
        ["config.json", "list", "object"],
    ),
    "another architecture": (
        edit_config(model_type="mixtral"),
        ValueError,
        ["model_type", "mixtral", "llama"],
    ),
    "a word for a number": (edit_config(hidden_size="40"), ValueError, ["hidden_size", "'40'"]),
    "quantized already": (
        edit_config(quantization_config={"bits": 4}),
        ValueError,
        ["already quantized"],
    ),
    "pickles": (
        instead_of_weights(pytorch_model_dot_bin="x"),
        ValueError,
        ["pytorch_model.bin", "pickles", "safe_serialization=True"],
    ),
    "pickles of another name": (
        instead_of_weights(consolidated_dot_pth="x"),
        ValueError,
        ["consolidated.pth", "pickles"],
    ),
    "no weights": (
        instead_of_weights(),
        FileNotFoundError,
        ["no weights", "model.safetensors", "model.safetensors.index.json"],
    ),
    "truncated": (truncate, ValueError, ["model.safetensors", "not a whole safetensors file"]),
    "garbled": (garble, ValueError, ["model.safetensors", "not a whole safetensors file"]),
    "missing tensor": (edit(lambda t: t.pop(Q1)), ValueError, ["no tensor", Q1]),
    "missing head": (
        edit(lambda t: t.pop("lm_head.weight")),
        ValueError,
        ["no tensor", "lm_head.weight"],
    ),
    "wrong shape": (
        edit(lambda t: t.update({Q1: t[Q1].T.copy()})),
        ValueError,
        [Q1, "(40, 56)", "(56, 40)"],
    ),
    "wrong type": (
        edit(lambda t: t.update({Q1: t[Q1].astype(np.int8)})),
        ValueError,
        [Q1, "I8", "float32, bfloat16, float16"],
    ),
    "layers of several types": (
        edit(lambda t: t.update({Q1: t[Q1].astype(np.float16)})),
        ValueError,
        [Q1, "float16", "model.layers.0.self_attn.q_proj.weight", "float32"],
    ),
    "NaN in a linear layer": (put(Q1, math.nan), ValueError, [Q1, "NaN"]),
    "infinity in a linear layer": (put(Q1, -math.inf), ValueError, [Q1, "infinite"]),
    "NaN in the embeddings": (
        put("model.embed_tokens.weight", math.nan),
        ValueError,
        ["model.embed_tokens.weight", "NaN"],
    ),
    "infinity in a norm": (
        put("model.layers.2.input_layernorm.weight", math.inf),
        ValueError,
        ["model.layers.2.input_layernorm.weight", "infinite"],
    ),
    "a bias": (
        edit(lambda t: t.update({"model.layers.0.mlp.up_proj.bias": np.ones(172, np.float32)})),
        ValueError,
        ["model.layers.0.mlp.up_proj.bias", "does not account"],
    ),
    "more layers than the config": (
        edit_config(num_hidden_layers=2),
        ValueError,
        ["model.layers.2.", "and 6 more", "does not account"],
    ),
    "fewer layers than the config": (
        edit_config(num_hidden_layers=4),
        ValueError,
        ["no tensor", "model.layers.3.", "and 6 more"],
    ),
    "missing shard": (
        lose_a_shard,
        FileNotFoundError,
        ["index.json", "model-00002-of-00003.safetensors"],
    ),
    "index is not JSON": (bad_index("]"), ValueError, ["index.json", "not valid JSON"]),
    "index without a map": (bad_index("{}"), ValueError, ["index.json", "weight_map"]),
}


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_a_folder_with_a_fault_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    spoil, error, words = FOLDER_FAULTS[fault]
    folder = write_model(tmp_path / "model", LLAMA)
    spoil(folder)
    with pytest.raises(error) as raised:
        hf.load_base(folder, PLAIN)
    assert type(raised.value) is error
    for word in [str(folder), *words]:
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)


def test_faults_without_a_quantizer_are_found_too(tmp_path: Path) -> None:
    put(Q1, math.nan)(write_model(tmp_path, LLAMA))
    with pytest.raises(ValueError, match=Q1):
        hf.load_base(tmp_path, None)


def linear_weights(
    folder: Path, names: list[str], dtype: Any = np.float32
) -> Generator[np.ndarray, None, None]:
    return read_ahead(_find_weights(folder), names, dtype)


def truncate_all(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:64])


@pytest.fixture
def readers() -> Iterator[None]:
    """No thread of a reader is left behind."""
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.usefixtures("readers")
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_an_error_in_the_reading_thread_names_the_tensor(tmp_path: Path, dtype: Any) -> None:
    """The file is whole when it is looked at, and shorter when the thread comes to it."""
    folder = write_model(tmp_path, LLAMA, random_tensors(LLAMA, dtype), shards=4)
    weights = linear_weights(folder, [Q1, Q2])
    truncate_all(folder)
    with pytest.raises(ValueError, match=rf"safetensors: {Q1} cannot be read"):
        list(weights)


@pytest.mark.usefixtures("readers")
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_no_thread_is_left_when_the_quantizer_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("irqlora_jax.base.make.quantize", stop)
    with pytest.raises(error):
        hf.load_base(write_model(tmp_path, LLAMA), PLAIN)


@pytest.mark.usefixtures("readers")
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensors_read_ahead_are_those_of_the_file(tmp_path: Path, dtype: Any) -> None:
    tensors = random_tensors(LLAMA, dtype)
    folder = write_model(tmp_path, LLAMA, tensors)
    names = [name for name in tensors if "proj" in name]
    # Some are read ahead as a whole, and of the largest a part.
    sizes = {tensors[name].nbytes for name in names}
    assert min(sizes) < max(tensors[name].size for name in names) < max(sizes)
    for wanted in (np.float32, None):
        seen = 0
        for name, weight in zip(names, linear_weights(folder, names, wanted), strict=True):
            assert weight.dtype == (wanted or dtype)
            np.testing.assert_array_equal(weight, tensors[name])
            seen += 1
        assert seen == len(names) == 21
    assert list(linear_weights(folder, [])) == []
