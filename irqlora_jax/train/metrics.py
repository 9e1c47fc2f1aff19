"""Writes the metrics of the training as JSON lines, to TensorBoard and to Weights & Biases.

Every `log.every` steps:
    loss                nats per target of the batch, or DPO's loss
    grad_norm           norm of the gradient before clipping
    targets             number of tokens of the batch that count in the loss
    learning_rate       of the step (with float16, a step that overflows counts too)
    loss_scale          only with float16
    rewards/...         only with preference pairs: chosen, rejected, margins, accuracies
    tokens_per_second   since the previous line, without evaluations and checkpoints
    device_share        lower bound on the fraction of that time in which the device was busy: if a
                        step ended before the next one started, the device counts as idle since the
                        host last waited for it
    peak_memory         bytes, of the device, or of the process on a CPU
At evaluations: eval_loss (nats per target, or DPO's loss), eval_seconds, eval_tokens_per_second and
samples; with preference pairs also eval_rewards/...
"""

import dataclasses
import importlib
import json
import logging
import math
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from irqlora_jax.config import Config, LogConfig
from irqlora_jax.files.checksums import text_checksum
from irqlora_jax.files.small import write_text
from irqlora_jax.messages import ON_STDOUT
from irqlora_jax.text import read_text

Values = Mapping[str, Any]
"""Numbers by name, and optionally "samples": [{"prompt": text, "answer": text}, ...]."""

_FILE = "metrics.jsonl"
logger = logging.getLogger(__name__)


def check_packages(config: LogConfig) -> None:
    """Checks that the packages for the requested metrics are installed.

    Raises:
        ValueError: a package is not installed; the message says how to install it.
    """
    asked = (
        ("tensorboard", "tensorboardX", "SummaryWriter", "tb"),
        ("wandb", "wandb", "init", "wandb"),
    )
    for field, package, needed, extra in asked:
        value = getattr(config, field)
        if not value:
            continue
        try:
            module = importlib.import_module(package)
        except ImportError:
            module = None
        # A folder of this name, e.g. from an earlier wandb run, is importable as an empty package.
        if not hasattr(module, needed):
            raise ValueError(
                f"log.{field} = {value!r}: the package {package} is not installed; "
                f'`pip install "irqlora-jax[{extra}]"` installs it'
            )


class Sink(Protocol):
    """Another destination for metrics, besides the file."""

    name: str

    def write(self, step: int, values: Values) -> None:
        """Writes the values of a step."""

    def close(self) -> None:
        """Flushes and closes the destination."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    name = "TensorBoard"

    def __init__(self, folder: Path, step: int) -> None:
        # Drop events after the step that the run resumes from.
        purge = step + 1 if step else None
        writer = importlib.import_module("tensorboardX").SummaryWriter
        self._writer = writer(
            str(folder / "tensorboard"), purge_step=purge, filename_suffix=f".{step}"
        )

    def write(self, step: int, values: Values) -> None:
        """Writes numbers as scalars and samples as text."""
        for name, value in values.items():
            if name != "samples":
                self._writer.add_scalar(name, value, step)
        for index, sample in enumerate(values.get("samples", ())):
            text = f"{sample['prompt']}\n\n---\n\n{sample['answer']}"
            self._writer.add_text(f"samples/{index}", text, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases. RUN/wandb-id stores its id, so that a resumed run continues it."""

    name = "Weights & Biases"

    def __init__(self, folder: Path, config: Config) -> None:
        self._wandb = importlib.import_module("wandb")
        stored = folder / "wandb-id"
        if not stored.exists():
            write_text(stored, uuid.uuid4().hex[:8])
        self._run = self._wandb.init(
            project=config.log.wandb,
            id=stored.read_text(encoding="utf-8").strip(),
            resume="allow",
            name=folder.name,
            dir=str(folder),
            config=dataclasses.asdict(config),
        )

    def write(self, step: int, values: Values) -> None:
        """Writes numbers, and samples as a table."""
        values = dict(values)
        samples = values.pop("samples", None)
        if samples is not None:
            rows = [[sample["prompt"], sample["answer"]] for sample in samples]
            values["samples"] = self._wandb.Table(columns=["prompt", "answer"], data=rows)
        self._run.log(values, step=step)

    def close(self) -> None:
        """Sends the remaining data and ends the run of Weights & Biases."""
        self._run.finish()


def read_log(folder: Path, step: int) -> tuple[str, list[tuple[int, float]]]:
    """Reads the lines of metrics.jsonl up to a step, and from them steps and evaluation losses.

    A crash may leave an incomplete last line, which is dropped.

    Raises:
        ValueError: another line is damaged; the message names it.
    """
    file = folder / _FILE
    if not file.exists():
        return "", []
    kept, evaluations = [], []
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if number == len(lines) and line[:1] in (b"", b"{"):
            break
        try:
            text = line.decode()
            row = json.loads(text)
            done, loss = row["step"], row.get("eval_loss", 0.0)
            if not isinstance(done, int) or not isinstance(loss, float):
                raise ValueError("values of other types")
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{file}: line {number} is damaged; expected a JSON object with a step"
            ) from error
        if done <= step:
            kept.append(f"{text}\n")
            evaluations += [(done, loss)] if "eval_loss" in row else []
    return "".join(kept), evaluations


def check_log(
    folder: Path, step: int, losses: Mapping[int, float], checksum: str | None = None
) -> list[tuple[int, float]]:
    """Returns the evaluations up to a step, and checks that they have these losses of checkpoints.

    Lines without an evaluation loss do not affect the training. If one of them is missing or has
    changed, `checksum` (of the lines up to the step) tells, and a warning is shown.

    Raises:
        ValueError: metrics.jsonl is damaged or incomplete.
    """
    text, evaluations = read_log(folder, step)
    for done, loss in losses.items():
        if done <= step and (done, loss) not in evaluations:
            raise ValueError(
                f"{folder / _FILE}: no evaluation loss {loss} of step {done}, which the checkpoint "
                "of that step has; expected the whole file"
            )
    if checksum not in (None, text_checksum(text)):
        logger.warning(
            f"{folder / _FILE}: lines up to step {step} are missing or changed; the training goes "
            "on without them"
        )
    return evaluations


def _is_non_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


class MetricsLog:
    """Writes metrics.jsonl, one JSON object a line, and the other requested destinations.

    If another destination fails (e.g. the network), one warning is shown and it is not used again.
    """

    def __init__(
        self, folder: Path, step: int, config: Config | None = None, *, writes: bool = True
    ) -> None:
        """Opens the log, and drops lines of steps that will be repeated.

        Args:
            folder: of the run.
            step: step that the run resumes from.
            config: of the run, for `log` (default: the file alone).
            writes: False only remembers the evaluations, for processes beside the first.

        Raises:
            ValueError: a line of metrics.jsonl is damaged.
        """
        self._path, self._writes = folder / _FILE, writes
        self._sinks: list[Sink] = []
        text, self.evaluations = read_log(folder, step)
        if not writes:
            return
        if self._path.exists():
            write_text(self._path, text)
        if config is not None and config.log.tensorboard:
            self._add("TensorBoard", lambda: TensorBoard(folder, step))
        if config is not None and config.log.wandb:
            self._add("Weights & Biases", lambda: WeightsAndBiases(folder, config))

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        for sink in self._sinks:
            self._try(sink.name, sink.close)

    def write(self, step: int, values: Values) -> None:
        """Appends a line.

        Raises:
            OSError: the file cannot be written.
        """
        if "eval_loss" in values:
            self.evaluations.append((step, values["eval_loss"]))
        if not self._writes:
            return
        # JSON has no nan and inf, e.g. for the gradient norm of an overflow in float16.
        known = {name: None if _is_non_finite(value) else value for name, value in values.items()}
        line = json.dumps({"step": step} | known, ensure_ascii=False) + "\n"
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise OSError(f"{self._path}: cannot be written ({error.strerror})") from error
        for sink in tuple(self._sinks):
            if not self._try(sink.name, lambda sink=sink: sink.write(step, values)):
                self._sinks.remove(sink)

    def checksum(self) -> str:
        """The checksum of all lines, for the checkpoint that is saved after them."""
        return text_checksum(read_text(self._path) if self._path.exists() else "")

    def _add(self, name: str, make: Callable[[], Sink]) -> None:
        self._try(name, lambda: self._sinks.append(make()))

    def _try(self, name: str, action: Callable[[], Any]) -> bool:
        try:
            action()
        except Exception as error:
            # Leave out the text of the error: it may contain request headers with a key.
            failure = type(error).__name__
            text = f"{name} failed ({failure}); the run continues, and {self._path} has everything"
            logger.warning(text, extra=ON_STDOUT)
            return False
        return True
