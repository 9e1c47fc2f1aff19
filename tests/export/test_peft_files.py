"""Reading adapters of PEFT and of the released code: exactness, and a sentence for a fault."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from irqlora_jax import hf
from irqlora_jax.adapters import METHODS
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.llama import Llama
from irqlora_jax.sharding import LINEAR_NAMES
from tests.models import LLAMA, assert_same

Tensors = dict[str, np.ndarray]
TARGETS = ("q_proj", "v_proj", "down_proj")
LORA = Llama(LLAMA, AdapterConfig(method="lora", rank=4, alpha=8.0, targets=TARGETS))
IEC = Llama(LLAMA, AdapterConfig(method="iec", rank=4, alpha=8.0, targets=TARGETS))
MODELS = {"lora": LORA, "iec": IEC}
PREFIX = "base_model.model.model.layers"
A0 = f"{PREFIX}.0.self_attn.q_proj.lora_A.weight"
SCALE0 = f"{PREFIX}.0.self_attn.q_proj.lora_A_scale"
PEFT_CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["v_proj", "q_proj", "down_proj"],
    "bias": "none",
    "rank_pattern": {},
    "lora_dropout": 0.1,
}


def make_adapter(scalars: float | None = None) -> Tensors:
    rng = np.random.default_rng(1)
    tensors = {}
    for i in range(2):
        for name in TARGETS:
            out_features, in_features = LLAMA.linear_shapes[name]
            stem = f"{PREFIX}.{i}.{'mlp' if name == 'down_proj' else 'self_attn'}.{name}"
            tensors[f"{stem}.lora_A.weight"] = rng.normal(size=(4, in_features))
            tensors[f"{stem}.lora_B.weight"] = rng.normal(size=(out_features, 4))
            if scalars is not None:
                tensors[f"{stem}.lora_A_scale"] = np.full(1, scalars * (i + 1))
                tensors[f"{stem}.lora_B_scale"] = np.full(1, -scalars * (i + 1))
    return {name: value.astype(np.float32) for name, value in tensors.items()}


def write_adapter(
    folder: Path, tensors: Tensors, config: dict[str, Any] | None = PEFT_CONFIG
) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("model", [LORA, IEC], ids=["lora", "iec"])
def test_a_plain_pair_loads_with_both_scalars_zero(tmp_path: Path, model: Llama) -> None:
    tensors = make_adapter()
    adapters = hf.load_adapter(write_adapter(tmp_path, tensors), model)
    fresh = model.init_adapters(jax.random.key(0))
    assert jax.tree.structure(adapters) == jax.tree.structure(fresh)
    assert jax.tree.map(jnp.shape, adapters) == jax.tree.map(jnp.shape, fresh)
    for i in range(2):
        for name in TARGETS:
            block = "mlp" if name == "down_proj" else "self_attn"
            layer = adapters["layers"][block][name]
            for leaf in ("lora_A", "lora_B"):
                expected = tensors[f"{PREFIX}.{i}.{block}.{name}.{leaf}.weight"]
                np.testing.assert_array_equal(layer[leaf][i], expected)
            if model is IEC:
                assert layer["beta1"][i] == layer["beta2"][i] == 0


@pytest.mark.parametrize("which", ["init", "final"])
def test_an_adapter_of_the_released_code_loads(golden: Path, which: str) -> None:
    folder = golden / "irqlora_reference"
    file = folder / f"adapter_{which}.safetensors"
    config = LlamaConfig.from_dict(json.loads((folder / "base" / "config.json").read_text()))
    model = Llama(config, AdapterConfig(method="iec", rank=16, alpha=16.0))
    adapters = hf.load_adapter(file, model)
    fresh = model.init_adapters(jax.random.key(0))
    assert jax.tree.structure(adapters) == jax.tree.structure(fresh)
    tensors = load_file(file)
    seen = 0
    for name in LINEAR_NAMES:
        path = hf.linear_path(name)
        for i in range(2):
            for leaf, value in adapters["layers"][path[0]][path[1]].items():
                expected = tensors[hf.adapter_name(path, i, METHODS["iec"].files[leaf])]
                np.testing.assert_array_equal(value[i], expected.reshape(value.shape[1:]))
                seen += 1
                if leaf.startswith("beta"):
                    assert (float(value[i]) != 0) == (which == "final")
    assert seen == len(tensors)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace("lora_A_scale", "lora_default_A_scale"),
        lambda name: name.replace("_scale", "_scale.default"),
    ],
    ids=["factors", "scalars", "scalars at the end"],
)
def test_tensor_names_may_contain_the_name_of_the_adapter(
    tmp_path: Path, rename: Callable[[str], str]
) -> None:
    tensors = make_adapter(scalars=0.5)
    plain = hf.load_adapter(write_adapter(tmp_path / "a", tensors), IEC)
    renamed = {rename(name): value for name, value in tensors.items()}
    assert_same(plain, hf.load_adapter(write_adapter(tmp_path / "b", renamed), IEC))
    beta1 = plain["layers"]["mlp"]["down_proj"]["beta1"]
    np.testing.assert_array_equal(beta1, np.float32([0.5, 1.0]))


def test_a_single_file_with_zero_scalars_loads_as_plain_lora(tmp_path: Path) -> None:
    pair = hf.load_adapter(write_adapter(tmp_path / "a", make_adapter()), LORA)
    zero = write_adapter(tmp_path / "b", make_adapter(scalars=0.0), config=None)
    assert_same(pair, hf.load_adapter(zero / "adapter_model.safetensors", LORA))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_adapter_takes_the_type_of_the_configuration(tmp_path: Path, dtype: Any) -> None:
    halves = {name: value.astype(np.float16) for name, value in make_adapter().items()}
    adapter = AdapterConfig(method="iec", rank=4, alpha=8.0, targets=TARGETS, dtype=dtype)
    adapters = hf.load_adapter(write_adapter(tmp_path, halves), Llama(LLAMA, adapter))
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype(dtype)}
    expected = halves[A0].astype(np.float32).astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(adapters["layers"]["self_attn"]["q_proj"]["lora_A"][0], expected)


CONFIG_FAULTS = {
    "rank": ({"r": 8}, ["r = 8", "adapter.rank = 4"]),
    "rank of PEFT's default": ({"r": None}, ["r = None", "adapter.rank = 4"]),
    "alpha": ({"lora_alpha": 16}, ["lora_alpha = 16", "adapter.alpha = 8"]),
    "targets": (
        {"target_modules": ["q_proj", "v_proj"]},
        ["target_modules = q_proj, v_proj,", "adapter.targets = down_proj, q_proj, v_proj"],
    ),
    "all targets": (
        {"target_modules": "all-linear"},
        ["gate_proj", "adapter.targets = down_proj, q_proj, v_proj"],
    ),
    "another method": ({"peft_type": "LOHA"}, ["peft_type = 'LOHA'", "'LORA'"]),
    "another scale": ({"use_rslora": True}, ["use_rslora = True", "False"]),
    "DoRA": ({"use_dora": True}, ["use_dora = True", "False"]),
    "a larger rank": (
        {"rank_pattern": {"q_proj": 5}},
        ["largest rank of a layer (r, rank_pattern) is 5, but adapter.rank = 4"],
    ),
    "smaller ranks": (
        {"rank_pattern": {"[qv]_proj": 2, "down_proj": 1}},
        ["largest rank of a layer (r, rank_pattern) is 2, but adapter.rank = 4"],
    ),
    "other alphas": (
        {"alpha_pattern": {".*": 2}},
        ["lora_alpha of the layers of rank 4 is 2, but adapter.alpha = 8"],
    ),
    "no rank": ({"rank_pattern": {"q_proj": 0}}, ["rank_pattern.q_proj = 0: expected a whole"]),
    "half a rank": ({"rank_pattern": {"q_proj": 1.5}}, ["rank_pattern.q_proj = 1.5: expected"]),
    "no alpha": ({"alpha_pattern": {"q_proj": "x"}}, ["alpha_pattern.q_proj = 'x': expected a p"]),
    "no pattern": ({"rank_pattern": [3]}, ["rank_pattern = [3]: expected numbers by layer"]),
    "no expression": ({"rank_pattern": {"(": 2}}, ["rank_pattern = ", "regular expressions"]),
    "a changed base": ({"init_lora_weights": "pissa"}, ["init_lora_weights = 'pissa'"]),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_an_adapter_config_that_says_something_else_is_refused(tmp_path: Path, fault: str) -> None:
    changes, words = CONFIG_FAULTS[fault]
    folder = write_adapter(tmp_path, make_adapter(), PEFT_CONFIG | changes)
    with pytest.raises(ValueError, match=r"adapter_config\.json") as raised:
        hf.load_adapter(folder, LORA)
    for word in words:
        assert word in str(raised.value)


def test_a_rank_that_the_tensors_do_not_have_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, make_adapter(), PEFT_CONFIG | {"rank_pattern": {"q_proj": 2}})
    message = r"q_proj\.lora_A\.weight has shape \(4, 40\): expected \(2, 40\) \(rank_pattern: 2\)"
    with pytest.raises(ValueError, match=message):
        hf.load_adapter(folder, LORA)
    # The connections of IEC depend on the rank, so zeros would change them.
    small = write_adapter(
        tmp_path, make_adapter(scalars=0.5), PEFT_CONFIG | {"rank_pattern": {"q_proj": 4}}
    )
    with pytest.raises(ValueError, match=r"rank_pattern: expected a LoRA pair alone"):
        hf.load_adapter(small, IEC)


@pytest.mark.parametrize("targets", [".*(q_proj|v_proj|down_proj)", ["self_attn.q_proj", *TARGETS]])
def test_targets_may_be_written_in_other_ways(tmp_path: Path, targets: str | list[str]) -> None:
    folder = write_adapter(tmp_path, make_adapter(), PEFT_CONFIG | {"target_modules": targets})
    assert "down_proj" in hf.load_adapter(folder, LORA)["layers"]["mlp"]


def change_adapter(change: Callable[[Tensors], Any], scalars: float | None = None) -> Tensors:
    tensors = make_adapter(scalars)
    change(tensors)
    return tensors


DORA0 = f"{PREFIX}.0.self_attn.q_proj.lora_magnitude_vector"
ADAPTER_FAULTS: dict[str, tuple[Tensors, str, list[str]]] = {
    "missing": (change_adapter(lambda t: t.pop(A0)), "lora", ["no tensor", A0]),
    "missing scalar": (
        change_adapter(lambda t: t.pop(SCALE0), 0.5),
        "iec",
        ["no tensor", SCALE0],
    ),
    "extra": (
        change_adapter(lambda t: t.update({DORA0: np.ones(56, np.float32)})),
        "lora",
        ["no tensor", "lora_magnitude_vector"],
    ),
    "extra layer": (
        change_adapter(lambda t: t.update({A0.replace("layers.0", "layers.2"): t[A0].copy()})),
        "lora",
        ["2-layer", "layers.2"],
    ),
    "two adapters": (
        change_adapter(lambda t: t.update({A0.replace("A.", "A.default."): t[A0].copy()})),
        "lora",
        ["several adapters"],
    ),
    "rank": (
        change_adapter(lambda t: t.update({A0: np.ones((8, 40), np.float32)})),
        "lora",
        [A0, "(8, 40)", "(4, 40)", "adapter.rank = 4"],
    ),
    "type": (
        change_adapter(lambda t: t.update({A0: np.ones((4, 40), np.int32)})),
        "lora",
        [A0, "I32", "float32, bfloat16, float16"],
    ),
    "NaN": (
        change_adapter(lambda t: t.update({A0: np.full((4, 40), np.nan, np.float32)})),
        "lora",
        [A0, "NaN"],
    ),
    "two numbers for a scalar": (
        change_adapter(lambda t: t.update({SCALE0: np.ones(2, np.float32)}), 0.5),
        "iec",
        [SCALE0, "(2,)", "(1,)"],
    ),
    "scalars for plain LoRA": (
        make_adapter(0.5),
        "lora",
        ["_scale changes the update", "iec, not lora"],
    ),
}


@pytest.mark.parametrize("fault", ADAPTER_FAULTS)
def test_an_adapter_with_a_fault_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    tensors, method, words = ADAPTER_FAULTS[fault]
    folder = write_adapter(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors") as raised:
        hf.load_adapter(folder, MODELS[method])
    for word in words:
        assert word in str(raised.value)


def test_adapters_that_are_not_there_or_not_safe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such adapter"):
        hf.load_adapter(tmp_path / "nowhere", LORA)
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        hf.load_adapter(tmp_path, LORA)
    (tmp_path / "adapter_model.bin").write_text("x")
    with pytest.raises(ValueError, match=r"pickle.*safe_serialization=True"):
        hf.load_adapter(tmp_path, LORA)
    with pytest.raises(ValueError, match=r"adapter_model\.bin: expected a \.safetensors file"):
        hf.load_adapter(tmp_path / "adapter_model.bin", LORA)
    (tmp_path / "adapter_model.safetensors").write_text("x")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        hf.load_adapter(tmp_path, LORA)
    with pytest.raises(ValueError, match=r"model\.adapter = None"):
        hf.load_adapter(tmp_path, Llama(LLAMA))
