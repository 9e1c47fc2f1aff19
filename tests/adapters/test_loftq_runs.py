"""LoftQ through the life of a run: crash, baselines, export, plan and refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax import hf
from irqlora_jax.adapters.loftq import LoftqOptions
from irqlora_jax.config import Config
from irqlora_jax.model.llama import Llama
from irqlora_jax.plan.measure import find_plan_device, measure, read_base_shapes
from irqlora_jax.plan.plan import plan
from irqlora_jax.runs.load import load_run
from irqlora_jax.train import finetune
from irqlora_jax.train.finetune import RunResult, run
from tests.models import WORLD, assert_same, long
from tests.train.small_runs import (
    StoppedError,
    assert_same_run,
    at_step,
    config_for,
    crash,
    no_training,
    steps_of,
)

pytestmark = pytest.mark.usefixtures("optimizer_promotion", "shared_steps")


def config(folder: Path, model: Path = WORLD / "base-small", **changes: Any) -> Config:
    settings = {"adapter__init": "loftq", "adapter__rank": 8, "train__keep_checkpoints": 1}
    settings |= {"quant__calibration": "icq", "quant__icq__steps": 4}
    return config_for(model, folder, **(settings | changes))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    folder = tmp_path_factory.mktemp("loftq") / "run"
    with jax.numpy_dtype_promotion("standard"):
        return run(config(folder, evaluate__baselines=True))


@pytest.fixture
def finished(result: RunResult) -> Path:
    return result.folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with a new adapter. What they learn does not matter here."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    changes = {"adapter__init": "default", "train__steps": 2, "data__eval": None}
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        no_training(patch)
        run(config(folder, **changes))
    return folder


@pytest.mark.long
def test_the_initial_checkpoint_is_kept_beside_the_newest(finished: Path) -> None:
    assert steps_of(finished) == [0, 6]


@pytest.mark.parametrize("moment", ["step 1", *long("save_config")])
def test_a_crashed_run_ends_as_if_it_had_not(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Before the folder is complete it begins anew; from then on nothing is fitted again."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        if moment.startswith("step"):
            at_step(patch, int(moment[-1]), crash)
        else:
            patch.setattr(f"{finetune.__name__}.{moment}", crash)
        run(config(folder))
    assert 0 in steps_of(folder)
    if moment.startswith("step"):
        monkeypatch.setattr(f"{finetune.__name__}.load_fitted", crash)
    else:
        # What a start that was broken off even earlier leaves.
        (folder / "checkpoints" / "0").rename(folder / "checkpoints" / "0.orbax-checkpoint-tmp")
    run(config(folder))
    assert_same_run(folder, finished)


def test_a_folder_with_checkpoints_of_no_run_is_refused(finished: Path, tmp_path: Path) -> None:
    for name, also in (("a", ("base.safetensors",)), ("b", ())):
        folder = tmp_path / name
        shutil.copytree(finished / "checkpoints", folder / "checkpoints")
        if name == "b":
            shutil.rmtree(folder / "checkpoints" / "6")
        for file in also:
            shutil.copy(finished / file, folder)
        with pytest.raises(ValueError, match=r"holds other files and no config\.json"):
            run(config(folder))
        assert steps_of(folder)


def test_a_merged_model_has_the_logits_of_base_and_pair(finished: Path, tmp_path: Path) -> None:
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    apply = jax.jit(Llama.apply, static_argnums=0)
    for step in (0, 6):
        run = load_run(finished, checkpoint=step, compute_dtype="float32")
        out = hf.export_merged(finished, tmp_path / str(step), checkpoint=step, dtype="float32")
        merged, llama = hf.load_base(out, None)
        expected = apply(run.model, run.variables, tokens)
        found = apply(Llama(llama), {"params": {}, "base": merged}, tokens)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_baseline_is_the_model_before_its_finetune(finished: Path) -> None:
    start = load_run(finished, adapter=False)
    assert start.step == 0
    assert_same(start.variables, load_run(finished, checkpoint=0).variables)


def test_the_table_has_the_quantizer_with_and_without_its_pair(result: RunResult) -> None:
    rows = {row.model: row for row in result.rows}
    assert list(rows) == [
        *("full precision", "plain nf3", "nf3 + ICQ", "nf3 + ICQ + LoftQ"),
        "nf3 + ICQ + LoftQ, finetuned",
    ]
    losses: dict[str, Any] = {name: row.loss for name, row in rows.items()}
    assert losses["full precision"] < losses["nf3 + ICQ + LoftQ"] < losses["nf3 + ICQ"]
    assert rows["nf3 + ICQ"].entropy != rows["nf3 + ICQ + LoftQ"].entropy


def test_bases_that_do_not_go_with_loftq_are_refused(
    finished: Path, plain: Path, tmp_path: Path
) -> None:
    origin = f"expected the original model ('{WORLD / 'base-small'}'), "
    for action in (run, plan):
        with pytest.raises(ValueError) as refused:
            action(config(tmp_path / "new", plain))
        assert str(refused.value) == (
            "adapter.init = 'loftq': needs the full-precision weights; model = "
            f"'{plain}' holds a quantized base only; {origin}which LoftQ quantizes itself"
        )
        with pytest.raises(ValueError) as refused:
            action(config(tmp_path / "new", finished, adapter__init="default"))
        assert str(refused.value) == (
            f"model = '{finished}': this base was fitted to the adapter of its run "
            f"and is incomplete without it; expected adapter.init_from = '{finished}', "
            f"{origin.removeprefix('expected ')}or a folder of irqlora quantize"
        )
    assert not (tmp_path / "new").exists()


def test_a_run_from_before_loftq_resumes(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config.json of an earlier version has not all fields."""
    no_training(monkeypatch)
    folder = shutil.copytree(plain, tmp_path / "run")
    changes = {"train__steps": 3, "data__eval": None}
    file = folder / "config.json"
    stored = json.loads(file.read_text())
    del stored["adapter"]["init"], stored["adapter"]["loftq"]
    file.write_text(json.dumps(stored))
    (folder / "checksums.json").unlink()
    run(config(folder, adapter__init="default", **changes))
    assert steps_of(folder) == [3]
    with pytest.raises(ValueError, match=r"adapter.init = 'default' there, 'loftq' here"):
        run(config(folder, **changes))


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter.init = 'loftq': expected default with quant"):
        config(tmp_path, quant__format="none")
    with pytest.raises(ValueError, match=r"adapter.loftq.iterations = 0: expected a whole"):
        LoftqOptions(iterations=0)


def test_the_plan_needs_shapes_alone(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(WORLD / "base-small" / "config.json", folder)
    needs = []
    for init in ("default", "loftq"):
        asked = config(tmp_path / "run", folder, adapter__init=init)
        shapes, llama = read_base_shapes(asked)
        # With a limit of 0 nothing is compiled: the step is that of any pair.
        needs.append(measure(asked, shapes, llama, find_plan_device(None, 1), limit=0))
    assert needs[0] == needs[1]
