"""Answers many prompts in batches, and saves every finished batch."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from irqlora_jax.data import batches_by_length, read_rows
from irqlora_jax.evaluate.choices import truncate_prompt
from irqlora_jax.evaluate.results import write_error
from irqlora_jax.files.checksums import check_seal, seal
from irqlora_jax.generate.conversation import Style, decode_stream, encode_turns
from irqlora_jax.generate.decode import generate
from irqlora_jax.messages import progress_bar
from irqlora_jax.runs.load import Run
from irqlora_jax.text import read_text

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of the decoding; see `generate`."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Prompt:
    """An instruction or a text to continue, and the input that belongs to it."""

    text: str
    context: str = ""


def read_prompts(path: str, limit: int | None = None) -> list[Prompt]:
    """Reads prompts from a file.

    A .txt file has one prompt a line; empty lines are skipped. A row of a .jsonl or .json file has
    "prompt", or "instruction" and optionally "input".

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has no prompts or is not UTF-8, or a row has no prompt.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"prompts = '{path}': no such file")
    if file.suffix not in (".txt", ".jsonl", ".json"):
        raise ValueError(f"prompts = '{path}': expected a .txt, .jsonl or .json file")
    if file.suffix == ".txt":
        prompts = [Prompt(line) for line in read_text(file).split("\n") if line.strip()]
    else:
        prompts = []
        for row in read_rows(path, ()):
            name = "prompt" if "prompt" in row.columns else "instruction"
            if name not in row.columns:
                there = ", ".join(row.columns) or "none"
                raise ValueError(
                    f"{row.place} has no column 'prompt' or 'instruction': its columns are {there}"
                )
            prompts.append(Prompt(row.text(name), row.text("input", "")))
    if not prompts:
        raise ValueError(f"{path} has no prompts")
    return prompts[:limit]


def answer_all(
    run: Run,
    style: Style,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    batch_size: int,
    output: Path,
    identity: str,
    progress: bool = False,
) -> dict[str, Any]:
    """Answers all prompts and writes a .jsonl file with one row a prompt, in their order.

    Every finished batch is written to OUTPUT.part at once. The same call resumes from that file.

    Args:
        run: the model.
        style: format of the prompts.
        prompts: from `read_prompts`.
        sampling: settings of the decoding.
        batch_size: prompts of a batch.
        output: the file. A row has index, prompt, output, tokens (number of tokens of the answer)
            and finished (whether the answer ended by itself).
        identity: identifies the model in OUTPUT.part.
        progress: show a progress bar.

    Returns:
        The number of prompts, tokens, finished answers and truncated prompts.

    Raises:
        ValueError: a prompt without tokens.
        OSError: the file cannot be written.
    """
    tokens = [encode_turns(style, run.tokenizer, p.text, context=p.context) for p in prompts]
    fitted, truncated = _fit(run, tokens, sampling.max_new_tokens)
    if truncated:
        logger.info(
            f"{truncated} of {len(prompts)} prompts were cut on the left to fit into the context"
        )
    batches = _batches(run, fitted, sampling.max_new_tokens, batch_size)
    setting = (identity, style, sampling, batch_size, [tuple(row) for row in fitted])
    key = hashlib.sha256(repr(setting).encode()).hexdigest()
    part = output.with_name(output.name + ".part")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        done = _load_part(part, key)
        # Rewrite the file: an interruption may have left an incomplete last line.
        _write_lines(part, [seal(row) for row in ({"key": key}, *done.values())])
        with (
            part.open("a", encoding="utf-8") as file,
            progress_bar("Answers", len(prompts), show=progress) as bar,
        ):
            for number, batch in enumerate(batches):
                if not all(index in done for index in batch):
                    rows = _answer(run, style, prompts, fitted, batch, sampling, number)
                    done |= {row["index"]: row for row in rows}
                    file.write("".join(json.dumps(seal(row)) + "\n" for row in rows))
                    file.flush()
                bar.update(len(batch))
        rows = [done[index] for index in range(len(prompts))]
        _write_lines(part, rows)
        os.replace(part, output)
    except OSError as error:
        raise write_error(output, error) from error
    return {
        "prompts": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "finished": sum(row["finished"] for row in rows),
        "truncated": truncated,
    }


def _fit(
    run: Run, prompts: Sequence[list[int]], max_new_tokens: int
) -> tuple[list[tuple[int, ...]], int]:
    """Truncates prompts to leave room for `max_new_tokens`, or a quarter of the context if less."""
    context = run.model.config.max_position_embeddings
    room = context - max(1, min(max_new_tokens, context // 4))
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index + 1} has no tokens")
    fitted = [truncate_prompt(prompt, room, run.model.config.bos_token_id) for prompt in prompts]
    return fitted, sum(len(prompt) > room for prompt in prompts)


def _batches(
    run: Run, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int
) -> list[list[int]]:
    """Batches prompts of similar length.

    A prompt with too little room for `max_new_tokens` gets its own batch. Else it would shorten
    the answers of the whole batch.
    """
    lengths = [len(prompt) for prompt in prompts]
    free = run.model.config.max_position_embeddings - max_new_tokens
    roomy = [index for index, length in enumerate(lengths) if length <= free]
    groups = batches_by_length([lengths[index] for index in roomy], batch_size)
    tight = [[index] for index, length in enumerate(lengths) if length > free]
    return tight + [[roomy[place] for place in group] for group in groups]


def _answer(
    run: Run,
    style: Style,
    prompts: Sequence[Prompt],
    tokens: Sequence[Sequence[int]],
    batch: list[int],
    sampling: Sampling,
    number: int,
) -> list[dict[str, Any]]:
    room = run.model.config.max_position_embeddings - max(len(tokens[index]) for index in batch)
    new = generate(
        run.model,
        run.variables,
        [tokens[index] for index in batch],
        min(sampling.max_new_tokens, room),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        key=jax.random.fold_in(jax.random.key(sampling.seed), number),
        eos_token_ids=run.model.config.eos_token_ids,
    )
    rows = []
    for index, answer in zip(batch, new, strict=True):
        taken = 0

        def count(answer: list[int] = answer) -> Any:
            nonlocal taken
            for token in answer:
                taken += 1
                yield token

        text = "".join(
            decode_stream(run.tokenizer, count(), prompt=tokens[index], stops=style.stops)
        )
        ended = taken < len(answer) or answer[-1] in run.model.config.eos_token_ids
        said = prompts[index]
        rows.append(
            {
                "index": index,
                "prompt": said.text,
                **({"input": said.context} if said.context else {}),
                "output": text if style.continues else text.strip(),
                "tokens": taken,
                "finished": ended,
            }
        )
    return rows


def _load_part(path: Path, key: str) -> dict[int, dict[str, Any]]:
    """Reads rows by index if the file has the same settings.

    The last line may be incomplete. It and damaged lines are left out, and answered again.
    """
    if not path.is_file():
        return {}
    rows: list[dict[str, Any]] = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            rows.append(check_seal(json.loads(line), "index"))
    if not rows or rows[0] != {"key": key}:
        return {}
    return {row["index"]: row for row in rows[1:] if "index" in row}


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
