"""Loads models: runs, quantized bases, Hugging Face folders and GGUF files."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from irqlora_jax.base.file import (
    has_base,
    is_fitted,
    read_base,
    read_base_config,
    read_source,
)
from irqlora_jax.base.make import load_base
from irqlora_jax.base.mesh import check_mesh
from irqlora_jax.base.source import read_llama
from irqlora_jax.base.updates import with_scales
from irqlora_jax.config import Config, check_settings, quant_settings
from irqlora_jax.data.chat import end_tokens
from irqlora_jax.files.checksums import check_seal
from irqlora_jax.files.gguf import is_gguf
from irqlora_jax.files.hub import is_hub_id, load_tokenizer, read_config, snapshot
from irqlora_jax.files.small import parse_json, read_json
from irqlora_jax.machine import free_memory
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import by_layer
from irqlora_jax.quant.config import KEPT, QuantConfig
from irqlora_jax.quant.matmul import dense_weights
from irqlora_jax.runs.checkpoint_files import check_end
from irqlora_jax.runs.checkpoints import Checkpoints
from irqlora_jax.runs.folder import BASE_FILE, GENERATION, TOKENIZER, read_config_file
from irqlora_jax.runs.recorded import RECORD_FILE, check_recorded, recorded
from irqlora_jax.sharding import placed, tree_shardings
from irqlora_jax.text import require, shorten

Which = Literal["last", "best"] | int
"""A checkpoint: the newest, the one with the best evaluation loss, or a step."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A model that is ready to use.

    Attributes:
        folder: the folder or the GGUF file it was read from.
        config: of the run; None for a base or an unquantized model.
        model: the architecture.
        variables: {"params": adapters, "base": base}.
        tokenizer: tokenizer from transformers.
        step: of the checkpoint; None without one.
        source: folder or hub id of the original model; None if unknown.
    """

    folder: Path
    config: Config | None
    model: Llama
    variables: dict[str, Any]
    tokenizer: Any
    step: int | None
    source: str | None = None


def load_run(
    folder: str | Path,
    *,
    adapter: bool = True,
    checkpoint: Which = "last",
    compute_dtype: str | None = None,
    mesh: Mesh | None = None,
) -> Run:
    """Reads a run, a folder of `irqlora quantize`, or a model without quantizing it.

    Args:
        folder: the folder, also of a Hugging Face model, or a GGUF file.
        adapter: False leaves the finetuned adapter out. A run that did not start with a new
            adapter (LoftQ, `adapter.init_from`) uses its initial adapter (step 0) instead.
        checkpoint: the checkpoint of a run.
        compute_dtype: type of the activations (default: the run's type, else float32).
        mesh: devices to split the weights over (default: all on the first device). Use the model
            inside of `jax.set_mesh(mesh)`.

    Raises:
        FileNotFoundError: no such folder, or no such checkpoint in it.
        ValueError: damaged files, another kind of folder, an invalid `checkpoint`, or a mesh that
            cannot split the weights.
    """
    folder, checkpoint = Path(folder), read_checkpoint(checkpoint)
    if not is_base(folder):
        if not is_gguf(folder) and not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"run = '{folder}': no base.safetensors and no config.json there; expected the "
                "folder of a run, of irqlora quantize, or of a Hugging Face model, or a .gguf file"
            )
        if mesh is not None:
            check_mesh(mesh, read_llama(folder), QuantConfig(format=KEPT))
        base, llama = load_base(folder, None, mesh=mesh)
        tokenizer = load_tokenizer(folder)
        llama = with_end_tokens(llama, tokenizer, folder)
        model = Llama(llama, compute_dtype=compute_dtype or "float32")
        variables = {"params": {}, "base": base}
        return Run(folder, None, model, variables, tokenizer, None, str(folder))
    tokenizer = read_tokenizer(folder)
    config = None
    if (folder / "config.json").is_file():
        config = read_config_file(folder)
    elif (folder / "checkpoints").is_dir():
        raise FileNotFoundError(f"{folder / 'config.json'}: no such file; expected a whole run")
    if mesh is not None:
        check_mesh(mesh, *read_base_config(folder / BASE_FILE))
    base, llama = read_base(folder / BASE_FILE, mesh)
    llama = with_end_tokens(llama, tokenizer, folder)
    source = read_source(folder / BASE_FILE)
    dtype = compute_dtype or (config and config.train.compute_dtype) or "float32"
    if config is not None and config.adapter.start_title and not adapter:
        adapter, checkpoint = True, 0
    if config is None or not adapter:
        model = Llama(llama, compute_dtype=dtype)
        return Run(folder, config, model, {"params": {}, "base": base}, tokenizer, None, source)
    model = Llama(llama, adapter=config.adapter, compute_dtype=dtype)
    if not isinstance(checkpoint, int):
        check_end(folder)
    with Checkpoints(folder) as checkpoints:
        step = checkpoints.find(checkpoint)
        like = jax.eval_shape(lambda: model.init_adapters(jax.random.key(0)))
        if mesh is not None:
            like = placed(like, tree_shardings(mesh, like, config.adapter.splits))
        adapters = checkpoints.restore_adapters(step, like)
    return Run(folder, config, model, {"params": adapters, "base": base}, tokenizer, step, source)


def unpacked(run: Run, *, each_layer: bool = False) -> Run:
    """On a CPU, a run with dense weights in the type of its activations, if they fit.

    They may take half of the free memory. Else, and on other devices, the run is unchanged. Trained
    scales become part of the weights.

    Args:
        run: the run.
        each_layer: every layer is a stack of its own. Decoding is faster then: a loop over a stack
            copies the weights of each layer before it uses them (benchmarks/cpu_speed.py). But
            compiling takes longer, because the layers no longer share a program.
    """
    # Several processes could decide differently.
    if jax.default_backend() != "cpu" or jax.process_count() > 1:
        return run
    dtype, base = jnp.dtype(run.model.compute_dtype), run.variables["base"]
    shapes = jax.eval_shape(lambda base: dense_weights(base, dtype), base)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    if size > free_memory() // 2:
        return run
    model, variables = with_scales(run.model, run.variables)
    if each_layer:
        variables["base"] = by_layer(variables["base"], model.config.num_hidden_layers)
    variables["base"] = dense_weights(variables["base"], dtype)
    return dataclasses.replace(run, model=model, variables=variables)


def read_checkpoint(value: str | int) -> Which:
    """Parses a checkpoint: "last", "best" or a step, as a number or as text.

    Raises:
        ValueError: anything else.
    """
    if value == "last" or value == "best":
        return value
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f"checkpoint = {shorten(value)}: expected last, best or the number of a step")


def is_base(source: str | Path) -> bool:
    """Whether `source` is a folder of `irqlora quantize` or of a run, with a quantized base.

    Raises:
        FileNotFoundError: the base of such a folder is missing. Without this error, the folder
            would be read as a Hugging Face model.
    """
    found = has_base(source)
    if not found and (Path(source) / RECORD_FILE).is_file():
        file = Path(source) / BASE_FILE
        raise FileNotFoundError(f"{file}: no such file; expected the whole run or quantized base")
    return found


def check_model(config: Config) -> None:
    """If `config.model` is a quantized base, checks that a new run can start from it.

    Raises:
        ValueError: the initialization needs float weights, the base was fitted to the adapter of
            another run, or the adapter of a run would be lost.
    """
    if not is_base(config.model):
        return
    file = Path(config.model) / BASE_FILE
    source = read_source(file)
    origin = "the original model" + (f" ('{source}')" if source else "")
    start = config.adapter.start
    if start.fit is not None:
        raise ValueError(
            f"adapter.init = {start.name!r}: needs the full-precision weights; model = "
            f"'{config.model}' holds a quantized base only; expected {origin}, which "
            f"{start.title} quantizes itself"
        )
    if is_fitted(file) and config.adapter.source is None:
        raise ValueError(
            f"model = '{config.model}': this base was fitted to the adapter of its run "
            f"and is incomplete without it; expected adapter.init_from = '{config.model}', "
            f"{origin}, or a folder of irqlora quantize"
        )
    is_run = (Path(config.model) / "config.json").is_file()
    if is_run and config.adapter.init_from is None:
        raise ValueError(
            f"model = '{config.model}': a run, whose adapter would be lost; expected "
            f"adapter.init_from = '{config.model}' to continue from its adapter, or 'new' to use "
            "its base alone"
        )


def read_architecture(source: str | Path, quant: QuantConfig) -> LlamaConfig:
    """Reads the architecture of a quantized base, or of a model in any other form.

    Downloads only config.json. So for a model on the hub, `tie_word_embeddings` is as in that file
    (`base.source.read_llama`).

    Raises:
        FileNotFoundError: no such model.
        ValueError: no known model with float weights, or a base of other settings than `quant`.
    """
    if not is_base(source):
        return read_config(source) if is_hub_id(source) else read_llama(snapshot(source))
    llama, stored = read_base_config(Path(source) / BASE_FILE)
    check_settings(quant_settings(quant), stored, source)
    return llama


def read_tokenizer(source: str | Path) -> Any:
    """Reads the tokenizer of a model, as `hf.load_tokenizer`.

    Raises:
        FileNotFoundError, ValueError: no tokenizer, or its files cannot be read.
    """
    if not is_base(source):
        return load_tokenizer(source)
    settings = Path(source) / TOKENIZER / "tokenizer_config.json"
    if not settings.is_file():  # without it, transformers guesses
        raise FileNotFoundError(f"{settings}: no such file; expected the whole folder")
    check_recorded(Path(source), f"{TOKENIZER}/")
    return load_tokenizer(Path(source) / TOKENIZER)


def with_end_tokens(llama: LlamaConfig, tokenizer: Any, source: str | Path) -> LlamaConfig:
    """Adds every end of text that belongs to a model to `eos_token_ids`.

    config.json names some of them; generation_config.json, the tokenizer and its chat template may
    name others. Examples for training end with the tokenizer's eos.

    Args:
        llama: the architecture.
        tokenizer: of the model.
        source: run, base, folder or hub id of the model.

    Raises:
        ValueError: generation_config.json is damaged.
    """
    folder = Path(source) / TOKENIZER if is_base(source) else snapshot(source)
    named: Any = None
    if (folder / GENERATION).is_file():
        named = read_json(folder / GENERATION).get("eos_token_id")
    named = named if isinstance(named, list) else [named]
    require(
        all(end is None or isinstance(end, int) for end in named),
        f"{folder / GENERATION}: eos_token_id",
        named,
        "token ids",
    )
    ends = dict.fromkeys((*llama.eos_token_ids, *named, *end_tokens(tokenizer)))
    known = [end for end in ends if isinstance(end, int) and 0 <= end < llama.vocab_size]
    return dataclasses.replace(llama, eos_token_ids=tuple(known))


def scores(folder: str | Path) -> dict[str, Any]:
    """Reads the scores of a run so far: results.json and every eval-*.json, by file name.

    Raises:
        ValueError: a file is damaged; the message names it.
    """
    files = sorted(Path(folder).glob("eval-*.json"))
    found: dict[str, Any] = {file.stem: read_evaluation(file) for file in files}
    results = Path(folder) / "results.json"
    if results.is_file() or recorded(Path(folder), results.name):
        found["results"] = read_results(results)
    return found


def read_evaluation(file: Path) -> dict[str, Any]:
    """Reads the results of `irqlora eval`.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    values = read_json(file)
    try:
        return check_seal(values)
    except ValueError as error:
        raise ValueError(f"{file}: damaged ({error})") from error


def read_results(file: Path) -> list[dict[str, Any]]:
    """Reads the rows of results.json.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged; the message names it.
    """
    check_recorded(file.parent, file.name)
    rows = parse_json(file)
    ok = isinstance(rows, list) and all(isinstance(row, dict) and "model" in row for row in rows)
    if not ok or any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError(f"{file}: damaged; expected a list of rows with a model and its scores")
    return rows
