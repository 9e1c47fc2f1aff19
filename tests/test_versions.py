"""What a run writes of its packages."""

import importlib.metadata

from irqlora_jax.versions import versions


def test_a_clone_that_is_not_installed_loses_a_line_and_not_the_run() -> None:
    """Training ended in PackageNotFoundError where the package was only on the path."""
    found = versions(["jax", "no-such-package-of-ours"])
    assert found == {
        "jax": importlib.metadata.version("jax"),
        "no-such-package-of-ours": "not installed",
    }
