"""Every adapter method, stored: as a plain pair for PEFT, and in its own form."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from irqlora_jax import hf
from irqlora_jax.adapters import METHODS
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.qalora import QaloraOptions
from irqlora_jax.adapters.qalora_iec import QaloraIecOptions
from irqlora_jax.export.peft import folded
from irqlora_jax.files.small import read_json
from irqlora_jax.files.tensors import read_headers
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import ADAPTER_CONFIG
from tests.models import NARROW

TARGETS = ("q_proj", "down_proj")


GROUPS: dict[str, Any] = {"qalora": QaloraOptions(8, "sum"), "qalora_iec": QaloraIecOptions(8)}


def model_of(method: Any) -> Llama:
    options = {method: GROUPS[method]} if method in GROUPS else {}
    shared: dict[str, Any] = {"rank": 5, "alpha": 9.0, "targets": TARGETS}
    return Llama(NARROW, AdapterConfig(method=method, **shared, **options))


def plain_model(folder: Path) -> Llama:
    """LoRA with the rank and alpha of a folder."""
    values = read_json(folder / ADAPTER_CONFIG)
    rank, alpha = values["r"], float(values["lora_alpha"])
    return Llama(NARROW, AdapterConfig(method="lora", rank=rank, alpha=alpha, targets=TARGETS))


def random_adapters(model: Llama) -> Any:
    """Every leaf random, so that gates are open or closed by chance."""
    fresh = model.init_adapters(jax.random.key(0))
    leaves, tree = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def pairs(adapters: Any, model: Llama) -> list[Any]:
    assert model.adapter is not None
    return [
        folded(leaves, jnp.int32(layer), model.adapter, NARROW.linear_shapes[name])
        for _, group in sorted(adapters["layers"].items())
        for name, leaves in sorted(group.items())
        for layer in range(NARROW.num_hidden_layers)
    ]


@pytest.mark.parametrize("method", [m.name for m in METHODS.values() if m.fold is not None])
def test_a_stored_adapter_has_the_same_update(tmp_path: Path, method: str) -> None:
    model = model_of(method)
    adapters = random_adapters(model)
    if method == "bayesian":
        adapters = with_ranks(adapters, [5, 5])
    (tmp_path / "own").mkdir()
    hf.save_adapter(tmp_path / "own", model, adapters, fold=False)
    hf.save_adapter(tmp_path, model, adapters)
    own = hf.load_adapter(tmp_path / "own", model)
    lora = plain_model(tmp_path)
    plain = hf.load_adapter(tmp_path, lora)
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, adapters)
    for pair, again, alone in zip(
        pairs(adapters, model), pairs(own, model), pairs(plain, lora), strict=True
    ):
        for leaf, value in pair.items():
            np.testing.assert_allclose(again[leaf], value, rtol=1e-6)
            np.testing.assert_allclose(alone[leaf], value, rtol=1e-6)


def with_ranks(adapters: Any, ranks: list[int]) -> Any:
    """Rank gates of Bayesian-LoRA that leave these ranks in each layer."""
    gates = jnp.where(jnp.arange(5)[None] < jnp.asarray(ranks)[:, None], 1.0, -1.0)
    change = lambda path, leaf: gates if path[-1].key == "gates_rank" else leaf  # noqa: E731
    return jax.tree_util.tree_map_with_path(change, adapters)


@pytest.mark.parametrize("ranks", [[2, 5], [3, 3]])
def test_ranks_that_the_gates_removed_are_not_stored(tmp_path: Path, ranks: list[int]) -> None:
    model = model_of("bayesian")
    adapters = with_ranks(random_adapters(model), ranks)
    hf.save_adapter(tmp_path, model, adapters)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    whole = iter(pairs(adapters, model))
    for name in ("mlp.down_proj", "self_attn.q_proj"):
        for layer, rank in enumerate(ranks):
            pair = next(whole)
            stem = f"base_model.model.model.layers.{layer}.{name}"
            a, b = (tensors[f"{stem}.{leaf}.weight"] for leaf in ("lora_A", "lora_B"))
            np.testing.assert_allclose(a, pair["lora_A"][:rank], rtol=1e-6)
            np.testing.assert_allclose(b, pair["lora_B"][:, :rank], rtol=1e-6)
            assert not pair["lora_B"][:, rank:].any()
    values = read_json(tmp_path / ADAPTER_CONFIG)
    assert (values["r"], values["lora_alpha"]) == (max(ranks), pytest.approx(9 * max(ranks) / 5))
    names = [f"layers.0.{name}" for name in ("self_attn.q_proj", "mlp.down_proj")]
    few = ranks[0] if ranks[0] < max(ranks) else None
    assert values.get("rank_pattern", {}) == (dict.fromkeys(names, few) if few else {})
    expected = dict.fromkeys(names, pytest.approx(9 * few / 5)) if few else {}
    assert values.get("alpha_pattern", {}) == expected


def test_signs_take_a_bit_each(tmp_path: Path) -> None:
    model = model_of("binary")
    hf.save_adapter(tmp_path, model, random_adapters(model), fold=False)
    for name, header in read_headers(tmp_path / "adapter_model.safetensors").items():
        out, into = NARROW.linear_shapes[name.split(".")[-2]]
        columns = {"lora_A_signs": into, "lora_B_signs": 5}.get(name.split(".")[-1])
        if columns is not None:
            rows = 5 if columns == into else out
            assert (header.dtype, header.shape) == ("U8", (rows, -(-columns // 8)))


def test_a_plain_pair_starts_bayesian_lora_but_no_binary_one(tmp_path: Path) -> None:
    lora = model_of("lora")
    adapters = random_adapters(lora)
    hf.save_adapter(tmp_path, lora, adapters)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: no tensor .*signs"):
        hf.load_adapter(tmp_path, model_of("binary"))
    started = hf.load_adapter(tmp_path, model_of("bayesian"))
    for pair, own in zip(pairs(adapters, lora), pairs(started, model_of("bayesian")), strict=True):
        for leaf, value in pair.items():
            np.testing.assert_allclose(own[leaf], value, atol=1e-6)
