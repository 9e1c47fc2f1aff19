"""Uploads an exported folder to the Hugging Face hub.

The token is the one of huggingface_hub: HF_TOKEN, or the login of `hf auth login`. It is never read
here. Texts of errors may contain headers with it, so they are not shown.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from irqlora_jax.machine import reaches_hub
from irqlora_jax.messages import progress_bar
from irqlora_jax.text import shorten

_LOGIN = "log in with `hf auth login` or set HF_TOKEN"


def check_name(name: str) -> None:
    """Checks the name of a repository.

    Raises:
        ValueError: not OWNER/NAME with the characters that the hub allows.
    """
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        ok = name.count("/") == 1
    except ValueError:
        ok = False
    if not ok:
        raise ValueError(
            f"push_to_hub = {shorten(name)}: expected OWNER/NAME, of up to 96 letters, digits and "
            "single - . _ that do not stand at an end"
        )


def check_access(name: str) -> None:
    """Checks before an export that an upload has a chance.

    Raises:
        OSError: offline, or there is no token.
    """
    import huggingface_hub
    from huggingface_hub import constants

    reason = None
    if constants.is_offline_mode():
        reason = "HF_HUB_OFFLINE is set; unset it, or export without push_to_hub"
    elif huggingface_hub.get_token() is None:
        reason = f"there is no token for the hub; {_LOGIN}"
    elif not reaches_hub():
        reason = "the hub does not answer; try again, or export without push_to_hub"
    if reason:
        raise OSError(f"push_to_hub = {name!r}: {reason}")


def upload(folder: Path, name: str, *, private: bool, progress: bool) -> str:
    """Uploads all files of a folder in one commit. Makes the repository if there is none.

    Files of the repository with other names stay.

    Args:
        folder: from an export.
        name: of the repository, OWNER/NAME.
        private: whether only the owner may see it.
        progress: show the progress: in a terminal the bars of huggingface_hub, else lines.

    Returns:
        The address of the repository.

    Raises:
        OSError: the upload failed, or a private repository was wanted and it is a public one. The
            folder is as before. The message names the command that uploads it later.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        place = api.create_repo(name, private=private, exist_ok=True)
        if not private or api.repo_info(name).private:
            with _shown(progress):
                message = "Upload of irqlora export"
                api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
            return str(place)
        reason = "the repository is public, and private = true; choose another name"
    except Exception as error:
        reason = _reason(error, name)
    # Raised outside of the handler: the cause could show the token.
    raise OSError(
        f"push_to_hub = {name!r}: {reason}. The export is complete in {folder}; "
        f"`hf upload {name} {folder}` uploads it"
    )


@contextlib.contextmanager
def _shown(progress: bool) -> Iterator[None]:
    from huggingface_hub import utils

    bars = progress and sys.stderr.isatty()
    hides = not bars and not utils.are_progress_bars_disabled()
    if hides:
        utils.disable_progress_bars()
    try:
        with progress_bar("Uploading", show=progress and not bars):
            yield
    finally:
        if hides:
            utils.enable_progress_bars()


def _reason(error: Exception, name: str) -> str:
    found: Any = error
    while found is not None and getattr(found, "response", None) is None:
        found = found.__cause__  # the client wraps errors of large files
    status = getattr(found and found.response, "status_code", None)
    if status == 401:
        return f"the hub does not know the token; {_LOGIN}"
    if status in (403, 404):
        return f"the token may not write there; expected one with write access to {name}"
    if status is not None:
        return f"the hub refused the upload (status {status})"
    return f"the upload did not end ({type(error).__name__})"
