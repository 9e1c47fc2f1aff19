"""GGUF files are the same models as Hugging Face folders, and faults in them are one sentence."""

import dataclasses
import io
import re
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import pre_tokenizers

from irqlora_jax import QuantConfig, hf
from irqlora_jax.files import tensors
from irqlora_jax.files.gguf import TYPES, read_gguf
from irqlora_jax.files.gguf_model import tensor_headers
from irqlora_jax.files.tensors import read_into
from irqlora_jax.model.config import RopeScaling
from tests.models import (
    TEMPLATE,
    assert_same,
    byte_tokenizer,
    gguf_tokens,
    random_tensors,
    tiny_llama,
    write_gguf,
    write_model,
)

MERGES = [("Ġ", "t"), ("h", "e"), ("1", "9"), ("Ġt", "he"), ("!", "!"), ("Ġ", "1")]
TOKENIZER = byte_tokenizer(MERGES, TEMPLATE)
LLAMA = tiny_llama(
    vocab_size=264,
    hidden_size=256,
    intermediate_size=256,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_ids=(1,),
)
SMALL = dataclasses.replace(LLAMA, hidden_size=32, intermediate_size=64, head_dim=8)
TEXTS = [
    "the year 1984 isn't far!!",
    "  a\n\n b\t 3.14159 ½² don't",
    "<s>the</s>the",
    "",
    "naïve 🙂",
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def write(file: Path, **changes: Any) -> Path:
    write_gguf(file, SMALL, **gguf_tokens(TOKENIZER) | changes)
    return file


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_read_row_by_row_in_the_order_of_hugging_face(file: Path, kind: str) -> None:
    llama = dataclasses.replace(LLAMA, num_hidden_layers=1)
    meant = write_gguf(file, llama, types=lambda name: kind)
    found = tensor_headers(read_gguf(file), llama)
    assert found.keys() == meant.keys()
    for name, value in meant.items():
        assert np.isfinite(value).all()
        assert len(np.unique(value)) > 10
        read = np.empty(value[3:201].shape, value.dtype)
        read_into(read, found[name], name, 3)
        np.testing.assert_array_equal(read, value[3:201])
        if value.ndim == 2:
            read = np.empty(value[3:201, 5:9].shape, value.dtype)
            read_into(read, found[name], name, 3, slice(5, 9))
            np.testing.assert_array_equal(read, value[3:201, 5:9])


def test_only_a_part_of_a_tensor_is_dequantized_at_a_time(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meant = write_gguf(file, SMALL, types=lambda name: "Q8_0")
    sizes: list[int] = []

    def dequantize(data: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
        values = gguf.quants.dequantize(data, kind)
        sizes.append(values.size)
        return values

    monkeypatch.setattr(gguf, "dequantize", dequantize)
    monkeypatch.setattr(tensors, "_PART", 320)
    hf.load_base(file, None)
    assert max(sizes) == 320
    assert sum(sizes) == sum(value.size for value in meant.values())


MIXED = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q8_0", "output": "BF16"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quant", [None, QuantConfig(format="nf3", calibration="none")])
def test_a_file_is_the_same_base_as_a_folder(
    tmp_path: Path, file: Path, tied: bool, quant: QuantConfig | None
) -> None:
    llama = dataclasses.replace(LLAMA, tie_word_embeddings=tied)
    types = lambda name: MIXED.get(name.split(".")[-2], "Q4_K")  # noqa: E731
    meant = write_gguf(file, llama, types=types, **gguf_tokens(TOKENIZER))
    folder = write_model(tmp_path / "folder", llama, meant, tokenizer=TOKENIZER)
    (base, found), (expected, _) = hf.load_base(file, quant), hf.load_base(folder, quant)
    assert found == llama
    assert_same(base, expected)


def test_layers_of_several_types_are_read_as_float32(file: Path) -> None:
    types = lambda name: "F32" if "blk.1.attn_k" in name else "Q8_0"  # noqa: E731
    meant = write_gguf(file, SMALL, types=types)
    base, _ = hf.load_base(file, None)
    keys = base["layers"]["self_attn"]["k_proj"]["weight"]
    assert keys.dtype == np.float32
    first, second = (meant[f"model.layers.{i}.self_attn.k_proj.weight"] for i in range(2))
    np.testing.assert_array_equal(keys[1], second)
    np.testing.assert_array_equal(keys[0].astype(np.float16), first)  # nothing was rounded


def test_the_factors_of_llama_3_are_found_again(file: Path) -> None:
    scaling = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    llama = dataclasses.replace(LLAMA, rope_scaling=scaling)
    # As llama.cpp's script computes them: by wavelengths.
    wavelengths = 2 * np.pi * llama.rope_theta ** (np.arange(32) / 32)
    smooth = (8192 / wavelengths - 1) / 3
    between = 1 / ((1 - smooth) / 32 + smooth)
    factors = np.where(wavelengths < 8192 / 4, 1, np.where(wavelengths > 8192, 32, between))
    assert sum((factors > 1) & (factors < 32)) > 1
    write_with_factors(file, factors)
    assert hf.read_config(file) == llama
    write_with_factors(file, np.ones(32))
    assert hf.read_config(file) == LLAMA
    write_with_factors(file, factors + 0.1)
    with pytest.raises(
        ValueError, match=r"rope_freqs\.weight does not hold the factors of LLaMA 3"
    ):
        hf.read_config(file)


def write_with_factors(file: Path, factors: np.ndarray) -> None:
    tensors = random_tensors(LLAMA) | {"rope_freqs.weight": factors.astype(np.float32)}
    write_gguf(file, LLAMA, tensors, **gguf_tokens(TOKENIZER))


def test_settings_of_the_rotation_and_ends(file: Path) -> None:
    linear = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}
    write(file, **linear, tokenizer__ggml__eot_token_id=7, tokenizer__ggml__eom_token_id=1)
    found = hf.read_config(file)
    assert found.rope_scaling == RopeScaling("linear", 4.0)
    assert found.eos_token_ids == (1, 7)
    write(file, **{key: None for key in ("llama__attention__key_length",)})
    assert hf.read_config(file).head_dim == 8


# -------------------------------------------------------------------------------------- tokenizers


def as_before(file: Path, tokenizer: Any, folder: Path) -> list[list[int]]:
    """Tokens of `TEXTS`; the tokenizer that is stored in a folder gives the same."""
    tokens = tokenizer(TEXTS)["input_ids"]
    tokenizer.save_pretrained(folder)
    again = hf.load_tokenizer(folder)
    assert again(TEXTS)["input_ids"] == tokens
    assert again.all_special_ids == tokenizer.all_special_ids
    return tokens


@pytest.mark.parametrize("pre", ["gpt-2", "smollm"])
def test_tokens_are_those_of_the_original_tokenizer(tmp_path: Path, file: Path, pre: str) -> None:
    original = byte_tokenizer(MERGES, TEMPLATE)
    if pre == "smollm":  # as SmolLM2's own tokenizer.json has it
        digits = pre_tokenizers.Digits(individual_digits=True)
        splits = [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        original.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    write(file, tokenizer__ggml__pre=pre)
    tokenizer = hf.load_tokenizer(file)
    assert as_before(file, tokenizer, tmp_path / "tokenizer") == original(TEXTS)["input_ids"]
    nineteen = tokenizer.convert_tokens_to_ids("19")
    assert (nineteen in tokenizer(TEXTS[0])["input_ids"]) == (pre == "gpt-2")
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.model_max_length == 64
    for text, tokens in zip(TEXTS, tokenizer(TEXTS)["input_ids"], strict=True):
        assert tokenizer.decode(tokens) == text


def test_llama_3_takes_whole_words_and_three_digits_and_begins_with_bos(
    tmp_path: Path, file: Path
) -> None:
    """ "!!" is a token that no merge makes, as LLaMA 3 has some."""
    fields = gguf_tokens(TOKENIZER, "llama-bpe")
    merges = [merge for merge in fields["tokenizer.ggml.merges"] if merge != "! !"]
    write(file, **fields | {"tokenizer.ggml.merges": merges})
    tokenizer = hf.load_tokenizer(file)
    as_before(file, tokenizer, tmp_path / "tokenizer")
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    assert [word for word, _ in split("ab'S 12345 x\n\n")] == [
        "ab",
        "'S",
        "Ġ",
        "123",
        "45",
        "Ġx",
        "ĊĊ",
    ]
    assert tokenizer.tokenize("!!", add_special_tokens=True) == ["<s>", "!!"]
    write(file, **fields | {"tokenizer.ggml.add_bos_token": False})
    assert hf.load_tokenizer(file)("!!")["input_ids"] == tokenizer("!!")["input_ids"][1:]


def test_without_a_rule_of_its_own_a_file_has_llama_cpps(file: Path) -> None:
    write(file, tokenizer__ggml__pre="default")
    split = hf.load_tokenizer(file).backend_tokenizer.pre_tokenizer.pre_tokenize_str
    assert [word for word, _ in split("a<=b 12345!")] == ["a", "<=", "b", "Ġ", "123", "45", "!"]


def test_the_tokens_of_sentencepiece(tmp_path: Path, file: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    text = "once upon a time there was a little girl. the girl had a red ball, 12 of them! " * 20
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text]),
        model_writer=trained,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    original = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    count = original.get_piece_size()
    asked = {2: original.is_unknown, 3: original.is_control, 6: original.is_byte}
    kinds = [next((kind for kind, has in asked.items() if has(i)), 1) for i in range(count)]
    fields = {
        "model": "llama",
        "tokens": [original.id_to_piece(i) for i in range(count)],
        "scores": [float(original.get_score(i)) for i in range(count)],
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    write_gguf(file, SMALL, **{f"tokenizer.ggml.{key}": value for key, value in fields.items()})
    tokenizer = hf.load_tokenizer(file)
    as_before(file, tokenizer, tmp_path / "tokenizer")
    for each in (text[:300], " two  spaces ", "Unseen: naïve 🙂\n\ttab", "the<unk", "▁a b"):
        assert tokenizer(each)["input_ids"] == [1, *original.encode(each)]
        assert tokenizer.decode(original.encode(each)) == original.decode(original.encode(each))


# ------------------------------------------------------------------------------------------ faults

FAULTS = {
    "architecture": ({"general.architecture": "gemma"}, "general.architecture = 'gemma'.*'llama'"),
    "adapter": ({"general.type": "adapter"}, "general.type = 'adapter': expected 'model'"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_count = 8: expected 0"),
    "split": ({"split.count": 3, "split.no": 1}, "part 2 of 3; expected one file"),
    "no layers": ({"llama.block_count": None}, "has no llama.block_count$"),
    "layers": ({"llama.block_count": 3}, "no tensor model.layers.2"),
    "width": ({"llama.embedding_length": 48}, "has shape .*: its header says"),
    "heads": ({"llama.attention.head_count_kv": 3}, "num_key_value_heads = 3: expected a divisor"),
    "text": ({"llama.attention.head_count": "x"}, "num_attention_heads = 'x': expected"),
    "rotation": ({"llama.rope.scaling.type": "longrope"}, "type = 'longrope': expected 'none', 'l"),
    "part": ({"llama.rope.dimension_count": 4}, "rope.dimension_count = 4: expected 8"),
    "wordpiece": ({"tokenizer.ggml.model": "bert"}, "ggml.model = 'bert': expected 'gpt2' or"),
    "rule": ({"tokenizer.ggml.pre": "falcon"}, "ggml.pre = 'falcon': expected one of default, gpt"),
    "no rule": ({"tokenizer.ggml.pre": None}, "ggml.pre = None: expected one of default, gpt-2"),
    "types": ({"tokenizer.ggml.token_type": [1]}, "token_type = .1.: expected 264 numbers"),
    "ids": ({"tokenizer.ggml.eos_token_id": 264}, "eos_token_id = 264: expected a number below"),
    "merges": ({"tokenizer.ggml.merges": ["no such"]}, "the tokenizer cannot be read: "),
}


def use(file: Path) -> None:
    hf.load_tokenizer(file)
    hf.load_base(file, None)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_sentence(file: Path, name: str) -> None:
    changes, pattern = FAULTS[name]
    write(file, **changes)
    with pytest.raises(ValueError, match=pattern) as error:
        use(file)
    assert str(error.value).startswith(str(file))
    assert str(error.value).count(str(file)) == 1
    assert "\n" not in str(error.value)


def test_tensors_of_other_names_and_types_are_refused(file: Path) -> None:
    for name in ("blk.0.attn_q_norm.weight", "blk.0.ffn_up.bias", "blk.0.other.weight"):
        write_gguf(file, SMALL, random_tensors(SMALL) | {name: np.zeros(8, np.float32)})
        with pytest.raises(ValueError, match=rf"cannot read these tensors: {re.escape(name)}"):
            hf.load_base(file, None)
    write_gguf(file, SMALL, random_tensors(SMALL) | {"blk.0.attn_q.bias": np.zeros(32, np.float32)})
    with pytest.raises(ValueError, match=r"no tensor model\.layers\.1\.self_attn\.q_proj\.bias"):
        hf.load_base(file, None)
    write_gguf(file, LLAMA, types=lambda name: "TQ1_0" if "ffn_up" in name else "Q8_0")
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_up\.weight has type TQ1_0: expected one"):
        hf.load_base(file, None)


def test_truncated_files_and_other_files_are_one_sentence(file: Path) -> None:
    whole = write(file).read_bytes()
    with pytest.raises(FileNotFoundError, match="no such file"):
        use(file.with_name("no.gguf"))
    start = len(whole) - sum(map(np.size, random_tensors(SMALL).values())) * 4
    for size in (4, 8, 20, 30, 100, 3000, start - 200):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.gguf: truncated in its header"):
            use(file)
    for size in (start + 100, len(whole) - 100):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"truncated: .*ends at byte [\d,]+, the file has"):
            use(file)
    for content in (b"", b"GG", b"x" * 100):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.gguf: not a GGUF file"):
            use(file)
    for version in (struct.pack("<I", 1), struct.pack(">I", 3)):
        file.write_bytes(whole[:4] + version + whole[8:])
        with pytest.raises(ValueError, match=r"version of GGUF = \d+: expected 2 or 3"):
            use(file)


def test_damage_in_the_header_is_never_another_error(file: Path) -> None:
    whole = write(file).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(4, 2500, 3):
            data[place] = rng.integers(256)
        file.write_bytes(data)
        try:
            hf.read_config(file)
            hf.load_tokenizer(file)
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 20
