"""The tasks of lm-evaluation-harness (the extra `eval`), asked through its own interface."""

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

from irqlora_jax.evaluate.harness_model import HarnessLM, Kept
from irqlora_jax.model.llama import Llama


@dataclasses.dataclass(frozen=True)
class HarnessScores:
    """What lm-eval reports, by task; groups of tasks stand among them."""

    scores: dict[str, dict[str, float]]
    """Metrics and their standard errors: acc, acc_stderr, acc_norm, ..."""
    shots: dict[str, int]
    counts: dict[str, int]
    """Questions asked."""
    task_versions: dict[str, Any]
    lm_eval: str
    """Version of lm-eval."""
    mean_acc: float | None
    """Mean of the `acc` of the tasks that were asked for, each with equal weight; None where one
    has none."""
    truncated: int
    """Requests that were cut on the left to fit into the context."""


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
    keep: Path | None = None,
    identity: str = "",
    progress: bool = False,
) -> HarnessScores:
    """Runs tasks of lm-eval.

    Args:
        model: the architecture.
        variables: {"params": adapters, "base": base}.
        tokenizer: of transformers.
        tasks: names that lm-eval knows, or that `folder` defines.
        folder: with more tasks (.yaml), which may read local files.
        shots: examples in front of each question (default: what the tasks say, or none).
        limit: ask only the first so many questions of each task.
        batch_size: rows computed at one time.
        keep: file for the answers given so far; those that are there already, of the same
            `identity`, are not computed again.
        identity: what `keep` is to tell models apart by.
        progress: show bars.

    Raises:
        ValueError: an unknown task, or the model gives no numbers.
        OSError: no such folder, or data that cannot be had.
    """
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"task_folder = '{folder}': no such folder")
    manager = TaskManager(include_path=folder)
    for name in tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks) or ["arc_easy", "piqa"]
            raise ValueError(
                f"task = 'lm-eval:{name}': lm-eval knows no such task; near are {', '.join(near)}"
            )
    lm = HarnessLM(
        *(model, variables, tokenizer, batch_size),
        kept=Kept(keep, identity),
        progress=progress,
    )
    # Or the bootstrap of some metrics forks this process, threads of jax and all.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    evaluate: Any = lm_eval.simple_evaluate  # its annotations are those of another function
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
    """Numbers by metric; lm-eval's filter is named where it is not the plain "none"."""
    numbers = {name: value for name, value in values.items() if "," in name}
    return {
        name.removesuffix(",none"): float(value)
        for name, value in numbers.items()
        if isinstance(value, int | float | np.number)
    }
