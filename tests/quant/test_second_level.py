"""LQ-LoRA's quantizer: evenly spaced scales in few bits, codes of 8 bits, and their storage."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax import hf
from irqlora_jax.base.file import base_shapes, read_base, save_base
from irqlora_jax.base.storage import abstract_base, measure_base
from irqlora_jax.quant import packing, stats
from irqlora_jax.quant.config import QuantConfig, QuantRule
from irqlora_jax.quant.encode import encode_with, quantize, quantized_shape
from irqlora_jax.quant.formats import FORMATS, Format, get_format
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.quant.stats import SecondLevel
from irqlora_jax.sharding import MeshConfig, bytes_by_device, make_mesh, tree_shardings
from tests.arrays import read_arrays
from tests.models import assert_same, random_tensors, tiny_llama, write_model

FEW: dict[str, Any] = {"scale_rule": "uniform", "scale_bits": 3, "scale_group": 32}
LLAMA = tiny_llama(hidden_size=64, intermediate_size=96)
TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def settings(case: dict[str, Any]) -> QuantConfig:
    """The configuration of a golden run."""
    return QuantConfig(
        format=f"nf{case['b']}",  # type: ignore[arg-type]
        block_size=case["B0"],
        calibration="none",
        scale_rule="uniform",
        scale_bits=case["b0"],
        scale_group=case["B1"],
        scale_dtype=TYPES[case["b1"]],  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_codes_and_scales_of_the_released_code(
    golden: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    released = read_arrays(golden / "lqlora_quant.npz")
    about = json.loads((golden / "lqlora_quant.json").read_text())
    levels = tuple(map(float, released["c2_levels"]))  # with 0, unlike ours
    monkeypatch.setitem(FORMATS, "nf2", Format("nf2", 2, levels))
    weight = jnp.asarray(released[f"{kind}_w"])
    for i, case in enumerate(about["configs"]):
        q, of = quantize(weight, settings(case)), f"{kind}_c{i}_"
        np.testing.assert_array_equal(q.codes(), released[of + "codes"])
        codes = packing.unpack_rows(q.scale_codes, case["b0"], 128)
        np.testing.assert_array_equal(codes.ravel(), released[of + "scale_codes"].ravel())
        np.testing.assert_array_equal(
            q.scale_max.astype(jnp.float32), released[of + "group_max"].ravel()
        )
        assert q.scale_max.dtype == TYPES[case["b1"]]
        assert float(q.scale_offset) == released[of + "offset"]
        table = get_format(q.format).table
        np.testing.assert_allclose(table, released[f"c{i}_levels"], atol=1.8e-7, rtol=0)
        error = float(jnp.mean((q.dequantize() - weight) ** 2))
        assert error == pytest.approx(about["mse"][f"{kind}_c{i}"], rel=1e-5)
        # The release does not count the offset of the matrix.
        bits = about["storage_bits_per_weight"][i]
        assert q.nbytes * 8 == bits * weight.size + 32


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_uniform_codes_are_the_nearest_steps(bits: int, center: bool) -> None:
    level = SecondLevel("uniform", bits, group=16, dtype="bfloat16")
    random = np.random.default_rng(bits)
    values = random.uniform(0.5, 2, 41).astype(np.float32)
    values = values if center else values * random.choice([-1, 1], 41).astype(np.float32)
    codes, largest, offset = stats.encode_groups(jnp.asarray(values), center, level)
    assert largest.dtype == jnp.bfloat16 and largest.shape == (3,)
    assert float(offset) == (values.min() if center else 0)
    assert int(codes.max()) < 2**bits
    steps = np.arange(2**bits) if center else np.arange(2**bits - 1) - (2 ** (bits - 1) - 1)
    found = np.asarray(stats.decode_groups(codes, largest, offset, center, level))
    for i, value in enumerate(values):
        reachable = steps / steps.max() * float(largest[i // 16]) + float(offset)
        assert abs(found[i] - value) <= np.abs(reachable - value).min() + 1e-6


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_extreme_scales_are_finite(dtype: Any) -> None:
    """Equal scales, scales that are almost 0, and scales beyond float16."""
    level = SecondLevel("uniform", 4, 16, dtype)
    for values in (np.full(20, 0.7), np.zeros(20), np.arange(20) * 1e-40, np.arange(20) * 1e6):
        given = jnp.asarray(values, jnp.float32)
        found = stats.decode_groups(*stats.encode_groups(given, True, level), True, level)
        assert jnp.isfinite(found).all()
        if dtype != "float16":
            np.testing.assert_allclose(found, given, atol=0.04 * float(given.max()) + 1e-35)


@pytest.mark.parametrize("rows", [1, 13])
@pytest.mark.parametrize("bits", [2, 3, 5, 7, 8])
def test_rows_of_codes_round_trip(bits: int, rows: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, rows, 5)).astype(np.uint8)
    packed = packing.pack_rows(jnp.asarray(codes), bits)
    assert packed.shape == (2, packing.packed_rows(rows, bits), 5)
    assert packed.size * 8 == 2 * 5 * bits * (rows if bits == 8 else -(-rows // 8) * 8)
    np.testing.assert_array_equal(packing.unpack_rows(packed, bits, rows), codes)


def test_picture_of_packed_rows() -> None:
    """Byte i holds bit i of 8 codes, the first row in its lowest bit."""
    codes = jnp.array([[1], [2], [4], [7], [0], [0], [0], [4]], jnp.uint8)
    packed = packing.pack_rows(codes, 3).ravel().tolist()
    assert packed == [0b0000_1001, 0b0000_1010, 0b1000_1100]


@pytest.mark.parametrize(
    ("format", "calibration", "largest"),
    [("nf2", "icq", 0.5), ("int3", "none", 0.25), ("nf8", "none", 0.12)],
)
def test_parts_of_a_matrix(format: Any, calibration: Any, largest: float) -> None:
    """Rows, stacked matrices and jit give what the whole matrix gives; padding changes nothing."""
    config = QuantConfig(format=format, block_size=32, calibration=calibration, **FEW)
    weight = jax.random.normal(jax.random.key(0), (13, 80))
    q = quantize(weight, config)
    assert q.grid == q.scale().shape == (13, 3)
    assert q.scale_codes.shape == (2 * 3, 3)
    assert quantized_shape((13, 80), config) == jax.eval_shape(lambda: q)
    restored = q.dequantize()
    np.testing.assert_array_equal(q.dequantize_rows()(4, 6), restored[4:10])
    np.testing.assert_array_equal(jax.jit(lambda w: quantize(w, config).packed)(weight), q.packed)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), q, q)
    np.testing.assert_array_equal(stacked.dequantize()[1], restored)
    own = quantize(jnp.pad(weight, ((0, 0), (0, 16)), mode="edge")[:, :80], config)
    np.testing.assert_array_equal(own.scale_codes, q.scale_codes)
    # A scale in 3 bits is up to a 14th of its group's range wrong; the codes make up for it.
    error = float(jnp.linalg.norm(restored - weight) / jnp.linalg.norm(weight))
    assert error < largest


def test_given_scales_are_stored_in_few_bits() -> None:
    weight = jax.random.normal(jax.random.key(0), (8, 64))
    config = QuantConfig(format="nf4", block_size=32, calibration="none", **FEW)
    scale = jnp.abs(weight).reshape(8, 2, 32).max(-1)
    shift = jax.random.normal(jax.random.key(1), (8, 2)) * 0.1
    q = encode_with(weight, config, scale, shift)
    assert q.shift_max is not None and q.shift_max.shape == (1,)
    assert bool((jnp.abs(q.scale() - scale) <= float(q.scale_max[0]) / 14 * 1.01).all())
    found = q.shift()
    assert found is not None
    assert bool((jnp.abs(found - shift) <= float(q.shift_max[0]) / 6 * 1.01).all())


def test_every_part_of_a_split_matrix_has_its_scales() -> None:
    """16 rows and 4 blocks over 2 x 2 devices, in the layer that is split both ways."""
    config = QuantConfig(format="nf3", block_size=32, calibration="none", **FEW)
    weight = quantize(jax.random.normal(jax.random.key(0), (16, 128)), config)
    base = {"layers": {"mlp": {"down_proj": {"weight": jax.tree.map(lambda x: x[None], weight)}}}}
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), rows=4)
    split = jax.device_put(base, tree_shardings(mesh, base))
    found = split["layers"]["mlp"]["down_proj"]["weight"]
    assert set(bytes_by_device(found.scale_codes).values()) == {weight.scale_codes.nbytes // 4}
    with jax.set_mesh(mesh):
        whole = jax.jit(QTensor.dequantize)(found)
    np.testing.assert_allclose(whole[0], weight.dequantize(), rtol=3e-7)


def test_the_file_and_the_arithmetic_of_a_mixed_base(tmp_path: Path) -> None:
    few = QuantRule("layers.0.*", format="nf8", calibration="none", scale_dtype="bfloat16", **FEW)
    rules = few, QuantRule("*.down_proj", format="int8", calibration="none")
    quant = QuantConfig(format="nf2", block_size=32, calibration="none", rules=rules)
    model = write_model(tmp_path / "model", LLAMA, random_tensors(LLAMA))
    base, _ = hf.load_base(model, quant)
    save_base(tmp_path / "base.safetensors", base, LLAMA, quant)
    again = read_base(tmp_path / "base.safetensors")[0]
    assert_same(again, base)
    plan = abstract_base(LLAMA, quant, jnp.float32)
    shapes = base_shapes(tmp_path / "base.safetensors")[0]
    assert measure_base(plan) == measure_base(base) == measure_base(shapes)
    weight = again["layers_0"]["mlp"]["down_proj"]["weight"]
    assert weight.second_level == SecondLevel("uniform", 3, 32, "bfloat16")
    # [64, 96]: 8 bits a weight, 3 bits a scale, 16 bits for 32 scales, and 32 bits.
    assert weight.nbytes * 8 == 64 * 96 * (8 + 3 / 32 + 16 / (32 * 32)) + 32


def test_the_default_storage_is_written_as_before(tmp_path: Path) -> None:
    """So earlier versions read it."""
    quant = QuantConfig(calibration="none", block_size=32)
    weight = jax.tree.map(lambda x: x[None], quantize(jnp.ones((8, 32)), quant))
    base = {"layers": {"mlp": {"up_proj": {"weight": weight}}}}
    save_base(tmp_path / "base.safetensors", base, LLAMA, quant)
    raw = (tmp_path / "base.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    static = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["quantized"])
    assert {name for fields in static.values() for name in fields} == {
        *("shape", "format", "block_size", "layout")
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scale_bits": 4}, r"scale_bits = 4: expected 8 with quant.scale_rule dynamic"),
        ({"scale_rule": "uniform", "scale_bits": 1}, r"scale_bits = 1: expected 2 to 8"),
        ({"scale_group": 8}, r"scale_group = 8: expected a whole number from 16 to 256"),
        ({"format": "nf8"}, r"calibration = 'icq': expected none or gptq with quant.format nf8"),
        ({"format": "int8", "calibration": "robust"}, r"'robust': expected none or gptq"),
        ({"rules": (QuantRule("*", scale_bits=3),)}, r"rules\[0\] \(.*scale_bits = 3: expected 8"),
    ],
)
def test_bad_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantConfig(**given)


def test_codes_of_8_bits_have_one_layout() -> None:
    q = quantize(jnp.ones((2, 64)), QuantConfig(format="nf8", calibration="none"))
    with pytest.raises(ValueError, match=r"'fragments': expected codes of 2, 3 or 4 bits"):
        q.with_layout("fragments")


def test_settings_survive_their_file() -> None:
    config = QuantConfig(rules=(QuantRule("*", **FEW),), scale_group=64, scale_dtype="float16")
    assert QuantConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert QTensor.__dataclass_fields__["second_level"].default == QuantConfig().second_level
