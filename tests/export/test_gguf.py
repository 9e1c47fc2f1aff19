"""GGUF files: read back here, every number in its place. tests/parity has llama.cpp."""

import dataclasses
import json
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.qalora import QaloraOptions
from irqlora_jax.export.folder import ExportConfig, export
from irqlora_jax.export.gguf import architecture_fields, save_gguf
from irqlora_jax.export.gguf_tokenizer import tokenizer_fields
from irqlora_jax.files.gguf import Gguf, read_gguf
from irqlora_jax.files.gguf_model import tensor_headers
from irqlora_jax.files.gguf_tokenizer import SPLITS, make_tokenizer
from irqlora_jax.model.config import RopeScaling
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.runs.load import load_run
from tests.models import (
    IEC,
    RELATIVES,
    STORIES,
    byte_tokenizer,
    needs_stories,
    quantize_base,
    random_base,
    tiny_llama,
    word_tokenizer,
    write_run,
)

MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("1", "9"), ("Ġ", "Ġ")]
TOKENIZER = byte_tokenizer(MERGES, "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}")
SMALL = tiny_llama(
    vocab_size=270,
    hidden_size=64,
    intermediate_size=128,
    num_key_value_heads=2,
    head_dim=16,
    bos_token_id=0,
    eos_token_ids=(1,),
    rms_norm_eps=1e-5,
)
TOKENS = jnp.arange(14, dtype=jnp.int32).reshape(2, 7)
INT4 = QuantConfig(format="int4", calibration="none", block_size=64)


def written(folder: Path, run: Path, **options: Any) -> Path:
    settings = {"progress": False, "kind": "gguf", **options}
    return export(ExportConfig(str(run), str(folder), **settings)) / "model.gguf"


def logits(run: Any) -> np.ndarray:
    return np.asarray(jax.jit(run.model.apply)(run.variables, TOKENS))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return write_run(folder, SMALL, INT4, IEC, tokenizer=TOKENIZER)


@pytest.fixture(scope="module")
def merged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    out = tmp_path_factory.mktemp("merged") / "out"
    export(ExportConfig(str(run), str(out), "merged", progress=False))
    return load_file(out / "model.safetensors")


def test_a_run_in_float16(tmp_path: Path, run: Path) -> None:
    """The architecture, the weights with the adapter, and the tokenizer come back."""
    out = written(tmp_path / "out", run)
    before, after = load_run(run), load_run(out)
    expected = dataclasses.replace(SMALL, pad_token_id=after.model.config.pad_token_id)
    assert after.model.config == expected
    difference = np.abs(logits(after) - logits(before)).max()
    assert 0 < difference < 2e-2
    assert np.abs(logits(before) - logits(load_run(run, adapter=False))).max() > 0.1
    text = "the  year 1984, don't"
    for one in (before, after):
        assert one.tokenizer.decode(one.tokenizer(text)["input_ids"]) == text
    assert after.tokenizer(text)["input_ids"] == before.tokenizer(text)["input_ids"]
    assert after.tokenizer.chat_template == TOKENIZER.chat_template
    fields = read_gguf(out).fields
    assert fields["tokenizer.ggml.pre"] == "gpt-2" and not fields["tokenizer.ggml.add_bos_token"]
    tokens, kinds = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    assert tokens[:2] == ["<s>", "</s>"] and kinds[:3] == [3, 3, 1]
    assert tokens[-1] == "[PAD269]" and kinds[-1] == 5 and len(tokens) == 270
    card = (out.parent / "README.md").read_text()
    assert "llama-cli -m out/model.gguf" in card and "part of these weights" in card
    assert {path.name for path in out.parent.iterdir()} == {"model.gguf", "README.md"}


@pytest.mark.parametrize(
    ("type", "table", "step"),
    [
        ("bf16", "BF16", 2**-8),
        ("q8_0", "Q8_0", 1 / 254),
        ("q4_0", "Q8_0", 1 / 8),
        ("q4_1", "Q8_0", 1 / 15),
    ],
)
def test_every_weight(
    tmp_path: Path, run: Path, merged: dict[str, np.ndarray], type: str, table: str, step: float
) -> None:
    """To one step of the type, which is a part of the largest weight of a block."""
    found = read_gguf(written(tmp_path / "out", run, type=type))
    types = {name: tensor.type for name, tensor in found.tensors.items()}
    assert types["token_embd.weight"] == types["output.weight"] == table
    assert types["blk.1.ffn_down.weight"] == types["blk.0.attn_q.weight"] == type.upper()
    assert types["blk.0.attn_norm.weight"] == "F32"
    headers = tensor_headers(found, SMALL)
    assert headers.keys() == merged.keys()
    for name, weight in merged.items():
        read = headers[name].rows(name, 0, len(weight)).astype(np.float32)
        blocks = weight.reshape(-1, min(32, weight.shape[-1]))
        allowed = (
            np.abs(blocks).max(1, keepdims=True) * step * 1.3
        )  # also of rounding scales to float16
        assert (np.abs(read - weight).reshape(blocks.shape) <= allowed).all(), name


EXACT = {
    "int4": ("Q4_1", {}),
    "int3 symmetric": ("Q4_0", {"symmetric": True}),
    "int8 symmetric": ("Q8_0", {"symmetric": True, "block_size": 32}),
}


@pytest.mark.parametrize("case", EXACT)
def test_codes_stay_as_they_are(tmp_path: Path, case: str, said: list[str]) -> None:
    """The weights differ by the rounding of scales to float16, and that is what is said."""
    kind, options = EXACT[case]
    quant = dataclasses.replace(INT4, format=case.split()[0], **options)
    run = write_run(tmp_path / "run", SMALL, quant, None, tokenizer=TOKENIZER)
    out = written(tmp_path / "out", run, type="exact")
    found, loaded = read_gguf(out), load_run(run)
    assert found.tensors["blk.0.attn_q.weight"].type == kind
    assert found.tensors["token_embd.weight"].type == "F32"
    headers, worst = tensor_headers(found, SMALL), 0.0
    for name in ("q_proj", "down_proj"):
        group = "self_attn" if name == "q_proj" else "mlp"
        weights = loaded.variables["base"]["layers"][group][name]["weight"]
        ours = np.asarray(jax.jit(lambda w: w.dequantize())(weights))[1]
        key = f"model.layers.1.{group}.{name}.weight"
        read = gguf_rows(headers[key], key)
        worst = max(worst, np.abs(read - ours).max() / np.abs(ours).max())
        assert np.abs(read - ours).max() <= 2**-10 * np.abs(ours).max()
    (line,) = (line for line in said if line.startswith("exact: "))
    assert worst <= float(line.split("at most ")[1].split()[0]) * 1.05 < 2**-10


def gguf_rows(header: Any, name: str) -> np.ndarray:
    """All rows in float32, which `Header.rows` gives as float16."""
    return dataclasses.replace(header, dtype="F32").rows(name, 0, header.shape[0])


def test_scales_that_float16_holds_are_exact(tmp_path: Path) -> None:
    base = quantize_base(random_base(SMALL), INT4, ("q_proj",))
    stack = base["layers"]["self_attn"]["q_proj"]
    stack["weight"] = dataclasses.replace(
        stack["weight"],
        scale_update=0.125 - stack["weight"].scale(),
        shift_update=-0.5 - stack["weight"].shift(),
    )
    variables = {"params": {}, "base": base}
    off = save_gguf(tmp_path / "x.gguf", Llama(SMALL), variables, {}, type="exact")
    assert off < 1e-6  # of the sum of a stored scale and its update


def test_an_absorbed_adapter_is_exact(tmp_path: Path) -> None:
    adapter = AdapterConfig("qalora", rank=2, alpha=4.0, qalora=QaloraOptions(64))
    run = write_run(tmp_path / "run", SMALL, INT4, adapter, tokenizer=TOKENIZER)
    after, before = load_run(written(tmp_path / "out", run, type="exact")), load_run(run)
    moved = np.abs(logits(before) - logits(load_run(run, adapter=False))).max()
    assert moved > 0.1 and np.abs(logits(after) - logits(before)).max() < 0.1 * moved


ROPES = {
    "llama3": RopeScaling("llama3", 8.0),
    "linear": RopeScaling("linear", 2.0),
    "yarn": RopeScaling("yarn", 4.0, original_max_position_embeddings=16, attention_factor=1.5),
}


@pytest.mark.parametrize("name", ROPES)
def test_rotary_settings_come_back(tmp_path: Path, name: str) -> None:
    llama = dataclasses.replace(SMALL, rope_scaling=ROPES[name], tie_word_embeddings=True)
    variables = {"params": {}, "base": random_base(llama)}
    file = tmp_path / "x.gguf"
    save_gguf(file, Llama(llama), variables, tokenizer_fields(TOKENIZER, llama), type="f16")
    found = load_run(file).model.config
    assert found.tie_word_embeddings and found.rope_scaling is not None
    read, wanted = (dataclasses.asdict(x) for x in (found.rope_scaling, ROPES[name]))
    assert read == pytest.approx(wanted)


FAMILIES = {
    "LLaMA with biases": {"attention_bias": True},
    "Mistral": {"model_type": "mistral"},
    "Qwen2": {"model_type": "qwen2"},
    "Qwen3": {"model_type": "qwen3", "head_dim": 32},
    "SmolLM3": {"model_type": "smollm3", "num_hidden_layers": 4, "unrotated_layers": (3,)},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_back(tmp_path: Path, name: str) -> None:
    llama = dataclasses.replace(SMALL, rope_theta=50000.0, **FAMILIES[name])
    variables = {"params": {}, "base": random_base(llama)}
    file = tmp_path / "x.gguf"
    save_gguf(file, Llama(llama), variables, tokenizer_fields(TOKENIZER, llama), type="exact")
    found = load_run(file)
    same = {"model_type": "llama"} if name == "Mistral" else {}
    assert found.model.config == dataclasses.replace(llama, **same)
    wanted = jax.jit(Llama(llama).apply)(variables, TOKENS)
    np.testing.assert_allclose(logits(found), wanted, rtol=1e-5, atol=1e-5)
    # Biases and norms of heads matter, and are not 0 or 1.
    leaves = jax.tree_util.tree_leaves_with_path(variables["base"])
    small = [x for path, x in leaves if "bias" in str(path) or "q_norm" in str(path)]
    assert len(small) == {"Qwen2": 3, "Qwen3": 1, "LLaMA with biases": 4}.get(name, 0)
    assert all(np.unique(x).size > 10 for x in small)
    text = "the  year 1984, don't"
    assert found.tokenizer(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert found.tokenizer.model_max_length == llama.max_position_embeddings


def test_what_llama_cpp_does_not_compute_is_refused() -> None:
    def fields(llama: Any, **changes: Any) -> dict[str, Any]:
        return architecture_fields(dataclasses.replace(llama, **changes))

    with pytest.raises(ValueError, match=r"rope_type = 'dynamic': expected linear, yarn or llama3"):
        fields(SMALL, rope_scaling=RopeScaling("dynamic", 2.0))
    with pytest.raises(ValueError, match=r"truncate = False: expected True, which llama.cpp uses"):
        fields(SMALL, rope_scaling=RopeScaling("yarn", 2.0, truncate=False))
    with pytest.raises(ValueError, match=r"beta_fast = 16.0: expected 32, which llama.cpp uses"):
        fields(SMALL, rope_scaling=RopeScaling("yarn", 2.0, beta_fast=16.0))
    with pytest.raises(
        ValueError, match=r"hidden_size = 24: expected num_attention_heads \* head_"
    ):
        fields(RELATIVES["Qwen2"])
    with pytest.raises(ValueError, match=r"attention_bias = True: expected false for a qwen3"):
        fields(RELATIVES["Qwen3"])
    smollm3 = dataclasses.replace(RELATIVES["SmolLM3"], attention_bias=False)
    with pytest.raises(ValueError, match=r"no_rope_layers = \(1, 2\): expected \(3,\)"):
        fields(smollm3)
    assert fields(smollm3, unrotated_layers=(3,))["general.architecture"] == "smollm3"
    # Within the window, all positions are seen.
    mistral = fields(RELATIVES["Mistral"])
    assert mistral["llama.context_length"] == RELATIVES["Mistral"].sliding_window == 7


REFUSED = {
    "nf4": (QuantConfig(calibration="none"), {}, "has format nf4; expected an integer format"),
    "blocks": (
        QuantConfig(format="int4", calibration="none", block_size=40),
        {},
        "blocks of 40 in rows of 64; expected multiples of 32",
    ),
    "outliers": (dataclasses.replace(INT4, outliers=0.01), {}, "has outliers"),
    "int8": (
        QuantConfig(format="int8", calibration="none"),
        {},
        "8 bits and zero points; expected quant.symmetric true",
    ),
    "adapter": (
        INT4,
        {"adapter": AdapterConfig("dora", rank=2)},
        "type = 'exact': no LoRA pair computes the update of DoRA; expected f16",
    ),
    "dtype": (INT4, {"dtype": "float16"}, "dtype = 'float16': expected null with kind gguf"),
    "kind": (INT4, {"kind": "merged"}, "type = 'exact': expected null with kind merged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(tmp_path: Path, case: str) -> None:
    quant, options, message = REFUSED[case]
    run = write_run(
        tmp_path / "run", SMALL, quant, options.pop("adapter", None), tokenizer=TOKENIZER
    )
    with pytest.raises(ValueError, match=message):
        written(tmp_path / "out", run, type="exact", **options)
    assert not (tmp_path / "out").exists()


def test_numbers_beyond_float16_are_refused(tmp_path: Path) -> None:
    base = random_base(SMALL)
    base["norm"]["weight"] = base["norm"]["weight"] * 1e6  # float32 in every file
    base["lm_head"]["weight"] = base["lm_head"]["weight"].at[3, 3].set(7e4)
    variables = {"params": {}, "base": base}
    with pytest.raises(ValueError, match=r"F16 cannot hold all values of output.weight; expected"):
        save_gguf(tmp_path / "x.gguf", Llama(SMALL), variables, {}, type="f16")
    save_gguf(tmp_path / "y.gguf", Llama(SMALL), variables, {}, type="bf16")


# --- tokenizers -----------------------------------------------------------------------------------


def byte_level(pre: str, **options: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose text is split by one of our rules."""
    core = json.loads(TOKENIZER.backend_tokenizer.to_str())
    core["model"] |= options
    made = Tokenizer.from_str(json.dumps(core))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[pre]]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([*splits, as_bytes])  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("pre", SPLITS)
def test_rules_are_recognized_by_their_patterns(pre: str) -> None:
    whole = pre in ("llama-bpe", "tekken")
    tokenizer = byte_level(pre, ignore_merges=whole)
    assert tokenizer_fields(tokenizer, SMALL)["tokenizer.ggml.pre"] == pre
    with pytest.raises(ValueError, match=f"ignore_merges = {not whole}: expected {whole} with"):
        tokenizer_fields(byte_level(pre, ignore_merges=not whole), SMALL)


def test_the_digits_of_smollm2() -> None:
    """As its tokenizer.json has them."""
    tokenizer = byte_level("gpt-2")
    parts = [pre_tokenizers.Digits(individual_digits=True)]
    parts += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)  # type: ignore[assignment]
    assert tokenizer_fields(tokenizer, SMALL)["tokenizer.ggml.pre"] == "smollm"


def test_unknown_tokenizers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokenizer: model = 'WordLevel': expected 'BPE'"):
        tokenizer_fields(word_tokenizer(SMALL.vocab_size), SMALL)
    with pytest.raises(ValueError, match=r"tokens 200, .* are beyond vocab_size = 200"):
        tokenizer_fields(TOKENIZER, dataclasses.replace(SMALL, vocab_size=200))
    tokenizer = byte_level("gpt-2")
    core = tokenizer.backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.Split(Regex("a+"), "isolated")  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"splits text with 'a\+', which llama.cpp does not know"):
        tokenizer_fields(tokenizer, SMALL)
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"pre_tokenizer = 'Whitespace': expected byte-level BPE"):
        tokenizer_fields(tokenizer, SMALL)
    slow = types.SimpleNamespace(is_fast=False)
    with pytest.raises(ValueError, match=r"expected a tokenizer with a tokenizer\.json"):
        tokenizer_fields(slow, SMALL)
    lower = byte_level("gpt-2")
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"gets other tokens by the rules of GGUF \(gpt2, gpt-2\)"):
        tokenizer_fields(lower, SMALL)


@needs_stories
def test_a_sentencepiece_tokenizer_comes_back() -> None:
    from irqlora_jax import hf

    tokenizer = hf.load_tokenizer(STORIES)
    llama = tiny_llama(vocab_size=512)
    fields = tokenizer_fields(tokenizer, llama)
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"]
    assert fields["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    made = make_tokenizer(Gguf(Path("x"), fields, {}))
    text = "Once upon a time, there was a little dog named Tim.\n 東  <s> x"
    assert made(text)["input_ids"] == tokenizer(text)["input_ids"]
