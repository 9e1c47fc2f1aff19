"""Runs tasks of lm-evaluation-harness (the extra `eval`) through its own interface."""

import dataclasses
import difflib
import importlib.metadata
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval  # pyright: ignore[reportMissingImports]
import numpy as np
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

from irqlora_jax.evaluate.harness_model import AnswerCache, HarnessLM
from irqlora_jax.model.llama import Llama


@dataclasses.dataclass(frozen=True)
class HarnessScores:
    """Results of lm-eval by task. Groups of tasks are also included."""

    scores: dict[str, dict[str, float]]
    """Metrics and their standard errors: acc, acc_stderr, acc_norm, ..."""
    shots: dict[str, int]
    counts: dict[str, int]
    """Number of questions of each task."""
    task_versions: dict[str, Any]
    lm_eval: str
    """Version of lm-eval."""
    mean_acc: float | None
    """Mean of `acc` over the requested tasks with equal weights. None if a task has no `acc`."""
    truncated: int
    """Number of requests that were truncated on the left to fit into the context."""


def harness(
    model: Llama,
    variables: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    folder: str | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    resume_file: Path | None = None,
    identity: str = "",
    progress: bool = False,
) -> HarnessScores:
    """Runs tasks of lm-eval.

    Args:
        model: the architecture.
        variables: {"params": adapters, "base": base}.
        tokenizer: a transformers tokenizer.
        tasks: names known to lm-eval or defined in `folder`.
        folder: folder with more tasks (.yaml), which may read local files.
        shots: few-shot examples of each question (default: as each task defines, or none).
        limit: use only the first `limit` questions of each task.
        batch_size: rows of a forward pass.
        resume_file: file for the answers so far. Answers in it with the same `identity` are not
            computed again.
        identity: identifies the model in `resume_file`.
        progress: show progress bars.

    Raises:
        ValueError: an unknown task, or the model returns NaN or infinite numbers.
        OSError: no such folder, or the data is not available.
    """
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"task_folder = '{folder}': no such folder")
    manager = TaskManager(include_path=folder)
    for name in tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks) or ["arc_easy", "piqa"]
            raise ValueError(
                f"task = 'lm-eval:{name}': lm-eval has no such task; similar names: "
                f"{', '.join(near)}"
            )
    lm = HarnessLM(
        model,
        variables,
        tokenizer,
        batch_size,
        cache=AnswerCache(resume_file, identity),
        progress=progress,
    )
    # Otherwise the bootstrap of some metrics forks this process, which is unsafe with jax threads.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    evaluate: Any = lm_eval.simple_evaluate  # its type annotations are wrong
    found = evaluate(
        model=lm,
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit,
        bootstrap_iters=1000,
        log_samples=False,
        torch_random_seed=None,
        task_manager=manager,
    )
    assert found is not None
    scores = {name: _metrics(values) for name, values in found["results"].items()}
    own = [scores.get(name, {}).get("acc", math.nan) for name in tasks]
    return HarnessScores(
        scores=scores,
        shots=dict(found["n-shot"]),
        counts={name: count["effective"] for name, count in found["n-samples"].items()},
        task_versions=dict(found["versions"]),
        lm_eval=importlib.metadata.version("lm_eval"),
        mean_acc=None if any(map(math.isnan, own)) else float(np.mean(own)),
        truncated=lm.truncated,
    )


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """Returns numbers by metric, without the name of lm-eval's default filter, ",none"."""
    numbers = {name: value for name, value in values.items() if "," in name}
    return {
        name.removesuffix(",none"): float(value)
        for name, value in numbers.items()
        if isinstance(value, int | float | np.number)
    }
