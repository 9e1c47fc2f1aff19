"""Codes in the layouts of bitsandbytes and compressed-tensors: transformers computes what the run
computes here."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax import hf
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.quant.config import QuantConfig, QuantRule
from irqlora_jax.runs.load import Run, load_run
from irqlora_jax.sharding import LINEAR_NAMES
from tests.models import quantize_base, random_base, tiny_llama, write_run

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # of other packages

WIDE = tiny_llama(
    hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=32
)
"""All sizes are multiples of 32, and rows are whole blocks of 64."""
IEC = AdapterConfig(method="iec", rank=4, alpha=8.0)
TOKENS = np.random.default_rng(0).integers(0, WIDE.vocab_size, (2, 16))


def ours(run: Run, adapter: bool = True) -> np.ndarray:
    model = run.model if adapter else run.model.clone(adapter=None)
    return np.asarray(jax.jit(model.apply)(run.variables, jnp.asarray(TOKENS, jnp.int32)))


def theirs(model: Any) -> np.ndarray:
    """Logits in the mode for training, which differs by nothing else than this: outside of it
    bitsandbytes multiplies in bfloat16 on CPUs that can."""
    with torch.no_grad():
        return model.train()(torch.from_numpy(TOKENS)).logits.float().numpy()


def load(folder: Path, **options: Any) -> Any:
    """A model folder, every tensor of which must find its place."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, **options
    )
    assert not any(info.values()), info
    return model


def exported(folder: Path, run: Path, kind: Any, **options: Any) -> Path:
    settings: dict[str, Any] = {"progress": False, "dtype": "float32", **options}
    return hf.export(hf.ExportConfig(str(run), str(folder), kind, **settings))


def compare(folder: Path, run: Path, kind: str, atol: float) -> Path:
    """Exports the run, and compares the logits of its base and of the adapter on top."""
    out, loaded = exported(folder / "out", run, kind), load_run(run)
    model = load(out)
    plain, adapted = ours(loaded, adapter=False), ours(loaded)
    assert np.abs(adapted - plain).max() > 0.1
    np.testing.assert_allclose(theirs(model), plain, rtol=0, atol=atol)
    model = peft.PeftModel.from_pretrained(model, out / "adapter")
    assert not any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
    np.testing.assert_allclose(theirs(model), adapted, rtol=0, atol=atol)
    assert "`adapter/`" in (out / "README.md").read_text()
    return out


NESTED = QuantConfig(format="nf4", calibration="none")
SCALES = QuantConfig(format="nf4", calibration="joint", symmetric=True)
FLOATS = QuantConfig(
    format="fp4", calibration="none", block_size=32, scale_rule="uniform", scale_bits=6
)


@pytest.mark.parametrize("quant", [NESTED, SCALES], ids=["plain", "joint"])
def test_bitsandbytes(tmp_path: Path, quant: QuantConfig) -> None:
    pytest.importorskip("bitsandbytes")
    out = compare(tmp_path, write_run(tmp_path / "run", WIDE, quant, IEC), "bitsandbytes", 1e-4)
    described = json.loads((out / "config.json").read_text())["quantization_config"]
    assert described["bnb_4bit_use_double_quant"]
    told = "joint calibration of scales without shifts" in (out / "README.md").read_text()
    assert told == quant.symmetric


def test_bitsandbytes_with_float_scales_and_kept_matrices(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = quantize_base(random_base(WIDE), FLOATS, {*LINEAR_NAMES} - {"up_proj", "k_proj"})
    kept = tuple(QuantRule(f"*.{name}", format="none") for name in ("up_proj", "k_proj"))
    quant = dataclasses.replace(FLOATS, rules=kept)
    run = write_run(tmp_path / "run", WIDE, quant, IEC, base=base)
    compare(tmp_path, run, "bitsandbytes", 1e-4)


INT4 = QuantConfig(format="int4", calibration="none", block_size=32)
INT3 = QuantConfig(format="int3", calibration="none", symmetric=True)


def test_compressed_tensors(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    run = write_run(tmp_path / "run", WIDE, INT3, IEC)
    compare(tmp_path, run, "compressed-tensors", 1e-4)


def test_compressed_tensors_with_zero_points(tmp_path: Path) -> None:
    """The layers of compressed-tensors 0.20 in transformers 5.24 expect zero points that are not
    packed, so the weights are dequantized when they are read."""
    pytest.importorskip("compressed_tensors")
    run = write_run(tmp_path / "run", WIDE, INT4, None)
    out = exported(tmp_path / "out", run, "compressed-tensors")
    whole = transformers.CompressedTensorsConfig(dequantize=True)
    model = load(out, quantization_config=whole)
    np.testing.assert_allclose(theirs(model), ours(load_run(run)), rtol=0, atol=1e-4)


def test_compressed_tensors_of_mixed_formats(tmp_path: Path) -> None:
    """Two widths and block sizes, and matrices that are kept."""
    pytest.importorskip("compressed_tensors")
    int8 = QuantConfig(format="int8", calibration="none", block_size=32, symmetric=True)
    base = quantize_base(random_base(WIDE), int8, ("q_proj", "down_proj"))
    base = quantize_base(base, INT3, ("o_proj", "gate_proj", "up_proj"))
    run = write_run(tmp_path / "run", WIDE, INT3, None, base=base)
    out = exported(tmp_path / "out", run, "compressed-tensors")
    np.testing.assert_allclose(theirs(load(out)), ours(load_run(run)), rtol=0, atol=1e-4)
