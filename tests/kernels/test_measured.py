"""A kernel is the default only where a measurement says so."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from irqlora_jax.kernels import matmul_mosaic_tiles, matmul_triton_tiles, measured
from irqlora_jax.kernels.measured import Measurement, is_faster, read_measurements, tuned_tiles
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.quant.matmul import (
    XLA,
    dequant_matmul,
    preferred_layout,
    with_preferred_layout,
)

ONE = Measurement(
    operation="matmul",
    implementation="mosaic",
    device="NVIDIA H200",
    format="nf4",
    shape=(4096, 11008),
    rows=(1, 16),
    speedup=2.5,
    jax="0.11.2",
    date="2026-11-24",
)


@pytest.mark.parametrize(
    ("change", "rows", "expected"),
    [
        ({}, 1, True),
        ({}, 16, True),
        ({}, 17, False),
        ({}, 0, False),
        ({"speedup": 1.0}, 4, False),
        ({"operation": "search"}, 4, False),
        ({"implementation": "triton"}, 4, False),
        ({"device": "NVIDIA H100"}, 4, False),
        ({"format": "nf3"}, 4, False),
        ({"shape": (11008, 4096)}, 4, False),
    ],
)
def test_a_kernel_is_faster_only_where_it_was_measured(
    change: dict, rows: int, expected: bool
) -> None:
    known = [dataclasses.replace(ONE, **change)]
    asked = "matmul", "mosaic", "NVIDIA H200", "nf4", (4096, 11008)
    assert is_faster(*asked, rows, known) is expected


def test_tuned_tiles_are_taken_where_they_were_measured() -> None:
    tuned = dataclasses.replace(ONE, rows=(16, 16), speedup=3.0, tiles={"stages": 6})
    asked = "matmul", "mosaic", "NVIDIA H200", "nf4", (4096, 11008)
    assert tuned_tiles(*asked, 16, [ONE, tuned]) == {"stages": 6}
    assert tuned_tiles(*asked, 8, [ONE, tuned]) == {}
    triton, mosaic = matmul_triton_tiles.Tiles(), matmul_mosaic_tiles.Tiles(64)
    for tiles, others in (
        (triton, matmul_triton_tiles.neighbors(triton)),
        (mosaic, matmul_mosaic_tiles.neighbors(mosaic, 4)),
    ):
        assert len(others) >= 4 and tiles not in others and len(set(others)) == len(others)


@pytest.mark.parametrize("transposed", [False, True], ids=["y", "dX"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rows", [1, 64, 2048])
def test_neighbors_of_mosaic_tiles_fit(bits: int, rows: int, transposed: bool) -> None:
    rule = matmul_mosaic_tiles.default_tiles(rows, 4096, 4096, bits, transposed)
    others = matmul_mosaic_tiles.neighbors(rule, bits, transposed)
    taken = [one.shared_memory(bits, transposed) for one in others]
    assert others and max(taken) <= matmul_mosaic_tiles.SHARED


def test_the_committed_file_is_read_and_a_broken_one_is_named(tmp_path: Path) -> None:
    assert all(isinstance(one, Measurement) for one in read_measurements())
    file = tmp_path / "measured.json"
    file.write_text(json.dumps([dataclasses.asdict(ONE)]))
    assert read_measurements(file) == (ONE,)
    for broken in ("{", "[1]", '[{"shape": [1, 2]}]'):
        other = tmp_path / f"{len(broken)}.json"
        other.write_text(broken)
        with pytest.raises(ValueError, match="not a list of measurements"):
            read_measurements(other)


def test_a_measurement_makes_a_kernel_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    from irqlora_jax.quant import matmul

    weight = quantize(jax.random.normal(jax.random.key(0), (24, 128)), QuantConfig())
    x = jnp.ones((3, 128))
    doubled = dataclasses.replace(
        XLA,
        name="triton",
        forward=lambda x, w: 2 * XLA.forward(x, w),
        is_faster=matmul.TRITON.is_faster,
    )
    there = (doubled, XLA)
    plain = dequant_matmul(x, weight, None, there)
    assert jnp.array_equal(plain, dequant_matmul(x, weight, "xla", there))
    kind = jax.devices()[0].device_kind
    here = dataclasses.replace(
        ONE, implementation="triton", device=kind, shape=(24, 128), rows=(2, 4)
    )
    monkeypatch.setattr(measured, "read_measurements", lambda: (here,))
    assert jnp.array_equal(dequant_matmul(x, weight, None, there), 2 * plain)
    assert jnp.array_equal(dequant_matmul(x[:1], weight, None, there), plain[:1])

    # The gradient has its own measurement.
    def slope(x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: dequant_matmul(x, weight, None, there).sum())(x)

    tripled = dataclasses.replace(doubled, backward=lambda g, w: 3 * XLA.backward(g, w))
    there = (tripled, XLA)
    once = slope(x)
    back = dataclasses.replace(here, operation="matmul_transposed")
    monkeypatch.setattr(measured, "read_measurements", lambda: (back,))
    assert jnp.array_equal(slope(x), 3 * once)
    assert jnp.array_equal(dequant_matmul(x, weight, None, there), plain)


def test_the_preferred_layout_is_that_of_the_default_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert preferred_layout("mosaic") == "fragments"
    assert {preferred_layout(name) for name in ("xla", "triton")} == {"planes"}
    assert preferred_layout(None) == "planes"
    here = dataclasses.replace(ONE, device=jax.devices()[0].device_kind)
    monkeypatch.setattr(measured, "read_measurements", lambda: (here,))
    assert preferred_layout(None) == "fragments"


def test_a_base_gets_the_preferred_layout() -> None:
    """Every matrix with blocks of 64 does, and its weights stay the same."""
    weights = {
        size: quantize(jax.random.normal(jax.random.key(0), (8, 128)), QuantConfig(block_size=size))
        for size in (32, 64)
    }
    base = {"small": weights[32], "usual": weights[64], "norm": jnp.ones(3)}
    moved = with_preferred_layout(base, "mosaic")
    assert (moved["small"].layout, moved["usual"].layout) == ("planes", "fragments")
    assert jnp.array_equal(moved["usual"].dequantize(), weights[64].dequantize())
    assert with_preferred_layout(moved, "triton")["usual"].layout == "planes"
