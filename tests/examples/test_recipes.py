"""Every recipe, at full size, from shapes alone: it loads, its step builds, it fits its mesh."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from irqlora_jax.base.mesh import check_mesh
from irqlora_jax.base.storage import abstract_base
from irqlora_jax.config import Config
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.runs.state import init_state, make_optimizer
from irqlora_jax.sharding import MeshConfig, make_mesh
from irqlora_jax.train.step import train_step
from tests.architectures import MODELS

pytestmark = pytest.mark.usefixtures("optimizer_promotion")

CONFIGS = Path(__file__).parents[2] / "configs"


PARAMETERS = {"7b": 6.74e9, "13b": 13.02e9, "30b": 32.53e9, "65b": 65.29e9, "llama3": 8.03e9}
PARAMETERS |= {"mistral": 7.24e9, "qwen2.5": 7.62e9}
LARGE = ("13b", "30b", "llama3.1")
RECIPES = {
    "alpaca-7b": ("7b", "13b"),
    "alpaca-65b": ("30b", "65b"),
    "flan-v2-7b": ("7b", "13b"),
    "flan-v2-65b": ("30b", "65b"),
    "llama3-8b": ("llama3", "llama3.1"),
    "qlora-alpaca-7b": ("7b",),
    "gptq-alpaca-7b": ("7b",),
    "qalora-alpaca-7b": ("7b",),
    "guanaco-7b": ("7b", "65b"),
    "dpo-hh-7b": ("7b",),
    "mistral-7b": ("mistral",),
    "qwen2.5-7b": ("qwen2.5",),
}


def test_the_architectures_have_the_published_sizes() -> None:
    for name, count in PARAMETERS.items():
        config = MODELS[name]
        linears = sum(out * into for out, into in config.linear_shapes.values())
        norms = 2 * config.hidden_size
        total = config.num_hidden_layers * (linears + norms)
        total += (2 * config.vocab_size + 1) * config.hidden_size
        assert abs(total / count - 1) < 2e-3, name


@pytest.mark.parametrize(
    ("recipe", "size"),
    [
        pytest.param(recipe, size, marks=[pytest.mark.long] if size in LARGE else [])
        for recipe, sizes in RECIPES.items()
        for size in sizes
    ],
)
def test_the_step_of_every_recipe_builds_at_full_size(recipe: str, size: str) -> None:
    config, architecture = Config.load(CONFIGS / f"{recipe}.yaml"), MODELS[size]
    settings = config.train
    model = Llama(
        architecture,
        adapter=config.adapter,
        compute_dtype=settings.compute_dtype or "bfloat16",
        remat=settings.remat,
    )
    optimizer = make_optimizer(settings)
    state = jax.eval_shape(lambda: init_state(model, optimizer, config.seed))
    length = config.data.source_length + config.data.target_length
    preference = config.data.format == "preference"
    shape = (settings.batch_size * (2 if preference else 1), length)
    batch = {
        "tokens": jax.ShapeDtypeStruct(shape, jnp.int32),
        "targets": jax.ShapeDtypeStruct(shape, jnp.bool_),
    }
    how: Any = {"model": model, "optimizer": optimizer, "config": settings}
    step = functools.partial(train_step, **how, preference=preference)
    new, metrics = jax.eval_shape(step, state, abstract_base(architecture, config.quant), batch)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shapes(new) == shapes(state)
    assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32
    # The paper's adapter: rank 64 on every linear layer. QA-LoRA's A has a column for each group.
    group = config.adapter.qalora.group if config.adapter.method == "qalora" else 1
    linears = sum(out + into // group for out, into in architecture.linear_shapes.values())
    pairs = architecture.num_hidden_layers * 64 * linears
    scalars = architecture.num_hidden_layers * 14 * (config.adapter.method == "iec")
    assert sum(leaf.size for leaf in jax.tree.leaves(new.adapters)) == pairs + scalars
    mesh = make_mesh(MeshConfig(fsdp=8), settings.batch_size // settings.accumulation)
    check_mesh(mesh, architecture, config.quant)


def test_every_recipe_is_covered_and_names_its_source() -> None:
    offline = {"quickstart", "stories260k"}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(RECIPES) | offline
    for recipe in RECIPES:
        head = (CONFIGS / f"{recipe}.yaml").read_text().split("\n\nmodel:")[0]
        assert re.search(r"table \d|arXiv", head, re.IGNORECASE), recipe


def test_the_papers_settings() -> None:
    """IR-QLoRA, appendix B.4: what differs between models and data sets."""
    small, large = (Config.load(CONFIGS / f"alpaca-{size}.yaml") for size in ("7b", "65b"))
    assert (small.train.learning_rate, small.adapter.dropout) == (2e-4, 0.1)
    assert (large.train.learning_rate, large.adapter.dropout) == (1e-4, 0.05)
    for name, steps in (("alpaca-7b", 10_000), ("flan-v2-7b", 20_000), ("flan-v2-65b", 20_000)):
        config = Config.load(CONFIGS / f"{name}.yaml")
        assert config.train.steps == steps and config.train.schedule == "constant"
        assert (config.train.batch_size, config.train.clip_norm) == (16, 0.3)
        assert (config.data.source_length, config.data.target_length) == (384, 128)
        assert config.quant == QuantConfig() and config.adapter.method == "iec"
    qlora = Config.load(CONFIGS / "qlora-alpaca-7b.yaml")
    assert (
        dataclasses.replace(
            qlora,
            output_dir=small.output_dir,
            quant=small.quant,
            adapter=dataclasses.replace(qlora.adapter, method="iec"),
        )
        == small
    )
