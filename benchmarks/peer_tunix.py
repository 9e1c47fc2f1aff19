"""google-tunix with qwix: NF4 QLoRA and float LoRA on its Llama3, as `PeftTrainer` trains it.

train_step.py starts it. The step is the one that `PeftTrainer` jits (nnx.value_and_grad with
respect to LoRAParam, and its default loss over full logits). The model is unrolled over the layers.
Remat is RematConfig.DECODER, which recomputes whole decoder layers, as our model does.
"""

import warnings
from collections.abc import Callable
from typing import Any

from peer import Step, serve, settings

ASKED = settings()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import qwix  # noqa: E402
from flax import nnx  # noqa: E402
from timing import versions  # noqa: E402
from tunix.models.llama3.model import Llama3, ModelConfig, RematConfig  # noqa: E402
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput  # noqa: E402
from tunix.sft.utils import build_positions_from_mask, make_causal_attn_mask  # noqa: E402

LINEARS = ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def random_model() -> Llama3:
    """Llama3 with random weights; its own initial weights are 0 in the MLP."""
    config = ModelConfig(
        num_layers=ASKED["layers"],
        vocab_size=ASKED["vocab"],
        embed_dim=ASKED["hidden"],
        hidden_dim=ASKED["ffn"],
        num_heads=ASKED["heads"],
        head_dim=ASKED["hidden"] // ASKED["heads"],
        num_kv_heads=ASKED["heads"],
        rope_theta=10_000,
        norm_eps=1e-6,
        remat_config=RematConfig.DECODER if ASKED["remat"] else RematConfig.NONE,
    )
    model = Llama3(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)

    def random(x: jax.Array) -> jax.Array:
        value = np.ones(x.shape) if x.ndim == 1 else rng.normal(0, 0.02, x.shape)
        return jnp.asarray(value, ASKED["dtype"])

    nnx.update(model, jax.tree.map(random, nnx.state(model, nnx.Param)))
    return model


def trainer_step(weight_qtype: str | None) -> tuple[Step, int]:
    """A jitted step and how many numbers it trains."""
    quantized = {"weight_qtype": weight_qtype, "tile_size": ASKED["block_size"]}
    provider = qwix.LoraProvider(
        module_path=LINEARS,
        rank=ASKED["rank"],
        alpha=16.0,
        **(quantized if weight_qtype else {}),
    )
    model = random_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = qwix.apply_lora_to_model(
            model, provider, rngs=nnx.Rngs(1), **model.get_model_input()
        )
    optimizer = optax.chain(optax.clip_by_global_norm(0.3), optax.adamw(2e-4))
    trainer = PeftTrainer(model, optimizer, TrainingConfig(eval_every_n_steps=10**9))

    def model_input(x: TrainingInput) -> dict[str, Any]:
        return {
            "input_tokens": x.input_tokens,
            "input_mask": x.input_mask,
            "positions": build_positions_from_mask(x.input_mask),
            "attention_mask": make_causal_attn_mask(x.input_mask),
        }

    trainer = trainer.with_gen_model_input_fn(model_input)
    step: Callable[..., Any] = trainer.jit_train_and_eval_step(cache_nnx_graph=True)[0]
    trained = jax.tree.leaves(nnx.state(trainer.model, nnx.LoRAParam))
    shape = (ASKED["batch"], ASKED["length"])
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, ASKED["vocab"], shape), jnp.int32)
    batch = TrainingInput(input_tokens=tokens, input_mask=jnp.ones(shape, bool))

    def run() -> float:
        loss, _, _ = step(batch)
        # The same program updates the optimizer, and it has finished when the adapters are ready.
        jax.block_until_ready(nnx.state(trainer.model, nnx.LoRAParam))
        return float(loss)

    return run, sum(x.size for x in trained)


def main() -> None:
    """Builds both steps and serves them."""
    steps, about = {}, {}
    for name, qtype in (("tunix + qwix NF4 QLoRA", "nf4"), ("tunix LoRA, unquantized", None)):
        steps[name], trained = trainer_step(qtype)
        about[name] = f"{trained:,} trained numbers"
    serve(steps, about, versions())


if __name__ == "__main__":
    main()
