"""Runs the training loop: steps, evaluation, checkpoints, metrics, early stopping and signals."""

import contextlib
import dataclasses
import functools
import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.method import LEARNED
from irqlora_jax.base.file import Base
from irqlora_jax.data import prefetch
from irqlora_jax.evaluate import evaluation_loss
from irqlora_jax.evaluate.preference import preference_scores
from irqlora_jax.generate.samples import answer_samples
from irqlora_jax.machine import peak_memory
from irqlora_jax.messages import progress_bar
from irqlora_jax.model.dpo import ACCURACY, MARGIN
from irqlora_jax.model.tree import LAYERS
from irqlora_jax.processes import fetch, highest
from irqlora_jax.runs.checkpoints import Checkpoints
from irqlora_jax.runs.state import TrainState
from irqlora_jax.sharding import put_batch
from irqlora_jax.text import readable_size
from irqlora_jax.train.job import Job, check_tokens
from irqlora_jax.train.metrics import MetricsLog
from irqlora_jax.train.step import make_step
from irqlora_jax.train.stop import Stop

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LoopResult:
    """Result of the loop.

    Attributes:
        state: the final state, which is saved as a checkpoint.
        signal: the signal that ended the loop, if any.
        early: reason of an early stop, if any.
    """

    state: TrainState
    signal: signal.Signals | None
    early: str | None


def train(
    job: Job,
    base: Base,
    state: TrainState,
    checkpoints: Checkpoints,
    log: MetricsLog,
    reference: dict[str, Any] | None = None,
) -> LoopResult:
    """Trains from `state` to the last step, an early stop, or a signal.

    Args:
        job: the run.
        base: the frozen weights.
        state: the state to start from.
        checkpoints: of the run.
        log: of the run.
        reference: for preference pairs, as for `train_step`.

    Raises:
        FloatingPointError: loss, gradient or state is not finite. Such a state is never saved.
        OSError: a checkpoint or the log cannot be written.
    """
    settings, first = job.config.train, int(state.step)
    steps, batches = settings.total_steps, job.batches
    how: Any = {"model": job.model, "optimizer": job.optimizer, "config": settings}
    advance = make_step(job.mesh, state, **how, preference=job.preference)
    show = job.config.log.progress
    progressing = progress_bar("finetuning", steps, "step", show=show, initial=first)

    def prepare(step: int) -> tuple[int, list[int], dict[str, Array]]:
        batch = batches[step]
        if job.config.data.streaming:
            check_tokens(job.config, job.model.config, int(batch["tokens"].max()))
        return step + 1, batches.indices(step), put_batch(job.mesh, batch)

    early = early_stop_reason(job, log.evaluations)
    remaining = range(first, first if early else steps)
    with (
        progressing as bar,
        Stop() as stop,
        contextlib.closing(prefetch(prepare, remaining)) as prepared,
    ):
        meter, ending = _Meter(job, log, checkpoints, bar), _Ending(stop, job.mesh)
        bar.set_description_str("compiling the training step", refresh=False)
        for done, indices, batch in prepared:
            meter.mark_start()
            state, metrics = advance(state, base, batch, reference)
            meter.put(done, indices, metrics)
            ending.note()
            last = done == steps
            evaluates = last or _is_due(settings.eval_every, done)
            saves = last or _is_due(settings.save_every, done)
            if not (evaluates or saves or ending.signal):
                continue
            with meter.paused():
                _require_finite(state, done, checkpoints)
                values = None
                if evaluates and (job.eval_examples or job.samples.prompts):
                    variables = {"params": state.adapters, "base": base}
                    values = stop.attempt(functools.partial(_evaluate, job, variables, reference))
                loss = None
                if values is not None:
                    loss = values.get("eval_loss")
                    if loss is not None and not math.isfinite(loss):
                        raise FloatingPointError(
                            f"evaluation loss = {loss} at step {done}; "
                            f"{_last_checkpoint(checkpoints)}"
                        )
                    best = min((loss for _, loss in log.evaluations), default=math.inf)
                    log.write(done, values)
                    if loss is not None:
                        logger.info(f"step {done}: evaluation loss {loss:.4f}{_rewards(values)}")
                        saves = saves or loss < best
                        early = early_stop_reason(job, log.evaluations)
                if evaluates and job.model.adapter is not None:
                    numbers = learned(job.model.adapter, state.adapters)
                    if numbers:
                        log.write(done, numbers)
                # Read the signal only once: a later signal ends the next step.
                ends = early is not None or ending.signal is not None
                if saves or ends:
                    checkpoints.save(done, state, loss, log.checksum())
            if ends:
                break
    return LoopResult(state, ending.signal, None if int(state.step) == steps else early)


class _Ending:
    """The signal that ends the training, the same in all processes.

    A process alone reads its own at once. Several agree while the next step runs, so that nobody
    waits: they end one step later.
    """

    def __init__(self, stop: Stop, mesh: Mesh) -> None:
        self._stop, self._mesh = stop, mesh
        self._alone = jax.process_count() == 1
        self._waiting: Array | None = None
        self._agreed: signal.Signals | None = None

    def note(self) -> None:
        """Tells the other processes of a signal, and hears of theirs. Once a step."""
        if self._alone:
            return
        before, self._waiting = self._waiting, highest(int(self._stop.signal or 0), self._mesh)
        number = 0 if before is None else int(before)
        self._agreed = signal.Signals(number) if number else None

    @property
    def signal(self) -> signal.Signals | None:
        """The signal, if any."""
        return self._stop.signal if self._alone else self._agreed


def learned(adapter: AdapterConfig, adapters: dict[str, Any]) -> dict[str, float]:
    """What a method learned besides its update (`Method.learned`), as metrics.

    The names are learned/QUANTITY/PROJECTION/LAYER.
    """
    one = adapter.chosen.learned
    if one is None:
        return {}
    return {
        f"{LEARNED}{quantity}/{name}/{layer}": float(value)
        for linears in adapters[LAYERS].values()
        for name, leaves in linears.items()
        for quantity, values in jax.vmap(one)(leaves).items()
        for layer, value in enumerate(fetch(values))
    }


def _is_due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0


def early_stop_reason(job: Job, evaluations: Sequence[tuple[int, float]]) -> str | None:
    """Returns why the run should stop early, given steps and evaluation losses, or None."""
    patience, losses = job.config.train.early_stopping, [loss for _, loss in evaluations]
    if not patience or not losses:
        return None
    best = int(np.argmin(losses))
    since = len(losses) - 1 - best
    if since < patience:
        return None
    step, loss = evaluations[best]
    return f"{since} evaluations without a loss below {loss:.4f} (step {step})"


def _evaluate(
    job: Job, variables: dict[str, Any], reference: dict[str, Any] | None
) -> dict[str, Any]:
    """Computes the evaluation loss in nats per target, its speed, and answers to the samples.

    Of preference pairs: DPO's loss, and the rewards.
    """
    values: dict[str, Any] = {}
    if job.eval_examples:
        settings, started = job.config.train, time.perf_counter()
        sizes = {"batch_size": settings.rows, "chunk": settings.loss_chunk}
        if job.preference:
            pairs: Any = job.eval_examples
            how: Any = sizes | {"reference": reference}
            scores = preference_scores(job.model, variables, pairs, settings.dpo, **how)
            values = {f"eval_{name}": value for name, value in scores.items()}
        else:
            examples: Any = job.eval_examples
            values = {"eval_loss": evaluation_loss(job.model, variables, examples, **sizes)}
        seconds = time.perf_counter() - started
        tokens = sum(len(example.tokens) for example in job.eval_examples)
        values |= {
            "eval_seconds": round(seconds, 3),
            "eval_tokens_per_second": round(tokens / seconds, 1),
        }
    if job.samples.prompts:
        values["samples"] = answer_samples(job.samples, job.model, variables)
    return values


def _rewards(values: Mapping[str, float]) -> str:
    """The rewards of pairs for a line of the log; "" without them."""
    margin, accuracy = (values.get(f"eval_{name}", values.get(name)) for name in (MARGIN, ACCURACY))
    if margin is None or accuracy is None:
        return ""
    return f", margin {margin:.3f}, accuracy {accuracy:.0%}"


@jax.jit
def _is_finite(x: Array) -> Bool[Array, ""]:
    return jnp.isfinite(jax.device_put(x, jax.memory.Space.Device)).all()


def _all_finite(tree: Any) -> bool:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    # One by one: offloaded moments may not fit on the device together.
    return bool(jnp.stack([_is_finite(x) for x in floats]).all())


def _require_finite(state: TrainState, done: int, checkpoints: Checkpoints) -> None:
    if not _all_finite((state.adapters, state.opt_state)):
        raise FloatingPointError(
            f"adapters or optimizer state are not finite after step {done}; "
            f"{_last_checkpoint(checkpoints)}"
        )


def _last_checkpoint(checkpoints: Checkpoints) -> str:
    step = checkpoints.latest()
    return (
        "there is no checkpoint yet" if step is None else f"the last checkpoint is of step {step}"
    )


class _Meter:
    """Fetches, checks and logs the metrics of a step while the device computes the next one."""

    def __init__(self, job: Job, log: MetricsLog, checkpoints: Checkpoints, bar: Any) -> None:
        self._job, self._log, self._checkpoints, self._bar = job, log, checkpoints, bar
        self._waiting: tuple[int, list[int], dict[str, Array]] | None = None
        self._since: float | None = None  # not set in the first step, which compiles
        self._tokens = 0
        self._fetched = math.inf  # when the host last waited for the device
        self._idle = 0.0

    def mark_start(self) -> None:
        """Adds the idle time of the device. Call it right before a step starts.

        If the previous step has already ended, the device is idle. We only know an upper bound on
        the idle time: since the host last waited for the device. Count all of it.
        """
        if self._waiting is None or self._waiting[2]["loss"].is_ready():  # type: ignore[attr-defined]
            self._idle += max(0.0, time.perf_counter() - self._fetched)

    def put(self, step: int, indices: list[int], metrics: dict[str, Array]) -> None:
        """Stores the metrics of a started step, and fetches the metrics of the previous step.

        Args:
            step: number of the step, from 1.
            indices: indices of the examples in its batch.
            metrics: metrics of `train_step`.
        """
        self._fetch()
        self._waiting = step, indices, metrics

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Fetches all metrics. The time inside of this context does not count for the speed."""
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
        self._bar.set_description_str("finetuning", refresh=False)
        self._bar.update()
        now = self._fetched = time.perf_counter()
        if self._since is None:
            self._since = now
        else:
            self._tokens += sum(len(self._job.examples[index].tokens) for index in indices)
        config = self._job.config
        if step % config.log.every and step != config.train.total_steps:
            return
        speed = ""
        if self._tokens:
            seconds = max(now - self._since, 1e-9)
            values["tokens_per_second"] = round(self._tokens / seconds, 1)
            values["device_share"] = round(max(0.0, 1 - self._idle / seconds), 4)
            speed = f", {values['tokens_per_second']:,.0f} tokens/s"
            if self._job.mesh.devices.flat[0].platform != "cpu":
                speed += f", device {values['device_share']:.0%} busy"
        self._since, self._tokens, self._idle = now, 0, 0.0
        memory = peak_memory()
        values["peak_memory"] = memory
        self._bar.set_postfix_str(
            f"loss {values['loss']:.4f}{_rewards(values)}{speed}, {readable_size(memory)}", False
        )
        self._log.write(step, values)

    def _check(self, step: int, indices: list[int], values: dict[str, float]) -> None:
        # In float16 an overflow only skips the step, as long as the loss scale can be halved.
        if values.get("loss_scale", 1.0) > 1:
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                batch = ", ".join(map(str, sorted(indices)))
                raise FloatingPointError(
                    f"{name} = {values[name]} at step {step}, in a batch of the training examples "
                    f"{batch} (counted from 0); {_last_checkpoint(self._checkpoints)}"
                )
