"""Exported GGUF files in llama.cpp: the same probabilities and the same greedy text."""

import dataclasses
import json
import socket
import urllib.request
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax import hf
from irqlora_jax.export.gguf import save_gguf
from irqlora_jax.export.gguf_tokenizer import tokenizer_fields
from irqlora_jax.generate.decode import generate
from irqlora_jax.model.config import RopeScaling
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.runs.load import load_run
from tests.models import (
    IEC,
    RELATIVES,
    byte_tokenizer,
    random_base,
    random_variables,
    tiny_llama,
    write_run,
)

xllamacpp = pytest.importorskip("xllamacpp")

MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("1", "9")]
TOKENIZER = byte_tokenizer(MERGES)
SIZES = {"vocab_size": 270, "bos_token_id": 0, "eos_token_ids": (1,), "rms_norm_eps": 1e-5}
SIZES |= {"max_position_embeddings": 256, "rope_theta": 500.0}
WIDE = tiny_llama(hidden_size=64, intermediate_size=128, head_dim=16, **SIZES)
INT4 = QuantConfig(format="int4", calibration="none", block_size=64)
PROMPTS = np.random.default_rng(0).integers(2, 260, (16, 40)).astype(np.int32)
READABLE = range(2, 96)
"""Tokens of a whole character. llama.cpp gives no probabilities in the middle of one."""


class LlamaCpp:
    """A file in llama.cpp, asked by HTTP on this machine."""

    def __init__(self, file: Path, adapter: Path | None = None) -> None:
        params = xllamacpp.CommonParams()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            params.port = free.getsockname()[1]
        params.model.path, params.n_ctx, params.n_parallel = str(file), 256, 1
        params.warmup, params.cpuparams.n_threads = False, 1
        if adapter is not None:
            lora = xllamacpp.CommonAdapterLoraInfo()
            lora.path, lora.scale = str(adapter), 1.0
            params.lora_adapters = [lora]
        self.server = xllamacpp.Server(params)

    def ask(self, path: str, **content: Any) -> Any:
        data = json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.server.listening_address}{path}", data, headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def answer(self, prompt: list[int], count: int) -> tuple[list[int], dict[int, float]]:
        """The most likely tokens, and logarithms of the largest probabilities of the first one."""
        settings = {"temperature": 0, "return_tokens": True, "cache_prompt": False, "n_probs": 20}
        found = self.ask("/completion", prompt=prompt, n_predict=count, **settings)
        first = found["completion_probabilities"][0]["top_logprobs"]
        return found["tokens"], {each["id"]: each["logprob"] for each in first}


def assert_close(model: Llama, variables: Any, file: Path, atol: float, **options: Any) -> None:
    """The probabilities of the token after a prompt."""
    found = np.asarray(jax.nn.log_softmax(jax.jit(model.apply)(variables, PROMPTS)[:, -1]))
    best, margin = found.argmax(-1), np.diff(np.sort(found)[:, -2:])[:, 0]
    number = int(np.where(np.isin(best, READABLE), margin, 0).argmax())
    ours = found[number]
    _, theirs = LlamaCpp(file, **options).answer(PROMPTS[number].tolist(), 1)
    assert len(theirs) == 20 and min(theirs.values()) < max(theirs.values()) - 0.5
    off = {token: abs(float(ours[token]) - value) for token, value in theirs.items()}
    assert max(off.values()) < atol, off


ROPES = {
    "llama3": RopeScaling("llama3", 8.0, original_max_position_embeddings=16),
    "linear": RopeScaling("linear", 2.0),
    "yarn": RopeScaling("yarn", 4.0, original_max_position_embeddings=16),
    "yarn, own factor": RopeScaling(
        "yarn", 4.0, original_max_position_embeddings=64, attention_factor=1.6
    ),
}
MODELS = {name: dataclasses.replace(WIDE, rope_scaling=rope) for name, rope in ROPES.items()}
MODELS |= {
    name: dataclasses.replace(RELATIVES[name], **SIZES, sliding_window=None, sliding_layers=())
    for name in ("LLaMA with biases", "Qwen2", "Mistral")
}
MODELS["Qwen2"] = dataclasses.replace(MODELS["Qwen2"], hidden_size=32)
MODELS["Qwen3"] = tiny_llama(model_type="qwen3", **SIZES)
MODELS["SmolLM3"] = tiny_llama(
    model_type="smollm3",
    num_hidden_layers=4,
    unrotated_layers=(3,),
    tie_word_embeddings=True,
    **SIZES,
)


@pytest.mark.parametrize("name", MODELS)
def test_architectures(tmp_path: Path, name: str) -> None:
    llama = MODELS[name]
    model, file = Llama(llama), tmp_path / "model.gguf"
    variables = random_variables(model, scale=0.2)
    save_gguf(file, model, variables, tokenizer_fields(TOKENIZER, llama), type="f16")
    assert_close(model, variables, file, 0.04)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = random_base(WIDE, INT4, scale=0.2)
    folder = tmp_path_factory.mktemp("runs") / "run"
    return write_run(folder, WIDE, INT4, IEC, base=base, tokenizer=TOKENIZER)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(
        tmp_path_factory.mktemp("bases") / "base", WIDE, INT4, None, tokenizer=TOKENIZER
    )


def exported(folder: Path, run: Path, **options: Any) -> Path:
    settings: dict[str, Any] = {"progress": False, **options}
    return hf.export(hf.ExportConfig(str(run), str(folder), "gguf", **settings))


def test_greedy_text_of_a_run(tmp_path: Path, run: Path) -> None:
    file = exported(tmp_path / "out", run) / "model.gguf"
    loaded, served = load_run(run), LlamaCpp(file)
    prompt = PROMPTS[0].tolist()
    theirs, _ = served.answer(prompt, 24)
    (ours,) = generate(loaded.model, loaded.variables, [prompt], 24, eos_token_ids=(1,))
    assert theirs == ours and len({*ours}) > 5
    text = "the year 1984, isn't  it?\n"
    found = served.ask("/tokenize", content=text, add_special=True, parse_special=True)
    assert found["tokens"] == TOKENIZER(text)["input_ids"]


@pytest.mark.parametrize("type", ["bf16", "q8_0", "q4_1", "q4_0", "exact"])
def test_types(tmp_path: Path, base: Path, type: str) -> None:
    """The weights that we read from the file. llama.cpp rounds activations to 8 bits for products
    with quantized weights."""
    file = exported(tmp_path / "out", base, type=type) / "model.gguf"
    read = load_run(file)
    assert_close(read.model, read.variables, file, 0.02 if type == "bf16" else 0.3)


def test_an_adapter_beside_exact_codes(tmp_path: Path, run: Path) -> None:
    out = exported(tmp_path / "out", run, type="exact")
    loaded, plain = load_run(run), load_run(run, adapter=False)
    logits = (jax.jit(one.model.apply)(one.variables, PROMPTS)[:, -1] for one in (loaded, plain))
    assert jnp.abs(jnp.subtract(*logits)).max() > 2  # the adapter does something
    file, adapter = out / "model.gguf", out / "adapter.gguf"
    assert_close(loaded.model, loaded.variables, file, 0.3, adapter=adapter)
    assert "--lora out/adapter.gguf" in (out / "README.md").read_text()
