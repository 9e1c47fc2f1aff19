"""config.json of LLaMA and its relatives: defaults, damage, rotations, layers that differ."""

import dataclasses
import math

import numpy as np
import pytest

from irqlora_jax.model.attention import rope_frequencies
from irqlora_jax.model.config import LlamaConfig, RopeScaling
from tests.models import tiny_llama

CONFIG = tiny_llama(num_hidden_layers=3)
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
    absent = LlamaConfig.from_dict(
        FILE | {"rope_scaling": YARN | {"mscale": 0, "mscale_all_dim": 1}}
    )
    assert absent == LlamaConfig.from_dict(FILE | {"rope_scaling": YARN})
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
            {"rope_scaling": YARN, "rope_theta": 1},
            "rope_theta = 1.0: expected another number than 1",
        ),
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
