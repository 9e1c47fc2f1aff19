"""The model: causality, packing, scan and remat, adapters and their gradients, config.json."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.adapters import METHODS
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.model.attention import rope_frequencies, segment_positions
from irqlora_jax.model.config import LlamaConfig, RopeScaling
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


FILE = {
    "model_type": "llama",
    "vocab_size": 29,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


YARN = {"rope_type": "yarn", "factor": 4.0}


def test_config_defaults_of_old_files():
    config = LlamaConfig.from_dict(FILE)
    assert (config.num_key_value_heads, config.head_dim) == (4, 6)
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-6, 2048)
    assert config.eos_token_ids == (2,)


OPTIONAL = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "num_key_value_heads": 4,
    "head_dim": 6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_theta": None, "partial_rotary_factor": None},
    "rope_parameters": {"rope_type": "default"},
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def of_kind(kind, **more):
    return LlamaConfig.from_dict(FILE | {"model_type": kind, "num_key_value_heads": 4} | more)


def test_config_defaults_are_those_of_the_family():
    """Of the classes of configurations in transformers."""
    mistral, qwen2, qwen3 = map(of_kind, ("mistral", "qwen2", "qwen3"))
    assert (mistral.sliding_window, mistral.sliding_layers) == (4096, (0, 1, 2))
    assert (mistral.bos_token_id, mistral.eos_token_ids) == (1, (2,))
    assert (mistral.max_position_embeddings, qwen2.max_position_embeddings) == (131072, 32768)
    assert (qwen2.bos_token_id, qwen2.eos_token_ids, qwen2.sliding_layers) == (None, (), ())
    assert (qwen2.head_dim, qwen3.head_dim) == (6, 128)
    assert qwen2.biased == ("q_proj", "k_proj", "v_proj") and qwen3.biased == ()
    assert of_kind("mistral", sliding_window=None).sliding_layers == ()
    assert of_kind("qwen2", num_key_value_heads=None).num_key_value_heads == 4
    with pytest.raises(ValueError, match="num_key_value_heads = 8: expected a divisor"):
        LlamaConfig.from_dict(FILE | {"model_type": "mistral"})


def test_config_windows_of_layers():
    some = of_kind("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    assert (some.sliding_window, some.sliding_layers) == (16, (1, 2))
    assert some.windows == (None, 16, 16)
    assert some.to_dict()["max_window_layers"] == 1
    assert some.of_layer(1) == some.of_layer(2) != some.of_layer(0)
    assert some.of_layer(0).windows == (None,) and some.of_layer(2).windows == (16,)
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    listed = of_kind("qwen3", use_sliding_window=True, layer_types=kinds)
    assert (listed.sliding_window, listed.sliding_layers) == (4096, (0,))
    off = {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 0}
    assert of_kind("qwen2", **off) == of_kind("qwen2")
    assert of_kind("llama", sliding_window=8) == of_kind("llama")  # transformers ignores it
    for config in (some, listed):
        assert LlamaConfig.from_dict(config.to_dict()) == config
    plain = of_kind("llama")
    assert plain.of_layer(1) is plain


def test_config_rotations_of_layers():
    deep = {"num_hidden_layers": 9}
    smollm = of_kind("smollm3", **deep)
    assert smollm.unrotated_layers == (3, 7) and smollm.tie_word_embeddings
    assert (smollm.rope_theta, smollm.eos_token_ids) == (2000000.0, (128001,))
    assert of_kind("smollm3", no_rope_layers=[0, 1, 1, 0]).unrotated_layers == (0,)
    window = {"use_sliding_window": True, "sliding_window": 8}
    # SmolLM3's files have max_window_layers, which transformers ignores.
    both = of_kind("smollm3", no_rope_layer_interval=3, max_window_layers=5, **deep, **window)
    assert both.sliding_layers == both.unrotated_layers == (2, 5, 8)
    for config in (smollm, both):
        assert LlamaConfig.from_dict(config.to_dict()) == config
    one = both.of_layer(5)
    assert one == both.of_layer(8) and one.windows == (8,) and one.rotated == (False,)
    assert both.of_layer(0).windows == (None,) and both.of_layer(0).rotated == (True,)


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("smollm3", {"no_rope_layers": [1, 1]}, "no_rope_layers = [1, 1]: expected a list of 3"),
        ("smollm3", {"no_rope_layers": [1, 2, 1]}, "no_rope_layers = [1, 2, 1]: expected"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval = 0: expected"),
        ("mistral", {"sliding_window": 0}, "sliding_window = 0: expected a whole number of at"),
        ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window = 'yes': expected true"),
        ("qwen2", {"max_window_layers": -1}, "max_window_layers = -1: expected a whole number"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types = ['full_attention']: expe"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "'full_attention' or 'sliding_att"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "unless use_sliding_window is true"),
    ],
)
def test_config_faults_of_windows(kind, more, message):
    with pytest.raises(ValueError) as error:
        of_kind(kind, **more)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_layers_that_a_family_does_not_have_are_refused():
    with pytest.raises(ValueError, match="sliding_window = 8: expected null for a llama"):
        dataclasses.replace(CONFIG, sliding_window=8)
    with pytest.raises(ValueError, match=r"unrotated_layers = \(0,\): expected none for a llama"):
        dataclasses.replace(CONFIG, unrotated_layers=(0,))
    with pytest.raises(ValueError, match=r"sliding_layers = \(0,\): expected all layers"):
        tiny_llama(model_type="mistral", sliding_window=8, sliding_layers=(0,))
    with pytest.raises(ValueError, match=r"sliding_layers = \(1, 0\): expected some of the"):
        tiny_llama(model_type="qwen2", sliding_window=8, sliding_layers=(1, 0))
    with pytest.raises(ValueError, match="expected no layers without sliding_window"):
        tiny_llama(model_type="qwen2", sliding_layers=(0,))


def test_config_null_is_absent():
    assert LlamaConfig.from_dict(FILE | dict.fromkeys(OPTIONAL)) == LlamaConfig.from_dict(FILE)
    assert LlamaConfig.from_dict(FILE | OPTIONAL) == LlamaConfig.from_dict(FILE)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = LlamaConfig.from_dict(FILE | ids)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (None, (), None)


@pytest.mark.parametrize("place", [(), ("rope_scaling",), ("rope_parameters",)])
def test_config_damage_of_any_kind_is_a_sentence(place):
    """Each field in turn has every kind of value: read, or refused with its name."""
    whole = FILE | OPTIONAL | {"bos_token_id": 1, "eos_token_id": [1, 2], "pad_token_id": 0}
    del whole["rope_parameters"]
    kinds = (None, True, 0, -1, 3, 10**400, 0.5, -2.5, math.nan, math.inf, "", "24", [], [3], {})
    for name in whole if not place else LLAMA3:
        for value in kinds:
            rope = {field: LLAMA3 | {name: value} for field in place}
            try:
                LlamaConfig.from_dict(whole | ({name: value} if not place else rope))
            except ValueError as error:
                message = str(error)
                assert message.startswith("config.json: ") and "\n" not in message
                assert name in message or "heads" in name


def test_config_rope_old_and_new():
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    old = FILE | {"rope_theta": 500000.0, "rope_scaling": LLAMA3}
    new = FILE | {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}}
    for values in (old, new):
        config = LlamaConfig.from_dict(values)
        assert (config.rope_theta, config.rope_scaling) == (500000.0, scaling)
    oldest = LlamaConfig.from_dict(FILE | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert oldest.rope_scaling == RopeScaling("linear", 2.0)
    plain = LlamaConfig.from_dict(FILE | {"rope_parameters": {"rope_type": "default"}})
    assert plain.rope_scaling is None


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        RopeScaling("linear", 4.0),
        RopeScaling(**LLAMA3),
        RopeScaling("dynamic", 4.0),
        RopeScaling("yarn", 4.0, attention_factor=1.5, beta_fast=16.0, truncate=False),
    ],
)
@pytest.mark.parametrize("eos", [(), (2,), (128001, 128009)])
def test_config_round_trip(scaling, eos):
    config = dataclasses.replace(CONFIG, rope_scaling=scaling, eos_token_ids=eos, pad_token_id=0)
    assert LlamaConfig.from_dict(config.to_dict()) == config


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones():
    config = dataclasses.replace(CONFIG, head_dim=128, rope_theta=500000.0)
    plain = rope_frequencies(config)
    scaled = rope_frequencies(dataclasses.replace(config, rope_scaling=RopeScaling(**LLAMA3)))
    wave = 2 * np.pi / np.asarray(plain)
    ratio = np.asarray(plain / scaled)
    np.testing.assert_allclose(ratio[wave < 8192 / 4], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[wave > 8192], 8, rtol=1e-6)
    assert np.all(np.diff(ratio) > -1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "model_type = 'mixtral': expected 'llama', "),
        ({"model_type": "gemma2"}, "model_type = 'gemma2': expected 'llama', "),
        ({"model_type": None}, "model_type = None"),
        ({"model_type": ["llama"]}, "model_type = ['llama']: expected 'llama', "),
        ({"attention_bias": 1}, "attention_bias = 1: expected true or false"),
        (
            {"model_type": "qwen2", "attention_bias": True, "num_key_value_heads": 4},
            "attention_bias = True: expected False with model_type 'qwen2'",
        ),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': expected 'silu'"),
        ({"vocab_size": None}, "vocab_size = None: expected a whole number"),
        (
            {"hidden_size": 26},
            "hidden_size = 26: expected a multiple of num_attention_heads = 4",
        ),
        ({"head_dim": 7}, "head_dim = 7: expected a positive even number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3: expected a divisor"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        (
            {"rope_scaling": {"type": "longrope", "factor": 2.0}},
            "rope_scaling.rope_type = 'longrope': expected 'default', 'linear', 'dynamic', 'yarn'",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.factor = None"),
        ({"rope_scaling": YARN | {"beta_fast": 0.5}}, "beta_fast = 0.5: expected at least beta_"),
        ({"rope_scaling": YARN | {"truncate": 0}}, "truncate = 0: expected true or false"),
        ({"rope_scaling": YARN | {"mscale": -1}}, "rope_scaling.mscale = -1: expected a positive"),
        (
            {"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "head_dim = 2: expected at least 4 with dynamic scaling",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor = None"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": "x"}}, "low_freq_factor = 'x'"),
        ({"rope_scaling": LLAMA3 | {"factor": True}}, "rope_scaling.factor = True"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1}}, "more than low_freq_factor = 1.0"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear': expected an object, or null"),
        ({"rope_parameters": [1]}, "rope_parameters = [1]"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_parameters.rope_theta = '1e4'"),
        ({"rope_scaling": {"type": ["linear"]}}, "rope_scaling.rope_type = ['linear']"),
        ({"partial": 1, "rope_scaling": {"partial_rotary_factor": 0.5}}, "rotary_factor = 0.5"),
        ({"hidden_size": 24.0}, "hidden_size = 24.0: expected a whole number of at least 1"),
        ({"hidden_size": 4096.5}, "hidden_size = 4096.5"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers = '3'"),
        ({"num_attention_heads": True}, "num_attention_heads = True"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"head_dim": 6.0}, "head_dim = 6.0: expected a positive even number"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads = '2': expected a whole number"),
        ({"max_position_embeddings": math.inf}, "max_position_embeddings = inf"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps = nan: expected a positive number"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps = -1e-06: expected a positive number"),
        ({"rms_norm_eps": [1e-6]}, "rms_norm_eps = [1e-06]"),
        ({"rope_theta": math.nan}, "rope_theta = nan: expected a positive number"),
        ({"rope_theta": 10**400}, "rope_theta = 1000"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false': expected true or false"),
        ({"bos_token_id": "<s>"}, "bos_token_id = '<s>': expected a whole number or null"),
        ({"eos_token_id": [2, [3]]}, "eos_token_id = [2, [3]]: expected a whole number, a list"),
        ({"eos_token_id": 2.5}, "eos_token_id = 2.5: expected"),
    ],
)
def test_config_faults(change, message):
    with pytest.raises(ValueError) as error:
        LlamaConfig.from_dict(FILE | change)
    assert message in str(error.value)
