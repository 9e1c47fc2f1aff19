"""Arrays in files."""

from pathlib import Path

import numpy as np


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file. A file that stays open fails a later test."""
    with np.load(file) as arrays:
        return dict(arrays)
