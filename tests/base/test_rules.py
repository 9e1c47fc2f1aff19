"""Layers in different formats: `quant.rules`, and the stacks that they are kept in."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax import hf
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.base.file import read_base, save_base
from irqlora_jax.base.storage import abstract_base, measure_base
from irqlora_jax.export.model import save_model
from irqlora_jax.model.layer import AdaptedLinear
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.config import QuantConfig, QuantRule
from irqlora_jax.quant.qtensor import QTensor
from tests.models import assert_same, random_tensors, tiny_llama, word_tokenizer, write_model

LLAMA = tiny_llama(num_hidden_layers=4)
RULES = (
    QuantRule("layers.[03].*", format="nf4"),
    QuantRule("layers.2.mlp.down_proj", format="none"),
)
MIXED = QuantConfig(format="nf3", calibration="none", rules=RULES)
TOKENS = jnp.arange(3, 9)[None]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rules") / "model"
    return write_model(folder, LLAMA, random_tensors(LLAMA), tokenizer=word_tokenizer(43))


def test_layers_are_stored_as_the_rules_say(model: Path, tmp_path: Path) -> None:
    base, llama = hf.load_base(model, MIXED)
    assert {"layers_0", "layers_1", "layers_2", "layers_3"} <= base.keys()
    up = [base[f"layers_{i}"]["mlp"]["up_proj"]["weight"].format for i in range(4)]
    assert up == ["nf4", "nf3", "nf3", "nf4"]
    assert not isinstance(base["layers_2"]["mlp"]["down_proj"]["weight"], QTensor)
    assert measure_base(base) == measure_base(abstract_base(llama, MIXED, "float32"))
    save_base(tmp_path / "base.safetensors", base, llama, MIXED)
    assert_same(read_base(tmp_path / "base.safetensors")[0], base)


def test_stacks_scanned_in_turn_equal_the_exported_model(model: Path, tmp_path: Path) -> None:
    base, llama = hf.load_base(model, MIXED)
    adapted = Llama(llama, adapter=AdapterConfig(rank=2))
    adapters = adapted.init_adapters(jax.random.key(0))
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
    variables = {"params": jax.tree.map(noise, adapters), "base": base}
    expected = adapted.apply(variables, TOKENS)
    save_model(tmp_path, adapted, variables, dtype="float32")
    word_tokenizer(43).save_pretrained(tmp_path)
    plain, _ = hf.load_base(tmp_path, None)
    whole = Llama(llama).apply({"params": {}, "base": plain}, TOKENS)
    np.testing.assert_allclose(whole, expected, atol=1e-4)
    _, cache = adapted.apply(
        variables, TOKENS[:, :4], adapted.init_cache(1, 8), method=Llama.decode
    )
    last, _ = adapted.apply(variables, TOKENS[:, 4:], cache, method=Llama.decode)
    np.testing.assert_allclose(last, expected[:, -1], atol=1e-4)


def test_a_rule_that_matches_nothing_or_sets_nothing_is_refused(model: Path) -> None:
    config = QuantConfig(rules=(QuantRule("layers.7.*", format="nf3"),))
    with pytest.raises(ValueError, match=r"quant.rules\[0\].match = 'layers.7.\*'.*layers 0 to 3"):
        hf.load_base(model, config)
    with pytest.raises(ValueError, match=r"quant.rules\[0\].*sets something"):
        QuantConfig(rules=(QuantRule("layers.0.*"),))


def test_the_program_without_second_moments_has_nothing_of_them(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, llama = hf.load_base(model, MIXED)
    bare = Llama(llama)

    def program(mutable: Any) -> str:
        """The compiled instructions, without the places in the source that they come from."""
        apply = lambda base: bare.apply({"base": base}, TOKENS, mutable=mutable)  # noqa: E731
        text = jax.jit(apply).lower(base).compile().as_text()
        lines = [line for line in text.splitlines() if " = " in line]
        return re.sub(r", metadata=\{[^}]*\}", "", "\n".join(lines))

    plain, moments = program(False), program(["stats"])
    with monkeypatch.context() as patch:
        patch.setattr(AdaptedLinear, "is_mutable_collection", lambda self, name: False)
        assert program(False) == plain
    # q, k and v read the same inputs, as gate and up do: four products a layer.
    assert moments.count(" dot(") == plain.count(" dot(") + 4 * 4


def test_second_moments_of_the_inputs_are_given_on_request(model: Path) -> None:
    base, llama = hf.load_base(model, None)
    bare = Llama(llama)
    variables = {"params": {}, "base": base}
    logits, found = bare.apply(variables, TOKENS, mutable=["stats"])
    np.testing.assert_array_equal(logits, bare.apply(variables, TOKENS))
    grams = found["stats"]["layers"]
    gram = np.asarray(grams["self_attn"]["q_proj"]["gram"])
    assert gram.shape == (4, llama.hidden_size, llama.hidden_size)
    # q, k and v read the same inputs, and a Gram matrix is symmetric.
    np.testing.assert_allclose(gram, np.asarray(grams["self_attn"]["v_proj"]["gram"]), rtol=1e-6)
    np.testing.assert_allclose(gram, gram.transpose(0, 2, 1), atol=1e-5)
    weight = base["layers"]["input_layernorm"]["weight"][0]
    x = np.asarray(base["embed_tokens"]["weight"])[np.asarray(TOKENS[0])]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + llama.rms_norm_eps) * np.asarray(weight)
    np.testing.assert_allclose(gram[0], x.T @ x, rtol=1e-4, atol=1e-4)
