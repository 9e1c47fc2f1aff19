"""The page about a run as a file: report.html, and what it has to know of the machine."""

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
from irqlora_jax.report.gather import ENVIRONMENT_FILE, gather
from irqlora_jax.report.page import page

REPORT_FILE = "report.html"
_PACKAGES = ("irqlora-jax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers")
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Writes the page about a run again, from what its folder holds."""

    run: str
    """Folder of a run, or of irqlora quantize."""
    output: str | None = None
    """File to write. Null: report.html in that folder."""


@shows_messages
def report(asked: ReportConfig) -> Path:
    """Writes the page.

    Raises:
        FileNotFoundError: no such folder, or nothing of a run in it.
        OSError: the file cannot be written.
    """
    folder = Path(asked.run)
    path = folder / REPORT_FILE if asked.output is None else Path(asked.output)
    text = page(gather(folder))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise OSError(f"{path}: {reason}; --output FILE is another place") from error
    logger.info(f"written to {path}")
    return path


@shows_messages
def try_to_write(folder: Path) -> None:
    """Writes the page of a run that has everything else already; says so if that fails."""
    try:
        report(ReportConfig(str(folder)))
    except Exception as error:  # whatever it is, the run is done and must not end with it
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        logger.warning(
            f"{folder / REPORT_FILE} was not written ({reason}); the run itself is whole, and "
            f"`irqlora report --run {folder}` tries again",
            extra=ON_STDOUT,
        )


def save_environment(folder: Path, mesh: Mesh) -> None:
    """Writes environment.json: on what, with which versions and when.

    Raises:
        OSError: it cannot be written.
    """
    device = jax.devices()[0]
    found = {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "system": platform.platform(terse=True),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {name: installed_version(name) for name in _PACKAGES},
    }
    write_text(folder / ENVIRONMENT_FILE, json.dumps(found, indent=1) + "\n")
