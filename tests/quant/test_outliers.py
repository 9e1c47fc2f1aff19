"""The sparse part of a QTensor: which weights it holds, what it costs, and what must heed it."""

import functools
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from irqlora_jax import dequant_matmul, hf
from irqlora_jax.adapters.loftq import loftq
from irqlora_jax.base.file import base_shapes, read_base, save_base
from irqlora_jax.base.storage import abstract_base, measure_base
from irqlora_jax.base.survey import survey
from irqlora_jax.config import parse_config
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant import slabs
from irqlora_jax.quant.config import QuantConfig, QuantRule
from irqlora_jax.quant.encode import encode_with, quantize, quantized_shape
from irqlora_jax.quant.formats import FORMATS, get_format
from irqlora_jax.quant.outliers import find_largest
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.sharding import MeshConfig, device_bytes, make_mesh, tree_shardings
from tests.models import NARROW, assert_same, quantize_base, random_base, write_model
from tests.quant.test_feedback import layer, output_error, slow

FEW_BITS = [name for name in FORMATS if FORMATS[name].bits < 8]


def heavy(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Weights with a few large ones, most of them in some rows and columns."""
    rng = np.random.default_rng(seed)
    scale = rng.lognormal(0, 0.5, (rows, 1)) * rng.lognormal(0, 0.5, (1, columns))
    return (scale * rng.standard_t(5, (rows, columns))).astype(np.float32)


def largest(weight: np.ndarray, share: float) -> np.ndarray:
    """Marks the share of the largest weights."""
    order = np.argsort(-np.abs(weight), axis=None, kind="stable")
    marked = np.zeros(weight.size, bool)
    marked[order[: round(share * weight.size)]] = True
    return marked.reshape(weight.shape)


def settings(share: float = 0.02, format: str = "nf3", calibration: str = "none", **more: Any):
    return QuantConfig(format=format, calibration=calibration, outliers=float(share), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 7, 60])
def test_the_largest_are_found_and_of_equal_ones_the_first(size: int) -> None:
    rng = np.random.default_rng(size)
    for values in (rng.integers(0, 4, (6, 10)), rng.standard_normal((6, 10)) * 1e-30):
        values = np.abs(values).astype(np.float32)
        found = find_largest(jnp.asarray(values), size)
        np.testing.assert_array_equal(found, largest(values, size / values.size))


@pytest.mark.parametrize("calibration", ["none", "icq", "joint", "robust"])
@pytest.mark.parametrize("format", ["nf3", "int3"])
def test_the_rest_is_quantized_as_if_outliers_were_zero(format: str, calibration: str) -> None:
    """With a last block that is not full."""
    weight = heavy(24, 150)
    marked, config = largest(weight, 0.03), settings(0.03, format, calibration)
    found = quantize(jnp.asarray(weight), config)
    core = jnp.asarray(np.where(marked, 0, weight))
    alone = quantize(core, settings(0, format, calibration))
    assert_same(found.packed, alone.packed)
    exact = weight.astype(np.float16)
    expected = np.where(marked, exact, alone.dequantize())
    np.testing.assert_allclose(found.dequantize(), expected, rtol=2e-6, atol=1e-6)
    np.testing.assert_array_equal(found.dequantize()[marked], exact[marked])
    np.testing.assert_array_equal(found.codes(), alone.codes())
    np.testing.assert_array_equal(found.entropy(), alone.entropy())
    half = jnp.asarray(exact).astype(jnp.bfloat16)[marked]
    np.testing.assert_array_equal(found.dequantize(jnp.bfloat16)[marked], half)


@pytest.mark.long
@pytest.mark.parametrize("format", FEW_BITS)
def test_more_outliers_lose_less(format: str) -> None:
    weight = heavy(64, 256)

    def error(share: float) -> float:
        found = quantize(jnp.asarray(weight), settings(share, format))
        return float(np.linalg.norm(np.asarray(found.dequantize()) - weight))

    errors = [error(share) for share in (0, 0.005, 0.01, 0.02, 0.1)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.75 * errors[0]


@pytest.mark.parametrize("share", [0.0, 1e-6])
def test_without_outliers_nothing_is_stored(share: float) -> None:
    """Also where the share of a small matrix is less than half a weight."""
    weight = jnp.asarray(heavy(8, 64))
    found, plain = quantize(weight, settings(share)), quantize(weight, settings(0))
    assert found.outliers is None and len(jax.tree.leaves(found)) == 4
    assert_same(found, plain)


def test_bfloat16_weights_are_kept_exactly() -> None:
    weight = jnp.asarray(heavy(16, 128), jnp.bfloat16)
    found = quantize(weight, settings(0.1))
    outliers = found.outliers
    assert outliers is not None
    exact = weight.astype(jnp.float32)[outliers.rows(), outliers.columns.astype(int)]
    np.testing.assert_array_equal(outliers.values.astype(jnp.float32), exact)


@pytest.mark.parametrize("format", FEW_BITS)
def test_bits_of_a_weight(format: str) -> None:
    shape, share = (256, 512), 0.01
    found, plain = (
        device_bytes(quantized_shape(shape, settings(own, format))) for own in (share, 0)
    )
    assert found - plain == 4 * round(share * 256 * 512) + 2 * 256
    made = quantize(jnp.asarray(heavy(20, 96)), settings(share, format))
    shapes = quantized_shape((20, 96), settings(share, format))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )


def test_rows_slabs_layouts_traces_and_stacks(monkeypatch) -> None:
    config, weights = settings(0.05), [heavy(40, 192, seed) for seed in range(3)]
    parts = [quantize(jnp.asarray(weight), config) for weight in weights]
    dense = [part.dequantize() for part in parts]
    some = parts[0].dequantize_rows()
    for start in (0, 13, 33):
        np.testing.assert_array_equal(some(start, 7), dense[0][start : start + 7])
    np.testing.assert_array_equal(parts[0].with_layout("fragments").dequantize(), dense[0])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    np.testing.assert_array_equal(stacked.dequantize(), jnp.stack(dense))
    _, scanned = jax.lax.scan(lambda carry, part: (carry, part.dequantize()), 0, stacked)
    np.testing.assert_array_equal(scanned, jnp.stack(dense))
    traced = jax.jit(lambda weight: quantize(weight, config))(jnp.asarray(weights[0]))
    assert_same(traced, parts[0])
    monkeypatch.setattr(slabs, "_CACHED", 7 * 192)
    jax.clear_caches()
    assert_same(quantize(jnp.asarray(weights[0]), config), parts[0])


def test_a_difference_keeps_its_largest_weights() -> None:
    weight, config = heavy(24, 100), settings(0.04)
    rng = np.random.default_rng(1)
    left, right = (rng.standard_normal(shape).astype(np.float32) for shape in ((24, 3), (3, 100)))
    found = quantize(jnp.asarray(weight), config, minus=(jnp.asarray(left), jnp.asarray(right)))
    difference = weight - left @ right
    expected = quantize(jnp.asarray(difference), config)
    np.testing.assert_array_equal(found.outlier_counts, expected.outlier_counts)
    np.testing.assert_allclose(found.dequantize(), expected.dequantize(), atol=2e-3)
    loss = [
        float(jnp.linalg.norm(weight - q.dequantize() - b @ a))
        for q, a, b in (
            loftq(jnp.asarray(weight), settings(share), 4, 1.0, 2, jax.random.key(0))
            for share in (0, 0.04)
        )
    ]
    assert loss[1] < 0.8 * loss[0]


def test_product_and_gradient_are_those_of_the_dense_matrix() -> None:
    found = quantize(jnp.asarray(heavy(24, 100)), settings(0.05))
    dense = found.dequantize()
    x, g = (jax.random.normal(jax.random.key(i), (5, n)) for i, n in enumerate((100, 24)))

    @jax.jit
    def product(x: jax.Array, weight: QTensor) -> jax.Array:
        return dequant_matmul(x, weight)

    np.testing.assert_allclose(product(x, found), x @ dense.T, rtol=1e-5, atol=1e-4)
    _, back = jax.vjp(functools.partial(product, weight=found), x)
    np.testing.assert_allclose(back(g)[0], g @ dense, rtol=1e-5, atol=1e-4)


def test_kernels_refuse_outliers() -> None:
    from irqlora_jax.kernels import matmul_triton

    weight = jnp.asarray(heavy(64, 128))
    x = jnp.ones((4, 128), jnp.bfloat16)
    assert matmul_triton._unfit(x, quantize(weight, settings(0)), False) is None
    refused = matmul_triton._unfit(x, quantize(weight, settings(0.01)), False)
    assert refused == "it takes no weights with outliers"


@pytest.mark.parametrize("format", ["nf3", "int3"])
def test_error_feedback_knows_the_outliers(format: str) -> None:
    weight, gram = layer(6, 200, 400)
    weight = weight * heavy(6, 200)
    marked, order = largest(weight, 0.05), np.argsort(-np.diag(gram), kind="stable")
    config = settings(0.05, format, rounding="feedback")
    found = quantize(jnp.asarray(weight), config, gram=jnp.asarray(gram))
    core = np.where(marked, 0, weight)
    of_column = np.repeat(np.arange(found.scale().shape[1]), 64)[:200]
    levels = np.asarray(get_format(format).table, np.float64)
    scale = np.asarray(found.scale(), np.float64)
    shift = 0 * scale if found.shift() is None else np.asarray(found.shift(), np.float64)

    def value_of(column: np.ndarray, place: int) -> np.ndarray:
        block = of_column[order[place]]
        values = levels * scale[:, block, None] + shift[:, block, None]
        nearest = np.abs(column[:, None] - values).argmin(1)[:, None]
        nearest = np.take_along_axis(values, nearest, 1)[:, 0]
        return np.where(marked[:, order[place]], 0, nearest)

    expected = np.zeros_like(weight)
    expected[:, order] = slow(core[:, order], gram[order][:, order], 0.01, value_of)
    expected = np.where(marked, weight.astype(np.float16), expected)
    np.testing.assert_allclose(found.dequantize(), expected, rtol=1e-5, atol=1e-4)
    plain = quantize(jnp.asarray(weight), settings(0.05, format))
    assert output_error(weight, found, gram) < 0.7 * output_error(weight, plain, gram)


@pytest.mark.parametrize("format", ["nf3", "int3"])
def test_inputs_choose_the_outliers_that_harm_most(format: str) -> None:
    """Against SpQR's rule in float64; one input is far larger than the others."""
    weight, gram = layer(32, 200, 600)
    large = np.where(np.arange(200) == 70, 30.0, 1.0)
    gram = (gram * large * large[:, None]).astype(np.float32)
    config = settings(0.02, format, outlier_rule="sensitivity", rounding="feedback")
    found = quantize(jnp.asarray(weight), config, gram=jnp.asarray(gram))
    order = np.argsort(-np.diag(gram), kind="stable")
    damped = np.float64(gram) + 0.01 * np.diag(gram).mean(dtype=np.float64) * np.eye(200)
    diagonal = np.zeros(200)
    upper = np.linalg.cholesky(np.linalg.inv(damped[order][:, order])).T
    diagonal[order] = np.diag(upper)
    likely = largest(weight / diagonal, 0.02)
    core = quantize(jnp.asarray(np.where(likely, 0, weight)), settings(0, format))
    scale, shift = core.scale(), core.shift()
    shift = jnp.zeros_like(scale) if shift is None else shift
    scale, shift = (np.repeat(np.float64(x), 64, 1)[:, :200] for x in (scale, shift))
    levels = np.asarray(get_format(format).table, np.float64)
    error = np.abs(scale[..., None] * levels + shift[..., None] - weight[..., None]).min(-1)
    outliers, marked = found.outliers, np.zeros(weight.shape, bool)
    assert outliers is not None
    marked[outliers.rows(), outliers.columns] = True
    np.testing.assert_array_equal(marked, largest(error / diagonal, 0.02))
    by_size = settings(0.02, format, rounding="feedback")
    by_size = quantize(jnp.asarray(weight), by_size, gram=jnp.asarray(gram))
    nearest = settings(0.02, format, outlier_rule="sensitivity")
    nearest = quantize(jnp.asarray(weight), nearest, gram=jnp.asarray(gram))
    assert (nearest.outliers.columns == found.outliers.columns).all()
    assert (nearest.packed != found.packed).any()
    assert by_size.nbytes == found.nbytes
    assert output_error(weight, found, gram) < 0.9 * output_error(weight, by_size, gram)


# --------------------------------------------------------------------------- in the whole product


def test_the_base_of_a_model(tmp_path: Path) -> None:
    """Shapes without weights, file, storage, rules, and a layer that is kept."""
    quant = settings(0.02, "nf3", rules=(QuantRule("*.down_proj", outliers=0.1),))
    model = write_model(tmp_path / "model", NARROW)
    base, _ = hf.load_base(model, quant)
    shapes = abstract_base(NARROW, quant, np.float32)
    assert jax.tree.structure(shapes) == jax.tree.structure(base)
    assert measure_base(shapes) == measure_base(base)
    down, up = (base["layers"]["mlp"][name]["weight"] for name in ("down_proj", "up_proj"))
    assert [x.outlier_values.shape for x in (down, up)] == [(2, 160), (2, 32)]
    stored, plain = measure_base(base), measure_base(abstract_base(NARROW, settings(0), np.float32))
    linear = NARROW.linear_shapes
    bits = sum(
        32 * round((0.1 if name == "down_proj" else 0.02) * math.prod(shape)) + 16 * shape[0]
        for name, shape in linear.items()
    )
    assert stored.outliers * 8 == 2 * bits
    assert stored.bits - plain.bits == pytest.approx(2 * bits / stored.weights)
    file = tmp_path / "base.safetensors"
    save_base(file, base, NARROW, quant)
    assert_same(read_base(file)[0], base)
    assert measure_base(base_shapes(file)[0]) == stored


def test_a_mesh_computes_the_same() -> None:
    llama = NARROW
    base = random_base(llama)
    quant = settings(0.03, block_size=8)
    base = quantize_base(base, quant)
    model, tokens = Llama(llama), jnp.arange(24).reshape(4, 6)
    expected = model.apply({"params": {}, "base": base}, tokens)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), 4)
    split = jax.device_put(base, tree_shardings(mesh, base))
    with jax.set_mesh(mesh):
        found = jax.jit(lambda base: model.apply({"params": {}, "base": base}, tokens))(split)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["up_proj", "down_proj"])
def test_no_device_of_a_mesh_holds_a_whole_matrix(name: str) -> None:
    """Though all of them hold all outliers."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=4), 4)
    weight = quantize(jnp.asarray(heavy(256, 512)), settings(0.02))
    tree = {"layers": {"mlp": {name: {"weight": jax.tree.map(lambda x: x[None], weight)}}}}
    split = jax.device_put(tree, tree_shardings(mesh, tree))["layers"]["mlp"][name]["weight"]
    split_inputs = NamedSharding(mesh, P(None, "tensor" if name == "down_proj" else None))
    x = jax.device_put(jax.random.normal(jax.random.key(0), (16, 512)), split_inputs)

    @jax.jit
    def product(x: jax.Array, stacked: QTensor) -> jax.Array:
        return dequant_matmul(x, jax.tree.map(lambda leaf: leaf[0], stacked))

    with jax.set_mesh(mesh):
        program = product.lower(x, split).compile().as_text()
        found = product(x, split)
    assert not re.search(r"f(32|16)\[256,512\]", program)
    np.testing.assert_allclose(found, x @ weight.dequantize().T, rtol=1e-4, atol=1e-3)


def test_the_survey_counts_the_error_with_outliers() -> None:
    weight, config = jnp.asarray(heavy(24, 150)), settings(0.05, "nf3", "joint")
    packed = quantize(weight, config)
    for sample in (24 * 150, 10 * 150):
        found = survey(0, "q_proj", weight, packed, config, sample)
        rows = np.unique(np.linspace(0, 23, sample // 150).round().astype(int))
        own, exact = np.asarray(packed.dequantize())[rows], np.asarray(weight)[rows]
        assert found.calibrated is not None
        expected = np.linalg.norm(own - exact) / np.linalg.norm(exact)
        assert found.calibrated.error == pytest.approx(expected, rel=1e-5)


def test_refusals() -> None:
    for share in (-0.1, 0.5, math.nan):
        with pytest.raises(ValueError, match=r"quant\.outliers = .*from 0 to below 0\.5"):
            settings(share)
    with pytest.raises(ValueError, match=r"quant\.rules\[0\].*quant\.outliers = 2"):
        QuantConfig(rules=(QuantRule("*", outliers=2.0),))
    with pytest.raises(
        ValueError, match=r"quant\.outlier_rule = 'size': expected magnitude or sen"
    ):
        parse_config(["--model=m", "--output_dir=o", "--quant.outlier_rule=size"])
    weight = jnp.asarray(heavy(8, 64))
    with pytest.raises(ValueError, match=r"gram = 'None': expected X\^T X .* 10 % outliers"):
        quantize(weight, settings(0.1, outlier_rule="sensitivity"))
    with pytest.raises(ValueError, match=r"largest weight = 70000\.0: expected 65504 or less"):
        quantize(weight.at[0, 0].set(-70000), settings(0.1))
    quantize(weight.at[0, 0].set(-70000), settings(0))
    with pytest.raises(ValueError, match="inputs = 65536: expected 65535 or fewer"):
        quantize(jnp.ones((1, 2**16)), settings(0.1))


def test_label_and_earlier_configurations() -> None:
    assert settings(0.005).label == "plain nf3, 0.5 % outliers"
    assert settings(0, "nf4", "icq").label == "nf4 + ICQ"
    assert QuantConfig.from_dict({"format": "nf3"}).outliers == 0


def test_given_outliers_have_to_be_as_many_as_configured() -> None:
    weight = jnp.asarray(heavy(4, 64))
    found = quantize(weight, settings(0.05))
    given = weight, settings(0.05), found.scale()
    assert_same(encode_with(*given, outliers=found.outliers).outliers, found.outliers)
    with pytest.raises(ValueError, match=r"outliers = 13: expected 26 with quant\.outliers 0\.1"):
        encode_with(weight, settings(0.1), found.scale(), outliers=found.outliers)
