"""Updates inside of a quantized base: exported, read, evaluated and trained again."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax import hf
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.qalora import QaloraOptions
from irqlora_jax.adapters.qbara import QbaraOptions
from irqlora_jax.base.file import read_base, save_base
from irqlora_jax.base.storage import measure_base
from irqlora_jax.export.folder import ExportConfig, export
from irqlora_jax.export.quantized import absorbed_base
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.runs.load import load_run
from irqlora_jax.train.job import check_adapter
from tests.models import (
    NARROW,
    RELATIVES,
    quantize_base,
    random_adapters,
    random_base,
    write_run,
)

QUANT = QuantConfig(format="nf3", block_size=8)
QALORA = AdapterConfig("qalora", rank=2, alpha=4.0, qalora=QaloraOptions(8))
TOKENS = jnp.arange(14, dtype=jnp.int32).reshape(2, 7)


def written(folder: Path, kind: Any, run: Path, **options: Any) -> Path:
    settings: dict[str, Any] = {"progress": False, **options}
    return export(ExportConfig(str(run), str(folder), kind, **settings))


def logits(run: Any) -> np.ndarray:
    return np.asarray(run.model.apply(run.variables, TOKENS))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", NARROW, QUANT, QALORA)


@pytest.mark.long
def test_an_absorbed_update_leaves_biases() -> None:
    adapter = dataclasses.replace(QALORA, targets=("q_proj", "o_proj"))
    model = Llama(RELATIVES["LLaMA with biases"], adapter)
    base = quantize_base(random_base(model.config, scale=0.3), QUANT, adapter.targets)
    variables = {"params": random_adapters(model, 0.3), "base": base}
    absorbed = {"base": absorbed_base(model, variables, "float32")}
    found = jax.jit(Llama(model.config).apply)(absorbed, TOKENS)
    np.testing.assert_allclose(found, jax.jit(model.apply)(variables, TOKENS), atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "bound"), [pytest.param("float32", 1e-5, marks=pytest.mark.long), (None, 2e-3)]
)
def test_a_quantized_export_is_a_base_without_an_adapter(
    tmp_path: Path, run: Path, dtype: Any, bound: float
) -> None:
    folder = written(tmp_path / "merged", "quantized", run, dtype=dtype)
    before, after = load_run(run), load_run(folder)
    assert after.model.adapter is None and after.config is None and after.step is None
    plain = logits(load_run(run, adapter=False))
    moved = np.abs(logits(before) - plain).max()
    assert moved > 0.1
    assert np.abs(logits(after) - logits(before)).max() <= bound * moved
    old, new = (r.variables["base"]["layers"]["mlp"]["up_proj"]["weight"] for r in (before, after))
    np.testing.assert_array_equal(old.packed, new.packed)
    np.testing.assert_array_equal(old.scale_codes, new.scale_codes)
    assert new.shift_update.dtype == jnp.dtype(dtype or "float16") and new.scale_update is None
    bits = 16 if dtype is None else 32
    added = measure_base(after.variables["base"]).bits - measure_base(before.variables["base"]).bits
    assert added == pytest.approx(bits / QUANT.block_size)
    assert "part of the scales and shifts" in (folder / "README.md").read_text()


@pytest.mark.long
def test_a_second_training_and_a_second_export(tmp_path: Path, run: Path) -> None:
    """The second run starts from the first one's outputs, and its export holds both updates."""
    folder = written(tmp_path / "merged", "quantized", run, dtype="float32")
    base, llama = read_base(folder / "base.safetensors")
    second = write_run(tmp_path / "second", llama, QUANT, QALORA, base=base, steps=(4,))
    both = written(tmp_path / "both", "quantized", second, dtype="float32")
    found = logits(load_run(both))
    np.testing.assert_allclose(found, logits(load_run(second)), atol=1e-4)
    assert np.abs(found - logits(load_run(folder))).max() > 0.1


@pytest.mark.long
def test_layers_of_other_formats_and_few_targets() -> None:
    base = random_base(NARROW, QuantConfig(format="int4", block_size=8))
    other = random_base(NARROW, QuantConfig(format="nf2", block_size=8))["layers"]
    own = base.pop("layers")
    base["layers_0"] = jax.tree.map(lambda x: x[:1], own)
    base["layers_1"] = jax.tree.map(lambda x: x[1:], other)
    adapter = AdapterConfig(
        "qbara", rank=2, alpha=4.0, targets=("q_proj", "down_proj"), qbara=QbaraOptions(8, 2)
    )
    model = Llama(NARROW, adapter)
    variables = {"params": random_adapters(model), "base": base}
    merged = absorbed_base(model, variables, "float32")
    alone = Llama(NARROW).apply({"params": {}, "base": merged}, TOKENS)
    np.testing.assert_allclose(alone, model.apply(variables, TOKENS), atol=1e-4)  # type: ignore[arg-type]
    kept = merged["layers_0"]["mlp"]["up_proj"]["weight"]
    assert isinstance(kept, QTensor) and kept.shift_update is None


@pytest.mark.parametrize(
    ("adapter", "quant", "options", "message"),
    [
        (AdapterConfig("lora", rank=2), QUANT, {}, "q_proj: the update of LoRA differs within"),
        (
            AdapterConfig("qalora", rank=2, qalora=QaloraOptions(4)),
            QUANT,
            {},
            "constant over 4 inputs, but the blocks of the base have 8 weights",
        ),
        (QALORA, QuantConfig(format="none"), {}, "q_proj: the base is not quantized"),
        (QALORA, QUANT, {"dtype": "bfloat16"}, "dtype = 'bfloat16': expected float16 or float32"),
        (QALORA, QUANT, {"base_model": "x"}, "base_model = 'x': expected null with kind quantized"),
        (None, QUANT, {}, "has no adapter"),
    ],
)
def test_refusals(
    tmp_path: Path, adapter: Any, quant: QuantConfig, options: dict[str, Any], message: str
) -> None:
    run = write_run(tmp_path / "run", NARROW, quant, adapter)
    with pytest.raises(ValueError, match=message):
        written(tmp_path / "out", "quantized", run, **options)
    assert not (tmp_path / "out").exists()


def test_an_update_beyond_float16_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", NARROW, QUANT, dataclasses.replace(QALORA, alpha=1e7))
    with pytest.raises(
        ValueError, match=r"dtype = .float16.: ._proj is out of its range; expected"
    ):
        written(tmp_path / "out", "quantized", run)
    written(tmp_path / "out", "quantized", run, dtype="float32")


def test_a_run_says_at_its_start_what_does_not_fit(said: list[str]) -> None:
    """From shapes alone. Whether an update can be absorbed is only a message."""
    check_adapter(Llama(NARROW, QALORA), QUANT)
    assert not said
    check_adapter(Llama(NARROW, AdapterConfig("qahira", rank=2)), QUANT)
    assert "constant over 4 inputs, but the blocks of the base have 8 weights" in said[0]
    for adapter, message in (
        (AdapterConfig("qalora", rank=2), r"adapter\.qalora\.group = 64: expected a divisor of 40"),
        (AdapterConfig("lora", rank=2, scales=64), r"adapter\.scales: 1 blocks in a row, but"),
    ):
        with pytest.raises(ValueError, match=message):
            check_adapter(Llama(NARROW, adapter), QUANT)


# --- trained scales and shifts --------------------------------------------------------------------

SCALES = AdapterConfig("iec", rank=2, alpha=4.0, scales=8)


@pytest.mark.long
def test_scales_move_the_weight_and_start_at_none() -> None:
    model = Llama(NARROW, SCALES)
    base = random_base(NARROW, QUANT)
    fresh = model.init_adapters(jax.random.key(0))
    plain = Llama(NARROW).apply({"params": {}, "base": base}, TOKENS)
    found = model.apply({"params": fresh, "base": base}, TOKENS)
    np.testing.assert_allclose(found, plain, atol=1e-5)  # type: ignore[arg-type]

    def value(params: Any) -> jax.Array:
        return (model.apply({"params": params, "base": base}, TOKENS) ** 2).sum()  # type: ignore[operator]

    moved = jax.grad(value)(fresh)["layers"]["mlp"]["down_proj"]
    for name in ("block_scale", "block_shift"):
        assert moved[name].shape == (2, NARROW.hidden_size, NARROW.intermediate_size // 8)
        # One entry beside a difference quotient.
        place = tuple(int(i) for i in np.unravel_index(np.abs(moved[name]).argmax(), (2, 40, 5)))

        def shifted(step: float, name: str = name, place: Any = place) -> float:
            own = fresh["layers"]["mlp"]["down_proj"]
            own = {**own, name: own[name].at[place].add(step)}
            mlp = {**fresh["layers"]["mlp"], "down_proj": own}
            return float(value({"layers": {**fresh["layers"], "mlp": mlp}}))

        quotient = (shifted(0.05) - shifted(-0.05)) / 0.1
        assert quotient == pytest.approx(float(moved[name][place]), rel=2e-2)


def test_scales_are_exported_with_the_base(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", NARROW, QUANT, SCALES)
    found = load_run(run)
    wanted = logits(found)
    merged = load_run(written(tmp_path / "merged", "merged", run, dtype="float32"))
    np.testing.assert_allclose(logits(merged), wanted, atol=1e-4)
    folder = written(tmp_path / "dequantized", "dequantized", run, dtype="float32")
    base, llama = hf.load_base(folder, None)
    model = Llama(llama, AdapterConfig("lora", rank=2, alpha=4.0))
    pair = hf.load_adapter(folder / "adapter", model)
    again = model.apply({"params": pair, "base": base}, TOKENS)
    np.testing.assert_allclose(np.asarray(again), wanted, atol=1e-4)
    with pytest.raises(ValueError, match=r"kind = 'adapter': adapter\.scales changed the base"):
        written(tmp_path / "adapter", "adapter", run)


def test_scales_of_other_blocks_are_refused() -> None:
    base = random_base(NARROW, QUANT)
    for scales, quant, message in (
        (10, QUANT, r"adapter\.scales: 4 blocks in a row, but the base has 5 of 8 weights"),
        (8, QuantConfig(format="none"), r"adapter\.scales: the base is not quantized"),
    ):
        model = Llama(NARROW, AdapterConfig("lora", rank=2, scales=scales))
        base = random_base(NARROW, quant)
        with pytest.raises(ValueError, match=message):
            model.apply({"params": random_adapters(model), "base": base}, TOKENS)


def test_updates_are_stored_bit_for_bit(tmp_path: Path) -> None:
    model = Llama(NARROW, AdapterConfig("qalora", rank=2, scales=8, qalora=QaloraOptions(8)))
    variables = {"params": random_adapters(model), "base": random_base(NARROW, QUANT)}
    merged = absorbed_base(model, variables, "float16")
    save_base(tmp_path / "base", merged, NARROW, QUANT)
    again, _ = read_base(tmp_path / "base")
    jax.tree.map(np.testing.assert_array_equal, again, merged)
    weight = again["layers"]["self_attn"]["q_proj"]["weight"]
    assert weight.scale_update.dtype == weight.shift_update.dtype == jnp.float16
    alone = Llama(NARROW).apply({"params": {}, "base": merged}, TOKENS)
    np.testing.assert_allclose(alone, model.apply(variables, TOKENS), atol=5e-3)  # type: ignore[arg-type]
