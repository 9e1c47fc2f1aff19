"""What quantization did to the weights: against plain NumPy, a block at a time."""

import dataclasses
import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.base.file import save_base
from irqlora_jax.base.survey import BINS, bin_edges, summarize, survey
from irqlora_jax.config import Config
from irqlora_jax.quant.calibrations.icq import IcqOptions
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.quant.formats import get_format
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.runs.folder import BASE_FILE, SURVEY_FILE, check_folder
from irqlora_jax.runs.quantize import link_base, quantize_base, save_survey
from irqlora_jax.sharding import LINEAR_NAMES
from tests.models import NARROW, write_model

ICQ = QuantConfig(format="nf3", block_size=32, icq=IcqOptions(steps=5))


def reference(weight: np.ndarray, q: QTensor) -> tuple[float, float, list[int]]:
    """Mean entropy of the blocks, relative error, counts of the codes."""
    codes, size = np.asarray(q.codes()), q.block_size
    entropies = []
    for row in codes:
        for start in range(0, len(row), size):
            block = row[start : start + size]
            shares = np.unique(block, return_counts=True)[1] / len(block)
            entropies.append(-sum(share * math.log2(share) for share in shares))
    off = np.asarray(q.dequantize(), np.float64) - weight
    counts = [int((codes == code).sum()) for code in range(2 ** get_format(q.format).bits)]
    return float(np.mean(entropies)), np.linalg.norm(off) / np.linalg.norm(weight), counts


def some_weights(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).normal(0.01, 0.1, shape).astype(np.float32)


@pytest.mark.parametrize(
    "config",
    [ICQ, dataclasses.replace(ICQ, format="int3"), QuantConfig("fp4", 32, calibration="none")],
    ids=["nf3", "int3", "fp4-plain"],
)
def test_all_rows_are_measured_as_by_numpy(config: QuantConfig) -> None:
    weight = some_weights((12, 80))  # the last block of a row is padded
    packed = quantize(jnp.asarray(weight), config)
    found = survey(3, "q_proj", weight, packed, config)
    plain = quantize(jnp.asarray(weight), dataclasses.replace(config, calibration="none"))
    assert (found.layer, found.name, found.weights, found.sampled) == (3, "q_proj", 960, 960)
    assert (found.calibrated is None) == (config.calibration == "none")
    for measured, q in ((found.plain, plain), (found.calibrated, packed)):
        if measured is None:
            continue
        entropy, error, codes = reference(weight, q)
        assert measured.entropy == pytest.approx(entropy, abs=1e-5)
        assert measured.error == pytest.approx(error, rel=1e-5)
        assert measured.codes == codes
        if q.shift_codes is None:
            assert measured.shifts is None
            continue
        shift, scale = np.asarray(q.shift()), np.asarray(q.scale())
        value = (-shift / scale if get_format(config.format).integer else shift / scale).ravel()
        # A value on an edge, as zero points are, may fall to either side of it here.
        expected, _ = np.histogram(value + 1e-6, bin_edges(config.format))
        assert measured.shifts is not None
        assert (sum(measured.shifts), len(measured.shifts)) == (36, BINS)
        np.testing.assert_array_equal(measured.shifts, expected)


def test_a_sample_is_whole_rows_from_the_first_to_the_last() -> None:
    weight = some_weights((12, 80))
    packed = quantize(jnp.asarray(weight), ICQ)
    found = survey(0, "q_proj", weight, packed, ICQ, sample=4 * 80 + 3)
    assert (found.weights, found.sampled) == (12 * 80, 4 * 80)
    rows = [0, 4, 7, 11]
    codes = np.asarray(packed.codes())[rows]
    assert found.calibrated is not None
    assert found.calibrated.codes == [int((codes == c).sum()) for c in range(8)]
    off = np.asarray(packed.dequantize())[rows] - weight[rows]
    error = np.linalg.norm(off) / np.linalg.norm(weight[rows])
    assert found.calibrated.error == pytest.approx(error, rel=1e-5)
    # A row that is longer than the sample is taken whole all the same.
    assert survey(0, "q_proj", weight, packed, ICQ, sample=3).sampled == 80


def test_zero_blocks_and_extreme_shifts_stay_finite() -> None:
    weight = np.zeros((12, 80), np.float32)
    weight[1] = 5.0 + np.linspace(0, 1e-3, 80)  # the shift is thousands of scales
    found = survey(0, "q_proj", weight, quantize(jnp.asarray(weight), ICQ), ICQ).calibrated
    assert found is not None and found.shifts is not None
    assert math.isfinite(found.error) and math.isfinite(found.entropy)
    assert found.shifts[-1] == 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Hugging Face."""
    return write_model(tmp_path_factory.mktemp("model"), NARROW)


def test_a_base_carries_its_survey_into_its_runs(model: Path, tmp_path: Path) -> None:
    base, llama, stored = quantize_base(model, ICQ)
    assert stored is not None and llama == NARROW
    size = 2 * 7 * 40 * 40
    assert (stored["format"], stored["calibration"]) == ("nf3", "icq")
    assert stored["sampled"] == stored["weights"] == size
    plain, after = stored["plain"], stored["calibrated"]
    assert after["mean_entropy"] > plain["mean_entropy"] and "shifts" not in plain
    assert set(after["entropy"]) == set(LINEAR_NAMES) == set(plain["error"])
    assert sum(after["codes"]) == sum(plain["codes"]) == size
    # What is stored is what is measured, layer by layer.
    for group in base["layers"].values():
        for name, linear in group.items():
            if name in LINEAR_NAMES:
                entropies = np.asarray(linear["weight"].entropy()).mean(axis=(1, 2))
                np.testing.assert_allclose(after["entropy"][name], entropies, atol=2e-6)

    folder, run = tmp_path / "base", tmp_path / "run"
    folder.mkdir()
    run.mkdir()
    save_base(folder / BASE_FILE, base, llama, ICQ)
    save_survey(folder, stored)
    link_base(folder, run)
    assert json.loads((run / SURVEY_FILE).read_text()) == stored
    # These two alone are what a start that broke off leaves: the folder is still free.
    assert check_folder(run, Config(str(model), str(run))) is None


def test_without_quantization_there_is_no_survey(model: Path, tmp_path: Path) -> None:
    base, llama, summary = quantize_base(model, QuantConfig(format="none"))
    assert summary is None
    save_survey(tmp_path, summary)
    assert list(tmp_path.iterdir()) == []
    save_base(tmp_path / BASE_FILE, base, llama, QuantConfig(format="none"))
    (tmp_path / "run").mkdir()
    link_base(tmp_path, tmp_path / "run")
    assert [file.name for file in (tmp_path / "run").iterdir()] == [BASE_FILE]


def test_a_summary_of_a_plain_quantizer() -> None:
    config = dataclasses.replace(ICQ, calibration="none")
    weights = [some_weights((4, 64)), some_weights((8, 64))]
    found = [
        survey(layer, "q_proj", w, quantize(jnp.asarray(w), config), config)
        for layer, w in reversed(list(enumerate(weights)))
    ]
    summary = summarize(found, config)
    assert "calibrated" not in summary and "shifts" not in summary["plain"]
    # By layer, whatever the order; the mean is over weights.
    first, second = (found[1].plain, found[0].plain)
    np.testing.assert_allclose(
        summary["plain"]["entropy"]["q_proj"], [first.entropy, second.entropy], atol=1e-6
    )
    mean = (first.entropy + 2 * second.entropy) / 3
    assert summary["plain"]["mean_entropy"] == pytest.approx(mean)
    assert json.loads(json.dumps(summary)) == summary
