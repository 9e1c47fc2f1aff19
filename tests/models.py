"""Folders of runs for tests: a random base, an adapter that does something, a tokenizer."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.base.file import save_base
from irqlora_jax.config import Config, TrainConfig
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.runs.checkpoints import Checkpoints
from irqlora_jax.runs.state import init_state, make_optimizer

# No width divides a block of 64, no rank a width, and the heads share keys and values.
LLAMA = LlamaConfig(
    vocab_size=43,
    hidden_size=40,
    intermediate_size=172,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=14,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
)
# Linear layers of one shape, to compile once.
NARROW = LlamaConfig.from_dict(
    LLAMA.to_dict() | {"intermediate_size": 40, "num_key_value_heads": 4, "head_dim": 10}
)
PLAIN = QuantConfig(format="nf4", calibration="none")
IEC = AdapterConfig(method="iec", rank=6, alpha=9.0)
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def random_base(llama: LlamaConfig, quant: QuantConfig, dtype: Any = np.float32) -> dict[str, Any]:
    """Random weights, the linear layers quantized."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(Llama(llama).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))

    def random(path: Any, like: Any) -> jax.Array:
        mean = 1.0 if "norm" in str(path[-2]) else 0.0
        return jnp.asarray(rng.normal(mean, 0.1, like.shape).astype(dtype))

    base = jax.tree_util.tree_map_with_path(random, shapes["base"])
    if quant.format != "none":
        for group in ("self_attn", "mlp"):
            for leaf in base["layers"][group].values():
                layers = [quantize(w, quant) for w in leaf["weight"]]
                leaf["weight"] = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    return base


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Whole words, with a chat template."""
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>"])}
    words |= {f"word{i}": i for i in range(3, size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
    )


def write_run(
    folder: Path,
    llama: LlamaConfig = LLAMA,
    quant: QuantConfig = PLAIN,
    adapter: AdapterConfig | None = IEC,
    *,
    base: dict[str, Any] | None = None,
    tokenizer: Any = None,
    model: str = "somewhere/base",
    steps: tuple[int, ...] = (3,),
) -> Path:
    """A finished run, or with adapter None a folder of `irqlora quantize`."""
    folder.mkdir(parents=True)
    base = random_base(llama, quant) if base is None else base
    save_base(folder / "base.safetensors", base, llama, quant, model)
    (tokenizer or word_tokenizer(llama.vocab_size)).save_pretrained(folder / "tokenizer")
    if adapter is None:
        return folder
    settings = TrainConfig(compute_dtype="float32", steps=max(steps))
    config = Config(model, str(folder), quant=quant, adapter=adapter, train=settings)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    optimizer = make_optimizer(settings)
    like = jax.eval_shape(lambda: init_state(Llama(llama, adapter), optimizer, 0))
    with Checkpoints(folder) as checkpoints:
        for step in steps:
            rng = np.random.default_rng(step)
            state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
            noise = lambda x, rng=rng: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype)  # noqa: E731
            adapters = jax.tree.map(noise, like.adapters)
            checkpoints.save(step, dataclasses.replace(state, adapters=adapters))
    return folder


def assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
