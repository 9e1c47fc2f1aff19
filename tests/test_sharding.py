"""Several devices give what one gives, and hold no more than their part."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax import hf
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.base.file import read_base, save_base
from irqlora_jax.base.mesh import check_mesh
from irqlora_jax.config import TrainConfig
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.calibrations.icq import IcqOptions
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.runs.state import init_state, make_optimizer
from irqlora_jax.sharding import (
    LINEAR_NAMES,
    MeshConfig,
    bytes_by_device,
    make_mesh,
    put_batch,
    tree_shardings,
)
from irqlora_jax.train.step import sharded_state, train_step
from tests.architectures import MODELS
from tests.models import WORLD, assert_same, long, random_base, tiny_llama

pytestmark = pytest.mark.usefixtures("optimizer_promotion")

# Everything can be split by 8: heads, outputs, and blocks of 8 inputs.
CONFIG = tiny_llama(
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=8,
    num_key_value_heads=8,
    max_position_embeddings=64,
)
ADAPTER = AdapterConfig(method="iec", rank=8, alpha=16.0, dropout=0.1)
TRAIN = TrainConfig(
    steps=3, batch_size=16, accumulation=2, learning_rate=1e-2, compute_dtype="float32"
)
MESHES = [(8, 1, 1), (2, 2, 2), *long((1, 8, 1), (1, 1, 8), (2, 1, 4))]


def mesh_of(shape: tuple[int, int, int]) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(*shape), TRAIN.batch_size // TRAIN.accumulation)


@functools.cache
def host_base() -> dict:
    """Packed weights as NumPy arrays."""
    quant = QuantConfig(format="nf4", block_size=8, icq=IcqOptions(steps=5))
    return jax.tree.map(np.asarray, random_base(CONFIG, quant, scale=0.02))


def batch(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {
        "tokens": rng.integers(0, 40, (16, 24), dtype=np.int32),
        "targets": rng.random((16, 24)) < 0.7,
    }


@functools.cache
def trained(shape: tuple[int, int, int]) -> tuple[list[float], dict, str]:
    """The losses of three steps, the adapters after them, and the program that every device ran."""
    mesh = mesh_of(shape)
    check_mesh(mesh, CONFIG, QuantConfig(block_size=8))
    model = Llama(CONFIG, adapter=ADAPTER, remat=shape == (2, 2, 2))
    optimizer = make_optimizer(TRAIN)
    with jax.set_mesh(mesh):
        base = jax.device_put(host_base(), tree_shardings(mesh, host_base()))
        state = sharded_state(mesh, lambda: init_state(model, optimizer, 1))
        step = jax.jit(
            functools.partial(train_step, model=model, optimizer=optimizer, config=TRAIN),
            out_shardings=(tree_shardings(mesh, state), None),
            compiler_options={"xla_backend_optimization_level": 0},  # half the time to compile
        )
        program = step.lower(state, base, put_batch(mesh, batch(0))).compile()
        losses = []
        for number in range(TRAIN.steps):
            state, metrics = program(state, base, put_batch(mesh, batch(number)))
            losses.append(float(metrics["loss"]))
    return losses, jax.tree.map(np.asarray, state.adapters), program.as_text()


@pytest.mark.parametrize("shape", MESHES, ids=lambda s: "x".join(map(str, s)))
def test_every_mesh_gives_the_losses_of_one_device(shape: tuple[int, int, int]) -> None:
    losses, adapters, _ = trained(shape)
    expected, expected_adapters, _ = trained((1, 1, 1))
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    assert losses[0] != losses[2]  # it learns, so the comparison is of more than the first step
    for ours, theirs in zip(
        jax.tree.leaves(adapters), jax.tree.leaves(expected_adapters), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", MESHES, ids=lambda s: "x".join(map(str, s)))
def test_packed_weights_are_split(shape: tuple[int, int, int]) -> None:
    mesh = mesh_of(shape)
    base = jax.device_put(host_base(), tree_shardings(mesh, host_base()))
    parts = shape[1] * shape[2]
    weights = [
        linear["weight"]
        for group in ("self_attn", "mlp")
        for linear in base["layers"][group].values()
    ]
    assert all(isinstance(weight, QTensor) for weight in weights)
    for weight in weights:
        for leaf in (weight.packed, weight.scale_codes, weight.shift_codes):
            sizes = set(bytes_by_device(leaf).values())
            assert sizes == {leaf.nbytes // parts}
    # Of the whole base only the small second-level statistics and norms are copied.
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    copied = sum(leaf.nbytes for leaf in jax.tree.leaves(base) if leaf.sharding.is_fully_replicated)
    if parts > 1:
        assert copied < 0.06 * total
        assert set(bytes_by_device(base).values()) == {(total - copied) // parts + copied}


def collected(program: str) -> set[str]:
    """Type and shape of everything that is gathered from several devices."""
    return set(re.findall(r"= (\w+\[[\d,]*\])\S* all-gather\(", program))


def test_fsdp_collects_packed_weights() -> None:
    gathered = collected(trained((1, 8, 1))[2])
    # Packed codes, and no matrix of weights in float.
    assert any(re.fullmatch(r"u8\[1,128,8,4\]", array) for array in gathered)
    for out, into in CONFIG.linear_shapes.values():
        assert not any(re.fullmatch(rf"f32\[(1,)?{out},{into}\]", array) for array in gathered)


def test_tensor_parallelism_collects_no_activations() -> None:
    """Attention and MLP each end in one sum; of activations only rank-sized ones are gathered."""
    gathered = collected(trained((1, 1, 8))[2])
    rows, seq = TRAIN.batch_size // TRAIN.accumulation, batch(0)["tokens"].shape[1]
    for width in (CONFIG.hidden_size, CONFIG.intermediate_size):
        assert f"f32[{rows},{seq},{width}]" not in gathered
    assert f"f32[{rows},{seq},{ADAPTER.rank}]" in gathered  # the pattern finds what there is


def test_adapters_and_optimizer_are_split_too() -> None:
    mesh = mesh_of((1, 2, 4))
    model, optimizer = Llama(CONFIG, adapter=ADAPTER), make_optimizer(TRAIN)
    state = sharded_state(mesh, lambda: init_state(model, optimizer, 1))
    adapters = sum(leaf.nbytes for leaf in jax.tree.leaves(state.adapters))
    for tree, copies in ((state.adapters, 1), (state.opt_state, 2)):
        assert max(bytes_by_device(tree).values()) < 0.4 * copies * adapters
    plain = init_state(model, optimizer, 1)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_no_mesh_changes_nothing() -> None:
    model = Llama(CONFIG)
    variables = {"params": {}, "base": jax.tree.map(jnp.asarray, host_base())}
    tokens = jnp.asarray(batch(0)["tokens"])
    alone = model.apply(variables, tokens)
    mesh = mesh_of((2, 2, 2))
    with jax.set_mesh(mesh):
        base = jax.device_put(host_base(), tree_shardings(mesh, host_base()))
        split = jax.jit(model.apply)({"params": {}, "base": base}, tokens)
        odd = jax.jit(model.apply)({"params": {}, "base": base}, tokens[:3])  # 3 rows stay together
    np.testing.assert_allclose(split, alone, rtol=0, atol=1e-5)
    np.testing.assert_allclose(odd, alone[:3], rtol=0, atol=1e-5)


def test_the_data_axis_takes_the_devices_that_divide_the_rows() -> None:
    assert dict(make_mesh(MeshConfig(), 16).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(MeshConfig(), 6).shape) == {"data": 6, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(MeshConfig(), 1).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(MeshConfig(fsdp=2, tensor=2), 4).shape)["data"] == 2


@pytest.mark.parametrize(
    ("config", "rows", "words"),
    [
        (MeshConfig(data=16), 16, ["16 x 1 x 1 = 16 devices", "there are 8"]),
        (MeshConfig(fsdp=3, tensor=4), 12, ["12 devices", "there are 8"]),
        (MeshConfig(data=8), 12, ["mesh.data x mesh.fsdp = 8", "12 rows", "train.batch_size"]),
        (MeshConfig(fsdp=4), 6, ["mesh.data x mesh.fsdp = 4", "6 rows"]),
    ],
)
def test_meshes_that_do_not_fit_are_refused(
    config: MeshConfig, rows: int, words: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        make_mesh(config, rows)
    for word in words:
        assert word in str(error.value)


LLAMA_7B = MODELS["7b"]


@pytest.mark.parametrize(
    ("shape", "llama", "block_size", "words"),
    [
        ((1, 1, 8), LLAMA_7B, 64, ["mesh.tensor = 8", "172 blocks", "down_proj", "1, 2, 4, 43"]),
        (
            (1, 1, 8),
            dataclasses.replace(LLAMA_7B, num_key_value_heads=4),
            64,
            ["mesh.tensor = 8", "4 key-value heads", "1, 2, 4"],
        ),
        (
            (1, 1, 2),
            dataclasses.replace(LLAMA_7B, intermediate_size=172),
            64,
            ["mesh.tensor = 2", "172 inputs of down_proj", "quant.block_size"],
        ),
        (
            (1, 8, 1),
            dataclasses.replace(LLAMA_7B, intermediate_size=172),
            None,
            ["mesh.tensor x mesh.fsdp = 8", "172 outputs of gate_proj", "1, 2, 4, 43"],
        ),
    ],
)
def test_shapes_that_cannot_be_split_are_refused(
    shape: tuple, llama: LlamaConfig, block_size: int | None, words: list[str]
) -> None:
    quant = QuantConfig(format="none")
    if block_size is not None:
        quant = QuantConfig(block_size=block_size)
    with pytest.raises(ValueError) as error:
        check_mesh(make_mesh(MeshConfig(*shape), 8), llama, quant)
    for word in words:
        assert word in str(error.value)


def test_published_shapes_can_be_split() -> None:
    """LLaMA 7B to 65B over fsdp 8, tensor 4 and 2 x 4; only 7B has an odd number of blocks at 8."""
    for name in ("7b", "13b", "30b", "65b"):
        llama = MODELS[name]
        assert set(llama.linear_shapes) == set(LINEAR_NAMES)
        for shape in ((1, 8, 1), (1, 1, 4), (1, 2, 4)):
            check_mesh(make_mesh(MeshConfig(*shape), 8), llama, QuantConfig())


def test_bases_are_read_onto_the_mesh(tmp_path: Path) -> None:
    folder = WORLD / "base-small"
    quant = QuantConfig(format="nf3", icq=IcqOptions(steps=3))
    mesh = mesh_of((1, 4, 1))
    plain, llama = hf.load_base(folder, quant)
    split, _ = hf.load_base(folder, quant, mesh=mesh)
    save_base(tmp_path / "base.safetensors", split, llama, quant)
    again, _ = read_base(tmp_path / "base.safetensors", mesh)
    for base in (split, again):
        assert_same(base, plain)
        packed = base["layers"]["mlp"]["up_proj"]["weight"].packed
        assert set(bytes_by_device(packed).values()) == {packed.nbytes // 4}
        assert len(bytes_by_device(packed)) == 4
