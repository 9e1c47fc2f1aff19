"""LoftQ: against a slow reference, by its properties, and for the weights of a model."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from irqlora_jax import hf
from irqlora_jax.adapters import loftq as module
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.loftq import LoftqOptions, exact_svd, loftq, randomized_svd
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant import encode
from irqlora_jax.quant.calibrations.icq import IcqOptions
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize, quantized_shape
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.quant.slabs import rows_of
from irqlora_jax.sharding import MeshConfig, make_mesh, tree_shardings
from tests.models import LLAMA, NARROW, WORLD, assert_same, random_tensors, write_model

KEY = jax.random.key(0)
SCALING = 16 / 6
NF2, NF3 = (QuantConfig(format=name, calibration="none") for name in ("nf2", "nf3"))
ICQ = QuantConfig(format="nf2", icq=IcqOptions(steps=4))
INT3 = QuantConfig(format="int3", block_size=32)
# No rows of whole blocks, no half precision that float32 could stand for.
CASES = [
    (NF3, (37, 101), jnp.float32),
    (ICQ, (130, 65), jnp.bfloat16),
    (INT3, (64, 96), jnp.float32),
]


def weights(shape: tuple[int, int], seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    """Random, with a few directions and a few weights that are larger than the others."""
    rng = np.random.default_rng(seed)
    wide = rng.normal(0, 0.02, shape) + 0.04 * np.outer(*(rng.normal(0, 1, n) for n in shape)) / 3
    return jnp.asarray(wide * np.where(rng.random(shape) < 0.01, 4, 1), dtype)


def left(weight: jax.Array, packed: QTensor, a: Any, b: Any, scaling: float = SCALING) -> float:
    """Frobenius norm of W - Q - s B A, in float64."""
    w, q, a, b = (np.asarray(x, np.float64) for x in (weight, packed.dequantize(), a, b))
    return float(np.linalg.norm(w - q - scaling * b @ a))


def reference(weight: jax.Array, config: QuantConfig, rank: int, turns: int) -> list[Any]:
    """Every turn in float64, but for what is quantized: error, Q and s B A."""
    w = np.asarray(weight, np.float64)
    update, found = np.zeros_like(w), []
    for _ in range(turns):
        packed = quantize(jnp.asarray((w - update).astype(np.float32)), config)
        error = w - np.asarray(packed.dequantize(), np.float64)
        u, s, v = np.linalg.svd(error, full_matrices=False)
        b, a = (u * np.sqrt(s / SCALING))[:, :rank], (np.sqrt(s / SCALING)[:, None] * v)[:rank]
        update = SCALING * b @ a
        found.append((np.linalg.norm(error - update), packed, update))
    return found


@pytest.mark.parametrize(("config", "shape", "dtype"), CASES)
def test_the_best_turn_is_that_of_the_reference(
    config: QuantConfig, shape: Any, dtype: Any
) -> None:
    weight = weights(shape, dtype=dtype)
    turns = reference(weight, config, 6, 4)
    for count in (1, 4):
        packed, a, b = loftq(weight, config, 6, SCALING, count, KEY)
        least, expected, update = min(turns[:count], key=lambda turn: turn[0])
        # A last bit of W - s B A may move a code that lies on the edge between two.
        np.testing.assert_allclose(left(weight, packed, a, b), least, rtol=2e-3)
        assert np.mean(np.asarray(packed.codes() != expected.codes())) < 1e-3
        gap = np.abs(SCALING * np.asarray(b, np.float64) @ np.asarray(a, np.float64) - update)
        assert gap.max() < (1e-6 if count == 1 else 0.05 * np.abs(update).max())


@pytest.mark.parametrize(("config", "shape", "dtype"), CASES)
def test_loftq_lowers_the_error_and_more_iterations_never_raise_it(
    config: QuantConfig, shape: Any, dtype: Any
) -> None:
    weight = weights(shape, dtype=dtype)
    plain = quantize(weight, config)
    for pair in (jnp.float32, jnp.bfloat16):
        errors = [left(weight, plain, np.zeros((1, shape[1])), np.zeros((shape[0], 1)))]
        for turns in (1, 2, 5):
            packed, a, b = loftq(weight, config, 6, SCALING, turns, KEY, pair)
            assert a.dtype == b.dtype == pair and a.shape == (6, shape[1])
            assert b.shape == (shape[0], 6)
            errors.append(left(weight, packed, a, b))
        assert errors[1] < 0.95 * errors[0]
        assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))


def test_the_first_turn_is_kept_where_it_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantizer that becomes worse from call to call: Q and its pair still belong together."""
    calls: list[Any] = []

    def worse(weight: jax.Array, config: QuantConfig, minus: Any, **inputs: Any) -> QTensor:
        calls.append(quantize(weight * (1.0 + len(calls)), config, minus=minus))
        return calls[-1]

    monkeypatch.setattr(module, "quantize", worse)
    weight = weights((37, 101))
    packed, a, b = loftq(weight, NF3, 6, SCALING, 3, KEY)
    assert len(calls) == 3
    assert_same(packed, calls[0])
    np.testing.assert_allclose(left(weight, packed, a, b), reference(weight, NF3, 6, 1)[0][0], 1e-5)


def test_a_full_rank_pair_removes_the_whole_error() -> None:
    for shape in ((24, 65), (65, 24)):
        weight = weights(shape)
        packed, a, b = loftq(weight, NF2, 33, 0.25, 2, KEY)
        assert a.shape == (33, shape[1]) and b.shape == (shape[0], 33)
        assert left(weight, packed, a, b, 0.25) < 1e-5 * float(jnp.linalg.norm(weight))
        assert not a[min(shape) :].any() and not b[:, min(shape) :].any()


def test_a_zero_weight_gives_a_pair_of_zeros() -> None:
    packed, a, b = loftq(jnp.zeros((8, 64)), NF3, 4, 1.0, 2, KEY)
    assert not packed.dequantize().any() and not a.any() and not b.any()


@pytest.mark.long
def test_the_key_matters_only_for_the_randomized_svd() -> None:
    large = (module.EXACT_UP_TO + 1, module.EXACT_UP_TO + 30)
    for shape, same in (((60, 100), True), (large, False)):
        weight = weights(shape)
        one, other, again = (
            loftq(weight, NF2, 8, SCALING, 1, jax.random.key(seed)) for seed in (0, 1, 0)
        )
        assert_same(one, again)
        assert_same(one[0], other[0])
        assert bool((one[1] == other[1]).all()) == same
    exact = reference(weights(large), NF2, 8, 1)[0][0]
    for found in (one, other):
        assert exact * (1 - 1e-6) < left(weights(large), *found) < 1.01 * exact


def test_random_directions_cost_at_most_a_hundredth() -> None:
    shape, rank = (260, 350), 32
    weight = jax.random.normal(KEY, shape)
    u, _, v = jnp.linalg.svd(weight, full_matrices=False)
    k = np.arange(1, shape[0] + 1)
    found = {"quantizer": weight - quantize(weight, NF2).dequantize()}
    for name, values in (("slow", k**-0.5), ("fast", np.exp(-k / 10))):
        found[name] = (u * values.astype(np.float32)[None, :]) @ v

    @jax.jit
    def drawn(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return randomized_svd(lambda start: rows_of(x, start, 49), shape, 49, rank, KEY)

    for name, x in found.items():
        exact, other = (
            float(jnp.linalg.norm(x - (u * s[None, :]) @ v))
            for u, s, v in (exact_svd(x, rank), drawn(x))
        )
        assert exact * (1 - 1e-4) < other < 1.01 * exact, name


def test_the_error_is_never_materialized() -> None:
    """Compiled, not run: the largest matrix of LLaMA-7B, in bfloat16."""
    shape, config = (11008, 4096), QuantConfig(format="nf4", calibration="none")
    weight = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    a, b = (jax.ShapeDtypeStruct(x, jnp.float32) for x in ((64, shape[1]), (shape[0], 64)))
    packed, scale = quantized_shape(shape, config), jnp.float32(1)
    for program in (
        encode._quantize.lower(weight, None, config, (b, a)),
        module._fit.lower(weight, packed, scale, KEY, 64, jnp.float32),
    ):
        temporary = program.compile().memory_analysis().temp_size_in_bytes
        assert temporary < 0.15 * 4 * shape[0] * shape[1]


@pytest.mark.parametrize(("name", "value"), [("iterations", 0), ("rank", 0)])
def test_zero_iterations_and_zero_rank_are_refused(name: str, value: int) -> None:
    settings: dict[str, Any] = {"rank": 4, "iterations": 1} | {name: value}
    with pytest.raises(ValueError, match=f"{name} = 0: expected a whole number of at least 1"):
        loftq(weights((8, 64)), NF3, scaling=1.0, key=KEY, **settings)


# ------------------------------------------------------------------------------------ checkpoints

SOME = AdapterConfig(
    method="iec",
    rank=4,
    alpha=6.0,
    init="loftq",
    loftq=LoftqOptions(iterations=2),
    targets=("q_proj", "down_proj"),
    dtype="bfloat16",
)


def test_targets_are_fitted_one_by_one_and_others_quantized_plainly(tmp_path: Path) -> None:
    tensors = random_tensors(LLAMA)
    folder = write_model(tmp_path / "model", LLAMA, tensors)
    base, pairs, llama = hf.load_loftq(folder, NF3, SOME, KEY)
    plain, _ = hf.load_base(folder, NF3)
    assert jax.tree.structure(base) == jax.tree.structure(plain)
    for group, name in (("self_attn", "q_proj"), ("mlp", "down_proj")):
        fitted = base["layers"][group].pop(name)["weight"]
        for layer in range(LLAMA.num_hidden_layers):
            weight = jnp.asarray(tensors[f"model.layers.{layer}.{group}.{name}.weight"])
            packed, a, b = loftq(weight, NF3, 4, 1.5, 2, KEY, jnp.bfloat16)
            take = lambda x, layer=layer: x[layer]  # noqa: E731
            assert_same(jax.tree.map(take, fitted), packed)
            found = jax.tree.map(take, pairs["layers"][group][name])
            assert_same(found, {"lora_A": a, "lora_B": b})
        del plain["layers"][group][name]
    assert_same(base, plain)
    # The start of IEC is that pair: its scalars are 0.
    adapters = Llama(llama, SOME).init_adapters(KEY, pairs)
    fresh = Llama(llama, SOME).init_adapters(KEY)
    assert jax.tree.structure(adapters) == jax.tree.structure(fresh)
    for (path, leaf), (_, like) in zip(
        *map(jax.tree_util.tree_leaves_with_path, (adapters, fresh)), strict=True
    ):
        assert leaf.dtype == like.dtype == jnp.bfloat16 and leaf.shape == like.shape
        assert bool(leaf.any()) == ("lora" in path[-1].key)
    with pytest.raises(ValueError, match=r"quant.format = 'none': expected nf4"):
        hf.load_loftq(folder, QuantConfig(format="none"), SOME, KEY)


def test_the_initial_pair_is_near_the_model_and_dropout_applies_to_it(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", NARROW)
    adapter = AdapterConfig(method="iec", rank=16, alpha=8.0, init="loftq", dropout=0.5)
    full, llama = hf.load_base(folder, None)
    plain, _ = hf.load_base(folder, NF2)
    base, pairs, _ = hf.load_loftq(folder, NF2, adapter, KEY)
    model = Llama(llama, adapter)
    adapters = model.init_adapters(KEY, pairs)
    tokens = jnp.arange(40, dtype=jnp.int32).reshape(2, 20)
    apply = jax.jit(Llama.apply, static_argnums=0, static_argnames="deterministic")
    exact, bad = (apply(Llama(llama), {"params": {}, "base": b}, tokens) for b in (full, plain))
    variables = {"params": adapters, "base": base}
    good = apply(model, variables, tokens)
    assert np.linalg.norm(good - exact) < 0.7 * np.linalg.norm(bad - exact)
    dropped = apply(model, variables, tokens, deterministic=False, rngs={"dropout": KEY})
    assert np.abs(dropped - good).max() > 1e-3  # the pair is not 0, so it shows at once


def test_base_and_pairs_are_read_onto_the_mesh() -> None:
    adapter = dataclasses.replace(SOME, dtype="float32", targets=("o_proj", "up_proj"))
    folder = WORLD / "base-small"
    mesh = make_mesh(MeshConfig(1, 2, 2), 8)
    one = hf.load_loftq(folder, NF3, adapter, KEY)
    split = hf.load_loftq(folder, NF3, adapter, KEY, mesh=mesh)
    for here, there in zip(one[:2], split[:2], strict=True):
        assert_same(here, there)
        for leaf, where in zip(
            *map(jax.tree.leaves, (there, tree_shardings(mesh, there))), strict=True
        ):
            assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
    split_as = jax.tree.map(lambda x: x.sharding.spec, split[1]["layers"])
    assert split_as["self_attn"]["o_proj"]["lora_A"] == P(None, None, ("tensor", "fsdp"))
    assert split_as["mlp"]["up_proj"]["lora_B"] == P(None, ("tensor", "fsdp"), None)
