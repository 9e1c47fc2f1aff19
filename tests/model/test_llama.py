"""The model: causality, packing, scan and remat, adapters and their gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.adapters import METHODS
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.model.attention import segment_positions
from irqlora_jax.model.llama import Llama, head_logits, head_weight
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.sharding import LINEAR_NAMES
from tests.models import quantize_base, random_adapters, random_base, tiny_llama

CONFIG = tiny_llama(num_hidden_layers=3)
IEC = AdapterConfig(method="iec", rank=4, alpha=6.0)
TOKENS = jax.random.randint(jax.random.key(7), (2, 12), 0, CONFIG.vocab_size)


def make_base(config=CONFIG):
    """Random weights large enough for every path to matter."""
    return random_base(config, scale=0.2)


@functools.partial(jax.jit, static_argnames=("model", "deterministic", "method"))
def run(model, variables, tokens, key=0, deterministic=True, method=None, **arrays):
    """`apply`, compiled."""
    settings = {"rngs": {"dropout": jax.random.key(key)}, "method": method}
    return model.apply(variables, tokens, deterministic=deterministic, **settings, **arrays)


def reference_logits(config, adapter, params, base, tokens):
    """One row, layer after layer, with adapters folded into dense weights."""

    def rms(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * weight

    def turn(x):  # [seq, heads, head_dim], as complex numbers
        half = config.head_dim // 2
        frequencies = config.rope_theta ** (-np.arange(half) / half)
        phase = np.exp(1j * np.arange(len(tokens))[:, None, None] * frequencies)
        z = (x[..., :half] + 1j * x[..., half:]) * phase
        return np.concatenate([z.real, z.imag], -1)

    def weight(layer, group, name):
        pair = {k: v[layer] for k, v in params["layers"][group][name].items()}
        pair = METHODS[adapter.method].fold(
            pair, (pair["lora_B"].shape[0], pair["lora_A"].shape[1])
        )
        update = np.asarray(pair["lora_B"] @ pair["lora_A"]) * adapter.alpha / adapter.rank
        return np.asarray(base["layers"][group][name]["weight"][layer]) + update

    base_array = jax.tree.map(np.asarray, base)
    x = base_array["embed_tokens"]["weight"][np.asarray(tokens)].astype(np.float64)
    groups = config.num_attention_heads // config.num_key_value_heads
    for layer in range(config.num_hidden_layers):
        h = rms(x, base_array["layers"]["input_layernorm"]["weight"][layer])
        q, k, v = (
            (h @ weight(layer, "self_attn", f"{n}_proj").T).reshape(len(x), -1, config.head_dim)
            for n in "qkv"
        )
        k, v = (np.repeat(y, groups, axis=1) for y in (turn(k), v))
        scores = np.einsum("tnd,snd->nts", turn(q), k) / np.sqrt(config.head_dim)
        scores[:, ~np.tri(len(x), dtype=bool)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = np.einsum("nts,snd->tnd", weights, v).reshape(len(x), -1)
        x = x + y @ weight(layer, "self_attn", "o_proj").T
        h = rms(x, base_array["layers"]["post_attention_layernorm"]["weight"][layer])
        gate = h @ weight(layer, "mlp", "gate_proj").T
        up = h @ weight(layer, "mlp", "up_proj").T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weight(layer, "mlp", "down_proj").T
    x = rms(x, base_array["norm"]["weight"])
    return x @ np.asarray(head_weight(base)).T


@pytest.mark.parametrize("method", ["lora", "iec"])
@pytest.mark.parametrize("tied", [False, True])
def test_scan_equals_layers_written_out(method, tied):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    adapter = AdapterConfig(method=method, rank=4, alpha=6.0)
    model = Llama(config, adapter)
    base, params = make_base(config), random_adapters(model)
    assert ("lm_head" in base) is not tied
    logits = run(model, {"params": params, "base": base}, TOKENS)
    for row, tokens in zip(logits, TOKENS, strict=True):
        expected = reference_logits(config, adapter, params, base, tokens)
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-4)


def test_causality_is_exact():
    model = Llama(CONFIG)
    base = make_base()
    before = run(model, {"base": base}, TOKENS)
    changed = TOKENS.at[:, 5].set((TOKENS[:, 5] + 1) % CONFIG.vocab_size)
    after = run(model, {"base": base}, changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.all(np.any(np.asarray(before[:, 5:] != after[:, 5:]), axis=-1))


def test_segments_are_isolated():
    model = Llama(CONFIG, IEC)
    variables = {"params": random_adapters(model), "base": make_base()}
    first, second = TOKENS[:1, :5], TOKENS[1:, :7]
    packed = jnp.concatenate([first, second], axis=1)
    ids = jnp.asarray([[4] * 5 + [2] * 7])
    logits = run(model, variables, packed, segment_ids=ids)
    expected = [run(model, variables, row) for row in (first, second)]
    np.testing.assert_allclose(logits, jnp.concatenate(expected, axis=1), rtol=1e-5, atol=1e-5)
    mixed = run(model, variables, packed)
    assert not np.allclose(logits[:, 5:], mixed[:, 5:], atol=1e-2)


def test_segment_positions_restart():
    ids = jnp.asarray([[1, 1, 1, 2, 2, 1], [0, 0, 0, 0, 0, 0]])
    expected = [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    np.testing.assert_array_equal(segment_positions(ids), expected)


def test_positions_are_relative_and_matter():
    model = Llama(CONFIG)
    base = make_base()
    index = jnp.broadcast_to(jnp.arange(12)[None, :], TOKENS.shape)
    plain = run(model, {"base": base}, TOKENS)
    same = run(model, {"base": base}, TOKENS, positions=index)
    moved = run(model, {"base": base}, TOKENS, positions=index + 40)
    stretched = run(model, {"base": base}, TOKENS, positions=index * 3)
    np.testing.assert_allclose(plain, same, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(plain, moved, rtol=1e-3, atol=1e-3)
    assert not np.allclose(plain, stretched, atol=1e-2)


def test_remat_changes_no_gradient():
    gradients = []
    adapter = dataclasses.replace(IEC, dropout=0.3, targets=("q_proj", "down_proj"))
    for remat in (False, True):
        model = Llama(CONFIG, adapter, remat=remat)

        def loss(params, base, model=model):
            variables = {"params": params, "base": base}
            return jnp.square(run(model, variables, TOKENS, 5, deterministic=False)).mean()

        grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
        gradients.append(grad(random_adapters(model), make_base()))
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        assert np.any(np.asarray(a) != 0)


@pytest.mark.parametrize("method", ["lora", "iec"])
def test_fresh_adapters_change_nothing(method):
    model = Llama(CONFIG, AdapterConfig(method=method, rank=4))
    base = make_base()
    params = model.init_adapters(jax.random.key(3))
    adapted = run(model, {"params": params, "base": base}, TOKENS)
    alone = run(Llama(CONFIG), {"base": base}, TOKENS)
    np.testing.assert_allclose(adapted, alone, rtol=1e-6, atol=1e-6)


def test_only_targets_are_adapted():
    model = Llama(CONFIG, dataclasses.replace(IEC, targets=("v_proj", "up_proj")))
    params = model.init_adapters(jax.random.key(0))["layers"]
    assert {k: list(v) for k, v in params.items()} == {"self_attn": ["v_proj"], "mlp": ["up_proj"]}
    # The choice of targets does not change what a target starts from.
    everywhere = Llama(CONFIG, IEC).init_adapters(jax.random.key(0))["layers"]
    a = params["mlp"]["up_proj"]["lora_A"]
    np.testing.assert_array_equal(a, everywhere["mlp"]["up_proj"]["lora_A"])
    assert Llama(CONFIG).init_adapters(jax.random.key(0)) == {}


def test_init_adapters_tree_and_values():
    model = Llama(CONFIG, IEC)
    params = model.init_adapters(jax.random.key(0))
    by_linen = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    described = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (params, by_linen)]
    assert described[0] == described[1]
    layers = CONFIG.num_hidden_layers
    a_matrices = []
    for group, names in (("self_attn", LINEAR_NAMES[:4]), ("mlp", LINEAR_NAMES[4:])):
        assert set(params["layers"][group]) == set(names)
        for name in names:
            out_features, in_features = CONFIG.linear_shapes[name]
            leaf = params["layers"][group][name]
            assert leaf["lora_A"].shape == (layers, IEC.rank, in_features)
            assert leaf["lora_B"].shape == (layers, out_features, IEC.rank)
            assert leaf["beta1"].shape == leaf["beta2"].shape == (layers,)
            a_matrices += [np.asarray(a).ravel()[:16] for a in leaf["lora_A"]]
    assert len(np.unique(np.stack(a_matrices), axis=0)) == 7 * layers
    again = jax.jit(model.init_adapters)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    other = model.init_adapters(jax.random.key(1))["layers"]["mlp"]["up_proj"]["lora_A"]
    assert np.all(np.asarray(other != params["layers"]["mlp"]["up_proj"]["lora_A"]))


def test_adapter_dtype():
    model = Llama(CONFIG, dataclasses.replace(IEC, dtype="bfloat16"))
    params = model.init_adapters(jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    logits = run(model, {"params": params, "base": make_base()}, TOKENS)
    assert logits.dtype == jnp.float32


def quantized_base():
    """Three of the linear layers quantized, the others not."""
    quant = QuantConfig(format="nf4", block_size=8, calibration="none")
    return quantize_base(make_base(), quant, ("k_proj", "gate_proj", "down_proj"))


def test_gradient_touches_adapters_only():
    model = Llama(CONFIG, IEC, remat=True)
    base, params = quantized_base(), random_adapters(model)

    def loss(params, base):
        return jnp.square(run(model, {"params": params, "base": base}, TOKENS)).mean()

    gradient = jax.jit(jax.grad(loss))(params, base)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    assert all(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(gradient))
    with pytest.raises(TypeError, match="uint8"):
        jax.grad(loss, argnums=1)(params, base)


def test_quantized_base_equals_its_dequantized_weights():
    model = Llama(CONFIG, IEC)
    base, params = quantized_base(), random_adapters(model)
    is_packed = lambda x: hasattr(x, "dequantize")  # noqa: E731
    dense = jax.tree.map(
        lambda x: x.dequantize(jnp.float32) if is_packed(x) else x, base, is_leaf=is_packed
    )

    def loss(params, base):
        logits = run(model, {"params": params, "base": base}, TOKENS)
        return jnp.square(logits).mean(), logits

    packed, unpacked = (jax.jit(jax.grad(loss, has_aux=True))(params, b) for b in (base, dense))
    for a, b in zip(*map(jax.tree.leaves, (packed, unpacked)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 4e-2), ("float16", 5e-3)])
def test_half_precision_is_close(dtype, tolerance):
    params, base = random_adapters(Llama(CONFIG, IEC)), make_base()
    results = []
    for kind in (dtype, "float32"):
        model = Llama(CONFIG, IEC, compute_dtype=kind)

        def loss(params, model=model):
            logits = run(model, {"params": params, "base": base}, TOKENS)
            return jnp.square(logits).mean(), logits

        results.append(jax.jit(jax.grad(loss, has_aux=True))(params))
        features = functools.partial(run, model, method="features")
        variables = {"params": params, "base": base}
        assert jax.eval_shape(features, variables, TOKENS).dtype == jnp.dtype(kind)
    (gradient, logits), (exact_gradient, exact_logits) = results
    assert logits.dtype == jnp.float32
    for a, b in ((logits, exact_logits), (gradient, exact_gradient)):
        a, b = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in (a, b))
        assert 0 < jnp.linalg.norm(a - b) < tolerance * jnp.linalg.norm(b)


def test_features_and_head_make_the_logits():
    model = Llama(CONFIG)
    base = make_base()
    features = run(model, {"base": base}, TOKENS, method="features")
    assert features.shape == (*TOKENS.shape, CONFIG.hidden_size)
    logits = head_logits(features, head_weight(base))
    expected = run(model, {"base": base}, TOKENS)
    np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-6)


def test_dropout_acts_on_the_input_of_lora_a_alone():
    model = Llama(CONFIG, dataclasses.replace(IEC, dropout=0.5))
    base, params = make_base(), random_adapters(model)

    def dropped(params, key, deterministic=False):
        return run(model, {"params": params, "base": base}, TOKENS, key, deterministic)

    np.testing.assert_array_equal(dropped(params, 0), dropped(params, 0))
    assert np.any(np.asarray(dropped(params, 0) != dropped(params, 1)))
    np.testing.assert_array_equal(dropped(params, 0, True), dropped(params, 1, True))
    without_a = jax.tree.map_with_path(
        lambda path, x: jnp.zeros_like(x) if path[-1].key == "lora_A" else x, params
    )
    np.testing.assert_array_equal(dropped(without_a, 0), dropped(without_a, 1))


def test_weights_of_another_model_are_refused():
    base = make_base()
    wider = Llama(dataclasses.replace(CONFIG, intermediate_size=48))
    with pytest.raises(ValueError, match=r"mlp\.gate_proj\.weight .*\(40, 24\).*\(48, 24\)"):
        wider.apply({"base": base}, TOKENS)
    model = Llama(CONFIG, IEC)
    others = {
        r"down_proj\.lora_A: shape \(3, 8, 40\), expected \(3, 4, 40\)": {"rank": 8},
        r"beta1: shape nothing, expected \(3,\)": {"method": "lora"},
        r"down_proj\.\w+: shape nothing, expected \(3": {"targets": ("q_proj", "v_proj")},
    }
    for message, changes in others.items():
        params = random_adapters(Llama(CONFIG, dataclasses.replace(IEC, **changes)))
        with pytest.raises(ValueError, match=message):
            model.apply({"params": params, "base": base}, TOKENS)
    with pytest.raises(ValueError, match=r"beta1: shape \(3,\), expected nothing"):
        plain = Llama(CONFIG, dataclasses.replace(IEC, method="lora"))
        plain.apply({"params": random_adapters(model), "base": base}, TOKENS)
    with pytest.raises(ValueError, match="compute_dtype = 'float64'"):
        Llama(CONFIG, compute_dtype="float64").apply({"base": base}, TOKENS)
