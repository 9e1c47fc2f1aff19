"""A whole run: reads, quantizes, finetunes, evaluates and saves.

Every process does all of it, on its part of the mesh. The first one writes the files, except for
the checkpoints, which all write.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from irqlora_jax.base.file import Base, read_base, save_base
from irqlora_jax.base.make import load_fitted
from irqlora_jax.base.storage import abstract_base, measure_base
from irqlora_jax.config import Config, with_base_settings
from irqlora_jax.data import longest_row
from irqlora_jax.evaluate.scores import Row, Scorer, baselines, table
from irqlora_jax.machine import fastest_dtype, installed_version
from irqlora_jax.messages import progress_bar, shows_messages
from irqlora_jax.processes import (
    check_agreement,
    check_folder_seen,
    first_only,
    is_first,
    together,
    wait_for_all,
)
from irqlora_jax.quant.budget import FIT
from irqlora_jax.quant.matmul import with_preferred_layout
from irqlora_jax.report.run_data import metric_curve, read_metrics
from irqlora_jax.report.write import save_environment, try_to_write
from irqlora_jax.runs.checkpoint_files import check_end, forget_end, record_end
from irqlora_jax.runs.checkpoints import Checkpoints
from irqlora_jax.runs.folder import (
    BASE_FILE,
    KEPT_LAYERS,
    RESULTS_FILE,
    Fingerprint,
    check_data,
    check_folder,
    check_space,
    fingerprint,
    save_config,
    save_data,
    settings_by_name,
)
from irqlora_jax.runs.load import (
    check_model,
    is_base,
    read_results,
)
from irqlora_jax.runs.lock import LOCK_FILE, locked
from irqlora_jax.runs.quantize import (
    Errors,
    describe_errors,
    link_base,
    quantize_base,
    save_survey,
    save_tokenizer,
)
from irqlora_jax.runs.recorded import write_recorded
from irqlora_jax.runs.state import TrainState as TrainState
from irqlora_jax.runs.state import init_state as init_state
from irqlora_jax.runs.state import learning_rate as learning_rate
from irqlora_jax.runs.state import make_optimizer as make_optimizer
from irqlora_jax.runs.state import make_state as make_state
from irqlora_jax.train.describe import describe, next_commands
from irqlora_jax.train.initial import check_start, read_start
from irqlora_jax.train.job import Job, check_warmup, read_job, with_chosen_rules
from irqlora_jax.train.loop import early_stop_reason, train
from irqlora_jax.train.metrics import MetricsLog, check_log, check_packages
from irqlora_jax.train.step import sharded_state as sharded_state
from irqlora_jax.train.step import train_step as train_step

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunResult:
    """Result of `run`.

    Attributes:
        folder: of the run.
        steps: total number of optimizer steps done.
        best: step of the checkpoint with the best evaluation loss; None without evaluations.
        rows: one row per model (full precision, quantized, finetuned), as in results.json.
    """

    folder: Path
    steps: int
    best: int | None
    rows: tuple[Row, ...]


@shows_messages
def run(
    config: Config,
    *,
    resume_from: int | None = None,
    fit: Callable[[Config], int] | None = None,
) -> RunResult:
    """Quantizes, finetunes, evaluates and saves. Resumes an earlier run in the same folder.

    The first SIGINT or SIGTERM ends the training after the current step, with a checkpoint. The
    second one ends it at once. A finished run is left as it is.

    Args:
        config: configuration of the run.
        resume_from: step of the checkpoint to go on from (default: the newest one). Checkpoints and
            metrics of later steps are deleted.
        fit: computes the size of the largest base that fits, in bytes, for `quant.budget` fit
            (`plan.fit.largest_base`).

    Raises:
        ValueError, OSError: bad input; the message is one sentence, and nothing is overwritten. A
            full disk during the training is also an OSError.
        FloatingPointError: the training diverged.
        SystemExit: a signal ended the training; 128 + its number (SIGINT: 130, SIGTERM: 143).
    """
    check_packages(config.log)
    dtype = config.train.compute_dtype or fastest_dtype(jax.devices()[0])
    train = dataclasses.replace(config.train, compute_dtype=dtype)
    config = with_base_settings(dataclasses.replace(config, train=train))
    folder = Path(config.output_dir)
    versions = {f"version of {name}": installed_version(name) for name in ("irqlora-jax", "jax")}
    check_agreement(versions | settings_by_name(config) | {"resume_from": resume_from})
    if not is_first():
        quiet = dataclasses.replace(config.log, progress=False, tensorboard=False, wandb=None)
        config = dataclasses.replace(config, log=quiet)
    # Before anything is written there, the file of the lock included.
    together(lambda: check_folder(folder, config))
    with contextlib.ExitStack() as held:
        first_only(lambda: held.enter_context(locked(folder)))
        check_folder_seen(folder / LOCK_FILE, "output_dir")
        result = _run_locked(config, folder, resume_from, fit)
        wait_for_all()
        return result


def _run_locked(
    config: Config,
    folder: Path,
    resume_from: int | None,
    fit: Callable[[Config], int] | None,
) -> RunResult:
    stored, job, limit, data = together(lambda: _prepare(config, folder, resume_from, fit))
    resumed = stored is not None
    if config.quant.budget is not None:
        job = with_chosen_rules(job, config.quant, limit)
    config = job.config
    check_agreement({f"data.{name}": value for name, value in data.items()})
    with jax.set_mesh(job.mesh):
        started = time.perf_counter()
        base, pairs, survey = _read_base(job, folder if resumed else config.model)
        seconds = None if resumed or is_base(config.model) else time.perf_counter() - started
        if not resumed:
            try:
                with progress_bar("Writing the base", show=config.log.progress):
                    _begin_folder(folder, job, base, pairs, survey, data)
            except OSError as error:
                if error.strerror is None:  # its message is already a sentence
                    raise
                reason = f"cannot be written ({error.strerror})"
                raise OSError(f"output_dir = '{folder}': {reason}") from error
        del pairs
        # The layout changes only in memory, not in the file.
        base = with_preferred_layout(base, config.train.matmul)
        logger.info(describe(job, base))
        return _finetune(job, base, folder, seconds, stored, resume_from)


def _prepare(
    config: Config,
    folder: Path,
    resume_from: int | None,
    fit: Callable[[Config], int] | None,
) -> tuple[Config | None, Job, int | None, Fingerprint]:
    """Reads and checks everything before the weights. Returns the configuration of an earlier run
    in the folder, the job, the limit of `quant.budget`, and the fingerprint of the data."""
    stored = check_folder(folder, config)
    resumed = stored is not None
    if not resumed:
        if resume_from is not None:
            raise ValueError(f"resume_from = {resume_from}: no run in '{folder}'; expected null")
        if config.train.epochs is None:
            check_warmup(config)
        check_model(config)
        check_start(config)
    elif stored.model != config.model:
        logger.info(f"model = {config.model!r}: not read; the run has its base of {stored.model!r}")
    limit = fit(config) if fit is not None and config.quant.budget == FIT else None
    job = read_job(config, folder if resumed else config.model, limit)
    if not resumed:
        check_warmup(job.config)
    data = fingerprint(job.examples, job.eval_examples, job.parts)
    if resumed:
        check_data(folder, job.config, data)
    elif not is_base(config.model):
        # A budget has rules of about its size here.
        size = measure_base(abstract_base(job.model.config, job.config.quant))
        kept = 0 if job.calibrate is None else size.total - size.rest
        check_space(folder, size.total + kept)
    return stored, job, limit, data


def _finetune(
    job: Job,
    base: Base,
    folder: Path,
    quantize_seconds: float | None,
    stored: Config | None,
    resume_from: int | None,
) -> RunResult:
    config, model = job.config, job.model
    offload = config.train.offload_optimizer
    init = functools.partial(init_state, model, job.optimizer, config.seed)
    splits = config.adapter.splits
    arrays = () if config.adapter.chosen.from_weight is None else (None, base)
    state = sharded_state(job.mesh, init, offload, *arrays, splits=splits)
    with Checkpoints(folder, config.train.keep_checkpoints) as checkpoints:
        latest = checkpoints.latest()
        if resume_from is not None:
            latest = checkpoints.find(resume_from, "resume_from")
        else:
            check_end(folder)
        if latest is not None:
            state = checkpoints.restore(latest, state)
            checkpoints.check_losses(latest)
        first = latest or 0  # step 0 is LoftQ's initial adapter
        evaluations = check_log(folder, first, checkpoints.losses(), checkpoints.log(first))
        if stored is not None and resume_from is None:
            finished = _finished(job, stored, folder, first, evaluations)
            if finished is not None:
                return dataclasses.replace(finished, best=checkpoints.best())
        if resume_from is not None:
            checkpoints.drop_after(first)

        def begin() -> None:
            if stored not in (None, job.stored_config):
                save_config(folder, job.stored_config)
            forget_end(folder)
            save_environment(folder, job.mesh)

        first_only(begin)
        if first > 0:
            logger.info(f"resuming from step {first} of {folder}")
        reference = None
        if job.preference and config.adapter.start_title:
            reference = checkpoints.restore_adapters(0, state.adapters)
        started = time.perf_counter()
        with MetricsLog(folder, first, config, writes=is_first()) as log:
            ended = train(job, base, state, checkpoints, log, reference)
        checkpoints.wait()
        seconds = time.perf_counter() - started
        state, step = ended.state, int(ended.state.step)
        if ended.signal is not None:
            logger.info(
                f"{ended.signal.name}: ended after step {step} of {config.train.total_steps}, "
                f"saved in {folder}; the same command resumes the run"
            )
            raise SystemExit(128 + ended.signal)
        if ended.early is not None:
            logger.info(
                f"ended early, after step {step} of {config.train.total_steps}: {ended.early}"
            )
        best, loss = checkpoints.best(), checkpoints.loss(step)
        scorer = Scorer(
            # DPO's loss compares with the base of the run, so it says nothing of other bases.
            [] if job.preference else job.eval_examples,  # type: ignore[arg-type]
            job.questions,
            config.train.rows,
            longest_row(config.data, model.config.max_position_embeddings),
            config.train.loss_chunk,
            config.log.progress,
        )
        rows = []
        if config.evaluate.baselines:
            start = None
            if config.adapter.start_title:
                start = checkpoints.restore(0, state).adapters
            given = quantize_seconds, start, job.calibrate
            rows = baselines(config, model, base, job.mesh, scorer, *given)
        name = f"{rows[-1].model}, finetuned" if rows else "finetuned"
        variables = {"params": state.adapters, "base": base}
        row = scorer.row(name, model, variables, seconds, loss)
        rows.append(dataclasses.replace(row, training_loss=_last_loss(folder)))
        if best not in (None, step):
            variables["params"] = checkpoints.restore(best, state).adapters
            name = f"{name}, best (step {best})"
            rows.append(scorer.row(name, model, variables, None, checkpoints.loss(best)))

    def end() -> None:
        record_end(folder, step)
        scores = json.dumps([dataclasses.asdict(row) for row in rows], indent=1)
        write_recorded(folder, RESULTS_FILE, scores)
        logger.info(table(rows))
        try_to_write(folder)
        logger.info(next_commands(config))

    first_only(end)
    return RunResult(folder, step, best, tuple(rows))


def _last_loss(folder: Path) -> float | None:
    """The last loss of the training in metrics.jsonl. The file may not show in other processes."""
    if not is_first():
        return None
    losses = metric_curve(read_metrics(folder / "metrics.jsonl"), "loss", sys.maxsize)[1]
    return losses[-1] if losses else None


def _finished(
    job: Job, stored: Config, folder: Path, step: int, evaluations: Sequence[tuple[int, float]]
) -> RunResult | None:
    """Says why there is nothing to do and returns the result of the run, or None if there is.

    Raises:
        ValueError: results.json is damaged.
    """
    steps, file = job.config.train.total_steps, folder / RESULTS_FILE
    early = early_stop_reason(job, evaluations)
    if step > steps:
        reason = f"train.steps = {steps}: the run is at step {step} already"
    elif not file.is_file() or job.config.evaluate != stored.evaluate:
        return None  # it still has to be scored
    elif step == steps:
        reason = f"finished, {step} of {steps} steps"
    elif early is not None:
        reason = f"ended early, after step {step} of {steps}: {early}"
    else:
        return None
    rows = read_results(file) if file.is_file() else []
    try:
        result = RunResult(folder, step, None, tuple(Row(**row) for row in rows))
    except TypeError as error:
        raise ValueError(f"{file}: damaged; expected rows of scores") from error
    logger.info(f"{folder}: {reason}; nothing is changed, and more train.steps would go on")
    return result


def _read_base(job: Job, source: str | Path) -> tuple[Base, Base | None, dict[str, Any] | None]:
    """Returns the base, the adapters that a new run starts from (None: new ones), and the survey
    of the quantization (only if this run makes the base)."""
    config, pairs, survey = job.config, None, None
    progress = config.log.progress
    options: dict[str, Any] = {"mesh": job.mesh, "progress": progress}
    options |= {"calibrate": job.calibrate, "keep": Path(config.output_dir) / KEPT_LAYERS}
    if config.adapter.source is not None and source == config.model:
        pairs = read_start(config, job.model)  # refuse a wrong adapter before the base is made
    if is_base(source):
        with progress_bar("Loading the base", show=progress):
            base, _ = read_base(Path(source) / BASE_FILE, job.mesh)
    elif config.adapter.start.fit is not None:
        errors: Errors = {}

        def watch(layer: int, name: str, *rest: Any) -> None:
            if rest[-1] is not None:
                errors[layer, name] = rest[-1]

        key, options["watch"] = jax.random.key(config.seed), watch
        base, pairs, _ = load_fitted(source, config.quant, config.adapter, key, **options)
        survey = describe_errors(job.calibrate, errors) or None
    else:
        base, _, survey = quantize_base(source, config.quant, **options)
    return *jax.block_until_ready((base, pairs)), survey


def _begin_folder(
    folder: Path,
    job: Job,
    base: Base,
    pairs: Base | None,
    survey: dict[str, Any] | None,
    data: Fingerprint,
) -> None:
    config = job.config

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # from an interrupted start
        save_tokenizer(job.samples.tokenizer, config.model, folder)
        if is_base(config.model):
            link_base(config.model, folder)

    def end() -> None:
        save_data(folder, data)
        # Write the configuration last: it marks a folder that can be resumed.
        save_config(folder, job.stored_config)
        shutil.rmtree(folder / KEPT_LAYERS, ignore_errors=True)

    first_only(begin)
    if not is_base(config.model):
        file, fitted = folder / BASE_FILE, config.adapter.start.fit is not None
        used, llama = (survey or {}).get("calibrate"), job.model.config
        quant, source = config.quant, config.model
        save_base(file, base, llama, quant, source, fitted=fitted, calibrate=used)
        first_only(lambda: save_survey(folder, survey))
    if pairs is not None:
        _save_start(folder, job, pairs, base)
    first_only(end)


def _save_start(folder: Path, job: Job, pairs: Base, base: Base) -> None:
    """Saves the initial adapters as the checkpoint of step 0: a resumed run does not make them
    again."""
    config = job.config
    init = functools.partial(init_state, job.model, job.optimizer, config.seed)
    splits, offload = config.adapter.splits, config.train.offload_optimizer
    arrays = (pairs,) if config.adapter.chosen.from_weight is None else (pairs, base)
    state = sharded_state(job.mesh, init, offload, *arrays, splits=splits)
    with Checkpoints(folder, config.train.keep_checkpoints) as checkpoints:
        checkpoints.save(0, state)
