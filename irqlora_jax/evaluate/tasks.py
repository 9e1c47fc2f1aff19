"""Evaluates a finished run on one task (the command `irqlora eval`)."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import logging
import re
import time
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from irqlora_jax.evaluate import results
from irqlora_jax.evaluate.mmlu import MmluScores, delete_resume_file, mmlu
from irqlora_jax.evaluate.mmlu_files import CATEGORIES
from irqlora_jax.evaluate.perplexity import score_text
from irqlora_jax.evaluate.prompts import Sampling, answer_all, read_prompts
from irqlora_jax.evaluate.questions import load_questions, score_questions
from irqlora_jax.generate.conversation import Style, decode_stream, encode_turns, find_style
from irqlora_jax.generate.decode import generate
from irqlora_jax.messages import progress_bar, shows_messages
from irqlora_jax.processes import check_agreement, first_only, is_first, together
from irqlora_jax.runs.load import Run, load_run, read_checkpoint, unpacked
from irqlora_jax.sharding import MeshConfig, make_mesh
from irqlora_jax.text import aligned, read_text, shorten

logger = logging.getLogger(__name__)
_TASKS = ("mmlu", "factworld", "questions", "perplexity", "generate")
_LM_EVAL = "lm-eval:"
_ROWS = {"mmlu": 8, "factworld": 64, "questions": 64, "perplexity": 4}


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluates a model on one task. The results are printed and written as JSON."""

    run: str
    """Folder of a run, of irqlora quantize, or of a Hugging Face model, or a .gguf file."""
    task: str
    """"mmlu": multiple-choice questions of 57 subjects. "questions" or "factworld": multiple-choice
    questions from a file. "perplexity": perplexity of a text file. "generate": answers to prompts.
    "lm-eval:NAMES": tasks of lm-evaluation-harness, e.g. lm-eval:arc_easy,piqa (needs the extra
    `eval`)."""
    baseline: bool = False
    """Leave the finetuned adapter out. With LoftQ or CLoQ, use the initial one."""
    checkpoint: Literal["last", "best"] | int = "last"
    """Checkpoint of the adapter: "last", "best" (lowest evaluation loss), or a step number."""
    output: str | None = None
    """File for the results. Null: eval-TASK.json (generate: .jsonl) in the folder of the run. If
    `run` is not a run, null only prints them, and generate with `prompts` needs a file."""
    batch_size: int | None = None
    """Rows of a forward pass. Null: mmlu 8, questions 64, perplexity 4, generate 16, lm-eval 16."""
    mesh: MeshConfig = MeshConfig(data=1)
    """Devices to split the model and the rows over. `data` null: as many as the rows allow."""
    limit: int | None = None
    """Use only this many questions or prompts (mmlu, lm-eval: of each subject or task). Null:
    all."""
    progress: bool = True
    """Show a progress bar."""
    mmlu: str | None = None
    """mmlu: folder with dev/SUBJECT_dev.csv and test/SUBJECT_test.csv, as published by its authors.
    Finished subjects are saved beside the results; the same command resumes from there."""
    shots: int | None = None
    """Number of few-shot examples. mmlu: null means 5; fewer are used if the context is too short.
    lm-eval: null means the default of each task, mostly 0."""
    split: Literal["test", "val"] = "test"
    """mmlu: which questions to use."""
    subjects: tuple[str, ...] = ()
    """mmlu: use only these subjects, e.g. ["anatomy", "astronomy"] (empty: all)."""
    questions: str | None = None
    """questions: .jsonl or .json file. Rows have subject, prompt, choices and answer. Or they have
    instruction, output and answer, where the instruction ends with "Answer format: a/b". Null: the
    file of the run."""
    text: str | None = None
    """perplexity: a plain text file."""
    window: int = 0
    """perplexity: length of a window in tokens (0: context of the model, at most 2048)."""
    stride: int = 0
    """perplexity: tokens from one window to the next (0: window - 1). A smaller stride gives every
    token more context but takes longer."""
    task_folder: str | None = None
    """lm-eval: folder with more task files (.yaml). With `dataset_path: json` a task reads local
    files without a download."""
    prompt: str | None = None
    """generate: the instruction to answer, or for a run on plain text the text to continue."""
    prompts: str | None = None
    """generate: file with many prompts: .txt with one prompt a line, or .jsonl with "prompt" or
    "instruction" (and "input")."""
    max_new_tokens: int = 128
    """generate: maximum number of new tokens."""
    temperature: float = 0.0
    """generate: sampling temperature. 0: greedy decoding."""
    top_k: int | None = None
    """generate: sample only from the k most likely tokens (null: all)."""
    top_p: float | None = None
    """generate: sample only from the most likely tokens with this total probability (null: all)."""
    seed: int = 0
    """generate: seed of the sampling."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                accepted = "a whole number of at least 1, or null"
                raise ValueError(f"{name} = {value}: expected {accepted}")
        names = self.task.removeprefix(_LM_EVAL).split(",")
        if self.task not in _TASKS and not (self.task.startswith(_LM_EVAL) and all(names)):
            accepted = f"{', '.join(_TASKS)} or {_LM_EVAL}NAME,NAME"
            raise ValueError(f"task = {shorten(self.task)}: expected {accepted}")
        if self.shots is not None and self.shots < 0:
            raise ValueError(f"shots = {self.shots}: expected 0 or more")

    @property
    def rows(self) -> int:
        """Rows of a forward pass."""
        return self.batch_size or _ROWS.get(self.task, 16)


@shows_messages
def evaluate_run(asked: EvalConfig) -> dict[str, Any]:
    """Runs one task, shows its result and then writes it as JSON. All processes.

    Args:
        asked: the model, the task and its settings.

    Returns:
        The contents of the JSON: the scores, the model, the settings and the versions.

    Raises:
        ValueError, OSError: bad input, or the results cannot be written.
    """
    together(lambda: _check_input(asked))
    check_agreement(dataclasses.asdict(asked))
    if not is_first():
        asked = dataclasses.replace(asked, progress=False)
    checkpoint = read_checkpoint(asked.checkpoint)
    asked = dataclasses.replace(asked, checkpoint=checkpoint)
    if asked.task == "mmlu" and asked.shots is None:
        asked = dataclasses.replace(asked, shots=5)
    mesh = make_mesh(asked.mesh, asked.rows, field="batch_size")
    where = mesh if mesh.size > 1 else None
    with contextlib.nullcontext() if where is None else jax.set_mesh(where):
        return _evaluate(asked, where)


def _evaluate(asked: EvalConfig, mesh: Mesh | None) -> dict[str, Any]:
    how: Any = {"adapter": not asked.baseline, "checkpoint": asked.checkpoint, "mesh": mesh}
    with progress_bar("Loading the model", show=asked.progress):
        run = unpacked(load_run(asked.run, **how))
    path = results.result_path(run, _file_stem(asked), asked.output)
    if path is None:
        logger.info("the result is only shown and nothing is kept; --output FILE writes it")
    task = {
        "mmlu": _mmlu,
        "factworld": _questions,
        "questions": _questions,
        "perplexity": _perplexity,
        "generate": _generate,
    }.get(asked.task, _harness)
    started = time.perf_counter()
    try:
        scores = task(asked, run, path)
    except KeyboardInterrupt:
        for part in (_resume_file(path), _resume_file(_answers_file(asked, path))):
            if part is not None and part.is_file():
                logger.info(f"finished work is kept in {part}; the same command resumes from there")
        raise
    seconds = time.perf_counter() - started
    result = results.describe(run, asked) | {"seconds": round(seconds, 3)} | scores
    if path is not None:
        first_only(lambda: results.write_result(_summary(asked, path), result))
    part = _resume_file(path)
    if part is not None and asked.task == "mmlu":
        delete_resume_file(part, len(scores["counts"]))
    if part is not None and asked.task.startswith(_LM_EVAL):
        part.unlink(missing_ok=True)
    return result


def _check_input(asked: EvalConfig) -> None:
    """Checks the input before a model is read."""
    needed = {"mmlu": ["mmlu"], "perplexity": ["text"], "generate": ["prompt", "prompts"]}
    if asked.task.startswith(_LM_EVAL) and importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            f"task = {shorten(asked.task)}: needs lm-eval; "
            'pip install "irqlora_jax[eval]" installs it'
        )
    names = needed.get(asked.task, [])
    given = [name for name in names if getattr(asked, name) is not None]
    if names and not given:
        flags = " or ".join(f"--{name}" for name in names)
        raise ValueError(f"{names[0]} = None: the task {asked.task} needs {flags}")
    if asked.prompts is not None and jax.process_count() > 1:
        raise ValueError(
            f"prompts = {shorten(asked.prompts)}: answers to a file of prompts are written by one "
            "process; expected --distributed off"
        )
    if len(given) > 1:
        raise ValueError(f"prompt = {shorten(asked.prompt)}: expected null with --prompts")
    for name in given:
        path = Path(getattr(asked, name))
        if name == "text" and not path.is_file():
            raise FileNotFoundError(f"text = '{path}': no such file")


def _file_stem(asked: EvalConfig) -> str:
    """Returns "eval-TASK" with a suffix for each variant, such as the baseline."""
    name = re.sub(r"[^\w+-]+", "_", asked.task.replace(",", "+").replace(":", "-"))
    if len(name) > 100:
        name = f"{name[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    parts = ["eval", name]
    if asked.baseline:
        parts.append("baseline")
    elif asked.checkpoint != "last":
        parts.append(f"step{asked.checkpoint}" if asked.checkpoint != "best" else "best")
    return "-".join(parts)


def _resume_file(path: Path | None) -> Path | None:
    """Path for finished work. Several processes keep none: they would have to agree on it."""
    alone = jax.process_count() == 1
    return path.with_name(path.name + ".part") if path is not None and alone else None


def _answers_file(asked: EvalConfig, path: Path | None) -> Path | None:
    """Path of the answers to many prompts."""
    return path and path.with_suffix(".jsonl") if asked.output is None else path


def _summary(asked: EvalConfig, path: Path) -> Path:
    """Path of the scores. For many prompts it differs from the path of the answers."""
    if asked.task != "generate" or asked.prompts is None or asked.output is None:
        return path
    return path.with_suffix(".summary.json" if path.suffix == ".json" else ".json")


def _mmlu(asked: EvalConfig, run: Run, path: Path | None) -> dict[str, Any]:
    assert asked.mmlu is not None and asked.shots is not None
    scores = mmlu(
        run.model,
        run.variables,
        run.tokenizer,
        asked.mmlu,
        shots=asked.shots,
        split=asked.split,
        subjects=asked.subjects,
        limit=asked.limit,
        batch_size=asked.rows,
        resume_file=_resume_file(path),
        identity=results.identity(run, asked.baseline),
        progress=asked.progress,
    )
    logger.info(_mmlu_table(scores))
    context = run.model.config.max_position_embeddings
    fewer = sum(n for shots, n in scores.shots.items() if int(shots) < asked.shots)
    if fewer:
        logger.info(
            f"{fewer} of {scores.count} questions had fewer than {asked.shots} examples, and "
            f"{scores.truncated} were cut, to fit into the context of {context} tokens"
        )
    if scores.ties:
        logger.info(f"{scores.ties} questions had a tie for the best letter; the first one counts")
    return dataclasses.asdict(scores)


def _mmlu_table(scores: MmluScores) -> str:
    rows = [("subject", "questions", "accuracy")]
    rows += [(n, str(scores.counts[n]), f"{a:.1%}") for n, a in scores.by_subject.items()]
    for category, parts in CATEGORIES.items():
        if category in scores.by_category:
            rows.append((f"[{category}]", "", f"{scores.by_category[category]:.1%}"))
            rows += [
                (f"  {part}", "", f"{scores.by_subcategory[part]:.1%}")
                for part in parts
                if part in scores.by_subcategory
            ]
    rows.append((f"all {len(scores.counts)} subjects", str(scores.count), f"{scores.accuracy:.1%}"))
    return aligned(rows)


def _harness(asked: EvalConfig, run: Run, path: Path | None) -> dict[str, Any]:
    # Imported here, because the extra may not be installed.
    from irqlora_jax.evaluate.harness import harness

    scores = harness(
        run.model,
        run.variables,
        run.tokenizer,
        asked.task.removeprefix(_LM_EVAL).split(","),
        folder=asked.task_folder,
        shots=asked.shots,
        limit=asked.limit,
        batch_size=asked.rows,
        resume_file=_resume_file(path),
        identity=results.identity(run, asked.baseline),
        progress=asked.progress,
    )
    rows = [("task", "questions", "shots", "metric", "value", "error")]
    for name, metrics in scores.scores.items():
        counts = (str(scores.counts.get(name, "")), str(scores.shots.get(name, "")))
        for metric, value in metrics.items():
            if "_stderr" not in metric:
                error = metrics.get(
                    metric.replace(",", "_stderr,"), metrics.get(f"{metric}_stderr")
                )
                spread = "" if error is None else f"{error:.4f}"
                rows.append((name, *counts, metric, f"{value:.4f}", spread))
    if scores.mean_acc is not None and len(scores.scores) > 1:
        rows.append(("mean", "", "", "acc", f"{scores.mean_acc:.4f}", ""))
    logger.info(aligned(rows))
    if scores.truncated:
        logger.info(f"{scores.truncated} requests were cut on the left to fit into the context")
    return dataclasses.asdict(scores)


def _questions(asked: EvalConfig, run: Run, path: Path | None) -> dict[str, Any]:
    file, limit = asked.questions, asked.limit
    if run.config is not None and file is None:
        file, limit = run.config.evaluate.questions, limit or run.config.evaluate.max_questions
    if file is None:
        raise ValueError("questions = None: the run has none; expected a .jsonl or .json file")
    questions = load_questions(file, run.tokenizer, limit)
    with progress_bar("Questions", len(questions), "q", show=asked.progress) as bar:
        scores = score_questions(run.model, run.variables, questions, asked.rows, done=bar.update)
    rows = [("subject", "accuracy")]
    rows += [(subject, f"{accuracy:.1%}") for subject, accuracy in scores.by_subject.items()]
    rows.append(("all", f"{scores.accuracy:.1%}"))
    if scores.accuracy_norm is not None:
        rows.append(("all, by length", f"{scores.accuracy_norm:.1%}"))
    if scores.recall is not None:
        rows.append(("recall", f"{scores.recall:.1%}"))
    if scores.bits_per_fact is not None:
        rows.append(("bits per fact", f"{scores.bits_per_fact:.3f}"))
    logger.info(aligned(rows))
    if scores.truncated:
        logger.info(f"{scores.truncated} of {scores.count} questions were cut on the left to fit")
    return dataclasses.asdict(scores)


def _perplexity(asked: EvalConfig, run: Run, path: Path | None) -> dict[str, Any]:
    assert asked.text is not None
    scores = score_text(
        run.model,
        run.variables,
        read_text(Path(asked.text)),
        run.tokenizer,
        window=asked.window or None,
        stride=asked.stride or None,
        batch_size=asked.rows,
        progress=asked.progress,
    )
    rows = [
        ("measure", "value"),
        ("perplexity", f"{scores.perplexity:.4f}"),
        ("nats per token", f"{scores.nll:.4f}"),
        ("bits per byte", f"{scores.bits_per_byte:.4f}"),
        ("tokens", f"{scores.tokens}"),
        ("window", f"{scores.window}"),
        ("stride", f"{scores.stride}"),
    ]
    logger.info(aligned(rows))
    return dataclasses.asdict(scores)


def _generate(asked: EvalConfig, run: Run, path: Path | None) -> dict[str, Any]:
    sampling = Sampling(
        asked.max_new_tokens, asked.temperature, asked.top_k, asked.top_p, asked.seed
    )
    style = find_style(run.config, run.tokenizer)
    if asked.prompt is not None:
        with progress_bar("Generating", show=asked.progress):
            return _answer_one(asked.prompt, run, style, sampling)
    assert asked.prompts is not None
    prompts = read_prompts(asked.prompts, asked.limit)
    output = _answers_file(asked, path)
    if output is None:
        raise ValueError(
            f"output = None: '{run.folder}' is not a run; expected a .jsonl file for the answers"
        )
    counts = answer_all(
        run,
        style,
        prompts,
        sampling,
        batch_size=asked.rows,
        output=output,
        identity=results.identity(run, asked.baseline),
        progress=asked.progress,
    )
    logger.info(f"{counts['prompts']} answers, {counts['tokens']} tokens, in {output}")
    return counts | {"answers": str(output)}


def _answer_one(prompt: str, run: Run, style: Style, sampling: Sampling) -> dict[str, Any]:
    tokens = encode_turns(style, run.tokenizer, prompt)
    context = run.model.config.max_position_embeddings
    if len(tokens) >= context:
        raise ValueError(
            f"prompt: has {len(tokens)} tokens: expected fewer than "
            f"max_position_embeddings = {context}"
        )
    new = generate(
        run.model,
        run.variables,
        [tokens],
        min(sampling.max_new_tokens, context - len(tokens)),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        key=jax.random.key(sampling.seed),
        eos_token_ids=run.model.config.eos_token_ids,
    )[0]
    answer = "".join(decode_stream(run.tokenizer, new, prompt=tokens, stops=style.stops))
    text = prompt + answer if style.continues else answer.strip()
    logger.info(text)
    return {"prompt": prompt, "text": text}
