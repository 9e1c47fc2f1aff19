"""What several files of tests need."""

from pathlib import Path

import pytest

from irqlora_jax.config import QuantizeConfig
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.runs.quantize import quantize_model
from tests.models import WORLD


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that is quantized once for all runs."""
    folder = tmp_path_factory.mktemp("base") / "nf3"
    quant = QuantConfig(format="nf3", calibration="none")
    quantize_model(QuantizeConfig(str(WORLD / "base-small"), str(folder), quant, progress=False))
    return folder
