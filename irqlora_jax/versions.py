"""Versions of packages, for what a run leaves behind."""

import importlib.metadata
from collections.abc import Iterable


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of each package its version, or "not installed": so it is called where this package is run
    from a clone, and what is lost then is a line of a report, not the run."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
