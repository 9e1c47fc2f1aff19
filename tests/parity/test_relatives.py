"""Models that differ a little from LLaMA, against transformers: logits, and what export writes."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax import hf
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.llama import Llama
from irqlora_jax.runs.load import load_run
from irqlora_jax.train.finetune import run as finetune
from tests.models import (
    PLAIN,
    RELATIVES,
    random_tensors,
    stack_tensors,
    word_tokenizer,
    write_model,
    write_run,
)
from tests.train.small_runs import config_for, losses_of

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # of other packages

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
DORA = AdapterConfig(method="dora", rank=3, alpha=6.0)


def their_model(llama: LlamaConfig) -> Any:
    """A random model of transformers, none of whose biases and norms is 0 or 1."""
    settings = transformers.AutoConfig.for_model(**llama.to_dict(), initializer_range=0.2)
    assert LlamaConfig.from_dict(settings.to_dict()) == llama
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings).eval()
    assert type(model).__name__ == llama.to_dict()["architectures"][0]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def their_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens)).logits.numpy()


@pytest.mark.parametrize("name", RELATIVES)
def test_logits(name: str, tmp_path: Path) -> None:
    """From the state of their model, and from the folder that it writes."""
    llama = RELATIVES[name]
    model = their_model(llama)
    tokens = np.random.default_rng(0).integers(0, llama.vocab_size, (2, 40))
    expected = their_logits(model, tokens)
    base = stack_tensors(model.state_dict(), llama)
    run = jax.jit(Llama(llama).apply)
    np.testing.assert_allclose(run({"base": base}, jnp.asarray(tokens)), expected, **CLOSE)
    assert expected.std() > 0.5
    model.save_pretrained(tmp_path)
    found, read = hf.load_base(tmp_path, None)
    assert read == llama
    jax.tree.map(np.testing.assert_array_equal, found, base)


@pytest.mark.parametrize("name", RELATIVES)
def test_exported(name: str, tmp_path: Path) -> None:
    """A quantized run with an adapter: merged, and the adapter beside the dequantized base."""
    llama = RELATIVES[name]
    adapter = DORA if name == "LLaMA with biases" else AdapterConfig("iec", rank=4, alpha=8.0)
    run = load_run(write_run(tmp_path / "run", llama, PLAIN, adapter))
    assert run.model.config == llama
    tokens = np.random.default_rng(0).integers(0, llama.vocab_size, (2, 40))
    apply = jax.jit(run.model.apply)
    expected = np.asarray(apply(run.variables, jnp.asarray(tokens)))
    merged = hf.export_merged(tmp_path / "run", tmp_path / "merged", dtype="float32")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        merged, output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(model).__name__ == llama.to_dict()["architectures"][0]
    np.testing.assert_allclose(their_logits(model, tokens), expected, **CLOSE)
    assert hf.read_config(merged) == llama
    assert f"tags:\n- {llama.model_type}\n" in (merged / "README.md").read_text()

    both = hf.export_dequantized(tmp_path / "run", tmp_path / "both", dtype="float32")
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(both / "adapter")
    np.testing.assert_allclose(their_logits(auto, tokens), expected, **CLOSE)


@pytest.mark.long
@pytest.mark.parametrize("name", RELATIVES)
def test_trained(name: str, tmp_path: Path) -> None:
    """From the folder of a model through a finetune to a merged model."""
    llama = RELATIVES[name]
    words = word_tokenizer(llama.vocab_size)
    drawn = random_tensors(llama)
    tensors = {key: np.float32(4 * value + ("norm" in key)) for key, value in drawn.items()}
    folder = write_model(tmp_path / "model", llama, tensors, tokenizer=words)
    rows = [{"input": f"w{i} w{i + 1}", "output": "w5 w6"} for i in range(3, 35)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = {"data__train": str(tmp_path / "rows.jsonl"), "data__format": "input_output"}
    data |= {"data__eval": None, "data__max_examples": None}
    quant = {"quant__format": "nf3", "quant__block_size": 8, "quant__calibration": "icq"}
    train = {"train__steps": 6, "train__learning_rate": 0.1, "adapter__dropout": 0.0}
    with jax.numpy_dtype_promotion("standard"):
        finetune(config_for(folder, tmp_path / "run", **data, **quant, **train))
    losses = [loss for _, loss in losses_of(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.1
    opened = load_run(tmp_path / "run", compute_dtype="float32")
    assert opened.model.config == llama
    tokens = np.random.default_rng(0).integers(0, llama.vocab_size, (2, 40))
    expected = np.asarray(jax.jit(opened.model.apply)(opened.variables, jnp.asarray(tokens)))
    merged = hf.export_merged(tmp_path / "run", tmp_path / "merged", dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(merged)
    np.testing.assert_allclose(their_logits(model, tokens), expected, **CLOSE)
