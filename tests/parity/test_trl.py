"""DPO here and in TRL: losses, rewards and gradients of the adapters."""

import collections
import json
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax import hf
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.config import TrainConfig
from irqlora_jax.data import load_pairs
from irqlora_jax.data.batches import pad
from irqlora_jax.data.config import DataConfig
from irqlora_jax.data.preference import rows_of
from irqlora_jax.model.dpo import REWARDS, DpoOptions, pair_sums
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import LAYERS
from irqlora_jax.train.step import preference_sums
from tests.models import byte_tokenizer, tiny_llama

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.filterwarnings("ignore")  # of other packages

# TRL's "sigmoid" has no label smoothing. Its "aot_unpaired" of a single pair is that loss.
CASES = {
    "sigmoid": DpoOptions(beta=0.3),
    "sigmoid_norm": DpoOptions(loss="sigmoid_norm", beta=1.5),
    "robust": DpoOptions(loss="robust", beta=0.3, label_smoothing=0.2),
    "ipo": DpoOptions(loss="ipo", beta=0.7),
    "aot_unpaired": DpoOptions(beta=0.3, label_smoothing=0.2),
}


def trainer_for(name: str, options: DpoOptions) -> Any:
    """What TRL's loss reads of a trainer, without a model."""
    same = lambda x: x  # noqa: E731
    return types.SimpleNamespace(
        model=types.SimpleNamespace(training=True),
        accelerator=types.SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        loss_types=[name],
        loss_weights=[1.0],
        beta=options.beta,
        label_smoothing=options.label_smoothing,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        precompute_ref_logps=True,
        use_weighting=False,
        aux_loss_enabled=False,
        _total_train_tokens=0,
        _tp_size=1,
        _metrics={"train": collections.defaultdict(list)},
    )


@pytest.mark.parametrize("name", CASES)
def test_losses_rewards_and_gradients_are_those_of_trl(name: str) -> None:
    options, rng = CASES[name], np.random.default_rng(0)
    pairs = 1 if name == "aot_unpaired" else 5
    mask = np.arange(9)[None, :] < rng.integers(2, 10, (2 * pairs, 1))
    mask[:, 0] = False
    tokens = rng.normal(-2, 1, (2, 2 * pairs, 8)).astype(np.float32) * mask[:, 1:]
    given = torch.tensor(tokens[0], requires_grad=True)
    zeros = torch.zeros(2 * pairs, 8)
    outputs = types.SimpleNamespace(
        log_probs=given, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )
    chosen, rejected = torch.tensor(tokens[1].sum(1)).chunk(2)
    inputs = {
        "input_ids": torch.zeros(2 * pairs, 9).long(),
        "attention_mask": torch.ones(2 * pairs, 9).long(),
        "completion_mask": torch.tensor(mask).long(),
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    trainer = trainer_for(name, options)
    loss = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    loss.backward()

    def ours(own: Any) -> Any:
        # TRL has all chosen answers first.
        by_pair = lambda x: x.reshape(2, pairs).T.reshape(-1)  # noqa: E731
        nll, frozen = by_pair(-own.sum(1)), by_pair(-jnp.asarray(tokens[1]).sum(1))
        sums = pair_sums(nll, frozen, by_pair(jnp.asarray(mask.sum(1), jnp.float32)), options)
        return sums["loss"] / sums["pairs"], sums

    (found, sums), gradient = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(tokens[0]))
    assert float(found) == pytest.approx(float(loss), rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(
        np.asarray(gradient) * mask[:, 1:], given.grad.numpy() * mask[:, 1:], atol=1e-5, rtol=1e-5
    )
    assert np.abs(gradient).max() > 1e-3
    for reward in REWARDS:
        expected = trainer._metrics["train"][reward][0]
        assert float(sums[reward] / pairs) == pytest.approx(expected, rel=1e-5, abs=1e-6)


ROWS = [
    {"prompt": "Name a color.", "chosen": " A warm red.", "rejected": " Twelve."},
    {"prompt": "Two and two?", "chosen": " Four", "rejected": " It is five or six."},
]


@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_a_step_of_trl_has_the_same_loss_and_gradients_here(tmp_path: Path, name: str) -> None:
    """TRL's own trainer, from text to the gradients of PEFT's LoRA. The reference is the base."""
    torch.manual_seed(0)
    tokenizer, options = byte_tokenizer(), CASES[name]
    tokenizer.pad_token = tokenizer.eos_token
    llama = tiny_llama(vocab_size=len(tokenizer), hidden_size=32, head_dim=8)
    config = transformers.LlamaConfig(**llama.to_dict(), initializer_range=0.1)
    theirs = transformers.LlamaForCausalLM(config)
    theirs.save_pretrained(tmp_path / "base")
    settings = {"beta": options.beta, "loss_type": [name], "per_device_train_batch_size": 2}
    settings |= {"report_to": [], "bf16": False, "use_cpu": True, "gradient_checkpointing": False}
    trainer = trl.DPOTrainer(
        theirs,
        args=trl.DPOConfig(output_dir=str(tmp_path / "out"), **settings),
        train_dataset=datasets.Dataset.from_list([dict(row) for row in ROWS]),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
        ),
    )
    for key, value in trainer.model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(value, std=0.1)
    trainer.model.save_pretrained(tmp_path / "adapter")
    items = [trainer.train_dataset[i] for i in range(len(ROWS))]
    batch = trainer.data_collator(items)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()

    (tmp_path / "pairs.json").write_text(json.dumps(ROWS))
    pairs = load_pairs(str(tmp_path / "pairs.json"), DataConfig(format="preference"), tokenizer)
    for side, one in enumerate(("chosen", "rejected")):
        for pair, item in zip(pairs, items, strict=True):
            own = [tokenizer.bos_token_id, *item["prompt_ids"], *item[f"{one}_ids"]]
            assert pair[side].tokens.tolist() == own
            assert pair[side].targets.sum() == len(item[f"{one}_ids"])
    # A byte-level tokenizer of TRL writes no bos, ours does: leave it out.
    rows = [type(row)(row.tokens[1:], row.targets[1:]) for row in rows_of(pairs)]
    adapter = AdapterConfig(
        method="lora", rank=4, alpha=6.0, targets=("q_proj", "down_proj"), dropout=0.0
    )
    frozen, llama = hf.load_base(tmp_path / "base", None)
    model = Llama(llama, adapter)
    adapters = hf.load_adapter(tmp_path / "adapter", model)
    given = {key: jnp.asarray(value) for key, value in pad(rows, len(rows), 8).items()}

    def ours(adapters: Any) -> Any:
        sums = preference_sums(
            adapters,
            frozen,
            given,
            jax.random.key(0),
            model=model,
            reference=(model.clone(adapter=None), {}),
            config=TrainConfig(dpo=options),
        )
        return sums["loss"] / 2, sums

    (found, sums), gradients = jax.value_and_grad(ours, has_aux=True)(adapters)
    assert float(found) == pytest.approx(float(loss), rel=1e-5)
    for reward in REWARDS:
        expected = trainer._metrics["train"][reward][0]
        assert float(sums[reward] / 2) == pytest.approx(expected, abs=1e-5)
    largest = 0.0
    for key, value in trainer.model.named_parameters():
        if "lora_" not in key:
            continue
        parts = key.split(".")
        layer, leaf = int(parts[parts.index("layers") + 1]), parts[-3]
        group, linear = parts[-5], parts[-4]
        own = np.asarray(gradients[LAYERS][group][linear][leaf][layer])
        np.testing.assert_allclose(own, value.grad.numpy(), atol=1e-5)
        largest = max(largest, float(np.abs(own).max()))
    assert largest > 1e-3
