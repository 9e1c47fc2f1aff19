"""Folders on disk as models that can be used: runs, quantized bases and Hugging Face folders."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from irqlora_jax import hf, report
from irqlora_jax.checkpoint import (
    Base,
    Checkpoints,
    is_loftq,
    load_base,
    read_base_config,
    read_source,
    save_base,
    write_text,
)
from irqlora_jax.config import Config, QuantConfig, QuantizeConfig
from irqlora_jax.folder import check_space, check_writable
from irqlora_jax.llama import Llama, LlamaConfig
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.quant.survey import Surveyed, summarize, survey
from irqlora_jax.step import init_state, make_optimizer
from irqlora_jax.storage import abstract_base, measure_base

BASE_FILE, TOKENIZER = "base.safetensors", "tokenizer"
SURVEY_FILE = "quantization.json"
_GENERATION = "generation_config.json"

Which = Literal["last", "best"] | int
"""A checkpoint: the newest, that of the best evaluation loss, or that of a step."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A model that is ready to use.

    Attributes:
        folder: where it was read from.
        config: of the run; None for a base or a Hugging Face folder.
        model: the architecture.
        variables: {"params": adapters, "base": base}.
        tokenizer: of transformers.
        step: of the checkpoint; None without one.
        source: the model that its base was made from; None where that is not known.
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
) -> Run:
    """Reads the folder of a run or of `irqlora quantize`, or a Hugging Face LLaMA as it is.

    Args:
        folder: which.
        adapter: False leaves the adapter of a run out: the quantized model before its finetune. One
            of LoftQ has the pair that it began with (step 0).
        checkpoint: which adapter of a run.
        compute_dtype: type of the activations (default: that of the run, else float32).

    Raises:
        FileNotFoundError: no such folder, or no such checkpoint in it.
        ValueError: damaged files, a folder of another kind, or no name of a checkpoint.
    """
    folder, checkpoint = Path(folder), read_checkpoint(checkpoint)
    if not (folder / BASE_FILE).is_file():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"run = '{folder}': no base.safetensors and no config.json there; accepted is the "
                "folder of a run, of irqlora quantize, or of a Hugging Face model"
            )
        base, llama = hf.load_base(folder, None)
        model = Llama(llama, compute_dtype=compute_dtype or "float32")
        variables = {"params": {}, "base": base}
        return Run(folder, None, model, variables, hf.load_tokenizer(folder), None, str(folder))
    tokenizer = hf.load_tokenizer(folder / TOKENIZER)
    config = None
    if (folder / "config.json").is_file():
        config = Config.load(folder / "config.json")
    base, llama = load_base(folder / BASE_FILE)
    source = read_source(folder / BASE_FILE)
    dtype = compute_dtype or (config and config.train.compute_dtype) or "float32"
    if config is not None and config.adapter.init == "loftq" and not adapter:
        adapter, checkpoint = True, 0
    if config is None or not adapter:
        model = Llama(llama, compute_dtype=dtype)
        return Run(folder, config, model, {"params": {}, "base": base}, tokenizer, None, source)
    model = Llama(llama, adapter=config.adapter, compute_dtype=dtype)
    with Checkpoints(folder) as checkpoints:
        step = checkpoints.find(checkpoint)
        optimizer = make_optimizer(config.train)
        like = jax.eval_shape(lambda: init_state(model, optimizer, config.seed))
        adapters = checkpoints.restore(step, like).adapters
    return Run(folder, config, model, {"params": adapters, "base": base}, tokenizer, step, source)


def read_checkpoint(value: str | int) -> Which:
    """A checkpoint as people write it: "last", "best" or a step, as a number or as text.

    Raises:
        ValueError: anything else.
    """
    if value == "last" or value == "best":
        return value
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f"checkpoint = {value!r}: accepted is last, best or the number of a step")


def is_base(source: str | Path) -> bool:
    """Whether `source` is a folder with a quantized base: of `irqlora quantize`, or of a run."""
    return (Path(source) / BASE_FILE).is_file()


def check_model(config: Config) -> None:
    """Refuses a quantized base that a new run cannot start from.

    Raises:
        ValueError: LoftQ is asked for, or the base was made by LoftQ for another run.
    """
    if not is_base(config.model):
        return
    file = Path(config.model) / BASE_FILE
    source = read_source(file)
    origin = "the model that it was made from" + (f" ('{source}')" if source else "")
    if config.adapter.init == "loftq":
        raise ValueError(
            f"adapter.init = 'loftq': needs the full-precision weights; model = '{config.model}' "
            f"holds a quantized base only; accepted is {origin}, which LoftQ quantizes itself"
        )
    if is_loftq(file):
        raise ValueError(
            f"model = '{config.model}': its base was quantized by LoftQ for the adapter of that "
            f"run, and is incomplete without it; accepted is {origin}, or a folder of irqlora "
            "quantize"
        )


def read_architecture(source: str | Path, quant: QuantConfig) -> LlamaConfig:
    """The architecture of a quantized base, of a Hugging Face folder or of a model on the hub.

    Raises:
        FileNotFoundError: no such model.
        ValueError: no float LLaMA, or a base that was quantized in another way than `quant`.
    """
    if not is_base(source):
        return hf.read_config(source)
    llama, stored = read_base_config(Path(source) / BASE_FILE)
    for field in dataclasses.fields(QuantConfig):
        asked, used = getattr(quant, field.name), getattr(stored, field.name)
        if asked != used:
            raise ValueError(
                f"quant.{field.name} = {asked!r}: the base in '{source}' is quantized with {used!r}"
            )
    return llama


def read_tokenizer(source: str | Path) -> Any:
    """The tokenizer that belongs to a model, as `hf.load_tokenizer`."""
    return hf.load_tokenizer(Path(source) / TOKENIZER if is_base(source) else source)


def link_base(source: str | Path, folder: Path) -> None:
    """Gives a run its base without a second copy, where the file system can, and its survey."""
    if (Path(source) / SURVEY_FILE).is_file():
        shutil.copyfile(Path(source) / SURVEY_FILE, folder / SURVEY_FILE)
    aside = folder / f"{BASE_FILE}.part"
    aside.unlink(missing_ok=True)
    try:
        os.link(Path(source) / BASE_FILE, aside)
    except OSError:
        shutil.copyfile(Path(source) / BASE_FILE, aside)
    os.replace(aside, folder / BASE_FILE)


def quantize_base(
    source: str | Path, quant: QuantConfig, *, mesh: Mesh | None = None, progress: bool = False
) -> tuple[Base, LlamaConfig, dict[str, Any] | None]:
    """`hf.load_base`, and what the quantization did to the weights: `quant.survey.summarize`, or
    None where nothing is quantized."""
    found: list[Surveyed] = []

    def watch(layer: int, name: str, weight: jax.Array, packed: QTensor) -> None:
        found.append(survey(layer, name, weight, packed, quant))

    base, llama = hf.load_base(source, quant, mesh=mesh, progress=progress, watch=watch)
    return base, llama, summarize(found, quant) if found else None


def save_survey(folder: Path, summary: dict[str, Any] | None) -> None:
    """Writes quantization.json, if there is anything to say."""
    if summary is not None:
        write_text(folder / SURVEY_FILE, json.dumps(summary) + "\n")


def quantize_model(config: QuantizeConfig, say: Callable[[str], None] = print) -> None:
    """Writes base.safetensors, quantization.json and tokenizer/ into a new folder, for many runs to
    share.

    Raises:
        ValueError, OSError: bad input, in one sentence; nothing is overwritten then.
    """
    folder = Path(config.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"output_dir = '{folder}': exists; accepted is a new folder")
    check_writable(folder)
    needed = measure_base(abstract_base(hf.read_config(config.model), config.quant)).total
    check_space(folder, needed)
    tokenizer = hf.load_tokenizer(config.model)
    base, llama, summary = quantize_base(config.model, config.quant, progress=config.progress)
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, config.model, folder)
    save_survey(folder, summary)
    # The base comes last: it marks a whole folder.
    save_base(folder / BASE_FILE, base, llama, config.quant, config.model)
    size = report.readable_size((folder / BASE_FILE).stat().st_size)
    say(
        f"{measure_base(base).bits:.2f} bits a weight, {size} in {folder}; next:\n"
        f"  irqlora train --config FILE --model {folder}"
    )


def save_tokenizer(tokenizer: Any, source: str | Path, folder: Path) -> None:
    """Writes FOLDER/tokenizer/, with the generation_config.json of `source` where it has one."""
    tokenizer.save_pretrained(folder / TOKENIZER)
    for origin in (hf.snapshot(source), hf.snapshot(source) / TOKENIZER):
        if (origin / _GENERATION).is_file():
            shutil.copyfile(origin / _GENERATION, folder / TOKENIZER / _GENERATION)


def scores(folder: str | Path) -> dict[str, Any]:
    """What was measured of a run so far: results.json and every eval-*.json, by file name."""
    files = sorted(Path(folder).glob("eval-*.json")) + sorted(Path(folder).glob("results.json"))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
