"""`irqlora quantize`: makes a base that many runs share."""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from irqlora_jax.base.budget import BUDGET_FILE, choose_rules, planned_rules
from irqlora_jax.base.file import Base, base_files, base_size, forget_base, save_base
from irqlora_jax.base.layerwise import OutputErrors
from irqlora_jax.base.make import check_text, load_base
from irqlora_jax.base.storage import abstract_base, measure_base
from irqlora_jax.base.survey import Surveyed, read_surveyed, summarize, summarize_outputs, survey
from irqlora_jax.config import QuantizeConfig
from irqlora_jax.data.calibrate import CalibrationRows, read_calibration
from irqlora_jax.files.hub import load_tokenizer, read_config, snapshot
from irqlora_jax.machine import installed_version
from irqlora_jax.messages import progress_bar, shows_messages
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.processes import (
    check_agreement,
    check_folder_seen,
    exchange,
    first_only,
    is_first,
    together,
)
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.runs.folder import (
    BASE_FILE,
    GENERATION,
    KEPT_LAYERS,
    SURVEY_FILE,
    TOKENIZER,
    check_space,
    check_writable,
    is_start,
)
from irqlora_jax.runs.lock import LOCK_FILE, locked
from irqlora_jax.runs.recorded import check_recorded, forget, record, write_recorded
from irqlora_jax.sharding import LINEAR_NAMES, MeshConfig, make_mesh
from irqlora_jax.text import readable_size

logger = logging.getLogger(__name__)


def link_base(source: str | Path, folder: Path) -> None:
    """Hard-links a base into the folder of a run, or else copies it. Also copies its survey and its
    budget.

    If a file is a symbolic link, links the file that it points to, as in the hub's cache. So the
    run keeps its weights when the symbolic link or its target is removed.
    """
    check_recorded(Path(source), SURVEY_FILE)
    if (Path(source) / SURVEY_FILE).is_file():
        shutil.copyfile(Path(source) / SURVEY_FILE, folder / SURVEY_FILE)
        record(folder, [SURVEY_FILE])
    if (Path(source) / BUDGET_FILE).is_file():
        shutil.copyfile(Path(source) / BUDGET_FILE, folder / BUDGET_FILE)
    files = base_files(Path(source))
    forget_base(folder / BASE_FILE)
    for file in files:  # the one that marks a base is the last
        aside = folder / f"{file.name}.part"
        aside.unlink(missing_ok=True)
        origin = file.resolve()  # os.link may link the symbolic link itself
        try:
            os.link(origin, aside)
        except OSError:
            shutil.copyfile(origin, aside)
        os.replace(aside, folder / file.name)


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
    if calibrate is None:
        found = _from_all(found)
    if not found:
        return base, llama, None
    return base, llama, {**summarize(found, quant), **describe_errors(calibrate, errors)}


def _from_all(own: list[Surveyed]) -> list[Surveyed]:
    """The measurements of all processes, each of which made other matrices. All processes."""
    if jax.process_count() == 1:
        return own
    texts = exchange(json.dumps([dataclasses.asdict(one) for one in own]))
    found = [read_surveyed(values) for text in texts for values in json.loads(text)]
    return sorted(found, key=lambda one: (one.layer, LINEAR_NAMES.index(one.name)))


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
    """Writes the base, quantization.json and tokenizer/ to a new folder that many runs can share.
    All processes; each makes a share of the matrices.

    Raises:
        ValueError, OSError: bad input; the message is one sentence, and nothing is overwritten.
    """
    folder = Path(config.output_dir)
    versions = {f"version of {name}": installed_version(name) for name in ("irqlora-jax", "jax")}
    check_agreement(versions | dataclasses.asdict(config))
    tokenizer, rows = together(lambda: _prepare(config, folder))
    count = len(jax.devices())
    options: dict[str, Any] = {"calibrate": rows, "progress": config.progress and is_first()}
    if count > 1 and (rows is not None or jax.process_count() > 1):
        options["mesh"] = make_mesh(MeshConfig(data=1, fsdp=count), count)
    with contextlib.ExitStack() as held:
        first_only(lambda: held.enter_context(locked(folder)))
        check_folder_seen(folder / LOCK_FILE, "output_dir")
        keep = folder / KEPT_LAYERS
        quant = choose_rules(config.model, config.quant, folder, **options)
        base, llama, summary = quantize_base(config.model, quant, keep=keep, **options)

        def begin() -> None:
            save_tokenizer(tokenizer, config.model, folder)
            save_survey(folder, summary)

        def end() -> None:
            shutil.rmtree(keep, ignore_errors=True)
            logger.info(
                f"{measure_base(base).bits:.2f} bits a weight, {readable_size(base_size(folder))} "
                f"in {folder}; next:\n  irqlora train --config FILE --model {folder}"
            )

        first_only(begin)
        # Write the base last: it marks a complete folder.
        with progress_bar("Writing the base", show=options["progress"]):
            used = (summary or {}).get("calibrate")
            file, source = folder / BASE_FILE, config.model
            save_base(file, base, llama, quant, source, calibrate=used)
        first_only(end)


def _prepare(config: QuantizeConfig, folder: Path) -> tuple[Any, CalibrationRows | None]:
    """Checks everything before the weights are read. Returns the tokenizer, and the text."""
    left = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.exists() and (not folder.is_dir() or not all(map(is_start, left))):
        raise FileExistsError(f"output_dir = '{folder}': exists; expected a new folder")
    check_writable(folder)
    architecture = read_config(config.model)
    planned = planned_rules(config.model, architecture, config.quant)
    stored = measure_base(abstract_base(architecture, planned))
    kept = 0 if config.calibrate.data is None else stored.total - stored.rest
    check_space(folder, stored.total + kept)
    tokenizer = load_tokenizer(config.model)
    check_text(config.quant, None, config.calibrate)
    length = architecture.max_position_embeddings
    return tokenizer, read_calibration(config.calibrate, tokenizer, length)


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
