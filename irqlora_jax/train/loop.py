"""The loop around the training step: evaluation, checkpoints, log, and the ways it can end."""

import contextlib
import dataclasses
import functools
import logging
import math
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from irqlora_jax.base.file import Base
from irqlora_jax.config import Config
from irqlora_jax.data import Example, ahead, make_batches
from irqlora_jax.evaluate import Question, evaluation_loss
from irqlora_jax.generate.samples import Samples, answer_samples
from irqlora_jax.machine import peak_memory
from irqlora_jax.model.llama import Llama
from irqlora_jax.runs.checkpoints import Checkpoints
from irqlora_jax.runs.state import TrainState
from irqlora_jax.sharding import put_batch
from irqlora_jax.text import readable_size
from irqlora_jax.train.metrics import MetricsLog
from irqlora_jax.train.step import make_step
from irqlora_jax.train.stop import Stop

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
    """All of a run but its weights. Nothing of it changes while training."""

    config: Config
    mesh: Mesh
    model: Llama
    optimizer: optax.GradientTransformation
    examples: list[Example]
    eval_examples: list[Example]
    questions: list[Question]
    samples: Samples


@dataclasses.dataclass(frozen=True)
class Ended:
    """How the loop ended.

    Attributes:
        state: the last one, of which there is a checkpoint.
        signal: that asked for it.
        early: in words, why before the last step.
    """

    state: TrainState
    signal: signal.Signals | None
    early: str | None


def train(
    job: Job, base: Base, state: TrainState, checkpoints: Checkpoints, log: MetricsLog
) -> Ended:
    """Goes on from `state` to the last step, to an early stop, or to a signal.

    Raises:
        FloatingPointError: loss, gradient or state are not finite. Such a state is never saved.
        OSError: a checkpoint or the log cannot be written.
    """
    from tqdm.auto import tqdm

    settings, first = job.config.train, int(state.step)
    batches = make_batches(
        *(job.examples, job.config.data, settings.batch_size, job.config.seed),
        job.model.config.max_position_embeddings,
    )
    advance = make_step(job.mesh, state, model=job.model, optimizer=job.optimizer, config=settings)
    bar = tqdm(
        total=settings.steps,
        initial=first,
        desc="finetuning",
        unit="step",
        disable=not job.config.log.progress,
    )

    def prepare(step: int) -> tuple[int, list[int], dict[str, Array]]:
        return step + 1, batches.indices(step), put_batch(job.mesh, batches[step])

    meter = _Meter(job, log, checkpoints, bar)
    early = _patience_is_over(job, log)
    steps = range(first, first if early else settings.steps)
    with bar, Stop() as stop, contextlib.closing(ahead(prepare, steps)) as prepared:
        for done, indices, batch in prepared:
            meter.mark_start()
            state, metrics = advance(state, base, batch)
            meter.put(done, indices, metrics)
            last = done == settings.steps
            evaluates = last or _is_due(settings.eval_every, done)
            saves = last or _is_due(settings.save_every, done)
            if not (evaluates or saves or stop.signal):
                continue
            with meter.paused():
                _require_finite(state, done, checkpoints)
                values = None
                if evaluates and (job.eval_examples or job.samples.prompts):
                    variables = {"params": state.adapters, "base": base}
                    values = stop.attempt(functools.partial(_evaluate, job, variables))
                loss = None
                if values is not None:
                    loss = values.get("eval_loss")
                    if loss is not None and not math.isfinite(loss):
                        raise FloatingPointError(
                            f"evaluation loss = {loss} at step {done}; {_last_good(checkpoints)}"
                        )
                    best = min((loss for _, loss in log.evaluations), default=math.inf)
                    log.write(done, values)
                    if loss is not None:
                        logger.info(f"step {done}: evaluation loss {loss:.4f}")
                        saves = saves or loss < best
                        early = _patience_is_over(job, log)
                # Asked once: a signal that comes behind this line ends the next step.
                ends = early is not None or stop.signal is not None
                if saves or ends:
                    checkpoints.save(done, state, loss)
            if ends:
                break
    return Ended(state, stop.signal, None if int(state.step) == settings.steps else early)


def _is_due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0


def _patience_is_over(job: Job, log: MetricsLog) -> str | None:
    """Why the run should stop early, if it should."""
    patience, losses = job.config.train.early_stopping, [loss for _, loss in log.evaluations]
    if not patience or not losses:
        return None
    place = int(np.argmin(losses))
    since = len(losses) - 1 - place
    if since < patience:
        return None
    step, loss = log.evaluations[place]
    return f"{since} evaluations without a loss below {loss:.4f} (step {step})"


def _evaluate(job: Job, variables: dict[str, Any]) -> dict[str, Any]:
    """Evaluation loss in nats per target, its speed, and answers to the samples."""
    values: dict[str, Any] = {}
    if job.eval_examples:
        settings, started = job.config.train, time.perf_counter()
        loss = evaluation_loss(
            job.model, variables, job.eval_examples, settings.batch_size, settings.loss_chunk
        )
        seconds = time.perf_counter() - started
        tokens = sum(len(example.tokens) for example in job.eval_examples)
        values = {
            "eval_loss": loss,
            "eval_seconds": round(seconds, 3),
            "eval_tokens_per_second": round(tokens / seconds, 1),
        }
    if job.samples.prompts:
        values["samples"] = answer_samples(job.samples, job.model, variables)
    return values


@jax.jit
def _is_finite(x: Array) -> Bool[Array, ""]:
    return jnp.isfinite(jax.device_put(x, jax.memory.Space.Device)).all()


def _all_finite(tree: Any) -> bool:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    # One by one: moments that lie in the memory of the host may not fit on the device together.
    return bool(jnp.stack([_is_finite(x) for x in floats]).all())


def _require_finite(state: TrainState, done: int, checkpoints: Checkpoints) -> None:
    if not _all_finite((state.adapters, state.opt_state)):
        raise FloatingPointError(
            f"adapters or optimizer state are not finite after step {done}; "
            f"{_last_good(checkpoints)}"
        )


def _last_good(checkpoints: Checkpoints) -> str:
    step = checkpoints.latest()
    return (
        "there is no checkpoint yet" if step is None else f"the last checkpoint is of step {step}"
    )


class _Meter:
    """Fetches, checks and logs the metrics of a step while the device works on the next one."""

    def __init__(self, job: Job, log: MetricsLog, checkpoints: Checkpoints, bar: Any) -> None:
        self._job, self._log, self._checkpoints, self._bar = job, log, checkpoints, bar
        self._waiting: tuple[int, list[int], dict[str, Array]] | None = None
        self._since: float | None = None  # the first step, which compiles, is not timed
        self._tokens = 0
        self._fetched = math.inf  # when the host last had to wait for the device
        self._idle = 0.0

    def mark_start(self) -> None:
        """To be called right before a step is started.

        If the step before has ended by then, the device has been idle: for how long cannot be told,
        but not before the host was last seen waiting for it. All of that counts.
        """
        if self._waiting is None or self._waiting[2]["loss"].is_ready():  # type: ignore[attr-defined]
            self._idle += max(0.0, time.perf_counter() - self._fetched)

    def put(self, step: int, indices: list[int], metrics: dict[str, Array]) -> None:
        """Takes the metrics of a step that has been started, and fetches those of the one before.

        Args:
            step: its number, from 1.
            indices: of the examples in its batch.
            metrics: of `train_step`.
        """
        self._fetch()
        self._waiting = step, indices, metrics

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Fetches everything; what takes time inside does not count for the speed."""
        self._fetch()
        started = time.perf_counter()
        yield
        self._fetched = time.perf_counter()
        if self._since is not None:
            self._since += self._fetched - started

    def _fetch(self) -> None:
        if self._waiting is None:
            return
        step, indices, metrics = self._waiting
        self._waiting = None
        values = {name: float(value) for name, value in metrics.items()}
        self._check(step, indices, values)
        self._bar.update()
        now = self._fetched = time.perf_counter()
        if self._since is None:
            self._since = now
        else:
            self._tokens += sum(len(self._job.examples[index].tokens) for index in indices)
        config = self._job.config
        if step % config.log.every and step != config.train.steps:
            return
        speed = ""
        if self._tokens:
            seconds = max(now - self._since, 1e-9)
            values["tokens_per_second"] = round(self._tokens / seconds, 1)
            values["device_share"] = round(max(0.0, 1 - self._idle / seconds), 4)
            speed = f", {values['tokens_per_second']:,.0f} tokens/s"
            speed += f", device {values['device_share']:.0%} busy"
        self._since, self._tokens, self._idle = now, 0, 0.0
        memory = peak_memory()
        values["peak_memory"] = memory
        self._bar.set_postfix_str(f"loss {values['loss']:.4f}{speed}, {readable_size(memory)}")
        self._log.write(step, values)

    def _check(self, step: int, indices: list[int], values: dict[str, float]) -> None:
        # In float16 a step that overflows changes nothing, as long as the scale can still fall.
        if values.get("loss_scale", 1.0) > 1:
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                batch = ", ".join(map(str, sorted(indices)))
                raise FloatingPointError(
                    f"{name} = {values[name]} at step {step}, in a batch of the training examples "
                    f"{batch} (counted from 0); {_last_good(self._checkpoints)}"
                )
