"""The scripts of an example, which belong to no package."""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


@contextlib.contextmanager
def scripts(folder: Path, *names: str) -> Iterator[dict[str, ModuleType]]:
    """Imports them as they import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield {name: importlib.import_module(name) for name in names}
