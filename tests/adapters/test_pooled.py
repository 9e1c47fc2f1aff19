"""QA-LoRA, QA-LoRA with IEC, Q-BaRA and QA-HiRA against results of the released codes, and their
updates inside of quantized weights."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from irqlora_jax.adapters import METHODS
from irqlora_jax.adapters.absorb import absorb
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.qahira import QahiraOptions
from irqlora_jax.adapters.qalora import QaloraOptions
from irqlora_jax.adapters.qalora_iec import QaloraIecOptions
from irqlora_jax.adapters.qbara import QbaraOptions
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import LAYERS, insert, linear_path
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.sharding import LINEAR_NAMES
from tests.models import tiny_llama

RANK8: dict[str, Any] = {"rank": 8, "alpha": 16.0}
CASES = {
    "qalora": AdapterConfig("qalora", **RANK8, qalora=QaloraOptions(32, "mean")),
    "qalora_peft": AdapterConfig("qalora", **RANK8, qalora=QaloraOptions(32, "peft")),
    "qalora_iec": AdapterConfig("qalora_iec", **RANK8, qalora_iec=QaloraIecOptions(32)),
    "qbara": AdapterConfig("qbara", **RANK8, qbara=QbaraOptions(2, 2)),
    "qahira": AdapterConfig("qahira", **RANK8, qahira=QahiraOptions(4, 8)),
}


def read(golden: Path, name: str, bits: str = "int4") -> dict[str, np.ndarray]:
    """The results of a case, with the base as "weight"."""
    found = dict(np.load(golden / f"{name}.npz"))
    if name == "qalora_peft":
        shared = np.load(golden / "qalora.npz")
        found |= {key: shared[key] for key in ("x", "target", "cotangent", "lora_A", "lora_B")}
    found = {key.removeprefix(f"{bits}_"): value for key, value in found.items()}
    if "weight" not in found:
        base = np.load(golden / "integer_base.npz")
        scale, zero, codes = (base[f"{bits}_gptq_{part}"] for part in ("scale", "zero", "codes"))
        scale, zero = (np.repeat(x, 32, axis=1) for x in (scale, zero))
        found["weight"] = scale * (codes - zero)
    return found


def output(adapter: AdapterConfig, params: Any, x: Any, weight: Any) -> jax.Array:
    scale = adapter.scale_for(weight.shape)
    return x @ weight.T + adapter.chosen.apply(params, x, x, scale, weight)


def parameters(adapter: AdapterConfig, found: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    names = adapter.chosen.files
    return {
        name: jnp.asarray(found[name].squeeze() if "beta" in name else found[name])
        for name in names
    }


def close(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    assert np.abs(np.asarray(found) - wanted).max() <= tolerance * np.abs(wanted).max()


def cases() -> list[tuple[str, str]]:
    return [("qalora", bits) for bits in ("int4", "int3", "int2")] + [
        (name, "int4") for name in CASES if name != "qalora"
    ]


@pytest.mark.parametrize(("name", "bits"), cases())
def test_forward_and_gradients(golden: Path, name: str, bits: str) -> None:
    adapter, found = CASES[name], read(golden, name, bits)
    weight = jnp.asarray(found["weight"])

    def total(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = output(adapter, params, x, weight)
        return (y * found["cotangent"]).sum(), y

    given = parameters(adapter, found), jnp.asarray(found["x"])
    (of_params, of_x), y = jax.grad(total, (0, 1), has_aux=True)(*given)
    close(y, found["y"])
    close(of_x, found["grad_x"])
    for leaf, gradient in of_params.items():
        close(gradient, found[f"grad_{leaf}"].reshape(gradient.shape))


@pytest.mark.parametrize(("name", "bits"), cases())
def test_ten_steps(golden: Path, optimizer_promotion, name: str, bits: str) -> None:
    adapter, found = CASES[name], read(golden, name, bits)
    weight, x, target = (jnp.asarray(found[key]) for key in ("weight", "x", "target"))
    params = {leaf: jnp.zeros_like(v) for leaf, v in parameters(adapter, found).items()}
    if "lora_A" in params:
        params["lora_A"] = jnp.asarray(found.get("init_lora_A", found["lora_A"]))
    optimizer = optax.adamw(1e-2, weight_decay=0.0)
    state, losses = optimizer.init(params), []
    step = jax.jit(
        jax.value_and_grad(lambda p: ((output(adapter, p, x, weight) - target) ** 2).mean())
    )
    for _ in range(10):
        loss, gradients = step(params)
        updates, state = optimizer.update(gradients, state, params)
        params = {leaf: value + updates[leaf] for leaf, value in params.items()}
        losses.append(float(loss))
    close(losses, found["losses"], 3e-6)
    finals = {leaf: key for leaf in params if (key := f"final_{leaf}") in found}
    for leaf, key in finals.items():
        close(params[leaf], found[key].reshape(params[leaf].shape), 2e-5)


@pytest.mark.parametrize("name", ["qbara", "qahira"])
def test_update_of_the_weight(golden: Path, name: str) -> None:
    adapter, found = CASES[name], read(golden, name)
    update = adapter.chosen.weight_update(parameters(adapter, found), found["delta"].shape)
    close(update * adapter.scale_for(found["delta"].shape), found["delta"])


def base(rows: int = 48, columns: int = 256, format: str = "int4", block: int = 32, **settings):
    weight = jax.random.normal(jax.random.key(5), (rows, columns))
    config = QuantConfig(format=format, block_size=block, calibration="none", **settings)  # type: ignore[arg-type]
    return quantize(weight, config)


@pytest.mark.parametrize("name", ["qalora", "qalora_peft"])
@pytest.mark.parametrize("bits", ["int4", "int3", "int2"])
def test_shifts_equal_the_released_merge(golden: Path, name: str, bits: str) -> None:
    """zero' = zero - update / scale, so the shift -zero scale grows by the update."""
    if name == "qalora_peft" and bits != "int4":
        pytest.skip("PEFT was run with int4 only")
    found, quantized = read(golden, name, bits), np.load(golden / "integer_base.npz")
    zero, scale = (quantized[f"{bits}_gptq_{part}"] for part in ("zero", "scale"))
    wanted = (zero - found["merged_zero"]) * scale
    merged = absorb(CASES[name], parameters(CASES[name], found), base())
    assert merged.shift_update is not None
    close(merged.shift_update, wanted, 1e-4)  # the zeros are differences of large numbers


def test_shifts_with_pools_of_whole_blocks(golden: Path) -> None:
    found = np.load(golden / "balanced_merge.npz")
    quantized = np.load(golden / "integer_base.npz")
    zero, scale = (quantized[f"int4_gptq_{part}"] for part in ("zero", "scale"))
    dense = np.repeat(scale, 32, 1) * (quantized["int4_gptq_codes"] - np.repeat(zero, 32, 1))
    names = {key.rpartition("_y")[0] for key in found if key.endswith("_y")}
    assert len(names) == 5
    for name in names:
        method, k_in, k_out = name.split("_")
        options: Any = {"hira": QahiraOptions, "bara": QbaraOptions}[method](int(k_in), int(k_out))
        own = {"hira": "qahira", "bara": "qbara"}[method]
        adapter = AdapterConfig(own, rank=4, alpha=8.0, **{own: options})
        params = {leaf: jnp.asarray(found[f"{name}_{leaf}"]) for leaf in adapter.chosen.files}
        close(output(adapter, params, jnp.asarray(found["x"]), dense), found[f"{name}_y"])
        merged = absorb(adapter, params, base())
        close(merged.shift_update, (zero - found[f"{name}_merged_zero"]) * scale, 1e-4)


@pytest.mark.parametrize("format", ["nf4", "nf3", "nf2", "fp4", "int3"])
@pytest.mark.parametrize("name", ["qalora", "qalora_iec", "qahira"])
def test_absorbed_weight_computes_the_same(format: str, name: str) -> None:
    """Also for formats without zero points, with groups of two blocks and a second merge."""
    weight = base(16, 256, format, block=32)
    options = {"qalora": QaloraOptions(64), "qalora_iec": QaloraIecOptions(64)}
    options["qahira"] = QahiraOptions(64, 4)  # type: ignore[assignment]
    adapter = AdapterConfig(name, rank=4, **{name: options[name]})
    fresh = adapter.chosen.init(jax.random.key(0), weight.shape, 4, options[name], jnp.float32)
    keys = jax.random.split(jax.random.key(1), len(fresh))
    params = {
        leaf: 0.1 * jax.random.normal(key, fresh[leaf].shape)
        for leaf, key in zip(fresh, keys, strict=True)
    }
    x = jax.random.normal(jax.random.key(2), (3, 256))
    one = x @ weight.dequantize().T
    update = adapter.chosen.apply(params, x, x, adapter.scale_for(weight.shape), weight)
    merged = absorb(adapter, params, weight)
    np.testing.assert_array_equal(merged.codes(), weight.codes())
    np.testing.assert_array_equal(merged.without_updates().dequantize(), weight.dequantize())
    close(x @ merged.dequantize().T, one + update, 1e-6)
    twice = absorb(adapter, params, merged)
    close(x @ twice.dequantize().T, one + 2 * update, 1e-6)
    half = absorb(adapter, params, weight, jnp.float16)
    assert half.shift_update is not None and half.shift_update.dtype == jnp.float16
    off = x @ (half.dequantize() - merged.dequantize()).T
    assert float(jnp.linalg.norm(off)) <= 1e-3 * float(jnp.linalg.norm(update))


def test_what_cannot_be_absorbed_says_what_would_do() -> None:
    weight = base(16, 256)
    for adapter, params, given, message in (
        (AdapterConfig("lora"), {}, weight, "differs within a block; expected kind merged"),
        (
            AdapterConfig("qahira"),
            {"matrix": jnp.ones((2, 64))},
            weight,
            r"constant over 4 inputs, but the blocks of the base have 32 weights; expected a "
            r"multiple of 32 \(adapter.qahira; for qalora_iec also .*, or kind merged",
        ),
        (AdapterConfig("qahira"), {}, jnp.ones((16, 256)), "not quantized; expected kind merged"),
        (
            AdapterConfig("qahira"),
            {},
            base(16, 256, outliers=0.01),
            "outliers, which have no shift",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            absorb(adapter, params, given)


def test_groups_that_do_not_divide_are_refused() -> None:
    for method, message in (
        ("qalora", "adapter.qalora.group = 64: expected a divisor of 72"),
        ("qalora_iec", "adapter.qalora_iec.group = 64: expected a divisor of 72"),
        ("qbara", "adapter.qbara.k_out = 2: expected a divisor of 15"),
        ("qahira", "adapter.qahira.k_out = 8: expected a divisor of 15"),
    ):
        with pytest.raises(ValueError, match=message):
            chosen = METHODS[method]
            chosen.init(jax.random.key(0), (15, 72), 4, chosen.options, jnp.float32)
    with pytest.raises(ValueError, match=r"adapter\.qalora\.group = 0: expected"):
        QaloraOptions(0)
    with pytest.raises(ValueError, match=r"adapter\.init = 'loftq': expected default with"):
        AdapterConfig("qalora", init="loftq")


def test_parameters_of_whole_models() -> None:
    """As the paper says, Q-BaRA has LoRA's number; QA-HiRA has it for 4096 x 4096 only."""

    def count(method: str, shape: tuple[int, int], rank: int) -> int:
        chosen = METHODS[method]
        made = jax.eval_shape(
            lambda: chosen.init(jax.random.key(0), shape, rank, chosen.options, jnp.float32)
        )
        return sum(leaf.size for leaf in jax.tree.leaves(made))

    for shape in ((4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096)):
        assert count("qbara", shape, 64) == count("lora", shape, 64)
    assert count("qahira", (4096, 4096), 64) == count("lora", (4096, 4096), 64)
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    hira, pair = (sum(count(m, shape, 64) for shape in shapes) for m in ("qahira", "lora"))
    assert hira / pair == pytest.approx(1.27, abs=0.005)


def test_a_whole_training_equals_the_released_one(golden: Path, optimizer_promotion) -> None:
    """Ten steps of a LLaMA with QA-LoRA: losses, gradient norms, factors, logits."""
    values = dict(np.load(golden / "llama_qalora.npz"))
    settings = json.loads((golden / "llama_qalora.json").read_text())
    llama = tiny_llama(**settings["config"], rope_theta=settings["rope_theta"], head_dim=16)
    adapter = AdapterConfig(
        "qalora", rank=4, alpha=16.0, qalora=QaloraOptions(settings["group"], "mean")
    )
    tree: dict[str, Any] = {}
    params: dict[str, Any] = {}
    final: dict[str, Any] = {}
    for name in LINEAR_NAMES:
        path = linear_path(name)
        layers = [f"model.layers.{i}.{'.'.join(path)}" for i in range(2)]
        dense = []
        for layer in layers:
            scale, zero, codes = (values[f"{part}.{layer}"] for part in ("scale", "zero", "codes"))
            scale, zero = (np.repeat(x, settings["group"], axis=1) for x in (scale, zero))
            dense.append(scale * (codes - zero))
        insert(tree, (LAYERS, *path), {"weight": jnp.asarray(np.stack(dense), jnp.float32)})
        for into, kind in ((params, "init"), (final, "final")):
            pair = {
                leaf: jnp.stack([values[f"{kind}.{layer}.{leaf}.weight"] for layer in layers])
                for leaf in ("lora_A", "lora_B")
            }
            insert(into, (LAYERS, *path), pair)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        both = np.stack([values[f"model.layers.{i}.{norm}.weight"] for i in range(2)])
        insert(tree, (LAYERS, norm), {"weight": jnp.asarray(both)})
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        tree[name.removeprefix("model.")] = {"weight": jnp.asarray(values[f"{name}.weight"])}
    model = Llama(llama, adapter=adapter)

    @jax.jit
    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params, "base": tree}, tokens)
        chosen = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return chosen.mean()

    logits: Any = model.apply(
        {"params": params, "base": tree}, jnp.asarray(values["tokens"][0, :1])
    )
    close(logits[0], values["logits_start"])
    optimizer = optax.adamw(settings["learning_rate"], weight_decay=0.0)
    state, step = optimizer.init(params), jax.jit(jax.value_and_grad(loss))
    for tokens, wanted, norm in zip(
        jnp.asarray(values["tokens"]), values["losses"], values["grad_norms"], strict=True
    ):
        value, gradients = step(params, tokens)
        assert float(value) == pytest.approx(wanted, rel=2e-6)
        found = optax.tree.norm(gradients)
        assert float(found) == pytest.approx(norm, rel=5e-5)
        gradients = jax.tree.map(
            lambda g, f=found: g * jnp.minimum(1, settings["clip"] / (f + 1e-6)), gradients
        )
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: close(a, np.asarray(b), 3e-5), params, final)
    logits = model.apply({"params": params, "base": tree}, jnp.asarray(values["tokens"][0, :1]))
    close(logits[0], values["logits_final"])
    scale = adapter.scale_for((64, 64))
    pair = {leaf: value[0] for leaf, value in params[LAYERS]["self_attn"]["q_proj"].items()}
    change = adapter.chosen.reduced(pair, (64, 64)) * scale  # type: ignore[misc]
    layer = "model.layers.0.self_attn.q_proj"
    moved = values[f"zero.{layer}"] - values[f"merged_zero.{layer}"]
    close(change, moved * values[f"scale.{layer}"], 1e-3)


def test_dropped_inputs_reach_only_the_pair() -> None:
    """As in IEC, the connection of QA-LoRA with IEC takes the inputs before dropout."""
    chosen = METHODS["qalora_iec"]
    params = chosen.init(jax.random.key(0), (16, 64), 4, QaloraIecOptions(16), jnp.float32)
    params |= {"beta1": jnp.float32(1), "beta2": jnp.float32(1)}
    x = jax.random.normal(jax.random.key(1), (3, 64))
    y = chosen.apply(params, x, jnp.zeros_like(x), 1.0, None)
    other = chosen.apply(params, x, x, 1.0, None)
    assert np.abs(np.asarray(y)).max() > 0
    assert np.abs(np.asarray(y - other)).max() > 0
