"""Reads data sets of the Hugging Face hub."""

import errno
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from irqlora_jax.machine import reaches_hub

# Errors of `datasets` that list the valid names and contain nothing secret.
_HUB_NAMES = ("Unknown split", "BuilderConfig", "Config name is missing")
# How `datasets` names a file on the hub. The revision is a commit.
_FILE = re.compile(r"hf://datasets/(?P<repo_id>[^@]+)@(?P<revision>[^/]+)/(?P<filename>.+)")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
Answer = TypeVar("Answer")


def read_hub(source: str, names: Sequence[str], split: str) -> list[dict[str, Any]]:
    """Reads the rows of a data set on the hub.

    Args:
        source: as the user wrote it, for the error message.
        names: its id, and the name of a configuration if it has several.
        split: name of the part.

    Raises:
        FileNotFoundError: the hub does not provide it; the message says why and what to do.
    """
    import datasets

    def read() -> list[dict[str, Any]]:
        return [dict(columns) for columns in datasets.load_dataset(*names, split=split)]

    return _ask(source, read)


def download_files(
    source: str, names: Sequence[str], split: str, suffixes: Sequence[str]
) -> list[Path]:
    """Downloads the files of a data set on the hub into the cache of `huggingface_hub`.

    `datasets` decides which files of the repository are a part, as when the rows are read at once.

    Args:
        source: as the user wrote it, for error messages.
        names: its id, and the name of a configuration if it has several.
        split: name of the part.
        suffixes: accepted ends of the names of the files.

    Returns:
        The files, in the order of their rows.

    Raises:
        FileNotFoundError: the hub does not provide it; the message says why and what to do.
        ValueError: the data set has files of another kind.
    """
    import datasets
    import huggingface_hub
    from huggingface_hub import constants

    def find() -> list[str]:
        if constants.HF_HUB_OFFLINE:  # which files are missing in the cache, only the hub knows
            raise ConnectionError
        builder: Any = datasets.load_dataset_builder  # has no type for several names
        parts = builder(*names).config.data_files or {}
        if split not in parts:
            there = sorted(map(str, parts))
            raise ValueError(f'Unknown split "{split}". Should be one of {there}.')
        return list(map(str, parts[split]))

    urls = _ask(source, find)
    kinds = {Path(url).suffix for url in urls}
    files = list(map(_FILE.fullmatch, urls))
    if len(kinds) > 1 or not kinds <= {*suffixes} or None in files:
        there = " and ".join(sorted(kind or "files without a suffix" for kind in kinds))
        raise ValueError(
            f"{source}: the data set on the hub consists of {there}; expected files of the hub of "
            f"one kind, {' or '.join(suffixes)}, with data.streaming true"
        )

    def fetch() -> list[Path]:
        return [
            Path(
                huggingface_hub.hf_hub_download(
                    each["repo_id"],
                    each["filename"],
                    repo_type="dataset",
                    revision=each["revision"],
                )
            )
            for each in files
            if each is not None
        ]

    return _ask(source, fetch)


def _ask(source: str, ask: Callable[[], Answer]) -> Answer:
    """Calls what asks the hub; without a network, for the cache alone.

    Raises:
        FileNotFoundError: the hub does not provide it; the message says why and what to do.
        OSError: the cache cannot be written.
    """
    from huggingface_hub import constants

    reached, offline = reaches_hub(), constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = not reached  # without a network, only the cache is read
    try:
        return ask()
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK:
            raise
        reason = _hub_reason(error if reached else ConnectionError())
    finally:
        constants.HF_HUB_OFFLINE = offline
    # Raised outside of the handler: the traceback of the cause could show a token.
    raise FileNotFoundError(f"{source}: there is no such file, and {reason}, or give a local file")


def _hub_reason(error: Exception) -> str:
    """Says why the hub does not provide a data set, and what to do.

    The text of an unknown error stays out: it may contain the request headers with the token.
    """
    text, kind = " ".join(str(error).split()), type(error).__name__
    if kind == "DatasetNotFoundError":
        if "gated" in text:
            return (
                "the data set is gated: accept its terms on the hub and log in with `hf auth login`"
            )
        return (
            "the hub has no such data set, or it is private; check the name, or log in with "
            "`hf auth login`"
        )
    if isinstance(error, ValueError) and text.startswith(_HUB_NAMES):
        return f"the data set on the hub has no such part: {text} Give ID:CONFIGURATION:SPLIT"
    if text.startswith("Dataset scripts"):
        return "the data set on the hub is made by a script, which is never run; download its files"
    if isinstance(error, ConnectionError | TimeoutError):
        return "the hub could not be reached; connect to the network"
    return (
        f"the hub does not provide it ({kind}); check the name, or log in with `hf auth login` if "
        "it is private"
    )
