"""Writes the results of an evaluation as JSON."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from irqlora_jax.files.checksums import seal
from irqlora_jax.files.small import write_text
from irqlora_jax.machine import installed_version
from irqlora_jax.runs.load import Run

logger = logging.getLogger(__name__)


def result_path(run: Run, stem: str, output: str | None) -> Path | None:
    """Returns the path of the results file.

    Args:
        run: the evaluated run.
        stem: name without suffix: "eval-TASK", with a suffix for each variant.
        output: the path requested by the user, if any.

    Returns:
        `output`, or STEM.json in the folder of the run. A folder that is not a run may belong to
        somebody else, so None: nothing is written.
    """
    if output is not None:
        return Path(output)
    if run.config is not None:
        return run.folder / f"{stem}.json"
    return None


def identity(run: Run, baseline: bool) -> str:
    """Identifies a model: its folder, its checkpoint, and size and time of its files."""
    place = run.folder.resolve()
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    trained = None
    if run.step is not None:
        trained = (run.folder / "checkpoints" / str(run.step)).stat().st_mtime_ns
    return repr((str(run.folder.resolve()), run.step, trained, baseline, stats))


def describe(run: Run, settings: Any) -> dict[str, Any]:
    """Describes the evaluated model, the settings and the versions, for the JSON."""
    return {
        "task": settings.task,
        "run": str(run.folder),
        "checkpoint": settings.checkpoint,
        "step": run.step,
        "baseline": settings.baseline,
        "directory": str(Path.cwd()),
        "compute_dtype": run.model.compute_dtype,
        "settings": dataclasses.asdict(settings),
        "versions": {
            "irqlora_jax": installed_version("irqlora-jax"),
            "jax": jax.__version__,
        },
    }


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Writes the JSON with a checksum, completely or not at all, and says where.

    Raises:
        OSError: it cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        values = json.loads(json.dumps(result))  # as they will be read
        write_text(path, json.dumps(seal(values), indent=1) + "\n")
    except OSError as error:
        raise write_error(path, error) from error
    logger.info(f"written to {path}")


def write_error(path: Path, error: OSError) -> OSError:
    """Makes an error that also says what to do."""
    return OSError(f"{path}: cannot be written ({error.strerror}); --output FILE writes elsewhere")
