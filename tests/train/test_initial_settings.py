"""Settings that a run takes from the adapter in `adapter.init_from`: a folder, a run or the hub."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.iec import IecOptions
from irqlora_jax.adapters.lokr import LokrOptions
from irqlora_jax.adapters.qalora import QaloraOptions
from irqlora_jax.config import Config, with_base_settings
from irqlora_jax.export.peft import save_adapter
from irqlora_jax.model.llama import Llama
from irqlora_jax.runs.folder import save_config
from irqlora_jax.train.initial import check_start, read_start
from tests.models import LLAMA, assert_same

SMALL: dict[str, Any] = {"rank": 2, "alpha": 3.0, "targets": ("q_proj",)}
ADAPTERS = [
    AdapterConfig(method="lora", rank=2, alpha=3.0, targets=("q_proj", "v_proj")),
    AdapterConfig(method="lora", **SMALL, scaling="sqrt_rank"),
    AdapterConfig(method="iec", **SMALL),
    AdapterConfig(method="dora", **SMALL),
    AdapterConfig(method="bayesian", **SMALL),
    AdapterConfig(method="lokr", **SMALL, lokr=LokrOptions(decompose_both=True)),
    AdapterConfig(method="qalora", **SMALL, qalora=QaloraOptions(4, "peft")),
]


@functools.cache
def leaves(adapter: AdapterConfig) -> Any:
    """Fresh adapters; DoRA's lengths, which are unknown without a base, are 1."""
    fresh = jax.jit(Llama(LLAMA, adapter=adapter).init_adapters)(jax.random.key(0))
    return jax.tree.map(lambda x: jnp.nan_to_num(x, nan=1.0), fresh)


def write(folder: Path, adapter: AdapterConfig, own: bool = False, **changes: Any) -> Path:
    """A folder of PEFT, or with `own` of ours, whose header names the method."""
    folder.mkdir()
    model = Llama(LLAMA, adapter=adapter)
    save_adapter(folder, model, leaves(adapter), base_model="somewhere/base", fold=False)
    if not own:
        tensors = folder / "adapter_model.safetensors"
        save_file(load_file(tensors), tensors)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def load(folder: Any, output: Path, /, **changes: Any) -> Config:
    """A configuration without a file: what is not given has its default, or is the adapter's."""
    given = {name.replace("__", "."): value for name, value in changes.items()}
    values = {"model": "copies/base", "output_dir": str(output), "adapter.from": str(folder)}
    file = output.with_suffix(".json")
    file.write_text(json.dumps(values | given))
    return Config.load(file)


def settings(adapter: AdapterConfig) -> Any:
    names = ("method", "rank", "alpha", "scaling", "targets", "options")
    return {name: getattr(adapter, name) for name in names}


@pytest.mark.parametrize("adapter", ADAPTERS, ids=[f"{a.method} {a.scaling}" for a in ADAPTERS])
def test_settings_come_from_a_folder(adapter: AdapterConfig, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", adapter)
    ours = write(tmp_path / "ours", adapter, own=True)
    assert settings(load(ours, tmp_path / "run").adapter) == settings(adapter)
    config = load(folder, tmp_path / "run", adapter__dropout=0.1)
    assert settings(config.adapter) == settings(adapter)
    assert config.adapter.dropout == 0.1
    check_start(config)
    read = read_start(config, Llama(LLAMA, adapter=config.adapter))
    assert_same(read, jax.tree.map(np.asarray, leaves(adapter)))
    # In Python, an adapter with nothing else.
    alone = Config(
        "copies/base", str(tmp_path / "run"), adapter=AdapterConfig(init_from=str(folder))
    )
    assert settings(with_base_settings(alone).adapter) == settings(adapter)


def test_targets_of_every_form(tmp_path: Path) -> None:
    adapter = ADAPTERS[0]
    for place, targets in enumerate([r".*\.(q|v)_proj", ["self_attn.q_proj", "v_proj"], ["x"]]):
        folder = write(tmp_path / f"adapter{place}", adapter, target_modules=targets)
        assert load(folder, tmp_path / "run").adapter.targets == adapter.targets
    whole = write(tmp_path / "all", AdapterConfig(rank=2), target_modules="all-linear")
    assert load(whole, tmp_path / "run").adapter.targets == AdapterConfig().targets


def test_given_settings_that_differ_are_refused_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", ADAPTERS[0])
    cases = [
        ({"rank": 4}, r"r = 2, but adapter\.rank = 4"),
        ({"alpha": 4}, r"lora_alpha = 3, but adapter\.alpha = 4\.0"),
        ({"scaling": "sqrt_rank"}, r"use_rslora = False: expected True"),
        ({"targets": ["q_proj"]}, r"target_modules = .*, but adapter\.targets = q_proj"),
        ({"method": "lokr"}, r"peft_type = 'LORA': expected 'LOKR' with adapter\.method lokr"),
    ]
    for changes, message in cases:
        given = {f"adapter__{name}": value for name, value in changes.items()}
        config = load(folder, tmp_path / "run", **given)
        with pytest.raises(ValueError, match=message):
            read_start(config, Llama(LLAMA, adapter=config.adapter))
    # A plain pair is a start of IEC, whose connections change nothing at first.
    config = load(folder, tmp_path / "run", adapter__method="iec")
    assert (config.adapter.method, config.adapter.rank) == ("iec", 2)
    assert config.adapter.iec == IecOptions()
    read_start(config, Llama(LLAMA, adapter=config.adapter))


def test_given_defaults_are_given(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", AdapterConfig(method="lora"))
    assert load(folder, tmp_path / "run").adapter.method == "lora"
    config = load(folder, tmp_path / "run", adapter__method="iec")
    assert config.adapter.method == with_base_settings(config).adapter.method == "iec"
    # Of a run, everything has to be the same.
    first = tmp_path / "first"
    first.mkdir()
    (first / "base.safetensors").touch()
    save_config(first, Config("m", str(first), adapter=AdapterConfig(rank=8)))
    assert load(first, tmp_path / "run").adapter.rank == 8
    with pytest.raises(ValueError, match=r"adapter\.rank = 64: the adapter in '.*first' has 8"):
        load(first, tmp_path / "run", adapter__rank=64)


def test_damaged_settings_name_the_file(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"r": "many"}, r"adapter_config\.json: adapter\.rank = 'many': expected a whole number"),
        ({"peft_type": "VERA"}, r"adapter_config\.json: peft_type = 'VERA': expected LORA or LOKR"),
    ]
    for place, (changes, message) in enumerate(cases):
        folder = write(tmp_path / f"adapter{place}", ADAPTERS[1], **changes)
        with pytest.raises(ValueError, match=message):
            load(folder, tmp_path / "run")


def test_the_name_of_another_base_is_a_note(tmp_path: Path, said: list[str]) -> None:
    folder = write(tmp_path / "adapter", ADAPTERS[0])
    check_start(load(folder, tmp_path / "run"))
    assert said == []
    check_start(load(folder, tmp_path / "run", model="copies/other"))
    assert "names the base 'somewhere/base'" in said[0] and "'copies/other'" in said[0]


def test_a_resumed_run_needs_its_adapter_no_more(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    stored = Config("m", str(run), adapter=AdapterConfig(rank=3, init_from="gone/adapter"))
    (run / "config.json").write_text(json.dumps(dataclasses.asdict(stored)))
    assert load("gone/adapter", run).adapter == stored.adapter
    # Nor does its configuration in another folder, which has all settings.
    moved = tmp_path / "moved.json"
    moved.write_text((run / "config.json").read_text())
    (run / "config.json").unlink()
    assert Config.load(moved) == stored


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A hub with adapters by id, which counts nothing else."""
    adapters: dict[str, Path] = {}

    def fetch(repo: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        from huggingface_hub.errors import RepositoryNotFoundError

        assert allow_patterns == ["adapter_model.safetensors", "adapter_config.json"]
        if repo not in adapters:
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)
        return str(adapters[repo])

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    return adapters


def test_an_adapter_on_the_hub(hub: dict[str, Path], tmp_path: Path) -> None:
    hub["owner/adapter"] = write(tmp_path / "adapter", ADAPTERS[0])
    config = load("owner/adapter", tmp_path / "run")
    assert config.adapter.init_from == "owner/adapter"
    assert settings(config.adapter) == settings(ADAPTERS[0])
    check_start(config)
    read = read_start(config, Llama(LLAMA, adapter=config.adapter))
    assert_same(read, jax.tree.map(np.asarray, leaves(ADAPTERS[0])))
    message = "adapter.init_from = 'owner/none': neither a local folder nor an adapter on the hub"
    with pytest.raises(FileNotFoundError, match=message):
        load("owner/none", tmp_path / "run")
