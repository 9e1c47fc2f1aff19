"""Statistics of layers against golden results and whole-model gradients."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from irqlora_jax import hf
from irqlora_jax.base.statistics import Gradients, Inputs, Statistics
from irqlora_jax.data.calibrate import CalibrateConfig, CalibrationRows
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import linear_path
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.sharding import MeshConfig, make_mesh
from tests.arrays import read_arrays
from tests.models import LLAMA, RELATIVES, assert_same, random_base, write_model

GRADIENTS = CalibrateConfig(metric="gradients", batch_size=3)
TOKENS = np.random.default_rng(3).integers(0, LLAMA.vocab_size, (5, 9)).astype(np.int32)


Found = dict[int, dict[str, Any]]


def statistics_of(
    base: Any, llama: LlamaConfig, rows: CalibrationRows, mesh: Mesh | None = None
) -> tuple[Found, Found]:
    """Moments and squared gradients of all layers, which stay in full precision."""
    outside = {name: np.asarray(base[name]["weight"]) for name in base if name != "layers"}

    def read(layer: int) -> Any:
        return jax.tree.map(lambda x: x[layer], base["layers"])

    found: Found = {}
    squares: Found = {}
    if rows.config.metric == "gradients":
        statistics: Statistics = Gradients(llama, rows, outside, read, True, mesh)
    else:
        statistics = Inputs(llama, rows, outside["embed_tokens"], mesh=mesh)
    for layer in statistics.order:
        found[layer] = statistics.moments(read(layer))
        squares[layer] = statistics.squares
        if len(found) < len(statistics.order):
            statistics.advance(read(layer), read(layer))
    return found, squares


def assert_close(found: Any, expected: Any, rtol: float) -> None:
    """Relative to the largest value; `found` has a mean diagonal of 1."""
    expected = np.asarray(expected, np.float64)
    expected = expected / np.diag(expected).mean()
    assert np.abs(np.asarray(found) - expected).max() <= rtol * np.abs(expected).max()


def test_the_hessians_are_the_golden_ones(golden: Path) -> None:
    reference = golden / "irqlora_reference"
    base, llama = hf.load_base(reference / "base", None)
    tokens = np.load(reference / "tokens.npy").reshape(-1, 64)[:8].astype(np.int32)
    found, squares = statistics_of(base, llama, CalibrationRows(tokens, GRADIENTS))
    for name, expected in read_arrays(golden / "oac_hessian.npz").items():
        layer, _, projection, *_ = name.split(".")
        assert_close(found[int(layer)][projection], expected, 1e-5)
    units = []
    for name, expected in read_arrays(golden / "fisher.npz").items():
        layer, _, projection, _, what = name.split(".")
        ours = np.asarray(squares[int(layer)][projection])
        of = {"D_row": np.sqrt(ours.mean(1)), "D_col": np.sqrt(ours.mean(0))}
        ours = of.get(what, np.sqrt(ours[:8]))
        theirs = np.sqrt(expected) if what.startswith("fisher") else expected
        units.append(float((ours * theirs).sum() / (theirs**2).sum()))
        np.testing.assert_allclose(ours, units[-1] * theirs, atol=1e-5 * ours.max())
    np.testing.assert_allclose(units, units[0], rtol=1e-5)  # one scale for the whole model


@pytest.mark.parametrize("name", ["Qwen3", "SmolLM3"])
def test_inputs_are_those_of_the_whole_model(name: str) -> None:
    """Also if layers differ in their windows or rotations."""
    llama = RELATIVES[name]
    base, tokens = random_base(llama, scale=0.3), TOKENS % llama.vocab_size
    found, _ = statistics_of(base, llama, CalibrationRows(tokens, CalibrateConfig(batch_size=3)))
    run = jax.jit(functools.partial(Llama(llama).apply, mutable=["stats"]))
    _, whole = run({"params": {}, "base": base}, jnp.asarray(tokens))
    for layer, grams in found.items():
        for projection, gram in grams.items():
            group, _ = linear_path(projection)
            of_stack = whole["stats"]["layers"][group][projection]["gram"]
            assert_close(gram, of_stack[layer], 1e-5)


@pytest.mark.parametrize("llama", [LLAMA, RELATIVES["Qwen3"]], ids=["LLaMA", "Qwen3"])
def test_the_hessians_are_those_of_whole_gradients(tmp_path: Path, llama: LlamaConfig) -> None:
    """One row at a time through the whole model, for every matrix."""
    base, llama = hf.load_base(write_model(tmp_path, llama), None)
    model = Llama(llama)

    def loss(layers: Any, row: jax.Array) -> jax.Array:
        logits = model.apply({"params": {}, "base": base | {"layers": layers}}, row[None])
        chosen = jax.nn.log_softmax(logits[0, :-1])  # type: ignore[index]
        return -jnp.take_along_axis(chosen, row[1:, None], 1).sum()

    total, slope = None, jax.jit(jax.grad(loss))
    rows = TOKENS % llama.vocab_size
    for row in rows:
        gradient = slope(base["layers"], jnp.asarray(row))
        part = jax.tree.map(
            lambda g: (jnp.einsum("loi,loj->lij", g, g), g**2) if g.ndim == 3 else g, gradient
        )
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    found, squares = statistics_of(base, llama, CalibrationRows(rows, GRADIENTS))
    for group in ("self_attn", "mlp"):
        for name, part in total[group].items():
            if name not in found[0]:  # a norm
                continue
            for layer in range(llama.num_hidden_layers):
                gram, each = (x[layer] for x in part["weight"])
                assert_close(found[layer][name], gram, 1e-4)
                size = float(each.max())
                np.testing.assert_allclose(squares[layer][name], each, atol=1e-4 * size)


@pytest.mark.parametrize("metric", ["inputs", "gradients"])
@pytest.mark.parametrize("rows", [8, 5], ids=["even", "a part that does not split"])
def test_devices_share_the_rows_bit_for_bit(metric: Any, rows: int, tmp_path: Path) -> None:
    tokens = np.random.default_rng(4).integers(0, LLAMA.vocab_size, (rows, 9)).astype(np.int32)
    given = CalibrationRows(tokens, CalibrateConfig(metric=metric, batch_size=1))
    base, llama = hf.load_base(write_model(tmp_path, LLAMA), None)
    one = statistics_of(base, llama, given)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), 4)
    jax.tree.map(np.testing.assert_array_equal, statistics_of(base, llama, given, mesh), one)


@pytest.mark.long
def test_devices_that_quantize_together(tmp_path: Path) -> None:
    """In the context of a mesh, as training has it: the errors of the outputs are the same."""
    folder = write_model(tmp_path, dataclasses.replace(LLAMA, num_hidden_layers=1))
    mesh = make_mesh(MeshConfig(data=2, tensor=2), 2)
    given: dict[str, Any] = {"calibrate": CalibrationRows(TOKENS, CalibrateConfig(batch_size=1))}
    quant = QuantConfig(format="nf3", calibration="none")
    errors: list[Any] = []
    given["watch"] = lambda *x: errors.append(x[-1])
    one = hf.load_base(folder, quant, **given)[0]
    with jax.set_mesh(mesh):
        assert_same(hf.load_base(folder, quant, mesh=mesh, **given)[0], one)
    half = len(errors) // 2
    assert errors[:half] == errors[half:]


@pytest.mark.long
def test_a_base_from_gradients_lowers_their_error_and_resumes(tmp_path: Path) -> None:
    folder, rows = write_model(tmp_path, LLAMA), CalibrationRows(TOKENS, GRADIENTS)
    quant = QuantConfig(format="nf2", calibration="gptq")
    errors: list[Any] = []
    options: dict[str, Any] = {"calibrate": rows, "keep": tmp_path / "keep"}
    whole = hf.load_base(folder, quant, watch=lambda *x: errors.append(x[-1]), **options)[0]
    assert np.mean([e.own for e in errors]) < 0.8 * np.mean([e.plain for e in errors])
    (tmp_path / "keep" / "layer_0.safetensors").unlink()  # the last one that was made
    assert_same(hf.load_base(folder, quant, **options)[0], whole)
    inputs = CalibrationRows(TOKENS, dataclasses.replace(GRADIENTS, metric="inputs"))
    other = hf.load_base(folder, quant, calibrate=inputs)[0]
    one, two = (b["layers"]["mlp"]["gate_proj"]["weight"].packed for b in (whole, other))
    assert not bool((one == two).all())
    with pytest.raises(ValueError, match=r"calibrate\.metric = 'hessian': expected inputs or"):
        CalibrateConfig(metric="hessian")  # type: ignore[arg-type]
