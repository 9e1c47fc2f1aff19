"""Rows of text for calibrations."""

from pathlib import Path

import numpy as np
import pytest

from irqlora_jax.data.calibrate import CalibrateConfig, read_calibration
from tests.models import word_tokenizer


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"w{3 + i * i % 37}" for i in range(100)))
    return str(file)


def test_rows_are_whole_windows_of_the_text_each_at_most_once(text: str) -> None:
    tokenizer = word_tokenizer(40)
    whole = read_calibration(CalibrateConfig(text, rows=10, length=10), tokenizer, 64)
    some = read_calibration(CalibrateConfig(text, rows=4, length=10), tokenizer, 64)
    other = read_calibration(CalibrateConfig(text, rows=4, length=10, seed=1), tokenizer, 64)
    assert whole is not None and some is not None and other is not None
    assert whole.tokens.shape == (10, 10) and some.tokens.shape == (4, 10)
    rows = [row.tolist() for row in whole.tokens]
    found = [rows.index(row.tolist()) for row in some.tokens]
    assert found == sorted(set(found))
    assert not np.array_equal(some.tokens, other.tokens)
    assert some.describe()["sha256"] != other.describe()["sha256"]


def test_a_short_text_is_said_or_refused(text: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = word_tokenizer(40)
    found = read_calibration(CalibrateConfig(text, rows=128, length=32), tokenizer, 64)
    assert found is not None and len(found.tokens) == 3
    assert "are enough for 3 of 128 rows (calibrate.rows)" in caplog.text
    with pytest.raises(ValueError, match=r"tokens; expected at least the length of a row, 512"):
        read_calibration(CalibrateConfig(text), tokenizer, 2048)
    with pytest.raises(ValueError, match=r"calibrate.length = 512: expected at most .* = 64"):
        read_calibration(CalibrateConfig(text), tokenizer, 64)
    assert read_calibration(CalibrateConfig(), tokenizer, 64) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("rows", 0), ("length", 1), ("batch_size", 0), ("damping", -0.1), ("damping", 1.0)],
)
def test_invalid_settings_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"calibrate.{field} = {value}"):
        CalibrateConfig(**{field: value})  # type: ignore[arg-type]
