"""Where the results of an evaluation go, and how they look."""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from irqlora_jax.files.small import write_text
from irqlora_jax.machine import installed_version
from irqlora_jax.runs.load import Run

logger = logging.getLogger(__name__)


def result_path(run: Run, stem: str, output: str | None) -> Path:
    """The file of the results.

    Args:
        run: what is evaluated.
        stem: of the file, "eval-TASK" and what tells it from others.
        output: a file that was asked for.

    Returns:
        `output`, or STEM.json in the folder of the run. The folder of anything but a run may be
        shared or not ours: then STEM-NAME.json in the working directory, NAME that of the folder.
    """
    if output is not None:
        return Path(output)
    if run.config is not None:
        return run.folder / f"{stem}.json"
    name = re.sub(r"[^\w.-]+", "_", run.folder.resolve().name)
    return Path(f"{stem}-{name}.json")


def identity(run: Run, baseline: bool) -> str:
    """What tells a model from others: its folder, checkpoint and the state of its files."""
    files = sorted(run.folder.resolve().glob("*.safetensors"))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    trained = None
    if run.step is not None:
        trained = (run.folder / "checkpoints" / str(run.step)).stat().st_mtime_ns
    return repr((str(run.folder.resolve()), run.step, trained, baseline, stats))


def describe(run: Run, settings: Any) -> dict[str, Any]:
    """What was evaluated, for the JSON: the model, the settings and the versions."""
    return {
        "task": settings.task,
        "run": str(run.folder),
        "checkpoint": settings.checkpoint,
        "step": run.step,
        "baseline": settings.baseline,
        "compute_dtype": run.model.compute_dtype,
        "settings": dataclasses.asdict(settings),
        "versions": {
            "irqlora_jax": installed_version("irqlora-jax"),
            "jax": jax.__version__,
        },
    }


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Writes the JSON completely or not at all, and says where.

    Raises:
        OSError: it cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise unwritable(path, error) from error
    logger.info(f"written to {path}")


def unwritable(path: Path, error: OSError) -> OSError:
    """The error as one sentence that says what to do."""
    return OSError(f"{path}: cannot be written ({error.strerror}); --output FILE is another place")
