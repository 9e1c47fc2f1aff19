"""Models and tokenizers, from a local folder or from the Hugging Face hub."""

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from irqlora_jax.files.small import read_json
from irqlora_jax.model.config import LlamaConfig

# "consolidated.safetensors" and "original/" repeat the weights under other names: not fetched.
_FETCHED = ("model*.safetensors", "*.json", "tokenizer*", "*.jinja")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_hub_id(source: str | Path) -> bool:
    """Whether `source` is no path of this computer, but can be the id of a model on the hub."""
    return (
        isinstance(source, str)
        and _HUB_ID.fullmatch(source) is not None
        and not Path(source).exists()
    )


def snapshot(source: str | Path) -> Path:
    """The local folder of a model; one that is not here is fetched from the Hugging Face hub.

    Raises:
        FileNotFoundError: no such folder, and nothing that the hub can or will give.
        NotADirectoryError: the path is a file.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"model = '{source}': a file; accepted is the folder it lies in")
    if not is_hub_id(source):
        raise FileNotFoundError(f"model = '{source}': no such folder")
    import huggingface_hub

    fetch = functools.partial(huggingface_hub.snapshot_download, allow_patterns=list(_FETCHED))
    return _fetch(source, fetch)


def _fetch(source: str | Path, fetch: Callable[[str], str]) -> Path:
    """What `fetch` gets from the hub for the id of a model.

    Raises:
        FileNotFoundError: the hub cannot or will not give it.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    way_out = "or give a local folder"
    try:
        return Path(fetch(str(source)))
    except GatedRepoError:
        reason = "the hub asks you to accept the model's license and to log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = (
            "neither a local folder nor a model that the hub shows you; check the name, log in "
            "with `hf auth login` if it is private"
        )
    except Exception as error:
        # Of many types. Their text may quote the headers of the request, and with them the token.
        reason = f"no such folder, and the hub could not be reached ({type(error).__name__})"
        way_out = "connect to the network, or give a local folder"
    raise FileNotFoundError(f"model = '{source}': {reason}, {way_out}")


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a folder or of a model on the hub (a transformers tokenizer).

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: its files cannot be read.
    """
    folder = snapshot(source)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise FileNotFoundError(f"{folder}: no tokenizer (tokenizer.json or tokenizer.model)")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        hint = ""
        if not (folder / "tokenizer.json").is_file():
            hint = " (a tokenizer.model needs the package sentencepiece)"
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder}: the tokenizer cannot be read{hint}: {reason}") from error


def read_config(source: str | Path) -> LlamaConfig:
    """The architecture of a folder or of a model on the hub.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ValueError: not a float LLaMA.
    """
    values = read_values(source)
    if values.get("quantization_config"):
        raise ValueError(f"{source}: quantized already; accepted are float weights")
    try:
        return LlamaConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def read_values(source: str | Path) -> Mapping[str, Any]:
    """config.json of a folder or of a model on the hub, from which nothing else is fetched.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ValueError: no JSON.
    """
    if not is_hub_id(source):
        return read_json(snapshot(source) / "config.json")
    import huggingface_hub

    fetch = functools.partial(huggingface_hub.hf_hub_download, filename="config.json")
    return read_json(_fetch(source, fetch))
