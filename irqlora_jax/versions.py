"""Versions of packages, for what a run leaves behind."""

import importlib.metadata


def installed_version(package: str) -> str:
    """The version, or "not installed": so is this package itself where it is run from a clone, and
    what is lost then is a line of a report, not the run."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
