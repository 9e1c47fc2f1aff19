"""Pretrains a base model of factworld in full precision.

    python examples/factworld/pretrain.py --base small    # 5 minutes on one CPU core
    python examples/factworld/pretrain.py --base large    # 6 minutes

Writes a Hugging Face folder, base-small/ or base-large/, and measured figures into bases.json.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import world as factworld
from safetensors.numpy import save
from tqdm import tqdm

from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.llama import Llama

CHUNK = 50  # steps in one jitted call


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Shape and training of one base."""

    hidden_size: int
    intermediate_size: int
    steps: int
    learning_rate: float
    seed: int
    layers: int = 4
    head_dim: int = 32
    batch: int = 128
    warmup: int = 200
    weight_decay: float = 0.01
    clip: float = 1.0


RECIPES = {
    "small": Recipe(64, 192, steps=3500, learning_rate=4e-3, seed=0),
    "large": Recipe(128, 256, steps=2000, learning_rate=3e-3, seed=0),
}


def llama_config(recipe: Recipe, world: factworld.World) -> LlamaConfig:
    """The architecture, from the values of a config.json."""
    heads = recipe.hidden_size // recipe.head_dim
    ids = world.ids
    return LlamaConfig.from_dict(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": len(world.words),
            "hidden_size": recipe.hidden_size,
            "intermediate_size": recipe.intermediate_size,
            "num_hidden_layers": recipe.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": recipe.head_dim,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
            "bos_token_id": ids[factworld.BOS],
            "eos_token_id": ids[factworld.EOS],
            "pad_token_id": ids[factworld.PAD],
        }
    )


def initial_base(key: jax.Array, config: LlamaConfig) -> dict:
    """Random weights. Standard deviations: 0.5 (embeddings), 1 / sqrt(inputs) (linear layers).

    Layers that write into the residual stream are smaller by sqrt(2 layers), so that the stream
    does not grow with depth.
    """
    hidden, ffn, depth = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    queries = config.num_attention_heads * config.head_dim
    values = config.num_key_value_heads * config.head_dim
    keys = iter(jax.random.split(key, 9))

    def normal(shape: tuple[int, ...], deviation: float) -> dict:
        return {"weight": deviation * jax.random.normal(next(keys), shape)}

    def linear(rows: int, columns: int, scale: float = 1.0) -> dict:
        return normal((depth, rows, columns), scale / math.sqrt(columns))

    residual = 1 / math.sqrt(2 * depth)
    return {
        "embed_tokens": normal((config.vocab_size, hidden), 0.5),
        "layers": {
            "self_attn": {
                "q_proj": linear(queries, hidden),
                "k_proj": linear(values, hidden),
                "v_proj": linear(values, hidden),
                "o_proj": linear(hidden, queries, residual),
            },
            "mlp": {
                "gate_proj": linear(ffn, hidden),
                "up_proj": linear(ffn, hidden),
                "down_proj": linear(hidden, ffn, residual),
            },
            "input_layernorm": {"weight": jnp.ones((depth, hidden))},
            "post_attention_layernorm": {"weight": jnp.ones((depth, hidden))},
        },
        "norm": {"weight": jnp.ones(hidden)},
        "lm_head": normal((config.vocab_size, hidden), 1 / math.sqrt(hidden)),
    }


def make_optimizer(recipe: Recipe, steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay to 1 %, and no weight decay of norms."""
    warmup = min(recipe.warmup, steps // 2)
    rate = recipe.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, steps, 0.01 * rate)

    def is_matrix(tree: dict) -> dict:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "norm" not in jax.tree_util.keystr(path), tree
        )

    return optax.chain(
        optax.clip_by_global_norm(recipe.clip),
        optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=recipe.weight_decay, mask=is_matrix),
    )


def multiple_choice(
    model: Llama, base: dict, tokens: np.ndarray, choices: np.ndarray, answer: np.ndarray
) -> dict[str, float]:
    """Accuracy of the best of four choices, and of the best word in the whole vocabulary."""
    last = jax.jit(lambda base, tokens: model.apply({"base": base}, tokens)[:, -1])
    logits = np.concatenate([np.asarray(last(base, part)) for part in np.split(tokens, 8)])
    best = np.argmax(np.take_along_axis(logits, choices, axis=1), axis=1)
    right = choices[np.arange(len(answer)), answer]
    return {
        "multiple_choice": round(float(np.mean(best == answer)), 4),
        "recall": round(float(np.mean(np.argmax(logits, axis=1) == right)), 4),
    }


def measure(model: Llama, base: dict, world: factworld.World) -> dict[str, dict[str, float]]:
    """Scores on 4,096 statements about all entities and on the 4,096 held-out questions."""
    lines = (factworld.data_files(world)["questions.jsonl"]).splitlines()
    rows, ids = [json.loads(line) for line in lines], world.ids
    prompts = [[ids[factworld.BOS]] + [ids[w] for w in row["prompt"].split()] for row in rows]
    choices = [[ids[w] for w in row["choices"]] for row in rows]
    asked = (np.array(prompts, np.int32), np.array(choices), np.array([r["answer"] for r in rows]))
    stated = factworld.statements(world, factworld.QUESTIONS)
    return {
        "statements": multiple_choice(model, base, **stated),
        "held_out_questions": multiple_choice(model, base, *asked),
    }


def pretrain(recipe: Recipe, world: factworld.World) -> tuple[dict, LlamaConfig, float]:
    """Trains on random documents. Returns the base, its configuration and the last loss."""
    config = llama_config(recipe, world)
    model = Llama(config, unroll=recipe.layers)
    pad = config.pad_token_id
    base = initial_base(jax.random.key(recipe.seed), config)
    optimizer = make_optimizer(recipe, recipe.steps)

    def loss_of(base: dict, tokens: jax.Array) -> jax.Array:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        logits = model.apply({"base": base}, inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.mean(losses, where=targets != pad)

    def step(state, tokens: jax.Array):
        base, optimizer_state = state
        loss, gradient = jax.value_and_grad(loss_of)(base, tokens)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, base)
        return (optax.apply_updates(base, updates), optimizer_state), loss

    @partial(jax.jit, donate_argnums=0)
    def run(state, tokens: jax.Array):
        return jax.lax.scan(step, state, tokens)

    state = (base, optimizer.init(base))
    rng = np.random.default_rng([recipe.seed, 2])
    losses = np.zeros(1)
    with tqdm(total=recipe.steps, unit="step", mininterval=5) as bar:
        while bar.n < recipe.steps:
            count = min(CHUNK, recipe.steps - bar.n)
            tokens = factworld.documents(world, rng, count * recipe.batch)
            state, losses = run(state, tokens.reshape(count, recipe.batch, -1))
            bar.set_postfix(loss=f"{float(losses.mean()):.3f}")
            bar.update(count)
    return state[0], config, float(np.mean(losses))


def save_base(folder: Path, base: dict, config: LlamaConfig, world: factworld.World) -> str:
    """Writes a Hugging Face folder. Returns the sha256 of model.safetensors."""
    tensors = {}
    for path, stacked in jax.tree_util.tree_leaves_with_path(base):
        names = [entry.key for entry in path]
        array = np.asarray(stacked, np.float32)
        if names[0] == "layers":
            rest = ".".join(names[1:])
            for layer, part in enumerate(array):
                tensors[f"model.layers.{layer}.{rest}"] = np.ascontiguousarray(part)
        else:
            prefix = "" if names[0] == "lm_head" else "model."
            tensors[prefix + ".".join(names)] = array
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids[0],
        "pad_token_id": config.pad_token_id,
        "do_sample": False,
    }
    described = {"torch_dtype": "float32", **config.to_dict()}
    files = {"config.json": described, "generation_config.json": generation}
    factworld.write_files(folder, factworld.tokenizer_files(world))
    factworld.write_files(folder, {n: json.dumps(c, indent=1) + "\n" for n, c in files.items()})
    weights = save(tensors, metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(weights)
    return hashlib.sha256(weights).hexdigest()


def main() -> None:
    """Trains, measures and saves one base."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", choices=RECIPES, default="small", help="which recipe")
    parser.add_argument(
        "--seed", type=int, help="seed of weights and documents (default: the recipe's)"
    )
    parser.add_argument("--steps", type=int, help="number of steps (default: the recipe's)")
    parser.add_argument("--output", type=Path, help="folder to write (default: base-NAME here)")
    args = parser.parse_args()
    # One core gives one order of sums: the weights must not depend on the number of cores.
    # jax reads this variable when it makes the first array.
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ.setdefault("XLA_FLAGS", flags)

    chosen = {name: getattr(args, name) for name in ("seed", "steps")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    recipe = dataclasses.replace(RECIPES[args.base], **chosen)
    world = factworld.make_world()
    start = time.process_time()
    base, config, loss = pretrain(recipe, world)
    seconds = round(time.process_time() - start)
    figures = measure(Llama(config), base, world)
    folder = args.output or factworld.FOLDER / f"base-{args.base}"
    digest = save_base(folder, base, config, world)
    linear = sum(
        leaf.size for leaf in jax.tree.leaves([base["layers"]["self_attn"], base["layers"]["mlp"]])
    )
    record = {
        "recipe": dataclasses.asdict(recipe),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(base)),
        "linear_parameters": linear,
        "bits_per_linear_parameter": round(5 * world.values.size / linear, 3),
        "loss": round(loss, 3),
        **figures,
        "cpu_seconds": seconds,
        "sha256": digest,
    }
    print(json.dumps(record, indent=1))
    if args.output is None:
        listing = factworld.FOLDER / "bases.json"
        bases = json.loads(listing.read_text()) if listing.exists() else {}
        bases[args.base] = record
        listing.write_text(json.dumps(dict(sorted(bases.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
