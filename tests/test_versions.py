"""What a run writes of its packages."""

import importlib.metadata

from irqlora_jax.versions import installed_version


def test_a_clone_that_is_not_installed_loses_a_line_and_not_the_run() -> None:
    """Training ended in PackageNotFoundError where the package was only on the path."""
    assert installed_version("jax") == importlib.metadata.version("jax")
    assert installed_version("no-such-package-of-ours") == "not installed"
