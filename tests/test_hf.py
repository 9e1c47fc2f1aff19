"""Reading Hugging Face folders and adapters: exactness, and one clear sentence for every fault."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from irqlora_jax import hf
from irqlora_jax.config import LINEAR_NAMES, AdapterConfig, QuantConfig
from irqlora_jax.llama import Llama, LlamaConfig
from irqlora_jax.quant.qtensor import QTensor, quantize

# No width divides a block, no head count another, and every linear layer has its own shape.
CONFIG = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
LLAMA = LlamaConfig.from_dict(CONFIG)
PLAIN = QuantConfig(format="nf4", block_size=32, calibration="none")
Q1 = "model.layers.1.self_attn.q_proj.weight"
Tensors = dict[str, np.ndarray]


def make_tensors(
    dtype: Any = np.float32, tied: bool = False, config: dict[str, Any] = CONFIG
) -> Tensors:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (97, 40),
        "model.norm.weight": (40,),
    }
    if not tied:
        shapes["lm_head.weight"] = (97, 40)
    for i in range(3):
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (40,)
        shapes[f"model.layers.{i}.post_attention_layernorm.weight"] = (40,)
        for name, shape in LlamaConfig.from_dict(config).linear_shapes.items():
            block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            shapes[f"model.layers.{i}.{block}.{name}.weight"] = shape
    return {name: rng.normal(0, 0.05, shape).astype(dtype) for name, shape in shapes.items()}


def write_folder(
    folder: Path, tensors: Tensors, config: dict[str, Any] | None = None, shards: int = 1
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    size = math.ceil(len(names) / shards)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i * size : (i + 1) * size]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


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
    tensors = make_tensors()
    single, config = hf.load_base(write_folder(tmp_path / "a", tensors), quant)
    sharded, _ = hf.load_base(str(write_folder(tmp_path / "b", tensors, shards=4)), quant)
    assert config == LLAMA
    assert_same(single, sharded)


# All linear layers alike, so that ICQ is compiled for one shape alone.
SQUARE = CONFIG | {"intermediate_size": 40, "num_key_value_heads": 4, "head_dim": 10}


@pytest.mark.parametrize(
    ("quant", "config"),
    [
        (PLAIN, CONFIG),
        (QuantConfig(format="int3", block_size=16, calibration="none"), CONFIG),
        (QuantConfig(format="nf2", block_size=32, search_steps=3), SQUARE),
    ],
    ids=["nf4-none", "int3-none", "nf2-icq"],
)
def test_every_linear_layer_is_what_quantize_makes_of_it_alone(
    tmp_path: Path, quant: QuantConfig, config: dict[str, Any]
) -> None:
    tensors = make_tensors(ml_dtypes.bfloat16, config=config)
    base, _ = hf.load_base(write_folder(tmp_path, tensors, config), quant)
    assert len(linears(base)) == 7
    for name, stacked in linears(base):
        assert isinstance(stacked, QTensor)
        for i in range(3):
            matrix = jnp.asarray(tensors[f"model.layers.{i}.{name}.weight"], jnp.float32)
            alone = quantize(matrix, quant)
            assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), alone)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("quant", [None, QuantConfig(format="none"), PLAIN])
def test_what_is_not_quantized_keeps_the_numbers_and_the_type_of_the_file(
    tmp_path: Path, dtype: Any, quant: QuantConfig | None
) -> None:
    tensors = make_tensors(dtype)
    base, _ = hf.load_base(write_folder(tmp_path, tensors), quant)
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


def test_the_tree_is_the_one_that_the_model_makes_itself(tmp_path: Path) -> None:
    base, config = hf.load_base(write_folder(tmp_path, make_tensors()), None)
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    fresh = jax.eval_shape(Llama(config).init, jax.random.key(0), tokens)["base"]
    assert jax.tree.map(jnp.shape, base) == jax.tree.map(jnp.shape, fresh)


def test_tied_embeddings_have_no_head(tmp_path: Path) -> None:
    config = CONFIG | {"tie_word_embeddings": True}
    tensors = make_tensors(tied=True)
    base, _ = hf.load_base(write_folder(tmp_path / "a", tensors, config), PLAIN)
    assert "lm_head" not in base
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    repeated, _ = hf.load_base(write_folder(tmp_path / "b", tensors, config), PLAIN)
    assert_same(base, repeated)


def test_old_rotary_tables_are_ignored(tmp_path: Path) -> None:
    tensors = make_tensors()
    plain, _ = hf.load_base(write_folder(tmp_path / "a", tensors), None)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)
    old, _ = hf.load_base(write_folder(tmp_path / "b", tensors), None)
    assert_same(plain, old)


@pytest.mark.parametrize("show", [True, False])
def test_the_bar_is_shown_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], show: bool
) -> None:
    hf.load_base(write_folder(tmp_path, make_tensors()), None, progress=show)
    shown = capsys.readouterr().err
    assert ("100%" in shown) == show
    assert show or not shown


# --- faults of a folder ---------------------------------------------------------------------------


def edit(change: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = make_tensors()
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def edit_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(json.dumps(CONFIG | changes)) and None


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
    write_folder(folder, make_tensors(), shards=3)
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
        edit_config(model_type="mistral"),
        ValueError,
        ["model_type", "mistral", "llama"],
    ),
    "a word for a number": (edit_config(hidden_size="40"), ValueError, ["hidden_size", "'40'"]),
    "quantized already": (
        edit_config(quantization_config={"bits": 4}),
        ValueError,
        ["quantized already"],
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
    folder = write_folder(tmp_path / "model", make_tensors())
    spoil(folder)
    with pytest.raises(error) as raised:
        hf.load_base(folder, PLAIN)
    assert type(raised.value) is error
    for word in [str(folder), *words]:
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)


def test_faults_without_a_quantizer_are_found_too(tmp_path: Path) -> None:
    put(Q1, math.nan)(write_folder(tmp_path, make_tensors()))
    with pytest.raises(ValueError, match=Q1):
        hf.load_base(tmp_path, None)


# --- the hub --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", ["/no/such/folder", "./no/such", "../base", "nowhere", Path("owner/name"), "a/b/c"]
)
def test_a_missing_folder_is_not_looked_for_on_the_hub(
    source: str | Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        hf.load_base(source, None)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    write_folder(tmp_path, make_tensors())
    with pytest.raises(NotADirectoryError, match=r"model\.safetensors'.*a file.*folder"):
        hf.load_base(tmp_path / "model.safetensors", None)


def hub_errors() -> dict[str, tuple[Exception, str]]:
    from huggingface_hub import errors

    leak = "Illegal header value b'Bearer hf_secret'"

    def made(kind: type[Exception]) -> Exception:
        return kind.__new__(kind, leak)  # their __init__ needs a response of the HTTP client

    return {
        "gated": (made(errors.GatedRepoError), "license.*hf auth login"),
        "unknown": (made(errors.RepositoryNotFoundError), "neither a local folder.*private"),
        "offline": (made(errors.LocalEntryNotFoundError), "not be reached.*local folder"),
        "bad header": (RuntimeError(leak), "not be reached.*local folder"),
    }


@pytest.mark.parametrize("case", ["gated", "unknown", "offline", "bad header"])
def test_a_hub_that_does_not_give_is_one_sentence_without_the_token(
    monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    error, pattern = hub_errors()[case]

    def refuse(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=pattern) as raised:
        hf.snapshot("owner/name")
    assert "owner/name" in str(raised.value)
    assert "secret" not in str(raised.value)
    assert raised.value.__cause__ is None
    assert raised.value.__context__ is None


def test_of_a_model_on_the_hub_only_what_is_read_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def fetch(repo: str, *, allow_patterns: list[str]) -> str:
        asked.update(repo=repo, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert hf.snapshot("meta-llama/Llama-3.2-1B") == tmp_path
    assert asked["repo"] == "meta-llama/Llama-3.2-1B"
    wanted = [
        *("config.json", "model.safetensors", "model-00001-of-00002.safetensors"),
        *("model.safetensors.index.json", "tokenizer.json", "tokenizer.model"),
        *("tokenizer_config.json", "chat_template.jinja"),
    ]
    unwanted = ["pytorch_model.bin", "original/consolidated.00.pth", "consolidated.safetensors"]
    patterns = asked["patterns"]
    assert list(filter_repo_objects(wanted + unwanted, allow_patterns=patterns)) == wanted


# --- tokenizers -----------------------------------------------------------------------------------


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "left": 1, "right": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_tokenizer_is_read_from_its_folder(tmp_path: Path) -> None:
    write_folder(tmp_path, make_tensors())
    write_tokenizer(tmp_path)
    assert hf.load_tokenizer(tmp_path)("right left up")["input_ids"] == [2, 1, 0]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, make_tensors())
    with pytest.raises(FileNotFoundError, match=r"no tokenizer \(tokenizer.json"):
        hf.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "hint"), [("tokenizer.json", "cannot be read"), ("tokenizer.model", "sentencepiece")]
)
def test_a_broken_tokenizer_is_refused(tmp_path: Path, name: str, hint: str) -> None:
    write_folder(tmp_path, make_tensors())
    (tmp_path / name).write_text("?")
    with pytest.raises(ValueError, match=hint) as raised:
        hf.load_tokenizer(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_importing_does_not_load_what_reading_a_folder_does_not_need() -> None:
    heavy = ("transformers", "huggingface_hub", "datasets", "torch", "jsonargparse")
    code = f"import sys, irqlora_jax.hf; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- adapters -------------------------------------------------------------------------------------

TARGETS = ("q_proj", "v_proj", "down_proj")
LORA = Llama(LLAMA, AdapterConfig(method="lora", rank=4, alpha=8.0, targets=TARGETS))
IEC = Llama(LLAMA, AdapterConfig(method="iec", rank=4, alpha=8.0, targets=TARGETS))
MODELS = {"lora": LORA, "iec": IEC}
PREFIX = "base_model.model.model.layers"
A0 = f"{PREFIX}.0.self_attn.q_proj.lora_A.weight"
SCALE0 = f"{PREFIX}.0.self_attn.q_proj.lora_A_scale"
PEFT_CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["v_proj", "q_proj", "down_proj"],
    "bias": "none",
    "rank_pattern": {},
    "lora_dropout": 0.1,
}


def make_adapter(scalars: float | None = None) -> Tensors:
    rng = np.random.default_rng(1)
    tensors = {}
    for i in range(3):
        for name in TARGETS:
            out_features, in_features = LLAMA.linear_shapes[name]
            stem = f"{PREFIX}.{i}.{'mlp' if name == 'down_proj' else 'self_attn'}.{name}"
            tensors[f"{stem}.lora_A.weight"] = rng.normal(size=(4, in_features))
            tensors[f"{stem}.lora_B.weight"] = rng.normal(size=(out_features, 4))
            if scalars is not None:
                tensors[f"{stem}.lora_A_scale"] = np.full(1, scalars * (i + 1))
                tensors[f"{stem}.lora_B_scale"] = np.full(1, -scalars * (i + 1))
    return {name: value.astype(np.float32) for name, value in tensors.items()}


def write_adapter(
    folder: Path, tensors: Tensors, config: dict[str, Any] | None = PEFT_CONFIG
) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("model", [LORA, IEC], ids=["lora", "iec"])
def test_a_plain_pair_loads_with_both_scalars_zero(tmp_path: Path, model: Llama) -> None:
    tensors = make_adapter()
    adapters = hf.load_adapter(write_adapter(tmp_path, tensors), model)
    fresh = model.init_adapters(jax.random.key(0))
    assert jax.tree.structure(adapters) == jax.tree.structure(fresh)
    assert jax.tree.map(jnp.shape, adapters) == jax.tree.map(jnp.shape, fresh)
    for i in range(3):
        for name in TARGETS:
            block = "mlp" if name == "down_proj" else "self_attn"
            layer = adapters["layers"][block][name]
            for leaf in ("lora_A", "lora_B"):
                expected = tensors[f"{PREFIX}.{i}.{block}.{name}.{leaf}.weight"]
                np.testing.assert_array_equal(layer[leaf][i], expected)
            if model is IEC:
                assert layer["beta1"][i] == layer["beta2"][i] == 0


@pytest.mark.parametrize("which", ["init", "final"])
def test_an_adapter_of_the_released_code_loads(golden: Path, which: str) -> None:
    folder = golden / "irqlora_reference"
    file = folder / f"adapter_{which}.safetensors"
    config = LlamaConfig.from_dict(json.loads((folder / "base" / "config.json").read_text()))
    model = Llama(config, AdapterConfig(method="iec", rank=16, alpha=16.0))
    adapters = hf.load_adapter(file, model)
    fresh = model.init_adapters(jax.random.key(0))
    assert jax.tree.structure(adapters) == jax.tree.structure(fresh)
    tensors = load_file(file)
    seen = 0
    for name in LINEAR_NAMES:
        path = hf.linear_path(name)
        for i in range(2):
            for leaf, value in adapters["layers"][path[0]][path[1]].items():
                expected = tensors[hf.adapter_name(path, i, leaf)]
                np.testing.assert_array_equal(value[i], expected.reshape(value.shape[1:]))
                seen += 1
                if leaf.startswith("beta"):
                    assert (float(value[i]) != 0) == (which == "final")
    assert seen == len(tensors)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace("lora_A_scale", "lora_default_A_scale"),
        lambda name: name.replace("_scale", "_scale.default"),
    ],
    ids=["factors", "scalars", "scalars at the end"],
)
def test_the_name_of_the_adapter_may_stand_inside(
    tmp_path: Path, rename: Callable[[str], str]
) -> None:
    tensors = make_adapter(scalars=0.5)
    plain = hf.load_adapter(write_adapter(tmp_path / "a", tensors), IEC)
    renamed = {rename(name): value for name, value in tensors.items()}
    assert_same(plain, hf.load_adapter(write_adapter(tmp_path / "b", renamed), IEC))
    beta1 = plain["layers"]["mlp"]["down_proj"]["beta1"]
    np.testing.assert_array_equal(beta1, np.float32([0.5, 1.0, 1.5]))


def test_a_file_on_its_own_and_scalars_of_zero_serve_plain_lora(tmp_path: Path) -> None:
    pair = hf.load_adapter(write_adapter(tmp_path / "a", make_adapter()), LORA)
    zero = write_adapter(tmp_path / "b", make_adapter(scalars=0.0), config=None)
    assert_same(pair, hf.load_adapter(zero / "adapter_model.safetensors", LORA))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_adapter_takes_the_type_of_the_configuration(tmp_path: Path, dtype: Any) -> None:
    halves = {name: value.astype(np.float16) for name, value in make_adapter().items()}
    adapter = AdapterConfig(method="iec", rank=4, alpha=8.0, targets=TARGETS, dtype=dtype)
    adapters = hf.load_adapter(write_adapter(tmp_path, halves), Llama(LLAMA, adapter))
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype(dtype)}
    expected = halves[A0].astype(np.float32).astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(adapters["layers"]["self_attn"]["q_proj"]["lora_A"][0], expected)


CONFIG_FAULTS = {
    "rank": ({"r": 8}, ["r = 8", "adapter.rank = 4"]),
    "rank of PEFT's default": ({"r": None}, ["r = None", "adapter.rank = 4"]),
    "alpha": ({"lora_alpha": 16}, ["lora_alpha = 16", "adapter.alpha = 8"]),
    "targets": (
        {"target_modules": ["q_proj", "v_proj"]},
        ["target_modules = q_proj, v_proj,", "adapter.targets = down_proj, q_proj, v_proj"],
    ),
    "all targets": (
        {"target_modules": "all-linear"},
        ["gate_proj", "adapter.targets = down_proj, q_proj, v_proj"],
    ),
    "another method": ({"peft_type": "LOHA"}, ["peft_type = 'LOHA'", "'LORA'"]),
    "another scale": ({"use_rslora": True}, ["use_rslora = True", "False"]),
    "DoRA": ({"use_dora": True}, ["use_dora = True", "False"]),
    "ranks by layer": ({"rank_pattern": {"q_proj": 2}}, ["rank_pattern", "q_proj"]),
    "alphas by layer": ({"alpha_pattern": {"q_proj": 2}}, ["alpha_pattern", "q_proj"]),
    "a changed base": ({"init_lora_weights": "pissa"}, ["init_lora_weights = 'pissa'"]),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_an_adapter_config_that_says_something_else_is_refused(tmp_path: Path, fault: str) -> None:
    changes, words = CONFIG_FAULTS[fault]
    folder = write_adapter(tmp_path, make_adapter(), PEFT_CONFIG | changes)
    with pytest.raises(ValueError, match=r"adapter_config\.json") as raised:
        hf.load_adapter(folder, LORA)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("targets", [".*(q_proj|v_proj|down_proj)", ["self_attn.q_proj", *TARGETS]])
def test_targets_may_be_written_in_other_ways(tmp_path: Path, targets: str | list[str]) -> None:
    folder = write_adapter(tmp_path, make_adapter(), PEFT_CONFIG | {"target_modules": targets})
    assert "down_proj" in hf.load_adapter(folder, LORA)["layers"]["mlp"]


def change_adapter(change: Callable[[Tensors], Any], scalars: float | None = None) -> Tensors:
    tensors = make_adapter(scalars)
    change(tensors)
    return tensors


DORA0 = f"{PREFIX}.0.self_attn.q_proj.lora_magnitude_vector"
ADAPTER_FAULTS: dict[str, tuple[Tensors, str, list[str]]] = {
    "missing": (change_adapter(lambda t: t.pop(A0)), "lora", ["no tensor", A0]),
    "missing scalar": (
        change_adapter(lambda t: t.pop(SCALE0), 0.5),
        "iec",
        ["no tensor", SCALE0],
    ),
    "extra": (
        change_adapter(lambda t: t.update({DORA0: np.ones(56, np.float32)})),
        "lora",
        ["do not belong", DORA0],
    ),
    "extra layer": (
        change_adapter(lambda t: t.update({A0.replace("layers.0", "layers.3"): t[A0].copy()})),
        "lora",
        ["3-layer", "layers.3"],
    ),
    "two adapters": (
        change_adapter(lambda t: t.update({A0.replace("A.", "A.default."): t[A0].copy()})),
        "lora",
        ["several adapters"],
    ),
    "rank": (
        change_adapter(lambda t: t.update({A0: np.ones((8, 40), np.float32)})),
        "lora",
        [A0, "(8, 40)", "(4, 40)", "adapter.rank = 4"],
    ),
    "type": (
        change_adapter(lambda t: t.update({A0: np.ones((4, 40), np.int32)})),
        "lora",
        [A0, "I32", "float32, bfloat16, float16"],
    ),
    "NaN": (
        change_adapter(lambda t: t.update({A0: np.full((4, 40), np.nan, np.float32)})),
        "lora",
        [A0, "NaN"],
    ),
    "two numbers for a scalar": (
        change_adapter(lambda t: t.update({SCALE0: np.ones(2, np.float32)}), 0.5),
        "iec",
        [SCALE0, "(2,)", "(1,)"],
    ),
    "scalars for plain LoRA": (make_adapter(0.5), "lora", ["_scale is not 0", "iec, not lora"]),
}


@pytest.mark.parametrize("fault", ADAPTER_FAULTS)
def test_an_adapter_with_a_fault_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    tensors, method, words = ADAPTER_FAULTS[fault]
    folder = write_adapter(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors") as raised:
        hf.load_adapter(folder, MODELS[method])
    for word in words:
        assert word in str(raised.value)


def test_adapters_that_are_not_there_or_not_safe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such adapter"):
        hf.load_adapter(tmp_path / "nowhere", LORA)
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        hf.load_adapter(tmp_path, LORA)
    (tmp_path / "adapter_model.bin").write_text("x")
    with pytest.raises(ValueError, match=r"pickle.*safe_serialization=True"):
        hf.load_adapter(tmp_path, LORA)
    with pytest.raises(ValueError, match=r"adapter_model\.bin: accepted is a \.safetensors file"):
        hf.load_adapter(tmp_path / "adapter_model.bin", LORA)
    (tmp_path / "adapter_model.safetensors").write_text("x")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        hf.load_adapter(tmp_path, LORA)
    with pytest.raises(ValueError, match=r"model\.adapter = None"):
        hf.load_adapter(tmp_path, Llama(LLAMA))
