"""Bases and runs that version 0.1.0 wrote open, and runs go on.

written_by_0.1.0.tar.xz holds what that version wrote of a random LLaMA (tests/models.py, LLAMA): a
base of `irqlora quantize`, two runs of 4 steps that are left at step 2, their data, and the logits
that it computed for `TOKENS` ("NAME" after step 4, "NAME@2" after step 2).
"""

import math
import tarfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.config import Config
from irqlora_jax.runs.load import load_run
from irqlora_jax.train.finetune import run

ARCHIVE = Path(__file__).parent / "written_by_0.1.0.tar.xz"
TOKENS = np.arange(3, 19, dtype=np.int32).reshape(2, 8)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path / "written")  # the runs name their files by relative paths
    return tmp_path / "written"


def logits(folder: str) -> np.ndarray:
    opened = load_run(folder)
    return np.asarray(opened.model.apply(opened.variables, jnp.asarray(TOKENS)))


@pytest.mark.long
@pytest.mark.usefixtures("optimizer_promotion")
@pytest.mark.parametrize("name", ["run-joint", "run-loftq"])
def test_a_run_opens_with_its_logits_and_goes_on(written: Path, name: str) -> None:
    with np.load("logits.npz") as stored:
        before, after = stored[f"{name}@2"], stored[name]
    np.testing.assert_allclose(logits(name), before, atol=1e-5)
    assert run(Config.load(f"{name}/config.json")).steps == 4
    np.testing.assert_allclose(logits(name), after, atol=1e-4)
    assert np.abs(after - before).max() > 1e-2  # so a run that did not go on would be seen


def test_a_base_and_flat_settings_are_read(written: Path) -> None:
    with np.load("logits.npz") as stored:
        np.testing.assert_allclose(logits("base"), stored["base"], atol=1e-5)
    joint, loftq = (Config.load(f"run-{name}/config.json") for name in ("joint", "loftq"))
    assert (joint.quant.joint.error_weight, joint.quant.joint.refine_steps) == (math.inf, 2)
    assert joint.adapter.iec.connections == "u1"
    icq = loftq.quant.icq
    assert (icq.search, icq.range, icq.steps) == ("zero_point", 0.2, 20)
    assert loftq.adapter.loftq.iterations == 2
