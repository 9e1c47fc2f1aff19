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
from irqlora_jax.adapters import dora, lora
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.dora import DORA
from irqlora_jax.adapters.lokr import LokrOptions
from irqlora_jax.adapters.qalora import QaloraOptions
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
    "dora": (
        "LoraConfig",
        {**LORA, "use_dora": True},
        AdapterConfig(method="dora", rank=6, alpha=9.0),
    ),
    "qalora": (
        "LoraConfig",
        {**LORA, "use_qalora": True, "qalora_group_size": 4},
        AdapterConfig(method="qalora", rank=6, alpha=9.0, qalora=QaloraOptions(4, "peft")),
    ),
    "qalora of mean pools": (
        "LoraConfig",
        {**LORA, "use_qalora": True, "qalora_group_size": 4},
        AdapterConfig(method="qalora", rank=6, alpha=9.0, qalora=QaloraOptions(4, "mean")),
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


@pytest.fixture(autouse=True)
def pools_of_plain_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT offers its QA-LoRA for GPTQ layers only. The same code runs here on plain layers."""
    layer = peft.tuners.lora.layer.Linear
    usual = layer.resolve_lora_variant

    def resolve(self: Any, *, config: Any, **options: Any) -> Any:
        if config.use_qalora:
            return peft.tuners.lora.variants.QALoraLinearVariant()
        return usual(self, config=config, **options)

    monkeypatch.setattr(layer, "resolve_lora_variant", resolve)


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
    fold = adapter.method != "qalora"  # else it would be a plain pair
    save_adapter(tmp_path / "adapter", ours, adapters, fold=fold)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    logits = ours.apply({"params": adapters, "base": frozen}, jnp.asarray(TOKENS))
    np.testing.assert_allclose(np.asarray(logits), logits_there(theirs), rtol=0, atol=1e-4)
    if adapter.method != "iec":  # folded there
        again = hf.load_adapter(tmp_path / "adapter", ours)
        same = functools.partial(np.testing.assert_allclose, rtol=1e-6)
        jax.tree.map(same, again, adapters)


def test_peft_reads_pairs_whose_ranks_differ_between_layers(tmp_path: Path) -> None:
    """Bayesian-LoRA, folded: the gates left 2 ranks in one layer and 5 in the other."""
    targets = ("q_proj", "down_proj")
    adapter = AdapterConfig(method="bayesian", rank=6, alpha=9.0, targets=targets)
    model = fresh_base(tmp_path)
    frozen, llama = hf.load_base(tmp_path / "base", None)
    ours = Llama(llama, adapter)
    gates = jnp.where(jnp.arange(6)[None] < jnp.array([[2], [5]]), 1.0, -1.0)
    change = lambda path, leaf: gates if path[-1].key == "gates_rank" else leaf  # noqa: E731
    adapters = jax.tree_util.tree_map_with_path(change, random_adapters(ours))
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", ours, adapters)
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert values["r"] == 5 and set(values["rank_pattern"].values()) == {2}
    plain = logits_there(model)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    logits = ours.apply({"params": adapters, "base": frozen}, jnp.asarray(TOKENS))
    np.testing.assert_allclose(np.asarray(logits), logits_there(theirs), rtol=0, atol=1e-4)
    assert np.abs(logits_there(theirs) - plain).max() > 1e-3
    # Read as LoRA of the largest rank: same scale, so the same pairs, with zeros.
    lora = Llama(llama, AdapterConfig(method="lora", rank=5, alpha=7.5, targets=targets))
    pairs = hf.load_adapter(tmp_path / "adapter", lora)
    assert (pairs["layers"]["mlp"]["down_proj"]["lora_A"][0, 2:] == 0).all()
    again = lora.apply({"params": pairs, "base": frozen}, jnp.asarray(TOKENS))
    np.testing.assert_allclose(np.asarray(again), np.asarray(logits), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "changes"),
    [("lora", {}), ("iec", {"use_rslora": True}), ("dora", {"use_dora": True})],
)
def test_pairs_of_peft_whose_ranks_differ(
    tmp_path: Path, method: Any, changes: dict[str, Any]
) -> None:
    """Names in a pattern are ends of module names or regular expressions. The first one counts, in
    the alphabetical order of PEFT's files."""
    patterns = {
        "rank_pattern": {"layers.0.self_attn.q_proj": 3, "layers.1.mlp.*": 2, "self_attn.*": 9},
        "alpha_pattern": {".*\\.1\\.mlp\\.up_proj": 5, "k_proj": 4.5},
    }
    model = fresh_base(tmp_path)
    frozen, llama = hf.load_base(tmp_path / "base", None)
    theirs = peft.get_peft_model(model, peft.LoraConfig(**LORA, **patterns, **changes)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    scaling = "sqrt_rank" if changes.get("use_rslora") else "rank"
    adapter = AdapterConfig(method=method, rank=9, alpha=9.0, scaling=scaling)
    ours = Llama(llama, adapter)
    adapters = hf.load_adapter(tmp_path / "adapter", ours)
    logits = ours.apply({"params": adapters, "base": frozen}, jnp.asarray(TOKENS))
    np.testing.assert_allclose(np.asarray(logits), logits_there(theirs), rtol=0, atol=1e-4)
    ranks = {
        name: [int((np.abs(leaf["lora_B"][i]).max(0) > 0).sum()) for i in (0, 1)]
        for group in adapters["layers"].values()
        for name, leaf in group.items()
    }
    assert ranks["q_proj"] == [3, 9] and ranks["k_proj"] == [9, 9] and ranks["up_proj"] == [6, 2]


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


def grads_there(layer: Any, x: Any, cotangent: Any) -> dict[str, np.ndarray]:
    layer.zero_grad()
    (layer(x) * cotangent).sum().backward()
    return {name: value.grad.numpy() for name, value in dora_leaves(layer).items()}


def dora_leaves(layer: Any) -> dict[str, Any]:
    magnitude = layer.lora_magnitude_vector.default.weight
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    return {"lora_A": a, "lora_B": b, "magnitude": magnitude}


@pytest.mark.usefixtures("optimizer_promotion")
def test_dora_trains_as_in_peft() -> None:
    """One layer: start, output, gradients with the norm as a constant, merge, and ten steps."""
    torch.manual_seed(2)
    net = torch.nn.Sequential(torch.nn.Linear(24, 16, bias=False))
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], use_dora=True)
    theirs = peft.get_peft_model(net, settings)
    layer = theirs.base_model.model[0]
    x, target, cotangent = torch.randn(32, 24), torch.randn(32, 16), torch.randn(32, 16)
    ours, aim, pull = (jnp.asarray(t.numpy()) for t in (x, target, cotangent))
    weight = jnp.asarray(layer.base_layer.weight.detach().numpy())

    def read() -> dict[str, jax.Array]:
        return {k: jnp.asarray(v.detach().numpy().copy()) for k, v in dora_leaves(layer).items()}

    def output(params: dict[str, jax.Array]) -> jax.Array:
        y = ours @ weight.T + DORA.apply(params, ours, ours, 2.0, weight)
        return y * dora.gain(params, weight, 2.0)[None]

    params = read()
    assert DORA.from_weight is not None
    start = DORA.from_weight(params, weight, 2.0)
    np.testing.assert_allclose(start["magnitude"], params["magnitude"], rtol=1e-6)
    optimizer = make_optimizer(TrainConfig(learning_rate=1e-2, compute_dtype="float32"), DORA)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        grads = jax.grad(lambda params: jnp.mean((output(params) - aim) ** 2))(params)
        steps, state = optimizer.update(grads, state, params)
        return jax.tree.map(jnp.add, params, steps), state

    there = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(10):
        there.zero_grad()
        torch.nn.functional.mse_loss(theirs(x), target).backward()
        there.step()
        params, state = step(params, state)
    for name, value in read().items():
        np.testing.assert_allclose(params[name], value, rtol=0, atol=1e-5)
    # After the steps no part of the update is 0 any more.
    params = read()
    expected = layer(x).detach().numpy()
    np.testing.assert_allclose(output(params), expected, rtol=0, atol=1e-5)
    grads = jax.grad(lambda params: (output(params) * pull).sum())(params)
    for name, value in grads_there(layer, x, cotangent).items():
        np.testing.assert_allclose(grads[name], value, rtol=0, atol=1e-5 * np.abs(value).max())
    merged = DORA.merged(params, weight, jnp.float32(2.0))
    layer.merge()
    theirs_merged = layer.base_layer.weight.detach().numpy()
    np.testing.assert_allclose(merged, theirs_merged, rtol=0, atol=1e-6)
