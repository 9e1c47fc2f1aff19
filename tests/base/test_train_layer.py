"""Training of a quantized decoder layer: against ApiQ's released code, and by its promises."""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from irqlora_jax.adapters import lora
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.base import fit_layer
from irqlora_jax.base.fit_layer import Data, Job, StoredLinear
from irqlora_jax.base.train_layer import TrainedLayer, train_layer
from irqlora_jax.model.attention import rope_rotations
from irqlora_jax.model.layer import Context, Layer, Settings
from irqlora_jax.model.tree import insert, linear_path
from irqlora_jax.quant.config import QuantConfig, QuantRule
from irqlora_jax.quant.encode import quantize
from irqlora_jax.quant.trained import ApiqOptions, BlockOptions, round_matrix
from irqlora_jax.sharding import LINEAR_NAMES
from tests.models import assert_same, random_base, tiny_llama

pytestmark = pytest.mark.usefixtures("optimizer_promotion")

# --------------------------------------------------------------------- ApiQ's released code

GOLDEN = Path(__file__).parents[1] / "golden"
RELEASED = json.loads((GOLDEN / "apiq_bw.json").read_text())
SETTINGS = Settings(
    tiny_llama(
        hidden_size=RELEASED["hidden"],
        intermediate_size=RELEASED["ffn"],
        num_attention_heads=RELEASED["heads"],
        num_key_value_heads=RELEASED["kv_heads"],
        head_dim=16,
        rms_norm_eps=RELEASED["rms_norm_eps"],
        rope_theta=RELEASED["rope_theta"],
    ),
    AdapterConfig(method="lora", rank=RELEASED["lora_r"], alpha=float(RELEASED["lora_alpha"])),
    "xla",
    None,
    deterministic=True,
)


def own_tensors(tensors: dict[str, np.ndarray], block: int) -> dict[str, np.ndarray]:
    prefix = f"block{block}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def released_layer(own: dict[str, np.ndarray], quant: QuantConfig) -> tuple[Any, Any]:
    """The float weights of a block, and its linear layers with the pairs at the start."""
    weights: dict[str, Any] = {}
    linears = {}
    for name in ("input_layernorm", "post_attention_layernorm"):
        weights[name] = {"weight": jnp.asarray(own[f"{name}.weight"])}
    for name in LINEAR_NAMES:
        weight = jnp.asarray(own[f"{name}.weight"])
        insert(weights, (*linear_path(name), "weight"), weight)
        pair = {leaf: jnp.asarray(own[f"{name}.{leaf}"]) for leaf in ("lora_A", "lora_B")}
        linears[name] = StoredLinear(quantize(weight, quant), pair)
    return weights, linears


@pytest.mark.parametrize("run", RELEASED["runs"])
def test_steps_of_the_released_code(run: str) -> None:
    """Losses, gradients and results of 20 steps for each of two blocks, without storage."""
    settings = RELEASED["runs"][run]
    options = ApiqOptions(epochs=RELEASED["epochs"], same_inputs=settings["aug_loss"])
    symmetric = settings["symmetric"]
    quant = QuantConfig(f"int{settings['bits']}", calibration="none", symmetric=symmetric)
    whole = tuple((name, symmetric) for name in LINEAR_NAMES)
    job = Job(SETTINGS, options, whole, fit_layer.WHOLE)
    init = load_file(GOLDEN / "apiq_bw_init.safetensors")
    full = found = init["inputs"]
    final, acts = (GOLDEN / f"apiq_bw_{run}_{part}.safetensors" for part in ("final", "acts"))
    for block in range(RELEASED["layers"]):
        weights, linears = released_layer(own_tensors(init, block), quant)
        data = Data(found, full, options.batch)
        wanted = data.wanted(job, weights)
        leaves, curve = fit_layer.fit(job, weights, linears, LINEAR_NAMES, data, wanted, run)
        np.testing.assert_allclose(curve[:, 0], settings["losses"][block], rtol=1e-5)
        np.testing.assert_allclose(curve[:, 1], settings["grad_norms"][block], rtol=1e-5)
        base = fit_layer.dense_weights(weights, linears)
        for name in LINEAR_NAMES:
            numbers = options.numbers(leaves[name], linears[name].weight, symmetric)
            dense = round_matrix(numbers, linears[name].weight)
            insert(base, (*linear_path(name), "weight"), dense)
        pairs = {
            name: {leaf: own[leaf] for leaf in ("lora_A", "lora_B")} for name, own in leaves.items()
        }
        full = np.concatenate([batch[0][0] for batch in wanted])
        found = np.asarray(fit_layer.layer_outputs(job, base, pairs, jnp.asarray(found))[0])
        if not final.exists():
            continue
        released = own_tensors(load_file(final), block)
        theirs = {"down": "lowbound_factor", "up": "upbound_factor"}
        for name, own in leaves.items():
            for leaf in ("down", "up", "lora_A", "lora_B"):
                expected = released[f"{name}.{theirs.get(leaf, leaf)}"].reshape(own[leaf].shape)
                np.testing.assert_allclose(own[leaf], expected, atol=1e-5)
        outputs = own_tensors(load_file(acts), block)
        np.testing.assert_allclose(full, outputs["fp_out"], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found, outputs["quant_out"], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------- what it promises

SQUARE = tiny_llama(hidden_size=48, intermediate_size=48, head_dim=12, num_key_value_heads=4)
"""All linear layers have the same shape, with one block of 48 weights to a row."""
LORA = AdapterConfig(method="lora", rank=4, alpha=8.0)
FAST = BlockOptions(epochs=12, batch=8, weight_lr=3e-3, scale_lr=3e-3, pair_lr=1e-2, pair_decay=0.0)


class Given(NamedTuple):
    """The arguments of `train_layer` between `layer` and `options`."""

    weights: dict[str, Any]
    start: dict[str, StoredLinear]
    inputs: np.ndarray
    full_inputs: np.ndarray


def settings_with(adapter: AdapterConfig | None) -> Settings:
    return Settings(SQUARE, adapter, "xla", None, deterministic=True)


def random_layer(quant: QuantConfig, adapter: AdapterConfig | None = LORA) -> Given:
    """A layer, its plain start, and inputs that a quantized prefix has moved a little."""
    base = random_base(SQUARE, scale=0.3)
    weights = jax.tree.map(lambda x: x[0], base["layers"])
    start, draw = {}, np.random.default_rng(0)
    for i, name in enumerate(LINEAR_NAMES):
        weight = weights[linear_path(name)[0]][name]["weight"]
        config = quant.for_matrix(f"layers.3.{'.'.join(linear_path(name))}")
        packed = None if config.format == "none" else quantize(weight, config)
        pair = {} if adapter is None else lora.init(jax.random.key(i), 48, 48, adapter.rank)
        start[name] = StoredLinear(packed, pair)
    full = draw.normal(size=(8, 12, 48)).astype(np.float32)
    moved = full + 0.1 * draw.normal(size=full.shape).astype(np.float32)
    return Given(weights, start, moved, full)


def run(quant: QuantConfig, given: Given, options: Any, adapter: Any = LORA) -> TrainedLayer:
    return train_layer(settings_with(adapter), quant, 3, *given, options)


def output_error(given: Given, linears: dict[str, StoredLinear], adapter: Any = LORA) -> float:
    """The loss from whole outputs of the layer, whose packed weights are in the model."""
    outputs = []
    positions = jnp.broadcast_to(jnp.arange(12)[None], (8, 12))
    context = Context(rope_rotations(SQUARE, positions), None, None)
    quantized: dict[str, Any] = dict(given.weights)
    for group in ("self_attn", "mlp"):
        quantized[group] = dict(given.weights[group])
    pairs: dict[str, Any] = {}
    for name, (weight, pair) in linears.items():
        if weight is not None:
            quantized[linear_path(name)[0]][name] = {"weight": weight}
        if pair:
            insert(pairs, linear_path(name), pair)
    for weights, adapters, x in ((quantized, pairs, given[2]), (given.weights, {}, given[3])):
        layer = Layer(settings_with(adapter))
        rest = (jnp.asarray(x), None), (jnp.int32(0), adapters), context
        outputs.append(np.asarray(layer.apply({"base": weights}, *rest)[0][0], np.float64))
    return float(np.mean((outputs[0] - outputs[1]) ** 2))


@pytest.mark.long
@pytest.mark.parametrize("format", ["nf3", "fp4", "int2"])
def test_block_training_gains_with_every_kind_of_format(format: str) -> None:
    quant = QuantConfig(format=format, calibration="joint")
    given = random_layer(quant)
    found = run(quant, given, FAST)
    assert found.kept == () and found.loss_after < 0.6 * found.loss_before
    assert found.loss_before == pytest.approx(output_error(given, given.start), rel=1e-4)
    assert found.loss_after == pytest.approx(output_error(given, found.linears), rel=1e-4)
    # The batch has all rows, so the first step sees the start, and storing loses little.
    assert found.losses[0] == pytest.approx(found.loss_before, rel=1e-4)
    assert found.loss_after == pytest.approx(found.losses[-1], rel=0.1)
    assert jax.tree.structure(found.linears) == jax.tree.structure(given.start)


@pytest.mark.long
@pytest.mark.parametrize(("format", "calibration"), [("nf3", "joint"), ("nf2", "none")])
def test_apiq_gains_with_and_without_shifts(format: str, calibration: str) -> None:
    """Its ranges do not start at those of the calibration, whose result is the one to beat."""
    quant = QuantConfig(format=format, calibration=calibration)
    given = random_layer(quant)
    found = run(quant, given, ApiqOptions(epochs=12, batch=8, clip_lr=0.1, pair_lr=1e-2))
    assert found.kept == () and found.loss_after < 0.8 * found.loss_before
    assert found.loss_after == pytest.approx(output_error(given, found.linears), rel=1e-4)
    assert jax.tree.structure(found.linears) == jax.tree.structure(given.start)


@pytest.mark.long
def test_outliers_keep_their_places_and_values() -> None:
    """They are chosen by sensitivity, and training would choose others by size."""
    quant = QuantConfig("nf2", calibration="joint", outliers=0.02, outlier_rule="sensitivity")
    given, start = random_layer(dataclasses.replace(quant, outlier_rule="magnitude")), {}
    gram = jnp.diag(jnp.linspace(0.1, 9.0, 48))
    for name, (_, pair) in given.start.items():
        weight = given.weights[linear_path(name)[0]][name]["weight"]
        start[name] = StoredLinear(quantize(weight, quant, gram=gram), pair)
        by_size = given.start[name].weight
        assert (by_size.outlier_columns != start[name].weight.outlier_columns).any()
    given = given._replace(start=start)
    found = run(quant, given, FAST)
    assert found.kept == () and found.loss_after < 0.6 * found.loss_before
    assert found.loss_after == pytest.approx(output_error(given, found.linears), rel=1e-4)
    for name, (packed, _) in found.linears.items():
        assert_same(packed.outliers, start[name].weight.outliers)
        assert (packed.packed != start[name].weight.packed).any()
    assert jax.tree.structure(found.linears) == jax.tree.structure(start)


@pytest.mark.parametrize("options", [ApiqOptions(), BlockOptions()])
def test_outliers_have_no_part_in_the_ranges(options: Any) -> None:
    """An outlier 100 times as large changes nothing but itself, and has no gradient."""
    quant = QuantConfig("nf3", calibration="none", outliers=1 / 48)
    weight = jax.random.normal(jax.random.key(0), (48, 48)).at[:, 7].set(9.0)
    job = Job(settings_with(LORA), options, (("q_proj", False),), fit_layer.WHOLE)
    found = []
    for large in (weight, weight.at[:, 7].set(900.0)):
        linear = StoredLinear(quantize(large, quant), {})
        leaves = fit_layer._start(job, linear, large)

        def dense(leaves: Any, linear: Any = linear) -> jax.Array:
            return round_matrix(options.numbers(leaves, linear.weight, False), linear.weight)

        gradient = jax.grad(lambda leaves, dense=dense: (dense(leaves) ** 2).sum())(leaves)
        found.append((dense(leaves), gradient))
        np.testing.assert_array_equal(found[-1][0][:, 7], large[:, 7])
        np.testing.assert_array_equal(gradient["weight"][:, 7], 0)
    rest = np.arange(48) != 7
    np.testing.assert_array_equal(found[0][0][:, rest], found[1][0][:, rest])
    assert_same(found[0][1], found[1][1])


@pytest.mark.long
def test_linear_layers_one_after_the_other() -> None:
    """ApiQ-lw. 8 rows in batches of 3 are 3 steps; there are 4 groups."""
    quant = QuantConfig(format="int2", calibration="none")
    given = random_layer(quant)
    options = ApiqOptions(epochs=3, batch=3, clip_lr=0.1, pair_lr=1e-2, match="linear")
    found = run(quant, given, options)
    assert found.losses.shape == found.norms.shape == (4 * 3 * 3,)
    assert found.loss_after < found.loss_before
    for steps in found.losses.reshape(4, 3, 3):
        assert steps[-1].mean() < steps[0].mean()


def test_equal_arguments_give_equal_bytes() -> None:
    quant = QuantConfig(format="nf2", calibration="joint")
    given = random_layer(quant)
    one, two = run(quant, given, FAST), run(quant, given, FAST)
    assert_same(one.linears, two.linears)
    np.testing.assert_array_equal(one.losses, two.losses)
    assert (given.start["q_proj"].pair["lora_B"] == 0).all()  # steps reuse no array of the start


def test_a_result_that_is_worse_than_its_start_is_dropped() -> None:
    quant = QuantConfig(format="nf2", calibration="joint")
    given = random_layer(quant)
    found = run(quant, given, BlockOptions(epochs=1, batch=8, weight_lr=9.0, scale_lr=9.0))
    assert set(found.kept) == set(LINEAR_NAMES) and found.loss_after == found.loss_before
    assert_same(found.linears, given.start)


def test_pairs_alone_leave_the_packed_weights() -> None:
    """Pairs and inputs in bfloat16 keep their type."""
    quant = QuantConfig(format="nf2", calibration="joint")
    given = random_layer(quant)
    start = {
        name: StoredLinear(weight, jax.tree.map(lambda x: x.astype(jnp.bfloat16), pair))
        for name, (weight, pair) in given.start.items()
    }
    inputs = [x.astype(jnp.bfloat16) for x in given[2:]]
    given = Given(given.weights, start, *inputs)
    found = run(quant, given, dataclasses.replace(FAST, weight_lr=0.0, scale_lr=0.0))
    assert found.kept == () and found.loss_after < 0.9 * found.loss_before
    for name, (weight, pair) in found.linears.items():
        assert_same(weight, start[name].weight)
        assert {leaf.dtype for leaf in pair.values()} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.long
def test_float_matrices_and_no_adapter() -> None:
    """A rule keeps one matrix as it is. Without pairs there is nothing of it to train."""
    rules = (QuantRule("*.down_proj", format="none"),)
    quant = QuantConfig(format="int2", calibration="joint", rules=rules)
    given = random_layer(quant, None)
    found = run(quant, given, FAST, None)
    assert found.linears["down_proj"] == StoredLinear(None, {})
    assert found.loss_after < 0.8 * found.loss_before
    assert found.loss_after == pytest.approx(output_error(given, found.linears, None), rel=1e-4)


def test_the_first_step_moves_everything_by_its_learning_rate() -> None:
    """Adam's first step is the sign of the gradient. Weights beyond the last level have none."""
    quant = QuantConfig(format="nf2", calibration="joint")
    given = random_layer(quant)
    options = dataclasses.replace(FAST, epochs=1, scale_lr=2e-3)
    symmetric = tuple((name, False) for name in LINEAR_NAMES)
    job = Job(settings_with(LORA), options, symmetric, fit_layer.WHOLE)
    data = Data(given.inputs, given.full_inputs, 8)
    wanted = data.wanted(job, given.weights)
    named = given.weights, given.start, LINEAR_NAMES, data, wanted, "layers.3"
    leaves, _ = fit_layer.fit(job, *named)
    for name, own in leaves.items():
        weight = given.weights[linear_path(name)[0]][name]["weight"]
        old = options.start(weight, given.start[name].weight) | given.start[name].pair
        for leaf, rate in (("weight", 3e-3), ("scale", 2e-3), ("shift", 2e-3), ("lora_B", 1e-2)):
            moves = np.abs(np.asarray(own[leaf]) - np.asarray(old[leaf]))
            moved = moves > 0
            assert moved.mean() > (0.5 if leaf == "shift" else 0.8)
            np.testing.assert_allclose(moves[moved], rate, rtol=0.02)
        np.testing.assert_array_equal(own["lora_A"], old["lora_A"])  # lora_B is 0


def test_steps_that_give_no_numbers_name_the_layer() -> None:
    quant = QuantConfig(format="nf2", calibration="joint")
    given = random_layer(quant)
    options = BlockOptions(epochs=2, batch=8, weight_lr=1e38, scale_lr=1e38, pair_lr=1e38)
    message = r"layers\.3: loss and gradient norm of step 1 = .*lower learning rates"
    with pytest.raises(ValueError, match=message):
        run(quant, given, options)
    broken = given.inputs.copy()
    broken[2, 3, 4] = np.nan
    with pytest.raises(ValueError, match=r"layers\.3: loss before training = .*nan"):
        run(quant, given._replace(inputs=broken), options)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"inputs": np.zeros((8, 11, 48), np.float32)}, FAST, r"layers.3: inputs = \(8, 11, 48\)"),
        ({"start": {}}, FAST, r"layers.3: start = \[\]: expected q_proj"),
        (
            {},
            BlockOptions(weight_lr=0.0, scale_lr=0.0, pair_lr=0.0),
            "layers.3: BlockOptions = .*a learning rate above 0",
        ),
    ],
)
def test_input_that_cannot_be_is_refused(change, options, message: str) -> None:
    quant = QuantConfig(format="nf2", calibration="joint")
    given = random_layer(quant)._replace(**change)
    with pytest.raises(ValueError, match=message):
        # Without the type checks of these tests, which users do not have.
        inspect.unwrap(train_layer)(settings_with(LORA), quant, 3, *given, options)


def test_a_start_of_another_format_is_refused() -> None:
    given = random_layer(QuantConfig(format="nf2", calibration="joint"))
    for quant, message in (
        (QuantConfig(format="nf3"), "layers.3.q_proj: format = 'nf2': expected nf3"),
        (QuantConfig(format="nf2", block_size=32), "block_size = 64: expected 32"),
    ):
        with pytest.raises(ValueError, match=message):
            run(quant, given, FAST)
    with pytest.raises(ValueError, match=r"q_proj: pair = \['lora_A', 'lora_B'\]: expected no"):
        run(QuantConfig(format="nf2"), given, FAST, None)
