"""Finds models and tokenizers in a local folder, a GGUF file or on the Hugging Face hub."""

import functools
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from irqlora_jax.files.gguf import is_gguf, read_gguf
from irqlora_jax.files.gguf_model import config_values, read_llama
from irqlora_jax.files.gguf_tokenizer import make_tokenizer
from irqlora_jax.files.small import read_json
from irqlora_jax.machine import reaches_hub
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.tree import ADAPTER, ADAPTER_CONFIG
from irqlora_jax.text import refusal

# Not "consolidated.safetensors" and "original/": they hold the same weights under other names.
_FETCHED = ("model*.safetensors", "*.json", "tokenizer*", "*.jinja")
_ADAPTER_FILES = (ADAPTER, ADAPTER_CONFIG)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_hub_id(source: str | Path) -> bool:
    """Whether `source` is not a local path, but may be the id of a model on the hub."""
    return (
        isinstance(source, str)
        and _HUB_ID.fullmatch(source) is not None
        and not is_gguf(source)
        and not Path(source).exists()
    )


def snapshot(source: str | Path) -> Path:
    """Returns the local folder of a model. If there is none, downloads the model from the hub.

    The path of a GGUF file is returned as it is.

    Raises:
        FileNotFoundError: no such folder, and the hub does not provide the model.
        NotADirectoryError: the path is another file.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() or (is_gguf(folder) and folder.exists()):
        return folder
    if folder.exists():
        raise NotADirectoryError(
            f"model = '{source}': a file; expected the folder that contains it, or a .gguf file"
        )
    if not is_hub_id(source):
        kind = "file" if is_gguf(source) else "folder"
        raise FileNotFoundError(f"model = '{source}': no such {kind}")
    import huggingface_hub

    fetch = functools.partial(huggingface_hub.snapshot_download, allow_patterns=list(_FETCHED))
    return _fetch(source, fetch)


def adapter_folder(source: str | Path) -> Path:
    """Returns the local folder of a trained adapter. If there is none, downloads a PEFT adapter.

    A path that cannot be the id of an adapter on the hub is returned as it is.

    Raises:
        FileNotFoundError: no such folder, and the hub does not provide the adapter.
    """
    if not is_hub_id(source):
        return Path(source).expanduser()
    import huggingface_hub

    fetch = functools.partial(
        huggingface_hub.snapshot_download, allow_patterns=list(_ADAPTER_FILES)
    )
    return _fetch(source, fetch, "adapter.init_from", "an adapter")


def _fetch(
    source: str | Path, fetch: Callable[..., str], field: str = "model", kind: str = "a model"
) -> Path:
    """Calls `fetch` with an id on the hub; without a network, for the cache alone.

    Args:
        source: the id.
        fetch: downloads it.
        field: of the configuration, for the error message.
        kind: what is fetched, with an article.

    Raises:
        FileNotFoundError: the hub does not provide it.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    advice = "or give a local folder"
    try:
        return Path(fetch(str(source), local_files_only=not reaches_hub()))
    except GatedRepoError:
        reason = "gated: accept its license on the hub and log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = (
            f"neither a local folder nor {kind} on the hub that you can see; check the name, log "
            "in with `hf auth login` if it is private"
        )
    except Exception as error:
        # The error has many types. Leave its text out: it may contain the headers with the token.
        reason = f"no such folder, and the hub could not be reached ({type(error).__name__})"
        advice = "connect to the network, or give a local folder"
    raise FileNotFoundError(f"{field} = '{source}': {reason}, {advice}")


def load_tokenizer(source: str | Path) -> Any:
    """Reads the transformers tokenizer of a folder, of a GGUF file or of a model on the hub.

    Raises:
        FileNotFoundError: the folder has no tokenizer.
        ValueError: its files cannot be read.
    """
    folder = snapshot(source)
    found = read_gguf(folder) if is_gguf(folder) else None
    names = ("tokenizer.json", "tokenizer.model")
    if found is None and not any((folder / name).is_file() for name in names):
        raise FileNotFoundError(f"{folder}: no tokenizer (tokenizer.json or tokenizer.model)")
    auto = _auto_tokenizer()
    try:
        if found is not None:
            tokenizer = make_tokenizer(found)
        else:
            tokenizer = auto.from_pretrained(folder, trust_remote_code=False)
        # Settings of wrong types fail only here.
        tokenizer.decode(tokenizer("A text.", verbose=False)["input_ids"])
        _ = tokenizer.all_special_ids, tokenizer.added_tokens_decoder
        return tokenizer
    except Exception as error:  # the tokenizers library raises bare Exceptions
        hint = ""
        if found is None and not (folder / "tokenizer.json").is_file():
            hint = " (a tokenizer.model needs the package sentencepiece)"
        reason = " ".join(str(error).split())
        for file in sorted(folder.glob("*token*.json")):
            try:
                read_json(file)
            except ValueError as damage:  # it names the file, the reason does not
                reason = str(damage)
        raise ValueError(f"{folder}: the tokenizer cannot be read{hint}: {reason}") from error


def _auto_tokenizer() -> Any:
    """Imports AutoTokenizer without the remark that PyTorch is missing: no model is needed."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        from transformers import AutoTokenizer
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
    return AutoTokenizer


def read_config(source: str | Path) -> LlamaConfig:
    """Reads the architecture of a model, from its config.json or the header of its GGUF file alone.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ValueError: not an accepted kind of model, already quantized, or an invalid value.
    """
    values = read_values(source)
    if values.get("quantization_config"):
        raise ValueError(f"{source}: already quantized; expected a model with float weights")
    if is_gguf(source):
        return read_llama(source, values)
    try:
        return LlamaConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def read_dtype(source: str | Path) -> Any:
    """Reads the type of a model's weights from its config.json.

    Raises:
        FileNotFoundError, ValueError: as `read_values`, or another type.
    """
    values = read_values(source)
    dtype = values.get("dtype") or values.get("torch_dtype") or "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        accepted = "float32, bfloat16 or float16"
        raise refusal(f"{source}: config.json: dtype", dtype, accepted)
    return jnp.dtype(dtype)


def read_values(source: str | Path) -> Mapping[str, Any]:
    """Reads config.json of a model in a folder or on the hub, and downloads no other file.

    For a GGUF file, returns what its header says in the same form.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ValueError: not valid JSON, or not a GGUF file of an accepted model.
    """
    if is_gguf(source):
        return config_values(read_gguf(source))
    if not is_hub_id(source):
        return read_json(snapshot(source) / "config.json")
    import huggingface_hub

    fetch = functools.partial(huggingface_hub.hf_hub_download, filename="config.json")
    return read_json(_fetch(source, fetch))


def file_marks(model: Path) -> list[list[Any]]:
    """Name, size and time of change of the files with the weights, to notice another model.

    Args:
        model: folder or GGUF file.
    """
    files = [model] if model.is_file() else sorted(model.glob("*.safetensors"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
