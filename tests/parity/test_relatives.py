"""Models that differ a little from LLaMA, against transformers: logits, and what export writes."""

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
from tests.models import PLAIN, RELATIVES, stack_tensors, write_run

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
