"""Evaluation of a finished run: what `eval.py` calls."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from irqlora_jax.checkpoint import Checkpoints, load_base, write_text
from irqlora_jax.config import Config, parse_flags
from irqlora_jax.data.examples import alpaca_prompt, encode_source
from irqlora_jax.evaluate.perplexity import perplexity
from irqlora_jax.evaluate.questions import load_questions, score_questions
from irqlora_jax.generate import generate
from irqlora_jax.llama import Llama


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """One evaluation of one run."""

    run: str
    """Folder of a run of train.py."""
    task: Literal["factworld", "perplexity", "generate"]
    """"factworld": multiple-choice questions by subject. "perplexity": of a text file.
    "generate": continue a prompt."""
    baseline: bool = False
    """Leave the adapter out: the quantized model before its finetune."""
    questions: str | None = None
    """factworld: file with questions (.jsonl). Null: that of the run."""
    text: str | None = None
    """perplexity: a plain text file."""
    window: int = 0
    """perplexity: tokens of context (0: the longest that the model takes)."""
    prompt: str | None = None
    """generate: the text to continue, or the instruction to follow if the run learned from Alpaca's
    format."""
    max_new_tokens: int = 128
    """generate: tokens to add at most."""
    temperature: float = 0.0
    """generate: 0 takes the likeliest token, larger values vary more."""
    top_k: int | None = None
    """generate: draw among the k likeliest tokens only."""
    top_p: float | None = None
    """generate: draw among the likeliest tokens that make up this probability."""
    seed: int = 0
    """generate: seed of the draws."""


def parse_eval(argv: Sequence[str]) -> EvalConfig:
    """The evaluation on a command line; see `EvalConfig`.

    Raises:
        ValueError: unknown flag, wrong type or value that is not accepted.
    """
    given = ["--baseline=true" if flag == "--baseline" else flag for flag in argv]
    return parse_flags(EvalConfig, given, "eval.py")


def load_run(run: Path, baseline: bool = False) -> tuple[Config, Llama, dict[str, Any], Any]:
    """Configuration, model, variables (newest adapters and base) and tokenizer of a run.

    Raises:
        FileNotFoundError: no run, or no checkpoint in it.
        ValueError: damaged files.
    """
    from irqlora_jax import hf
    from irqlora_jax.train import init_state, make_optimizer

    if not (run / "config.json").is_file():
        raise FileNotFoundError(f"run = '{run}': no config.json there; accepted is a run's folder")
    config = Config.load(run / "config.json")
    base, llama = load_base(run / "base.safetensors")
    adapter = None if baseline else config.adapter
    model = Llama(llama, adapter=adapter, compute_dtype=config.train.compute_dtype)
    tokenizer = hf.load_tokenizer(str(run / "tokenizer"))
    if baseline:
        return config, model, {"params": {}, "base": base}, tokenizer
    with Checkpoints(run) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            raise FileNotFoundError(f"run = '{run}': no checkpoint yet; use --baseline")
        optimizer = make_optimizer(config.train)
        like = jax.eval_shape(lambda: init_state(model, optimizer, config.seed))
        adapters = checkpoints.restore(step, like).adapters
    return config, model, {"params": adapters, "base": base}, tokenizer


def evaluate_run(asked: EvalConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs one task, prints its result and writes it to RUN/eval-TASK[-baseline].json.

    Raises:
        ValueError, OSError: bad input, in one sentence.
    """
    run = Path(asked.run)
    needed = {"perplexity": "text", "generate": "prompt"}.get(asked.task)
    if needed and getattr(asked, needed) is None:
        raise ValueError(f"{needed} = None: the task {asked.task} needs --{needed}")
    config, model, variables, tokenizer = load_run(run, asked.baseline)
    result: dict[str, Any]
    if asked.task == "factworld":
        path = asked.questions or config.evaluate.questions
        if path is None:
            raise ValueError("questions = None: the run has none; accepted is a .jsonl file")
        questions = load_questions(path, tokenizer, config.evaluate.max_questions)
        scores = score_questions(model, variables, questions, 64)
        result = dataclasses.asdict(scores)
        for subject, accuracy in scores.by_subject.items():
            say(f"{subject:<24} {accuracy:7.1%}")
        say(f"{'all':<24} {scores.accuracy:7.1%}")
        if scores.recall is not None:
            say(f"{'recall':<24} {scores.recall:7.1%}")
        if scores.bits_per_fact is not None:
            say(f"{'bits per fact':<24} {scores.bits_per_fact:7.3f}")
    elif asked.task == "perplexity":
        assert asked.text is not None
        file = Path(asked.text)
        if not file.is_file():
            raise FileNotFoundError(f"text = '{file}': no such file")
        window = asked.window or model.config.max_position_embeddings
        text = file.read_text(encoding="utf-8")
        value = perplexity(model, variables, text, tokenizer, window=window)
        result = {"perplexity": value, "window": window, "text": asked.text}
        say(f"perplexity {value:.4f} (windows of {window} tokens)")
    else:
        assert asked.prompt is not None
        alpaca = config.data.format == "alpaca"
        asked_text = alpaca_prompt(asked.prompt) if alpaca else asked.prompt
        prompt = encode_source(tokenizer, [asked_text])[0]
        room = model.config.max_position_embeddings - len(prompt)
        tokens = generate(
            model,
            variables,
            [prompt],
            min(asked.max_new_tokens, room),
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
            key=jax.random.key(asked.seed),
            eos_token_ids=model.config.eos_token_ids,
        )[0]
        text = tokenizer.decode(tokens if alpaca else prompt + tokens, skip_special_tokens=True)
        result = {"prompt": asked.prompt, "text": text}
        say(text)
    name = f"eval-{asked.task}{'-baseline' if asked.baseline else ''}.json"
    write_text(run / name, json.dumps(result, indent=1) + "\n")
    return result
