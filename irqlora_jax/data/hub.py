"""Reads data sets of the Hugging Face hub."""

from collections.abc import Sequence
from typing import Any

from irqlora_jax.machine import reaches_hub

# Errors of `datasets` that list the valid names and contain nothing secret.
_HUB_NAMES = ("Unknown split", "BuilderConfig", "Config name is missing")


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
    from huggingface_hub import constants

    reached, offline = reaches_hub(), constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = not reached  # without a network, only the cache is read
    try:
        return [dict(columns) for columns in datasets.load_dataset(*names, split=split)]
    except Exception as error:
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
