"""Keeps the losses of single matrices in a file, so that an interruption loses none."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from irqlora_jax.files.checksums import check_seal, seal
from irqlora_jax.files.small import write_text
from irqlora_jax.text import shorten

Losses = dict[tuple[int, str], float]
"""Losses by layer and projection, in nats per token."""


def read_losses(file: Path, settings: Mapping[str, Any]) -> Losses:
    """Reads the losses in a file, and rewrites it without its damaged lines. Makes a new file.

    Args:
        file: a line with the settings, then a line for each loss.
        settings: everything that the losses depend on, as plain values.

    Raises:
        ValueError: the file belongs to other settings, or is another kind of file.
        OSError: the file cannot be read or written.
    """
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else []
    rows = [row for row in map(_parse, lines) if row is not None]
    if lines:
        stored = rows[0].get("settings") if rows else None
        if not isinstance(stored, dict):
            raise ValueError(
                f"{file}: not the losses of irqlora sensitivity; expected a new folder"
            )
        for name in sorted(stored.keys() | settings.keys()):
            if stored.get(name) != settings.get(name):
                there, here = shorten(stored.get(name)), shorten(settings.get(name))
                raise ValueError(
                    f"output_dir = '{file.parent}': holds the losses of other settings ({name} = "
                    f"{there} there, {here} here); expected a new folder, or the same settings"
                )
    losses: Losses = {
        (row["layer"], row["projection"]): row["loss"] for row in rows if "loss" in row
    }
    # An interruption may have left an incomplete last line.
    head = json.dumps(seal({"settings": settings}))
    kept = [head, *(_line(*place, loss) for place, loss in losses.items())]
    write_text(file, "\n".join(kept) + "\n")
    return losses


def append_loss(file: Path, layer: int, projection: str, loss: float) -> None:
    """Appends the loss of one matrix."""
    with file.open("a", encoding="utf-8") as opened:
        opened.write(_line(layer, projection, loss) + "\n")


def _line(layer: int, projection: str, loss: float) -> str:
    return json.dumps(seal({"layer": layer, "projection": projection, "loss": loss}))


def _parse(line: str) -> dict[str, Any] | None:
    """The values of a line; None if it is damaged."""
    try:
        return check_seal(json.loads(line), "projection")
    except (ValueError, AttributeError, RecursionError):
        return None
