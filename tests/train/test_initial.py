"""Runs that start from a trained adapter (`adapter.init_from`)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from irqlora_jax import hf
from irqlora_jax.config import Config
from irqlora_jax.files.small import read_json
from irqlora_jax.runs.load import load_run
from irqlora_jax.train import finetune
from irqlora_jax.train.finetune import run
from tests.models import QUICKSTART, WORLD, assert_same
from tests.train.small_runs import config_for, losses_of, steps_of

pytestmark = pytest.mark.usefixtures("optimizer_promotion", "shared_steps")

SMALL = {"adapter__dropout": 0.0, "train__steps": 3, "train__save_every": 0}


def settings(model: Path, folder: Path, **changes: Any) -> Config:
    return config_for(model, folder, **(SMALL | changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import jax

    folder = tmp_path_factory.mktemp("initial") / "run"
    with jax.numpy_dtype_promotion("standard"):
        run(settings(WORLD / "base-small", folder))
    return folder


def adapters(folder: Path, step: int) -> Any:
    return load_run(folder, checkpoint=step).variables["params"]


@pytest.mark.long
def test_training_continues_from_the_adapter_of_a_run(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    changes = {"adapter__init_from": str(trained), "train__learning_rate": 1e-3}
    run(settings(trained, folder, **changes))
    assert_same(adapters(folder, 0), adapters(trained, 3))
    assert steps_of(folder) == [0, 3]
    # The first batch is that of the other run, whose adapter has seen it.
    before, after = losses_of(trained), losses_of(folder)
    assert after[0][1] < before[0][1]
    # Another mesh, and a run that is resumed from step 0.
    other = tmp_path / "other"
    run(settings(trained, other, **changes, mesh__data=2, mesh__fsdp=2))
    np.testing.assert_allclose(losses_of(other)[0][1], after[0][1], rtol=1e-4)


def test_an_exported_adapter_is_a_start(trained: Path, tmp_path: Path) -> None:
    exported = hf.export_adapter(trained, tmp_path / "adapter", fold=False)
    run(settings(trained, tmp_path / "run", adapter__init_from=str(exported)))
    assert_same(adapters(tmp_path / "run", 0), adapters(trained, 3))


def test_a_lokr_folder_of_peft_is_a_start(tmp_path: Path) -> None:
    """All steps have the same batch, so the third loss is that of the adapter after two steps."""
    first, folder = tmp_path / "first", tmp_path / "adapter"
    changes = {"adapter__method": "lokr", "data__max_examples": 4, "adapter__targets": ["q_proj"]}
    run(settings(WORLD / "base-small", first, **changes, train__save_every=2))
    assert steps_of(first) == [2, 3]
    hf.export_adapter(first, folder, checkpoint=2)
    assert read_json(folder / "adapter_config.json")["peft_type"] == "LOKR"
    changes["adapter__init_from"] = str(folder)
    run(settings(first, tmp_path / "next", **changes))
    assert_same(adapters(tmp_path / "next", 0), adapters(first, 2))
    before, after = losses_of(first), losses_of(tmp_path / "next")
    assert after[0][1] == pytest.approx(before[2][1], rel=1e-6)
    assert before[2][1] < before[0][1]
    # A folder of another method is refused before anything is computed or written.
    changes["adapter__method"] = "iec"
    other = settings(WORLD / "base-small", tmp_path / "other", **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "quantize_base", None)
        message = r"peft_type = 'LOKR': expected 'LORA' with adapter\.method iec"
        with pytest.raises(ValueError, match=message):
            run(other)
    assert not (tmp_path / "other").exists()


def test_an_adapter_is_never_lost_in_silence(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"model = '{trained}': a run, whose adapter would be"):
        run(settings(trained, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    run(settings(trained, tmp_path / "run", adapter__init_from="new", train__steps=1))
    assert steps_of(tmp_path / "run") == [1]
    assert losses_of(tmp_path / "run")[0] == losses_of(trained)[0]  # a new adapter


@pytest.mark.long
def test_a_loftq_run_continues_on_its_own_base(tmp_path: Path) -> None:
    first = tmp_path / "first"
    run(settings(WORLD / "base-small", first, adapter__init="loftq", train__steps=1))
    run(settings(first, tmp_path / "next", adapter__init_from=str(first), train__steps=1))
    assert_same(adapters(tmp_path / "next", 0), adapters(first, 1))


def test_a_start_that_does_not_fit_is_refused(trained: Path, tmp_path: Path) -> None:
    start = {"adapter__init_from": str(trained)}
    other = {"quant__format": "nf2"}
    refused: list[tuple[Path, dict[str, Any], str]] = [
        (
            trained,
            {"train__warmup_steps": 4},
            r"warmup_steps = 4: expected at most train.steps = 3",
        ),
        (trained, start | {"adapter__rank": 4}, r"adapter\.rank = 4: the adapter in .* has 8"),
        (trained, start | {"adapter__iec__connections": "u1"}, r"adapter\.iec = .*u1.* has .*both"),
        (WORLD / "base-small", start | other, r"model = .*not the base on which the adapter"),
        (trained, {"adapter__init_from": str(tmp_path / "no")}, r"init_from = '.*no': not found"),
        (trained, start | {"adapter__init": "loftq"}, r"adapter\.init = 'loftq': expected default"),
    ]
    for model, changes, message in refused:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(settings(model, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_the_field_has_a_second_name(trained: Path) -> None:
    config = Config.load(QUICKSTART, {"adapter.from": str(trained)})
    assert config.adapter.init_from == str(trained)
