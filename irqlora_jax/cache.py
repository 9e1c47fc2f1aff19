"""Compiled programs, kept from one run to the next."""

import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def cache_programs(
    environment: Mapping[str, str] = os.environ, say: Callable[[str], None] = _say
) -> Path | None:
    """Lets jax keep what it compiles in a folder, for this process and the next ones.

    The folder is $JAX_COMPILATION_CACHE_DIR, else $XDG_CACHE_HOME/irqlora_jax, else
    ~/.cache/irqlora_jax. It may be deleted at any time. JAX_ENABLE_COMPILATION_CACHE=false, a
    variable of jax's own, keeps nothing.

    Args:
        environment: the variables.
        say: told if the folder cannot be used.

    Returns:
        The folder; None where nothing is kept.
    """
    if not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return None
    home = environment.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(environment.get(VARIABLE) or f"{home}/irqlora_jax").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        reason = getattr(error, "strerror", None) or error
        say(f"compiled programs are not kept: {VARIABLE} = '{folder}': {reason}")
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder
