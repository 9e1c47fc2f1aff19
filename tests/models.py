"""Tiny models for tests, of any shape: weights, tokenizers, folders of Hugging Face, runs."""

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.base.file import save_base
from irqlora_jax.config import Config, TrainConfig
from irqlora_jax.model.config import LlamaConfig, RopeScaling
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.runs.checkpoints import Checkpoints
from irqlora_jax.runs.state import init_state, make_optimizer
from irqlora_jax.sharding import LINEAR_NAMES

# ----------------------------------------------------------------------------------------- choices


def long(*values: Any) -> list[Any]:
    """Parameters of a test that only `pytest -m ""` and `pytest -m long` use."""
    return [pytest.param(value, marks=pytest.mark.long) for value in values]


# ------------------------------------------------------------------------------------------ places

ROOT = Path(__file__).parents[1]
WORLD = ROOT / "examples" / "factworld"
SHARED = ROOT.parent / "shared" / "data"
STORIES = SHARED / "stories260K"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"no folder {STORIES}")

# ----------------------------------------------------------------------------------- architectures


def tiny_llama(**changes: Any) -> LlamaConfig:
    """Two layers; heads share keys and values, and together are wider than the model."""
    fields = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return LlamaConfig(**(fields | changes))


TINY = tiny_llama()
LLAMA = tiny_llama(
    vocab_size=43,
    hidden_size=40,
    intermediate_size=172,
    head_dim=14,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
)
"""No width is a multiple of a block of 64 or of a rank, and most linear layers differ in shape."""
NARROW = dataclasses.replace(LLAMA, intermediate_size=40, num_key_value_heads=4, head_dim=10)
"""All linear layers have the same shape, which is compiled once."""
RELATIVES = {
    "LLaMA with biases": tiny_llama(attention_bias=True),
    "Qwen2": tiny_llama(
        model_type="qwen2",
        tie_word_embeddings=True,
        sliding_window=6,
        sliding_layers=(1,),
    ),
    "Mistral": tiny_llama(model_type="mistral", sliding_window=7, sliding_layers=(0, 1)),
    "Qwen3": tiny_llama(
        model_type="qwen3",
        num_hidden_layers=3,
        attention_bias=True,
        rms_norm_eps=1e-3,
        sliding_window=5,
        sliding_layers=(0, 2),
    ),
    "SmolLM3": tiny_llama(
        model_type="smollm3",
        num_hidden_layers=4,
        attention_bias=True,
        tie_word_embeddings=True,
        sliding_window=6,
        sliding_layers=(1, 3),
        unrotated_layers=(1, 2),
        rope_theta=50.0,
        rope_scaling=RopeScaling("yarn", 4.0, original_max_position_embeddings=16),
    ),
}
"""Models that differ from LLaMA: all kinds of weights and layers."""
FLOAT = QuantConfig(format="none")
PLAIN = QuantConfig(format="nf4", calibration="none")
IEC = AdapterConfig(method="iec", rank=6, alpha=9.0)

# ----------------------------------------------------------------------------------------- weights


def random_like(shapes: Any, scale: float = 0.1, seed: int = 0, dtype: Any = np.float32) -> Any:
    """Random arrays of these shapes, as after some training: none is 0, norms are around 1."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, like: Any) -> jax.Array:
        mean = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(rng.normal(mean, scale, like.shape).astype(dtype))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def quantize_base(
    base: dict[str, Any], quant: QuantConfig, names: Iterable[str] = LINEAR_NAMES
) -> dict[str, Any]:
    """The base with these linear layers quantized, one after the other."""
    layers = dict(base["layers"])
    for group in ("self_attn", "mlp"):
        layers[group] = dict(layers[group])
        for name in layers[group].keys() & set(names):
            parts = [quantize(weight, quant) for weight in layers[group][name]["weight"]]
            packed = jax.tree.map(lambda *x: jnp.stack(x), *parts)
            layers[group][name] = layers[group][name] | {"weight": packed}
    return base | {"layers": layers}


def random_base(
    llama: LlamaConfig, quant: QuantConfig = FLOAT, dtype: Any = np.float32, scale: float = 0.1
) -> dict[str, Any]:
    """Random weights, the linear layers quantized."""
    shapes = jax.eval_shape(Llama(llama).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    base = random_like(shapes["base"], scale, dtype=dtype)
    return base if quant.format == "none" else quantize_base(base, quant)


def random_adapters(model: Llama, scale: float = 0.1) -> dict[str, Any]:
    """Adapters as after some training."""
    return random_like(jax.eval_shape(model.init_adapters, jax.random.key(0)), scale, seed=1)


def random_variables(model: Llama, scale: float = 0.1) -> dict[str, Any]:
    """What `model.apply` takes. With a scale of 0.2 a tiny model prefers some tokens clearly."""
    base = random_base(model.config, scale=scale)
    return {"params": random_adapters(model, scale) if model.adapter else {}, "base": base}


def stack_tensors(tensors: dict[str, Any], llama: LlamaConfig) -> dict[str, Any]:
    """The tree of weights that have the names of Hugging Face, written out by hand."""

    def stack(name: str) -> dict[str, jax.Array]:
        layers = range(llama.num_hidden_layers)
        found = {}
        for leaf in ("weight", "bias"):
            if f"model.layers.0.{name}.{leaf}" in tensors:
                parts = [np.asarray(tensors[f"model.layers.{i}.{name}.{leaf}"]) for i in layers]
                found[leaf] = jnp.asarray(np.stack(parts))
        return found

    def single(name: str) -> dict[str, jax.Array]:
        return {"weight": jnp.asarray(np.asarray(tensors[f"{name}.weight"]))}

    norms = ("input_layernorm", "post_attention_layernorm")
    layers: dict[str, Any] = {name: stack(name) for name in norms}
    names = LINEAR_NAMES[:4]
    names += ("q_norm", "k_norm") if llama.model_type == "qwen3" else ()
    layers["self_attn"] = {name: stack(f"self_attn.{name}") for name in names}
    layers["mlp"] = {name: stack(f"mlp.{name}") for name in LINEAR_NAMES[4:]}
    base = {"embed_tokens": single("model.embed_tokens"), "norm": single("model.norm")}
    if not llama.tie_word_embeddings:
        base["lm_head"] = single("lm_head")
    return base | {"layers": layers}


def assert_same(left: Any, right: Any) -> None:
    """Bit by bit, types and structure included."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# -------------------------------------------------------------------------------------- tokenizers

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def word_tokenizer(size: int, **names: Any) -> PreTrainedTokenizerFast:
    """Whole words, "w3" to f"w{size - 1}", with a chat template. `names` are further settings."""
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>"])}
    words |= {f"w{i}": i for i in range(3, size)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE} | names
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **settings)


def byte_tokenizer(
    merges: Iterable[tuple[str, str]] = (), template: str | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE: "<s>", "</s>", a token a byte, and those of the merges."""
    merges, symbols = list(merges), sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *symbols, *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=template
    )


# ------------------------------------------------------------------------- folders of Hugging Face


def random_tensors(llama: LlamaConfig = LLAMA, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random weights with the names of Hugging Face, which are written out here once more."""
    rng = np.random.default_rng(0)
    table, vector = (llama.vocab_size, llama.hidden_size), (llama.hidden_size,)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": table, "model.norm": vector}
    if not llama.tie_word_embeddings:
        shapes["lm_head"] = table
    for i in range(llama.num_hidden_layers):
        shapes[f"model.layers.{i}.input_layernorm"] = vector
        shapes[f"model.layers.{i}.post_attention_layernorm"] = vector
        if llama.model_type == "qwen3":
            for norm in ("q_norm", "k_norm"):
                shapes[f"model.layers.{i}.self_attn.{norm}"] = (llama.head_dim,)
        for name, shape in llama.linear_shapes.items():
            block = "self_attn" if name in LINEAR_NAMES[:4] else "mlp"
            shapes[f"model.layers.{i}.{block}.{name}"] = shape
            if name in llama.biased:
                shapes[f"model.layers.{i}.{block}.{name}.bias"] = shape[:1]
    draw = lambda shape: rng.normal(0, 0.05, shape).astype(dtype)  # noqa: E731
    names = {name: name if name.endswith("bias") else f"{name}.weight" for name in shapes}
    return {names[name]: draw(shape) for name, shape in shapes.items()}


def write_config(folder: Path, llama: LlamaConfig = LLAMA, **more: Any) -> Path:
    """A folder with a config.json alone, or that file in a folder that is there."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(llama.to_dict() | more))
    return folder


def write_model(
    folder: Path,
    llama: LlamaConfig = LLAMA,
    tensors: dict[str, np.ndarray] | None = None,
    shards: int = 1,
    tokenizer: Any = None,
    **more: Any,
) -> Path:
    """A model in one file or in several. It has a tokenizer only if one is given."""
    write_config(folder, llama, **more)
    tensors = random_tensors(llama) if tensors is None else tensors
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    size = math.ceil(len(names) / shards)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i * size : (i + 1) * size]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


# --------------------------------------------------------------------------------------- GGUF files

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """The name of a tensor in a GGUF file. Names that no folder has stay as they are."""
    if name.startswith("blk."):
        return name
    bare = name.removesuffix(".weight")
    if bare.startswith("model.layers."):
        layer, bare = bare.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{GGUF_NAMES[bare]}.weight"
    return f"{GGUF_NAMES.get(bare, bare)}.weight"


def gguf_tokens(tokenizer: PreTrainedTokenizerFast, pre: str = "gpt-2") -> dict[str, Any]:
    """The metadata of a byte-level tokenizer (`byte_tokenizer`)."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(core["model"]["vocab"], key=core["model"]["vocab"].get)
    special = {each["content"] for each in core["added_tokens"]}
    fields = {"model": "gpt2", "pre": pre, "tokens": tokens}
    fields["token_type"] = [3 if token in special else 1 for token in tokens]
    fields["merges"] = [" ".join(pair) for pair in core["model"]["merges"]]
    fields |= {"bos_token_id": 0, "eos_token_id": 1}
    found = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    return found | {"tokenizer.chat_template": tokenizer.chat_template}


def write_gguf(
    file: Path,
    llama: LlamaConfig,
    tensors: dict[str, np.ndarray] | None = None,
    *,
    types: Callable[[str], str] = lambda name: "F32",
    **changes: Any,
) -> dict[str, np.ndarray]:
    """A GGUF file like one that llama.cpp's script writes from a Hugging Face folder.

    Args:
        file: path of the file.
        llama: the architecture.
        tensors: as `random_tensors` makes them.
        types: the type of a matrix by its name in the file. Types that the library cannot write
            get random blocks.
        changes: metadata by key with "__" for a dot, None for a key that is not there.

    Returns:
        What the tensors of the file stand for, with the names of Hugging Face.
    """
    import gguf

    fields: dict[str, Any] = {
        "llama.block_count": llama.num_hidden_layers,
        "llama.context_length": llama.max_position_embeddings,
        "llama.embedding_length": llama.hidden_size,
        "llama.feed_forward_length": llama.intermediate_size,
        "llama.attention.head_count": llama.num_attention_heads,
        "llama.attention.head_count_kv": llama.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": llama.rms_norm_eps,
        "llama.rope.freq_base": llama.rope_theta,
        "llama.rope.dimension_count": llama.head_dim,
        "llama.attention.key_length": llama.head_dim,
    }
    fields |= {key.replace("__", "."): value for key, value in changes.items()}
    writer = gguf.GGUFWriter(file, fields.pop("general.architecture", "llama"))
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
    add |= {float: writer.add_float32, list: writer.add_array}
    for key, value in fields.items():
        if value is not None:
            add[type(value)](key, value)
    heads = {"attn_q": llama.num_attention_heads, "attn_k": llama.num_key_value_heads}
    rng, meant = np.random.default_rng(1), {}
    for name, value in (random_tensors(llama) if tensors is None else tensors).items():
        theirs = gguf_name(name)
        chosen = gguf.GGMLQuantizationType[types(theirs) if value.ndim == 2 else "F32"]
        dtype = {"F32": "float32", "BF16": "bfloat16"}.get(chosen.name, "float16")
        rows = np.arange(len(value))  # by their place in the file
        if (count := heads.get(theirs.split(".")[-2])) is not None:
            # llama.cpp rotates neighbors, so the two halves of a head alternate.
            rows = rows.reshape(count, 2, -1).swapaxes(1, 2).ravel()
        try:
            data = gguf.quantize(value[rows], chosen)
        except NotImplementedError:
            shape = gguf.quant_shape_to_byte_shape(value.shape, chosen)
            data = rng.integers(0, 45, shape, np.uint8)  # every half in it is small
        writer.add_tensor(theirs, data, raw_dtype=chosen)
        meant[name] = np.empty(value.shape, dtype)
        meant[name][rows] = gguf.dequantize(data, chosen).astype(dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


# -------------------------------------------------------------------------------------------- runs


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


def run_settings(model: Path, folder: Path, /, **changes: Any) -> dict[str, Any]:
    """A short run on factworld by its settings; `train__steps=2` changes `train.steps`.

    They go on top of configs/quickstart.yaml (`QUICKSTART`).
    """
    settings = {
        "model": str(model),
        "output_dir": str(folder),
        "quant.calibration": "none",
        "data.train": str(WORLD / "data" / "train.jsonl"),
        "data.eval": str(WORLD / "data" / "eval.jsonl"),
        "data.max_examples": 64,
        "evaluate.questions": None,
        "evaluate.baselines": False,
        "train.batch_size": 4,
        "mesh.data": 1,
        "log.progress": False,
    }
    return settings | {name.replace("__", "."): value for name, value in changes.items()}


def made_once(make_step: Callable[..., Any]) -> Callable[..., Any]:
    """`train.step.make_step` that returns the same compiled step for the same program."""
    made: dict[Any, Any] = {}

    def make(
        mesh: Any, state: Any, *, model: Any, optimizer: Any, config: Any, preference: bool = False
    ) -> Any:
        key = (mesh, preference, *_program(model, config))
        if key not in made:
            how: Any = {"model": model, "optimizer": optimizer, "config": config}
            made[key] = make_step(mesh, state, **how, preference=preference)
        return made[key]

    return make


def _program(model: Llama, config: TrainConfig) -> tuple[Llama, TrainConfig]:
    """The settings without those on which the compiled step does not depend."""
    adapter, counted = model.adapter, config.schedule != "constant"
    if adapter is not None:
        counted |= adapter.chosen.prepare is not None
        start = {"init": "default", "init_from": None, "loftq": None}
        model = model.clone(adapter=_replaced(adapter, **start))
    rest = {"eval_every": 0, "save_every": 0, "keep_checkpoints": 1, "early_stopping": 0}
    return model, _replaced(config, **rest | ({} if counted else {"steps": 1}))


def _replaced(settings: Any, **changes: Any) -> Any:
    """Like `dataclasses.replace`, for a key alone: nothing is checked."""
    new = copy.copy(settings)
    for name, value in changes.items():
        object.__setattr__(new, name, value)
    return new


QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Settings as they are written on the command line."""
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in settings.items()}
    return [f"--{name}={text}" for name, text in texts.items()]
