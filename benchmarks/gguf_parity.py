"""A GGUF file here, in transformers and in llama.cpp: logits, tokens, greedy text.

    pip install xllamacpp
    python benchmarks/gguf_parity.py FILE.gguf --folder FOLDER --text TEXT_FILE

FOLDER is the same model, converted for transformers (e.g. `irqlora export --kind merged`, or by
other means). Without it the logits are not compared. Prints a Markdown table.

Greedy text is compared token by token: our model reads the prompt and llama.cpp's answer, and
its most likely next token is compared at every place. So one difference does not hide what follows.
llama.cpp rounds activations to 8 bits for products with quantized weights, so it differs itself.
"""

import argparse
import json
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from timing import table

from irqlora_jax.files.gguf import read_gguf
from irqlora_jax.files.gguf_tokenizer import SPLITS, make_tokenizer
from irqlora_jax.generate.decode import generate
from irqlora_jax.runs.load import load_run

PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "How do I boil an egg?",
    "What is 17 + 25?",
    "Name three primary colors.",
    "Who wrote Romeo and Juliet?",
    "Explain photosynthesis in one sentence.",
    "Give me a recipe for pancakes.",
    "What is the largest planet?",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "List the days of the week.",
    "What does a compiler do?",
    "Tell me a short story about a fox.",
    "How many legs does a spider have?",
    "What is the boiling point of water in Fahrenheit?",
    "Write a Python function that adds two numbers.",
    "What year did the Second World War end?",
    "How can I sleep better?",
    "Describe the color red to somebody who cannot see.",
)
TEXTS = (
    "The year 1984 isn't far. x=12, 3.14159 ½² 1e-05 100000",
    "  two  spaces\n\n\ttab and\r\nlines   \n",
    "don't I'LL we've 'tis naïve café 東京 🙂 Здравствуйте",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|> a < b && c |= d; $x + `y` ~ ^",
)


class LlamaCpp:
    """A file in llama.cpp, asked by HTTP on this machine."""

    def __init__(self, file: Path, port: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.port = str(file), port
        params.n_ctx, params.n_parallel, params.warmup = 1024, 1, False
        self.server = xllamacpp.Server(params)

    def ask(self, path: str, **content: Any) -> Any:
        data = json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.server.listening_address}{path}", data, headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def tokens(self, text: str) -> list[int]:
        return self.ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def answer(self, prompt: list[int], count: int) -> list[int]:
        settings = {"temperature": 0, "return_tokens": True, "cache_prompt": False}
        return self.ask("/completion", prompt=prompt, n_predict=count, **settings)["tokens"]


def write_tiny(file: Path, fields: dict[str, Any]) -> None:
    """A tiny random model with the tokenizer of these fields, for llama.cpp."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(4096)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    kinds = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
    kinds[list] = writer.add_array
    for key, value in fields.items():
        if key.startswith("tokenizer."):
            kinds[type(value)](key, value)
    square, vector = np.zeros((32, 32), np.float32), np.ones(32, np.float32)
    count = len(fields["tokenizer.ggml.tokens"])
    writer.add_tensor("token_embd.weight", np.zeros((count, 32), np.float32))
    writer.add_tensor("output_norm.weight", vector)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", square)
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def compare_tokens(file: Path, port: int, texts: list[str]) -> str:
    """Texts with the same tokens, and their number of tokens."""
    tokenizer, theirs = make_tokenizer(read_gguf(file)), LlamaCpp(file, port)
    found = [(tokenizer(text, verbose=False)["input_ids"], theirs.tokens(text)) for text in texts]
    same = sum(ours == other for ours, other in found)
    return f"{same} of {len(texts)} texts, {sum(len(ours) for ours, _ in found)} tokens"


def compare_logits(run: Any, folder: Path, texts: list[str]) -> dict[str, str]:
    """The largest differences of a logit: ours, transformers in float32 and in float64.

    The third one says how much of the first is rounding. (In float64, transformers still computes
    its norms and angles in float32.)
    """
    import torch
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    single, double = (load(folder, dtype=dtype) for dtype in (torch.float32, torch.float64))
    logits: dict[str, list[np.ndarray]] = {"ours": [], "float32": [], "float64": []}
    for text in texts:
        tokens = run.tokenizer(text, verbose=False)["input_ids"][:128]
        with torch.no_grad():
            for name, model in (("float32", single), ("float64", double)):
                logits[name].append(model(torch.tensor([tokens])).logits.numpy()[0])
        ours = run.model.apply(run.variables, jnp.asarray([tokens], jnp.int32))
        logits["ours"].append(np.asarray(ours)[0])
    found = {name: np.concatenate(rows).astype(np.float64) for name, rows in logits.items()}
    pairs = (("ours", "float32"), ("ours", "float64"), ("float32", "float64"))
    rows = {
        f"largest difference of a logit, {a} and {b}": f"{np.abs(found[a] - found[b]).max():.1e}"
        for a, b in pairs
    }
    return rows | {"largest logit": f"{np.abs(found['float64']).max():.1f}"}


def compare_answers(run: Any, file: Path, port: int, count: int) -> dict[str, str]:
    """How often both models choose the same token, and how many answers are the same."""
    theirs = LlamaCpp(file, port)
    turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    texts = run.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    prompts = run.tokenizer(texts, add_special_tokens=False)["input_ids"]
    answers = [theirs.answer(prompt, count) for prompt in prompts]
    forward = jax.jit(lambda variables, x: run.model.apply(variables, x).argmax(-1))
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    same = total = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        row = np.zeros((1, width), np.int32)
        row[0, : len(prompt) + len(answer)] = [*prompt, *answer]
        best = np.asarray(forward(run.variables, row))[0]
        same += int((best[len(prompt) - 1 :][: len(answer)] == answer).sum())
        total += len(answer)
    ours = generate(
        run.model, run.variables, prompts, count, eos_token_ids=run.model.config.eos_token_ids
    )
    pairs = list(zip(ours, answers, strict=True))
    alike = [
        next((i for i, (a, b) in enumerate(zip(*p, strict=False)) if a != b), None) for p in pairs
    ]
    whole = sum(place is None for place in alike)
    begun = [min(map(len, p)) if i is None else i for i, p in zip(alike, pairs, strict=True)]
    return {
        "same token after the same text": f"{same} of {total} ({100 * same / total:.1f} %)",
        "answers that agree to the end": f"{whole} of {len(pairs)}",
        "tokens before the first difference": f"median {np.median(begun):g} of {count}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=64, help="length of an answer")
    parser.add_argument("--port", type=int, default=18080, help="first of the ports for llama.cpp")
    args = parser.parse_args()
    texts = [*TEXTS, *PROMPTS]
    if args.text is not None:
        text = args.text.read_text(encoding="utf-8")[:200_000]
        texts += [text[i : i + 2000] for i in range(0, len(text), 2000)]
    fields = dict(read_gguf(args.file).fields)
    rows = {"tokens, the file's own rule": compare_tokens(args.file, args.port, texts)}
    if fields["tokenizer.ggml.model"] == "gpt2":
        with tempfile.TemporaryDirectory() as folder:
            for place, pre in enumerate(SPLITS, 1):
                tiny = Path(folder) / f"{pre}.gguf"
                write_tiny(tiny, fields | {"tokenizer.ggml.pre": pre})
                rows[f"tokens, rule {pre}"] = compare_tokens(tiny, args.port + place, texts)
    run = load_run(args.file)
    if args.folder is not None:
        rows |= compare_logits(run, args.folder, texts[:24])
    rows |= compare_answers(run, args.file, args.port + 9, args.tokens)
    print(table(("what", args.file.name), list(rows.items())))


if __name__ == "__main__":
    main()
