"""An adapter saved by PEFT computes here what it computes there."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax import hf
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.model.llama import Llama
from irqlora_jax.sharding import LINEAR_NAMES
from tests.models import NARROW

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # of other packages


@pytest.mark.parametrize("method", ["lora", "iec"])
@pytest.mark.parametrize("targets", [LINEAR_NAMES, ("q_proj", "down_proj")], ids=["all", "two"])
def test_an_adapter_of_peft_has_the_same_logits_here(
    tmp_path: Path, method: Any, targets: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**NARROW.to_dict(), initializer_range=0.02)
    base = transformers.LlamaForCausalLM(config).eval()
    base.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(
        r=6,
        lora_alpha=9,
        target_modules=list(targets),
        init_lora_weights=False,  # also lora_B is random then
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(base, lora).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    tokens = np.random.default_rng(0).integers(0, NARROW.vocab_size, (2, 17)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
        with theirs.disable_adapter():
            plain = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    assert np.abs(expected - plain).max() > 1e-2

    frozen, llama_config = hf.load_base(tmp_path / "base", None)
    model = Llama(llama_config, AdapterConfig(method=method, rank=6, alpha=9.0, targets=targets))
    adapters = hf.load_adapter(tmp_path / "adapter", model)
    logits = model.apply({"params": adapters, "base": frozen}, jnp.asarray(tokens))
    np.testing.assert_allclose(np.asarray(logits), expected, rtol=0, atol=1e-4)
