"""Evaluation compared with a plain forward pass over the same padded rows.

    python benchmarks/evaluate.py [--size cpu] [--subjects 1] [--questions 24]

Tokens a second of `questions`, `mmlu` and lm-eval's interface (with the extra `eval`). Times
include reading files, tokenizing, and reading results. The plain pass computes the logits of
exactly the rows that the evaluation computes, with their padding; "hidden" stops before the logits.
Each evaluation must have at least 0.9 of the plain pass's speed; exit code 1 otherwise. `mmlu` runs
in two ways: each prompt from its start, and with the common start of a subject's prompts computed
only once, which is the default. Both count the tokens of whole prompts.

Weights and words are random. Prompts are as long as 5-shot MMLU prompts with LLaMA's tokenizer.
"""

import argparse
import csv
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from timing import compare, machine, table, verdict, versions
from train_step import SHIFTED, add_size, fill_size, llama, random_base

from irqlora_jax.evaluate import Question, choice_scores, choices, mmlu, score_questions
from irqlora_jax.evaluate.mmlu import letter_tokens, subject_questions
from irqlora_jax.evaluate.mmlu_files import read_subject
from irqlora_jax.model.llama import Llama

LEAST = 0.9
WORDS = 3000


def word_tokenizer() -> Any:
    """A tokenizer with one token for each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *"ABCD", "Answer:", *(f"{letter}." for letter in "ABCD")]
    names += [f"w{i}" for i in range(WORDS)]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def words(rng: np.random.Generator, count: int) -> str:
    """`count` random words."""
    return " ".join(f"w{i}" for i in rng.integers(0, WORDS, count))


def lengths(rng: np.random.Generator, count: int, mean: float) -> list[int]:
    """Random lengths, skewed as the lengths of questions are."""
    return [int(n) + 8 for n in rng.gamma(2.0, (mean - 8) / 2, count)]


def write_mmlu(folder: Path, subjects: int, questions: int) -> None:
    """Writes MMLU files: 9 tokens for each choice, and on average 60 for each question."""
    rng = np.random.default_rng(0)
    for split, count in (("dev", 5), ("test", questions)):
        (folder / split).mkdir()
        for subject in range(subjects):
            rows = [
                [words(rng, n), *(words(rng, 9) for _ in range(4)), "ABCD"[rng.integers(4)]]
                for n in lengths(rng, count, 60)
            ]
            path = folder / split / f"subject{subject}_{split}.csv"
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows)


def recorded(call: Callable[[], Any]) -> list[np.ndarray]:
    """The padded rows that an evaluation computes."""
    rows: list[np.ndarray] = []
    score = choices._score

    def record(model: Any, variables: Any, cache: Any, tokens: np.ndarray, *rest: Any) -> Any:
        rows.append(tokens)
        return score(model, variables, cache, tokens, *rest)

    choices._score = record  # type: ignore[assignment]
    try:
        call()
    finally:
        choices._score = score
    return rows


@functools.partial(jax.jit, static_argnums=0)
def forward(model: Llama, variables: Any, tokens: Any) -> Any:
    """The plain pass: computes logits and keeps one number of each row."""
    return model.apply(variables, tokens).max(axis=(1, 2))


@functools.partial(jax.jit, static_argnums=0)
def hidden(model: Llama, variables: Any, tokens: Any) -> Any:
    """As `forward`, without the product with the output matrix."""
    return model.apply(variables, tokens, method="features").max(axis=(1, 2))


def requests(count: int) -> Iterator[SimpleNamespace]:
    """Requests of lm-eval: four endings for each context."""
    rng = np.random.default_rng(1)
    for n in lengths(rng, count, 60):
        context = words(rng, n)
        for _ in range(4):
            yield SimpleNamespace(args=(context, f" {words(rng, int(rng.integers(1, 12)))}"))


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_size(parser)
    parser.set_defaults(hidden=256, layers=4, ffn=768, heads=4, length=2048, batch=8)
    parser.add_argument("--subjects", type=int, default=1)
    parser.add_argument("--questions", type=int, default=24, help="questions of each subject")
    parser.add_argument("--repeats", type=int, default=5)
    args = fill_size(parser.parse_args())
    print(f"{machine()}; {versions(('lm_eval',))}", flush=True)
    print(f"hidden {args.hidden}, {args.layers} layers, {args.dtype}, nf4; {args.batch} rows")
    model = Llama(llama(args), compute_dtype=args.dtype)
    variables = {"params": {}, "base": random_base(args, SHIFTED)}
    tokenizer = word_tokenizer()
    folder = Path(tempfile.mkdtemp())
    write_mmlu(folder, args.subjects, args.questions)
    fast = True

    def ask(share: bool) -> list[np.ndarray]:
        """Scores MMLU as `mmlu` does, without its bookkeeping."""
        scores = []
        for subject in range(args.subjects):
            read = read_subject(folder, f"subject{subject}", "test", 5, None)
            asked, *_ = subject_questions(model, tokenizer, read, letter_tokens(tokenizer), 5)
            scores += choice_scores(model, variables, asked, args.batch, share=share)[0]
        return scores

    rng = np.random.default_rng(2)
    draw = lambda n: tuple(int(i) for i in rng.integers(20, WORDS, n))  # noqa: E731
    count = 2 * args.questions
    asked = [
        Question("", draw(n), tuple(draw(int(rng.integers(2, 8))) for _ in range(4)), 0)
        for n in lengths(rng, count, 100)
    ]
    evaluations: dict[str, Callable[[], Any]] = {
        "questions": lambda: score_questions(model, variables, asked, args.batch),
        "mmlu, each prompt from its start": lambda: ask(share=False),
    }
    try:
        from irqlora_jax.evaluate.harness_model import HarnessLM
    except ImportError:
        print("lm-eval is not installed")
    else:
        lm = list(requests(count))
        evaluations["lm-eval"] = lambda: HarnessLM(
            model, variables, tokenizer, args.batch
        ).loglikelihood(lm)
    table_rows = []
    for name, evaluate in evaluations.items():
        rows = recorded(evaluate)
        tokens = sum(row.size for row in rows)
        calls: dict[str, Callable[[], Any]] = {
            label: lambda call=call, rows=rows: [call(model, variables, row) for row in rows]
            for label, call in (("plain", forward), ("hidden", hidden))
        }
        calls[name] = evaluate
        if name.startswith("mmlu"):
            shared = functools.partial(mmlu, model, variables, tokenizer, folder)
            calls["mmlu"] = lambda shared=shared: shared(batch_size=args.batch)
        times = compare(calls, args.repeats)
        for called, time in times.items():
            ratio = time.speedups(times["plain"])
            table_rows.append((f"{called} ({len(rows)} batches)", time.rate(tokens), ratio))
            fast &= called == "hidden" or time.speedup(times["plain"]) >= LEAST
        if "mmlu" in times:
            gain = times["mmlu"].speedups(times[name])
            apart, together = (np.stack(ask(share)) for share in (False, True))
            error = np.abs(apart - together).max()
            same = (apart.argmax(1) == together.argmax(1)).mean()
            note = f"mmlu, common starts computed once: {gain} times as fast; "
            note += f"log-probabilities within {error:.1e}, {same:.1%} of the letters the same"
    print(table(("evaluation", "tokens/s", "to the plain pass"), table_rows))
    print(note)
    print(f"each must be at least {LEAST} of the plain pass: {verdict(fast)}")
    return 0 if fast else 1


if __name__ == "__main__":
    sys.exit(main())
