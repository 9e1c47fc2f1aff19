"""`irqlora quantize`: makes a base that many runs share."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from irqlora_jax.base.budget import BUDGET_FILE, choose_rules, planned_rules
from irqlora_jax.base.file import Base, save_base
from irqlora_jax.base.layerwise import OutputErrors
from irqlora_jax.base.make import check_text, load_base
from irqlora_jax.base.storage import abstract_base, measure_base
from irqlora_jax.base.survey import Surveyed, summarize, summarize_outputs, survey
from irqlora_jax.config import QuantizeConfig
from irqlora_jax.data.calibrate import CalibrationRows, read_calibration
from irqlora_jax.files.hub import load_tokenizer, read_config, snapshot
from irqlora_jax.messages import progress_bar, shows_messages
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.runs.folder import (
    BASE_FILE,
    BASE_START,
    GENERATION,
    KEPT_LAYERS,
    SURVEY_FILE,
    TOKENIZER,
    check_space,
    check_writable,
)
from irqlora_jax.runs.lock import locked
from irqlora_jax.runs.recorded import check_recorded, forget, record, write_recorded
from irqlora_jax.sharding import MeshConfig, make_mesh
from irqlora_jax.text import readable_size

logger = logging.getLogger(__name__)


def link_base(source: str | Path, folder: Path) -> None:
    """Hard-links a base into the folder of a run, or else copies it. Also copies its survey and its
    budget.

    If the base is a symbolic link, links the file that it points to, as in the hub's cache. So the
    run keeps its weights when the symbolic link or its target is removed.
    """
    check_recorded(Path(source), SURVEY_FILE)
    if (Path(source) / SURVEY_FILE).is_file():
        shutil.copyfile(Path(source) / SURVEY_FILE, folder / SURVEY_FILE)
        record(folder, [SURVEY_FILE])
    if (Path(source) / BUDGET_FILE).is_file():
        shutil.copyfile(Path(source) / BUDGET_FILE, folder / BUDGET_FILE)
    aside = folder / f"{BASE_FILE}.part"
    aside.unlink(missing_ok=True)
    file = (Path(source) / BASE_FILE).resolve()  # os.link may link the symbolic link itself
    try:
        os.link(file, aside)
    except OSError:
        shutil.copyfile(file, aside)
    os.replace(aside, folder / BASE_FILE)


Errors = dict[tuple[int, str], OutputErrors]
"""Errors of the outputs by layer and projection."""


def quantize_base(
    source: str | Path,
    quant: QuantConfig,
    *,
    calibrate: CalibrationRows | None = None,
    keep: Path | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> tuple[Base, LlamaConfig, dict[str, Any] | None]:
    """Like `hf.load_base`, but also returns the survey of the weights (`base.survey.summarize`,
    with "calibrate" from `describe_errors`), or None if nothing is quantized."""
    found: list[Surveyed] = []
    errors: Errors = {}

    def watch(
        layer: int,
        name: str,
        weight: jax.Array,
        packed: QTensor,
        own: QuantConfig,
        outputs: OutputErrors | None,
    ) -> None:
        found.append(survey(layer, name, weight, packed, own))
        if outputs is not None:
            errors[layer, name] = outputs

    options: dict[str, Any] = {"mesh": mesh, "progress": progress, "watch": watch}
    base, llama = load_base(source, quant, calibrate=calibrate, keep=keep, **options)
    if not found:
        return base, llama, None
    return base, llama, {**summarize(found, quant), **describe_errors(calibrate, errors)}


def describe_errors(calibrate: CalibrationRows | None, errors: Errors) -> dict[str, Any]:
    """For quantization.json and the metadata of a base: which text was used, and "output_error"
    (`base.survey.summarize_outputs`). Empty without a text."""
    if calibrate is None or not errors:
        return {}
    return {
        "calibrate": {**calibrate.describe(), "output_error": summarize_outputs(errors)},
    }


def save_survey(folder: Path, summary: dict[str, Any] | None) -> None:
    """Writes quantization.json, unless the summary is None."""
    if summary is not None:
        write_recorded(folder, SURVEY_FILE, json.dumps(summary) + "\n")


@shows_messages
def quantize_model(config: QuantizeConfig) -> None:
    """Writes base.safetensors, quantization.json and tokenizer/ to a new folder that many runs can
    share.

    Raises:
        ValueError, OSError: bad input; the message is one sentence, and nothing is overwritten.
    """
    folder = Path(config.output_dir)
    left = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.exists() and (not folder.is_dir() or not left <= BASE_START):
        raise FileExistsError(f"output_dir = '{folder}': exists; expected a new folder")
    check_writable(folder)
    architecture = read_config(config.model)
    planned = planned_rules(config.model, architecture, config.quant)
    stored = measure_base(abstract_base(architecture, planned))
    kept = 0 if config.calibrate.data is None else stored.total - stored.rest
    check_space(folder, stored.total + kept)
    tokenizer = load_tokenizer(config.model)
    check_text(config.quant, None, config.calibrate)
    rows = read_calibration(config.calibrate, tokenizer, architecture.max_position_embeddings)
    with locked(folder):
        options: dict[str, Any] = {"calibrate": rows, "progress": config.progress}
        keep = folder / KEPT_LAYERS
        count = len(jax.devices())
        if rows is not None and count > 1:  # the devices share the rows
            options["mesh"] = make_mesh(MeshConfig(), count)
        quant = choose_rules(config.model, config.quant, folder, **options)
        base, llama, summary = quantize_base(config.model, quant, keep=keep, **options)
        save_tokenizer(tokenizer, config.model, folder)
        save_survey(folder, summary)
        # Write the base last: it marks a complete folder.
        with progress_bar("Writing the base", show=config.progress):
            used = (summary or {}).get("calibrate")
            file, source = folder / BASE_FILE, config.model
            save_base(file, base, llama, quant, source, calibrate=used)
        shutil.rmtree(keep, ignore_errors=True)
    size = readable_size((folder / BASE_FILE).stat().st_size)
    logger.info(
        f"{measure_base(base).bits:.2f} bits a weight, {size} in {folder}; next:\n"
        f"  irqlora train --config FILE --model {folder}"
    )


def save_tokenizer(tokenizer: Any, source: str | Path, folder: Path) -> None:
    """Writes FOLDER/tokenizer/, with the generation_config.json of `source` if it has one."""
    model = snapshot(source)
    if not (folder.exists() and model.samefile(folder)):
        # An interrupted start with another model may have left e.g. a chat template.
        shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
    tokenizer.save_pretrained(folder / TOKENIZER)
    for origin in (model, model / TOKENIZER):
        if (origin / GENERATION).is_file():
            shutil.copyfile(origin / GENERATION, folder / TOKENIZER / GENERATION)
    files = (path for path in (folder / TOKENIZER).rglob("*") if path.is_file())
    forget(folder, f"{TOKENIZER}/")
    record(folder, sorted(path.relative_to(folder).as_posix() for path in files))
