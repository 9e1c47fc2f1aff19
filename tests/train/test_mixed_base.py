"""A base of several formats through the whole product: first and last layer nf4, the others nf3."""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax import cli, hf
from irqlora_jax.base.file import read_base
from irqlora_jax.base.storage import abstract_base, measure_base
from irqlora_jax.config import Config
from irqlora_jax.model.llama import Llama
from irqlora_jax.plan import plan as plans
from irqlora_jax.plan.measure import read_base_shapes
from irqlora_jax.quant.config import QuantConfig, QuantRule
from irqlora_jax.runs.load import load_run
from irqlora_jax.sharding import MeshConfig, make_mesh, tree_shardings
from irqlora_jax.train.finetune import RunResult, run
from tests.models import WORLD, assert_same
from tests.train.small_runs import (
    StoppedError,
    assert_same_run,
    at_step,
    config_for,
    crash,
    losses_of,
)

ENDS = {"match": "layers.[03].*", "format": "nf4"}
DOWN = {"match": "layers.[12].mlp.down_proj", "format": "none"}
TOKENS = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)

pytestmark = pytest.mark.usefixtures("shared_steps")


def settings(folder: Path, model: Path = WORLD / "base-small", **changes: Any) -> Config:
    quant = {"quant__format": "nf3", "quant__rules": [ENDS, DOWN], "quant__calibration": "icq"}
    quant |= {
        "quant__block_size": 16,
        "quant__icq__steps": 4,
        "train__steps": 4,
        "adapter__dropout": 0.0,
        "data__eval": None,
    }
    return config_for(model, folder, **(quant | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, RunResult]]:
    folder = tmp_path_factory.mktemp("mixed") / "run"
    with jax.numpy_dtype_promotion("standard"):
        yield folder, run(settings(folder, evaluate__baselines=True))


@functools.partial(jax.jit, static_argnums=0)
def apply(model: Llama, variables: Any) -> Any:
    return model.apply(variables, TOKENS)


def test_a_run_has_the_formats_of_the_rules_and_learns(finished: tuple[Path, RunResult]) -> None:
    folder, result = finished
    base, _ = read_base(folder / "base.safetensors")
    up = {name: base[name]["mlp"]["up_proj"]["weight"].format for name in base if "layers_" in name}
    assert up == {"layers_0": "nf4", "layers_1": "nf3", "layers_3": "nf4"}  # 1 and 2 are stacked
    rows = {row.model: row for row in result.rows}
    names = ("plain nf3, with rules", "nf3 + ICQ, with rules")
    assert list(rows) == ["full precision", *names, f"{names[1]}, finetuned"]
    assert rows[names[0]].entropy < rows[names[1]].entropy  # what ICQ is for
    assert rows[names[1]].bits == pytest.approx(measure_base(base).bits, abs=1e-3)
    losses = [loss for _, loss in losses_of(folder)]
    assert losses[-1] < losses[0]


def test_a_crashed_run_ends_as_if_it_had_not(
    finished: tuple[Path, RunResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with jax.numpy_dtype_promotion("standard"):
        with monkeypatch.context() as patch, pytest.raises(StoppedError):
            at_step(patch, 3, crash)
            run(settings(folder))
        run(settings(folder))
    assert_same_run(folder, finished[0])


@pytest.mark.long
def test_a_mesh_gives_the_same_run(finished: tuple[Path, RunResult], tmp_path: Path) -> None:
    mesh = {"mesh__data": 1, "mesh__fsdp": 2, "mesh__tensor": 2}
    with jax.numpy_dtype_promotion("standard"):
        run(settings(tmp_path / "run", finished[0], adapter__init_from="new", **mesh))
    one, split = losses_of(finished[0]), losses_of(tmp_path / "run")
    np.testing.assert_allclose([loss for _, loss in split], [loss for _, loss in one], rtol=1e-3)


def test_a_mixed_base_is_quantized_onto_a_mesh() -> None:
    """Plainly, because the calibration sees one matrix at a time (tests/test_sharding.py)."""
    rules = (QuantRule(**ENDS), QuantRule(**DOWN))
    quant = QuantConfig(format="nf3", rules=rules, block_size=16, calibration="none")
    mesh = make_mesh(MeshConfig(1, 2, 2), 4)
    one, split = (hf.load_base(WORLD / "base-small", quant, mesh=m)[0] for m in (None, mesh))
    assert_same(split, one)
    for leaf, where in zip(
        *map(jax.tree.leaves, (split, tree_shardings(mesh, split))), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim)


@pytest.mark.long
def test_a_mixed_base_is_quantized_once_and_finetuned(
    finished: tuple[Path, RunResult], tmp_path: Path
) -> None:
    rules = json.dumps([ENDS, DOWN])
    flags = ["--quant.format=nf3", "--quant.block_size=16", "--quant.icq.steps=4"]
    base = tmp_path / "base"
    command = ["quantize", f"--model={WORLD / 'base-small'}", f"--output_dir={base}", *flags]
    assert cli.main([*command, f"--quant.rules={rules}", "--progress=false"]) == 0
    assert_same(*(read_base(f / "base.safetensors")[0] for f in (finished[0], base)))
    with jax.numpy_dtype_promotion("standard"):
        run(settings(tmp_path / "run", base))
        assert_same_run(tmp_path / "run", finished[0])
        with pytest.raises(ValueError, match=r"quant\.rules = .*nf2"):
            run(settings(tmp_path / "other", base, quant__rules=[{**ENDS, "format": "nf2"}]))


def test_exports_have_the_logits_of_the_run(
    finished: tuple[Path, RunResult], tmp_path: Path
) -> None:
    folder, opened = finished[0], load_run(finished[0], compute_dtype="float32")
    expected = np.asarray(apply(opened.model, opened.variables))
    merged = hf.export_merged(folder, tmp_path / "merged", dtype="float32")
    weights, llama = hf.load_base(merged, None)
    found = apply(Llama(llama), {"params": {}, "base": weights})
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    adapter = hf.export_adapter(folder, tmp_path / "adapter")
    params = hf.load_adapter(adapter, opened.model)
    found = apply(opened.model, {"base": opened.variables["base"], "params": params})
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert "layers.[03].*" in (merged / "README.md").read_text()


@pytest.mark.long
def test_a_budget_goes_through_the_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose formats, train, crash, resume with the same settings, export, evaluate."""
    few = {"formats": ["nf3", "nf4"], "block_sizes": [16], "scale_bits": [8], "tie": 2}
    asked: dict[str, Any] = {f"quant__allocation__{name}": x for name, x in few.items()}
    asked |= {"quant__budget": 7.2, "quant__rules": [DOWN], "quant__calibration": "none"}
    config, folder = settings(tmp_path / "run", **asked), tmp_path / "run"
    with jax.numpy_dtype_promotion("standard"):
        with monkeypatch.context() as patch, pytest.raises(StoppedError):
            at_step(patch, 3, crash)
            run(config)
        run(config)
        with pytest.raises(ValueError, match=r"quant\.budget = 7\.2 there, 7\.3 here"):
            run(dataclasses.replace(config, quant=dataclasses.replace(config.quant, budget=7.3)))
    assert [step for step, _ in losses_of(folder)] == [1, 2, 3, 4]
    stored = Config.load(folder / "config.json").quant
    assert stored.budget is None and stored.rules[0].match == DOWN["match"]
    base, llama = read_base(folder / "base.safetensors")
    assert 7.0 < measure_base(base).bits <= 7.2
    assert measure_base(abstract_base(llama, stored, "float32")) == measure_base(base)
    merged = hf.export_merged(folder, tmp_path / "merged", dtype="float32")
    weights, _ = hf.load_base(merged, None)
    found: Any = Llama(llama).apply({"params": {}, "base": weights}, TOKENS)
    opened = load_run(folder, compute_dtype="float32")
    expected = np.asarray(opened.model.apply(opened.variables, TOKENS))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert all(rule.match in (merged / "README.md").read_text() for rule in stored.rules)
    text = tmp_path / "text.txt"
    text.write_text("The fact.\n" * 9)
    command = ["eval", f"--run={folder}", "--task=perplexity", f"--text={text}"]
    assert cli.main([*command, "--progress=false"]) == 0
    page = (folder / "report.html").read_text()
    assert "Bits by layer and projection" in page and DOWN["match"] in page


@pytest.mark.long
def test_plan_and_report_know_the_formats(
    finished: tuple[Path, RunResult],
    tmp_path: Path,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # More rows would need more programs, and tests/plan has tests of their number.
    monkeypatch.setattr(plans, "_most_rows", lambda config, base, llama, target, need: (0, need))
    folder, _ = finished
    base, _ = read_base(folder / "base.safetensors")
    config = settings(tmp_path / "new")
    planned = measure_base(read_base_shapes(config)[0])
    for part in ("codes", "scales", "shifts", "weights"):
        assert getattr(planned, part) == getattr(measure_base(base), part)
    assert plans.plan(config)
    assert "base: codes" in "\n".join(said)
    page = (folder / "report.html").read_text()
    assert "layers.[03].*: format nf4" in page and "(at most 4 bits)" in page
