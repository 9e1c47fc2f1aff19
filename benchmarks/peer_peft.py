"""Hugging Face transformers and PEFT on bitsandbytes' NF4 (double quantization), in bfloat16.

train_step.py starts it. There are two variants. One follows PEFT's documentation
(prepare_model_for_kbit_training: norms, embeddings, head and adapters in float32, autocast, the
paged AdamW of QLoRA). The other has the fastest settings that we know (everything in bfloat16,
fused AdamW). Both use SDPA attention and, if asked, gradient checkpointing of every layer.
"""

from peer import Step, serve, settings

ASKED = settings()

import bitsandbytes as bnb  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training  # noqa: E402
from timing import versions  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def quantized_model() -> LlamaForCausalLM:
    """A random LLaMA whose linear layers are Linear4bit."""
    config = LlamaConfig(
        vocab_size=ASKED["vocab"],
        hidden_size=ASKED["hidden"],
        intermediate_size=ASKED["ffn"],
        num_hidden_layers=ASKED["layers"],
        num_attention_heads=ASKED["heads"],
        num_key_value_heads=ASKED["heads"],
        max_position_embeddings=ASKED["length"],
        attn_implementation="sdpa",
        use_cache=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name in [name for name in LINEARS if hasattr(block, name)]:
                setattr(block, name, quantized(getattr(block, name)))
    torch.set_default_dtype(torch.float32)
    model.is_loaded_in_4bit = True
    return model


def quantized(linear: torch.nn.Linear) -> bnb.nn.Linear4bit:
    """The same layer in NF4 with double quantization. Moving it to the device quantizes it."""
    four = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    four.weight = bnb.nn.Params4bit(
        linear.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
    )
    return four.to(DEVICE)


def training_step(documented: bool) -> tuple[Step, str]:
    """A step, and a text about the trained numbers."""
    model = quantized_model()
    checkpointing = {"use_reentrant": False}
    if documented:
        model = prepare_model_for_kbit_training(model, ASKED["remat"], checkpointing)
    elif ASKED["remat"]:
        model.gradient_checkpointing_enable(checkpointing)
    lora = LoraConfig(
        r=ASKED["rank"],
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=LINEARS,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora, autocast_adapter_dtype=documented)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not documented:
        for parameter in trained:
            parameter.data = parameter.data.to(torch.bfloat16)
    if documented and DEVICE == "cuda":
        optimizer: torch.optim.Optimizer = bnb.optim.PagedAdamW32bit(trained, lr=2e-4)
    else:
        optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, fused=True)
    shape = (ASKED["batch"], ASKED["length"])
    tokens = torch.randint(0, ASKED["vocab"], shape, device=DEVICE)
    model.train()

    def run() -> float:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=documented):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())

    return run, f"{sum(p.numel() for p in trained):,} trained numbers in {trained[0].dtype}"


def main() -> None:
    """Builds both steps and serves them."""
    steps, about = {}, {}
    for name, documented in (("as documented", True), ("fastest settings", False)):
        name = f"PEFT + bitsandbytes, {name}"
        steps[name], about[name] = training_step(documented)
    peak = torch.cuda.max_memory_allocated if DEVICE == "cuda" else lambda: None
    serve(steps, about, versions(), peak)


if __name__ == "__main__":
    main()
