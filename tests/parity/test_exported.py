"""What export writes computes in transformers and PEFT what the run computes here."""

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax import hf
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.generate.decode import generate
from irqlora_jax.model.config import LlamaConfig, RopeScaling
from irqlora_jax.quant.calibrations.icq import IcqOptions
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.runs.load import Run, load_run
from irqlora_jax.sharding import LINEAR_NAMES
from tests.models import FLOAT, IEC, LLAMA, PLAIN, STORIES, needs_stories, tiny_llama, write_run

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # of other packages

LLAMA1 = tiny_llama(vocab_size=43, hidden_size=32, intermediate_size=88, num_key_value_heads=4)
LLAMA3 = tiny_llama(
    vocab_size=43,
    hidden_size=48,
    intermediate_size=88,
    num_attention_heads=6,
    head_dim=4,
    rope_theta=500000.0,
    rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 32),
    max_position_embeddings=256,
    tie_word_embeddings=True,
    eos_token_ids=(40, 41),
)
LORA = AdapterConfig(method="lora", rank=4, alpha=16.0, targets=("q_proj", "o_proj", "down_proj"))
HALF = AdapterConfig(method="iec", rank=8, alpha=16.0, dtype="bfloat16")
NF4 = QuantConfig(format="nf4", icq=IcqOptions(steps=1))
INT3 = QuantConfig(format="int3", calibration="none")
NF2 = QuantConfig(format="nf2", calibration="none")
FP4 = QuantConfig(format="fp4", calibration="none")
CASES: dict[str, tuple[LlamaConfig, QuantConfig, AdapterConfig]] = {
    "LLaMA 1, nf4 + ICQ, IEC": (LLAMA1, NF4, IEC),
    "padded rows, int3, IEC": (LLAMA, INT3, IEC),
    "LLaMA 3 tied, nf2, LoRA on some": (LLAMA3, NF2, LORA),
    "fp4, bfloat16 adapter": (LLAMA1, FP4, HALF),
    "not quantized, IEC": (LLAMA3, FLOAT, IEC),
}


def ours(run: Run, tokens: np.ndarray, adapter: bool = True) -> np.ndarray:
    model = run.model if adapter else run.model.clone(adapter=None)
    return np.asarray(jax.jit(model.apply)(run.variables, jnp.asarray(tokens, jnp.int32)))


def theirs(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens)).logits.numpy()


def load(folder: Path) -> Any:
    """A model folder, every tensor of which must find its place."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    return model


def compare(folder: Path, run_folder: Path, length: int) -> None:
    run = load_run(run_folder)
    vocab = run.model.config.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab, (2, length))
    adapted, plain = ours(run, tokens), ours(run, tokens, adapter=False)
    assert np.abs(adapted - plain).max() > 0.1
    close = {"rtol": 0, "atol": 1e-4}

    merged = hf.export_merged(run_folder, folder / "merged", dtype="float32", shard_size=1e-4)
    np.testing.assert_allclose(theirs(load(merged), tokens), adapted, **close)

    both = hf.export_dequantized(run_folder, folder / "dequantized", dtype="float32")
    base = load(both)
    np.testing.assert_allclose(theirs(base, tokens), plain, **close)
    with warnings.catch_warnings(record=True) as warned:
        model = peft.PeftModel.from_pretrained(base, both / "adapter")
    assert not [w for w in warned if "keys" in str(w.message)]  # missing ones
    np.testing.assert_allclose(theirs(model, tokens), adapted, **close)
    np.testing.assert_allclose(theirs(model.merge_and_unload(), tokens), adapted, **close)
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(both / "adapter")
    np.testing.assert_allclose(theirs(auto, tokens), adapted, **close)

    alone = hf.export_adapter(run_folder, folder / "adapter", base_model=str(both))
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(alone)
    np.testing.assert_allclose(theirs(auto, tokens), adapted, **close)

    moved = both.rename(folder / "moved")  # away from the path that the adapter names
    model = peft.PeftModel.from_pretrained(load(moved), moved / "adapter")
    np.testing.assert_allclose(theirs(model, tokens), adapted, **close)


@pytest.mark.parametrize("case", CASES)
def test_logits(tmp_path: Path, case: str) -> None:
    llama, quant, adapter = CASES[case]
    compare(tmp_path, write_run(tmp_path / "run", llama, quant, adapter), 48)


def test_a_released_adapter_reaches_peft(tmp_path: Path, golden: Path) -> None:
    reference = golden / "irqlora_reference"
    base, llama = hf.load_base(reference / "base", None)
    adapter = AdapterConfig(method="iec", rank=16, alpha=16.0)
    folder = write_run(tmp_path / "run", llama, FLOAT, adapter, base=base)
    run = load_run(folder)
    adapters = hf.load_adapter(reference / "adapter_final.safetensors", run.model)
    hf.save_adapter(tmp_path, run.model, adapters)
    tokens = np.random.default_rng(0).integers(0, llama.vocab_size, (2, 20))
    variables = {"params": adapters, "base": base}
    expected = np.asarray(run.model.apply(variables, jnp.asarray(tokens, jnp.int32)))
    float_base = transformers.AutoModelForCausalLM.from_pretrained(reference / "base")
    model = peft.PeftModel.from_pretrained(float_base, tmp_path)
    np.testing.assert_allclose(theirs(model, tokens), expected, rtol=0, atol=1e-4)


@needs_stories
def test_stories260k(tmp_path: Path) -> None:
    base, llama = hf.load_base(STORIES, PLAIN)
    tokenizer = hf.load_tokenizer(STORIES)
    adapter = AdapterConfig(method="iec", rank=8, alpha=0.5, targets=LINEAR_NAMES)
    folder = write_run(
        tmp_path / "run", llama, PLAIN, adapter, base=base, tokenizer=tokenizer, model=str(STORIES)
    )
    compare(tmp_path, folder, 200)

    text = "Once upon a time, there was a little dog"
    theirs_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    prompt = tokenizer(text)["input_ids"]
    assert theirs_tokenizer(text)["input_ids"] == prompt
    run = load_run(folder)
    tokens = generate(run.model, run.variables, [prompt], 64, eos_token_ids=llama.eos_token_ids)[0]
    model = load(tmp_path / "merged")
    with torch.no_grad():
        written = model.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)
    assert written[0, len(prompt) :].tolist() == tokens
    assert len(set(tokens)) > 10


def test_a_base_alone(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "base", LLAMA, PLAIN, None)
    run = load_run(folder)
    tokens = np.random.default_rng(0).integers(0, 43, (2, 16))
    out = hf.export_merged(folder, tmp_path / "out")
    np.testing.assert_allclose(theirs(load(out), tokens), ours(run, tokens), rtol=0, atol=1e-4)
    config = transformers.GenerationConfig.from_pretrained(out)
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
