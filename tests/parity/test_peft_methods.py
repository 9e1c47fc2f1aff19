"""LoKr, rsLoRA and DoRA: files of PEFT compute here what they compute there, and the reverse."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax import hf
from irqlora_jax.adapters import lora
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.lokr import LokrOptions
from irqlora_jax.config import TrainConfig
from irqlora_jax.export.peft import save_adapter
from irqlora_jax.model.llama import Llama
from irqlora_jax.runs.state import make_optimizer
from irqlora_jax.sharding import LINEAR_NAMES
from tests.models import NARROW, random_adapters

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
optimizers = pytest.importorskip("peft.optimizers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # of other packages
TOKENS = np.random.default_rng(0).integers(0, NARROW.vocab_size, (2, 17)).astype(np.int32)
TARGETS = {"target_modules": list(LINEAR_NAMES), "task_type": "CAUSAL_LM"}
LOKR = {"r": 2, "alpha": 6, "init_weights": False, **TARGETS}
LORA = {"r": 6, "lora_alpha": 9, "init_lora_weights": False, **TARGETS}
CASES: dict[str, tuple[Any, dict[str, Any], AdapterConfig]] = {
    "lokr": ("LoKrConfig", LOKR, AdapterConfig(method="lokr", rank=2, alpha=6.0)),
    "lokr of both": (
        "LoKrConfig",
        {**LOKR, "decompose_both": True, "decompose_factor": 8},
        AdapterConfig(method="lokr", rank=2, alpha=6.0, lokr=LokrOptions(True, 8)),
    ),
    "rslora": (
        "LoraConfig",
        {**LORA, "use_rslora": True},
        AdapterConfig(method="lora", rank=6, alpha=9.0, scaling="sqrt_rank"),
    ),
    "rslora with iec": (
        "LoraConfig",
        {**LORA, "use_rslora": True},
        AdapterConfig(method="iec", rank=6, alpha=9.0, scaling="sqrt_rank"),
    ),
}


@functools.cache
def base() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**NARROW.to_dict(), initializer_range=0.05)
    return transformers.LlamaForCausalLM(config).eval()


def fresh_base(folder: Path) -> Any:
    """A copy of the base, because PEFT changes the model, and its folder for us."""
    base().save_pretrained(folder / "base")
    return transformers.LlamaForCausalLM.from_pretrained(folder / "base").eval()


def logits_there(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_has_the_same_logits_here(tmp_path: Path, case: str) -> None:
    kind, settings, adapter = CASES[case]
    model = fresh_base(tmp_path)
    plain = logits_there(model)
    theirs = peft.get_peft_model(model, getattr(peft, kind)(**settings)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    expected = logits_there(theirs)
    assert np.abs(expected - plain).max() > 1e-2
    frozen, llama = hf.load_base(tmp_path / "base", None)
    ours = Llama(llama, adapter)
    adapters = hf.load_adapter(tmp_path / "adapter", ours)
    logits = ours.apply({"params": adapters, "base": frozen}, jnp.asarray(TOKENS))
    np.testing.assert_allclose(np.asarray(logits), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_our_folder(tmp_path: Path, case: str) -> None:
    adapter = CASES[case][2]
    model = fresh_base(tmp_path)
    frozen, llama = hf.load_base(tmp_path / "base", None)
    ours = Llama(llama, adapter)
    adapters = random_adapters(ours)
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", ours, adapters)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    logits = ours.apply({"params": adapters, "base": frozen}, jnp.asarray(TOKENS))
    np.testing.assert_allclose(np.asarray(logits), logits_there(theirs), rtol=0, atol=1e-4)
    if adapter.method != "iec":  # folded there
        again = hf.load_adapter(tmp_path / "adapter", ours)
        jax.tree.map(np.testing.assert_array_equal, again, adapters)


FAULTS = {
    "rank": ({"r": 3}, "r = 3, but adapter.rank = 2"),
    "alpha": ({"alpha": 5}, "alpha = 5, but adapter.alpha = 6"),
    "factor": ({"decompose_factor": 4}, "decompose_factor = 4: expected -1"),
    "both": ({"decompose_both": True}, "decompose_both = True: expected False"),
    "kind": ({"peft_type": "LOHA"}, "peft_type = 'LOHA': expected 'LOKR'"),
    "ranks by layer": ({"rank_pattern": {"q_proj": 3}}, "rank_pattern"),
}


def test_a_lokr_folder_that_says_something_else_is_refused(tmp_path: Path) -> None:
    ours = Llama(NARROW, CASES["lokr"][2])
    save_adapter(tmp_path, ours, random_adapters(ours))
    file = tmp_path / "adapter_config.json"
    written = json.loads(file.read_text())
    known = set(peft.LoKrConfig(**LOKR).to_dict()) | {"inference_mode"}
    assert set(written) <= known
    for changes, words in FAULTS.values():
        file.write_text(json.dumps(written | changes))
        with pytest.raises(ValueError, match=r"adapter_config\.json") as raised:
            hf.load_adapter(tmp_path, ours)
        assert words in str(raised.value)


@pytest.mark.usefixtures("optimizer_promotion")
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_ten_steps_of_lora_plus_are_those_of_peft(decay: float) -> None:
    """The groups of PEFT's optimizer, on one layer; also its learning rate in the decay."""
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(24, 16, bias=False))
    theirs = peft.get_peft_model(net, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"]))
    x, target = torch.randn(32, 24), torch.randn(32, 16)
    layer = theirs.base_model.model[0]
    there = {"lora_A": layer.lora_A.default.weight, "lora_B": layer.lora_B.default.weight}
    params = {name: jnp.asarray(value.detach().numpy().copy()) for name, value in there.items()}
    weight = jnp.asarray(layer.base_layer.weight.detach().numpy())
    groups = optimizers.create_loraplus_optimizer(
        theirs,
        torch.optim.AdamW,
        lr=1e-2,
        loraplus_lr_ratio=16.0,
        loraplus_weight_decay=decay,
    )
    settings = TrainConfig(
        learning_rate=1e-2, weight_decay=decay, lora_plus_ratio=16.0, compute_dtype="float32"
    )
    optimizer = make_optimizer(settings)
    state = optimizer.init(params)
    ours, aim = jnp.asarray(x.numpy()), jnp.asarray(target.numpy())

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            y = ours @ weight.T + lora.apply(params, ours, ours, 2.0)
            return jnp.mean((y - aim) ** 2)

        steps, state = optimizer.update(jax.grad(loss)(params), state, params)
        return jax.tree.map(jnp.add, params, steps), state

    for _ in range(10):
        groups.zero_grad()
        torch.nn.functional.mse_loss(theirs(x), target).backward()
        groups.step()
        params, state = step(params, state)
    for name, value in there.items():
        np.testing.assert_allclose(params[name], value.detach().numpy(), rtol=0, atol=1e-5)
