"""Writes report.html, and environment.json with the device and versions of the training."""

import dataclasses
import datetime
import json
import logging
import platform
from pathlib import Path

import jax
from jax.sharding import Mesh

from irqlora_jax.files.small import write_text
from irqlora_jax.machine import installed_version
from irqlora_jax.messages import ON_STDOUT, shows_messages
from irqlora_jax.report.page import page
from irqlora_jax.report.run_data import read_run_data
from irqlora_jax.runs.folder import ENVIRONMENT_FILE
from irqlora_jax.runs.recorded import write_recorded

REPORT_FILE = "report.html"
_PACKAGES = ("irqlora-jax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers")
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Writes the page about a run again from the files in its folder."""

    run: str
    """Folder of a run, or of irqlora quantize."""
    output: str | None = None
    """Output file. Null: report.html in the folder of the run."""


@shows_messages
def report(asked: ReportConfig) -> Path:
    """Writes the page.

    Raises:
        FileNotFoundError: no such folder, or it is not a run.
        OSError: the file cannot be written.
    """
    folder = Path(asked.run)
    path = folder / REPORT_FILE if asked.output is None else Path(asked.output)
    found = read_run_data(folder)
    for problem in dict.fromkeys(found.problems):
        logger.warning(f"{folder}: {problem}", extra=ON_STDOUT)
    text = page(found)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise OSError(f"{path}: {reason}; --output FILE writes elsewhere") from error
    logger.info(f"written to {path}")
    return path


@shows_messages
def try_to_write(folder: Path) -> None:
    """Writes the page at the end of a run. A failure is only reported."""
    try:
        report(ReportConfig(str(folder)))
    except Exception as error:  # no error of the page may end a finished run
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        logger.warning(
            f"{folder / REPORT_FILE} was not written ({reason}); the run itself is complete, and "
            f"`irqlora report --run {folder}` tries again",
            extra=ON_STDOUT,
        )


def save_environment(folder: Path, mesh: Mesh) -> None:
    """Writes environment.json: device, versions, and start time of the training.

    Raises:
        OSError: the file cannot be written.
    """
    device = jax.devices()[0]
    found = {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "directory": str(Path.cwd()),
        "system": platform.platform(terse=True),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {name: installed_version(name) for name in _PACKAGES},
    }
    write_recorded(folder, ENVIRONMENT_FILE, json.dumps(found, indent=1) + "\n")
