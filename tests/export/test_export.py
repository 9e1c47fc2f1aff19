"""Exported weights: every number in its place."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from irqlora_jax import hf
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.qalora import QaloraOptions
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.calibrations.icq import IcqOptions
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.runs.load import load_run
from irqlora_jax.sharding import LINEAR_NAMES, MeshConfig
from tests.models import FLOAT, IEC, LLAMA, NARROW, PLAIN, assert_same, random_base, write_run

SOME = AdapterConfig(method="iec", rank=4, alpha=10.0, targets=("k_proj", "down_proj"))
LORA = AdapterConfig(method="lora", rank=3, alpha=4.5)
HALF = AdapterConfig(method="iec", rank=6, alpha=9.0, dtype="bfloat16")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 43, (2, 20)), jnp.int32)

NARROW_BLOCKS = QuantConfig(format="nf4", calibration="none", block_size=16)


@pytest.fixture(scope="module")
def plain_base() -> dict[str, Any]:
    return random_base(LLAMA, PLAIN)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, plain_base: dict[str, Any]) -> Path:
    """A run with two checkpoints. Tests leave it as it is."""
    return write_run(tmp_path_factory.mktemp("runs") / "run", base=plain_base, steps=(3, 5))


# A compiler may round level * scale + shift once or twice.
ULPS: dict[str, Any] = {"rtol": 3e-7, "atol": 3e-8}


@jax.jit
def _dequantize(weight: QTensor) -> jax.Array:
    return weight.dequantize()


def dequantize(weight: Any) -> np.ndarray:
    return np.asarray(_dequantize(weight) if isinstance(weight, QTensor) else weight)


def logits_of(model: Llama, params: Any, base: Any) -> np.ndarray:
    return np.asarray(jax.jit(model.apply)({"params": params, "base": base}, TOKENS))


def read(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of all shards; none may stand in two."""
    found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not found.keys() & part.keys()
        found |= part
    return found


def spread(n: int, size: int) -> np.ndarray:
    """Eq. 12 as a matrix [size, n], entry by entry."""
    g = math.gcd(n, size)
    matrix = np.zeros((size, n))
    for i in range(size):
        for j in range(n):
            matrix[i, j] = g / n if i // (size // g) == j // (n // g) else 0.0
    return matrix


def update(params: dict[str, Any], layer: int, adapter: AdapterConfig) -> np.ndarray:
    """alpha / rank * (B + beta2 E2) (A + beta1 E1), in float64."""
    get = lambda name: np.asarray(params[name][layer]).astype(np.float64)  # noqa: E731
    a, b = get("lora_A"), get("lora_B")
    if adapter.method == "iec":
        a = a + get("beta1") * spread(a.shape[1], a.shape[0])
        b = b + get("beta2") * spread(b.shape[1], b.shape[0])
    return adapter.alpha / adapter.rank * (b @ a)


def expected_shapes(llama: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """By the documentation of the format, not by our own tables."""
    hidden, table = (llama.hidden_size,), (llama.vocab_size, llama.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table}
    shapes["model.norm.weight"] = hidden
    if not llama.tie_word_embeddings:
        shapes["lm_head.weight"] = table
    for i in range(llama.num_hidden_layers):
        stem = f"model.layers.{i}"
        shapes[f"{stem}.input_layernorm.weight"] = hidden
        shapes[f"{stem}.post_attention_layernorm.weight"] = hidden
        for name, shape in llama.linear_shapes.items():
            block = "self_attn" if name[0] in "qkvo" else "mlp"
            shapes[f"{stem}.{block}.{name}.weight"] = shape
    return shapes


@pytest.mark.parametrize("kind", ["merged", "dequantized"])
def test_every_number_of_a_model(tmp_path: Path, run: Path, kind: Any) -> None:
    out = hf.export(hf.ExportConfig(str(run), str(tmp_path / "out"), kind))
    loaded, found = load_run(run), read(out)
    assert {name: value.shape for name, value in found.items()} == expected_shapes(LLAMA)
    assert {value.dtype for value in found.values()} == {np.dtype(np.float32)}
    base, adapters = loaded.variables["base"], loaded.variables["params"]
    np.testing.assert_array_equal(
        found["model.embed_tokens.weight"], base["embed_tokens"]["weight"]
    )
    np.testing.assert_array_equal(found["lm_head.weight"], base["lm_head"]["weight"])
    np.testing.assert_array_equal(found["model.norm.weight"], base["norm"]["weight"])
    for layer in range(2):
        norm = base["layers"]["input_layernorm"]["weight"][layer]
        np.testing.assert_array_equal(found[f"model.layers.{layer}.input_layernorm.weight"], norm)
        for name in LINEAR_NAMES:
            path = hf.linear_path(name)
            weight = dequantize(base["layers"][path[0]][name]["weight"])[layer]
            stored = found[f"model.layers.{layer}.{path[0]}.{name}.weight"]
            if kind == "dequantized":
                np.testing.assert_allclose(stored, weight, **ULPS)
            else:
                more = update(adapters["layers"][path[0]][name], layer, IEC)
                assert np.abs(more).max() > 0.1
                np.testing.assert_allclose(stored, weight + more, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["merged", "adapter", "quantized"])
def test_a_model_that_is_split_over_devices_is_exported_alike(tmp_path: Path, kind: Any) -> None:
    llama = dataclasses.replace(LLAMA, hidden_size=64, intermediate_size=128, head_dim=16)
    how = AdapterConfig(method="qalora", rank=4, alpha=8.0, qalora=QaloraOptions(group=16))
    source = write_run(tmp_path / "run", llama, NARROW_BLOCKS, how)
    out = []
    for name, mesh in {"one": MeshConfig(data=1), "split": MeshConfig(1, 2, 2)}.items():
        asked = hf.ExportConfig(str(source), str(tmp_path / name), kind, mesh=mesh)
        out.append(read(hf.export(asked)))
    assert out[0].keys() == out[1].keys()
    for name, value in out[0].items():
        np.testing.assert_allclose(out[1][name], value, **ULPS, err_msg=name)


FORMATS = {
    "nf3": QuantConfig(format="nf3", calibration="none", block_size=32),
    "fp4": QuantConfig(format="fp4", calibration="none"),
    "int4": QuantConfig(format="int4", calibration="none"),
    "int2 symmetric": QuantConfig(format="int2", calibration="none", symmetric=True),
    "nf2 with ICQ": QuantConfig(format="nf2", icq=IcqOptions(steps=1)),
    "none": FLOAT,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_dequantized_as_the_model_does(tmp_path: Path, name: str) -> None:
    base = random_base(NARROW, FORMATS[name])
    folder = write_run(tmp_path / "base", NARROW, FORMATS[name], None, base=base)
    found = read(hf.export_dequantized(folder, tmp_path / "out"))
    for path in map(hf.linear_path, LINEAR_NAMES):
        weight = base["layers"][path[0]][path[1]]["weight"]
        assert isinstance(weight, QTensor) == (name != "none")
        dense = dequantize(weight)
        for layer in range(2):
            stored = found[hf.weight_name(path, layer)]
            np.testing.assert_allclose(stored, dense[layer], **ULPS)
            assert name != "none" or (stored == dense[layer]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_are_rounded_once(tmp_path: Path, run: Path, dtype: Any) -> None:
    exact = read(hf.export_merged(run, tmp_path / "a", dtype="float32"))
    out = hf.export_merged(run, tmp_path / "b", dtype=dtype)
    rounded = read(out)
    assert rounded.keys() == exact.keys()
    for name, value in rounded.items():
        assert value.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(value, exact[name].astype(jnp.dtype(dtype)))
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    with safe_open(out / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_model_keeps_the_type_of_the_original(tmp_path: Path) -> None:
    base = random_base(NARROW, PLAIN, ml_dtypes.bfloat16)
    folder = write_run(tmp_path / "run", NARROW, adapter=SOME, base=base)
    out = hf.export_dequantized(folder, tmp_path / "out")
    assert {value.dtype for value in read(out).values()} == {jnp.dtype("bfloat16")}
    assert {value.dtype for value in read(out / "adapter").values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("size", [1e-9, 2e-5, 1e-4, 1.0])
def test_shards(tmp_path: Path, run: Path, size: float) -> None:
    whole = read(hf.export_merged(run, tmp_path / "whole"))
    out = hf.export_merged(run, tmp_path / "out", shard_size=size)
    files = sorted(out.glob("*.safetensors"))
    if size == 1.0:
        assert [file.name for file in files] == ["model.safetensors"]
        assert not (out / "model.safetensors.index.json").exists()
    else:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        bytes_of = {name: value.nbytes for name, value in whole.items()}
        assert index["metadata"]["total_size"] == sum(bytes_of.values())
        assert index["metadata"]["total_parameters"] == sum(bytes_of.values()) // 4
        count = len(files)
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        assert [file.name for file in files] == names
        assert index["weight_map"] == {n: f.name for f in files for n in load_file(f)}
        for file in files:
            part = load_file(file)
            assert len(part) == 1 or sum(bytes_of[name] for name in part) <= size * 1e9
        assert count == (len(whole) if size == 1e-9 else count) > 1
    again = read(out)
    assert again.keys() == whole.keys()
    for name, value in again.items():
        np.testing.assert_array_equal(value, whole[name])


def test_a_merged_model_read_again_has_the_logits_of_the_run(tmp_path: Path, run: Path) -> None:
    loaded = load_run(run)
    logits = logits_of(loaded.model, loaded.variables["params"], loaded.variables["base"])
    base, config = hf.load_base(hf.export_merged(run, tmp_path / "out", shard_size=1e-4), None)
    assert config == LLAMA
    np.testing.assert_allclose(logits_of(Llama(config), {}, base), logits, rtol=0, atol=1e-5)


def test_tied_embeddings_are_written_once(tmp_path: Path) -> None:
    tied = dataclasses.replace(NARROW, tie_word_embeddings=True)
    folder = write_run(tmp_path / "run", tied, adapter=SOME)
    out = hf.export_merged(folder, tmp_path / "out")
    assert {name: value.shape for name, value in read(out).items()} == expected_shapes(tied)
    base, config = hf.load_base(out, None)
    assert config == tied and "lm_head" not in base


def test_a_model_folder_is_exported_in_another_type(tmp_path: Path, run: Path) -> None:
    first = hf.export_merged(run, tmp_path / "first")
    second = hf.export_merged(first, tmp_path / "second", dtype="bfloat16")
    exact, rounded = read(first), read(second)
    for name, value in rounded.items():
        np.testing.assert_array_equal(value, exact[name].astype(ml_dtypes.bfloat16))


# --- adapters -------------------------------------------------------------------------------------

PREFIX = "base_model.model.model.layers"


@pytest.mark.parametrize("adapter", [IEC, SOME, LORA, HALF], ids=["IEC", "some", "LoRA", "half"])
def test_the_folded_pair_is_the_same_update(
    tmp_path: Path, plain_base: dict[str, Any], adapter: AdapterConfig
) -> None:
    folder = write_run(tmp_path / "run", adapter=adapter, base=plain_base)
    loaded = load_run(folder)
    out = hf.export_adapter(folder, tmp_path / "out")
    found = load_file(out / "adapter_model.safetensors")
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(2):
        for name in adapter.targets:
            path = hf.linear_path(name)
            out_features, in_features = LLAMA.linear_shapes[name]
            stem = f"{PREFIX}.{layer}.{path[0]}.{name}"
            shapes[f"{stem}.lora_A.weight"] = (adapter.rank, in_features)
            shapes[f"{stem}.lora_B.weight"] = (out_features, adapter.rank)
            a, b = found[f"{stem}.lora_A.weight"], found[f"{stem}.lora_B.weight"]
            plain = adapter.alpha / adapter.rank * (b.astype(np.float64) @ a.astype(np.float64))
            params = loaded.variables["params"]["layers"][path[0]][name]
            np.testing.assert_allclose(plain, update(params, layer, adapter), rtol=0, atol=2e-6)
    assert {name: value.shape for name, value in found.items()} == shapes
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == adapter.rank and config["lora_alpha"] == adapter.alpha
    assert sorted(config["target_modules"]) == sorted(adapter.targets)
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")

    plain_model = Llama(
        LLAMA, AdapterConfig("lora", adapter.rank, adapter.alpha, targets=adapter.targets)
    )
    again = hf.load_adapter(out, plain_model)
    stacked = again["layers"]["mlp"]["down_proj"]["lora_B"]
    np.testing.assert_array_equal(stacked[1], found[f"{PREFIX}.1.mlp.down_proj.lora_B.weight"])


@pytest.mark.parametrize(
    ("adapter", "fold"), [(SOME, False), (HALF, False), (LORA, False), (LORA, True)]
)
def test_an_adapter_comes_back_bit_by_bit(
    tmp_path: Path, plain_base: dict[str, Any], adapter: AdapterConfig, fold: bool
) -> None:
    folder = write_run(tmp_path / "run", adapter=adapter, base=plain_base)
    loaded = load_run(folder)
    out = hf.export_adapter(folder, tmp_path / "out", fold=fold)
    again = hf.load_adapter(out, loaded.model)
    assert_same(again, loaded.variables["params"])


def test_scalars_have_the_names_and_shapes_of_the_released_code(tmp_path: Path, run: Path) -> None:
    out = hf.export_adapter(run, tmp_path / "out", fold=False)
    found = load_file(out / "adapter_model.safetensors")
    scalar = found[f"{PREFIX}.1.mlp.up_proj.lora_B_scale"]
    beta2 = load_run(run).variables["params"]["layers"]["mlp"]["up_proj"]["beta2"]
    np.testing.assert_array_equal(scalar, np.asarray(beta2)[1:2])
    assert len(found) == 4 * 7 * 2
    assert "PEFT ignores tensors" in (out / "README.md").read_text()


def test_the_base_that_an_adapter_names(tmp_path: Path, run: Path) -> None:
    def named(folder: Path) -> Any:
        config = json.loads((folder / "adapter_config.json").read_text())
        return config["base_model_name_or_path"]

    both = hf.export_dequantized(run, tmp_path / "both")
    assert named(both / "adapter") == str(both) and both.is_absolute()
    assert named(hf.export_adapter(run, tmp_path / "none")) is None
    given = hf.export_adapter(run, tmp_path / "given", base_model="me/base")
    assert named(given) == "me/base"
    hub = hf.export_dequantized(run, tmp_path / "hub", base_model="me/base")
    assert named(hub / "adapter") == "me/base"

    original = hf.export_dequantized(run, tmp_path / "original")
    for name, model, expected in (
        ("from-hub", "owner/name", "owner/name"),
        ("from-folder", str(original), str(original)),
        ("from-nowhere", str(tmp_path / "gone"), None),
    ):
        folder = write_run(tmp_path / f"run-{name}", NARROW, FLOAT, SOME, model=model)
        assert named(hf.export_adapter(folder, tmp_path / name)) == expected


def test_a_checkpoint_can_be_chosen(tmp_path: Path, run: Path) -> None:
    last = read(hf.export_adapter(run, tmp_path / "last"))
    third = read(hf.export_adapter(run, tmp_path / "third", checkpoint=3))
    fifth = read(hf.export_adapter(run, tmp_path / "fifth", checkpoint=5))
    for name, value in last.items():
        np.testing.assert_array_equal(value, fifth[name])
        assert (value != third[name]).all()
    with pytest.raises(FileNotFoundError, match="4"):
        hf.export_adapter(run, tmp_path / "fourth", checkpoint=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifth", "last", "third"]
