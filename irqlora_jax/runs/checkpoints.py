"""The checkpoints of a run: its training states by step.

orbax writes them. What we know of a state stands in orbax's `_CHECKPOINT_METADATA`: the evaluation
loss, a checksum of every array, and one of the lines of metrics.jsonl so far. Checkpoints of
earlier versions have no checksums.
"""

import contextlib
import dataclasses
import gc
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from irqlora_jax.files.checksums import checksums, seal
from irqlora_jax.processes import first_only
from irqlora_jax.runs.checkpoint_files import check_folders, check_path, read_metadata

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Kept:
    """Tells orbax to keep the newest checkpoints, the best one, and step 0 (LoftQ's initial
    adapter, a baseline for the finetuned one)."""

    newest: int
    losses: Mapping[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {0, *steps[-self.newest :], _best(self.losses)}
        return [step in kept for step in steps]


def _is_news(record: logging.LogRecord) -> bool:
    # Every orbax thread logs the full traceback of an error, which is raised later anyway.
    return not (record.exc_info and "orbax" in record.pathname)


def _best(losses: Mapping[int, float]) -> int | None:
    return min(sorted(losses), key=losses.__getitem__, default=None)


class Checkpoints:
    """The training states of a run by step, each with its evaluation loss if it was evaluated.

    Use it as a context manager. Its exit waits for pending writes.
    """

    def __init__(self, run: Path, keep: int | None = None) -> None:
        """Finds the existing checkpoints.

        Args:
            run: folder of the run.
            keep: number of newest checkpoints to keep besides the best one. Leftovers of an
                interrupted save are then deleted. None keeps everything, for reading.

        Raises:
            NotADirectoryError: a file in place of a folder.
        """
        import orbax.checkpoint as ocp

        check_path(run)
        check_folders(run / "checkpoints")
        self._ocp = ocp
        self._folder = (run / "checkpoints").absolute()
        self._losses: dict[int, float] = {}
        self._checksums: dict[int, Mapping[str, str]] = {}
        self._logs: dict[int, str | None] = {}
        self._damaged: dict[int, str] = {}  # steps without readable metadata, and why
        self._writing: int | None = None
        self._manager = ocp.CheckpointManager(
            self._folder,
            item_handlers=ocp.StandardCheckpointHandler(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=None if keep is None else _Kept(keep, self._losses),
                cleanup_tmp_directories=keep is not None,
            ),
        )
        for step in self._manager.all_steps():
            try:
                stored = read_metadata(self._folder / str(step))
            except (OSError, ValueError) as error:
                self._damaged[step] = str(error)
                continue
            self._checksums[step], self._logs[step] = stored.arrays, stored.log
            if stored.loss is not None:
                self._losses[step] = stored.loss

    def __enter__(self) -> "Checkpoints":
        logging.getLogger("absl").addFilter(_is_news)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            with self._explained(self._writing):
                self._manager.close()
        except OSError as error:
            if kind is None:
                raise
            logger.warning(str(error))  # the first error is raised
        finally:
            logging.getLogger("absl").removeFilter(_is_news)

    def latest(self) -> int | None:
        """The newest complete step."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step with the lowest evaluation loss; None if none was evaluated."""
        return _best(self._losses)

    def loss(self, step: int) -> float | None:
        """The evaluation loss of a checkpoint; None if it was not evaluated."""
        return self._losses.get(step)

    def log(self, step: int) -> str | None:
        """The checksum of the lines of metrics.jsonl up to a checkpoint; None if unknown."""
        return self._logs.get(step)

    def losses(self) -> dict[int, float]:
        """The evaluation losses of the checkpoints that were evaluated, by step."""
        return dict(self._losses)

    def find(self, which: Literal["last", "best"] | int, field: str = "checkpoint") -> int:
        """The step of a checkpoint. `field` is the setting that asks for it, for messages.

        Raises:
            FileNotFoundError: there is none, none of this step, or none with an evaluation loss.
            ValueError: a damaged checkpoint may be the best one.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise FileNotFoundError(f"{self._folder}: no checkpoint yet; use --baseline")
        if which == "last":
            return steps[-1]
        there = ", ".join(map(str, steps))
        if which == "best":
            self.check_losses()
            best = self.best()
            if best is None:
                raise FileNotFoundError(
                    f"checkpoint = best: none in {self._folder} has an evaluation loss (data.eval "
                    f"or data.eval_fraction); expected last or one of {there}"
                )
            return best
        if which not in steps:
            raise FileNotFoundError(f"{field} = {which}: not in {self._folder}; there are {there}")
        return which

    def check_losses(self, last: int | None = None) -> None:
        """Checks that the evaluation losses are known, up to step `last`: one of them is the best.

        Raises:
            ValueError: a checkpoint is damaged.
        """
        for step, reason in sorted(self._damaged.items()):
            if last is None or step <= last:
                raise ValueError(
                    f"{reason}; its evaluation loss, and so the best checkpoint, is unknown; "
                    f"expected a whole checkpoint, or no folder {self._folder / str(step)}"
                )

    def drop_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, the newest first."""
        dropped = [each for each in self._manager.all_steps() if each > step]

        def drop() -> None:
            for later in sorted(dropped, reverse=True):
                shutil.rmtree(self._folder / str(later))

        first_only(drop)
        for later in dropped:
            for known in (self._losses, self._checksums, self._logs, self._damaged):
                known.pop(later, None)
        self._manager.reload()

    def save(
        self, step: int, state: Any, loss: float | None = None, log: str | None = None
    ) -> None:
        """Writes a pytree of arrays in the background, then deletes old checkpoints.

        Args:
            step: of the state.
            state: the arrays.
            loss: evaluation loss of the state.
            log: checksum of the lines of metrics.jsonl so far.

        Raises:
            OSError: this checkpoint or the previous one could not be written.
        """
        self.wait()
        if loss is not None:
            self._losses[step] = loss
        self._checksums[step], self._logs[step] = checksums(state), log
        metadata = {"eval_loss": loss, "log": log, "arrays": self._checksums[step]}
        metadata = seal({name: value for name, value in metadata.items() if value is not None})
        with self._explained(step):
            self._manager.save(
                step, args=self._ocp.args.StandardSave(state), custom_metadata=metadata
            )
        self._writing = step

    def wait(self) -> None:
        """Waits until all writes are complete.

        Raises:
            OSError: the last checkpoint could not be written; earlier ones are unchanged.
        """
        with self._explained(self._writing):
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _explained(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax raises many types
            code = re.search(r"os_error_code='(\d+)'", str(error))
            known = os.strerror(int(code[1])) if code else getattr(error, "strerror", None)
            reason = known or " ".join(str(error).split())
            if step is not None:
                self._losses.pop(step, None)
            self._manager.reload()  # it lists the new one as saved and the old ones as deleted
            last = self.latest()
            kept = "there is no earlier one" if last is None else f"that of step {last} is intact"
            what = "the checkpoints" if step is None else f"the checkpoint of step {step}"
            raise OSError(
                f"{self._folder}: {what} could not be written ({reason}); {kept}"
            ) from error

    def restore_adapters(self, step: int, like: Any) -> Any:
        """Reads only the adapters of a state, into the structure of `like`.

        Raises:
            ValueError: as `restore`.
        """
        wanted = {"adapters": jax.tree.map(_abstract, like)}
        handler = self._ocp.PyTreeCheckpointHandler()

        def read(step: int) -> Any:
            arguments = self._ocp.args.PyTreeRestore(
                wanted,
                restore_args=self._ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            )
            folder: Any = self._folder / str(step) / "default"
            return handler.restore(folder, args=arguments)

        return self._restore(step, read)["adapters"]

    def restore(self, step: int, like: Any) -> Any:
        """Reads a state into the structure of `like` (arrays or their shapes).

        Raises:
            ValueError: the checkpoint is damaged, or has another structure or other shapes; the
                message names the newest whole one.
        """
        abstract = jax.tree.map(_abstract, like)

        def read(step: int) -> Any:
            return self._manager.restore(step, args=self._ocp.args.StandardRestore(abstract))

        return self._restore(step, read)

    def _restore(self, step: int, read: Callable[[int], Any]) -> Any:
        try:
            return self._read(step, read)
        except ValueError as error:
            whole = next(
                (other for other in self._others(step) if self._is_whole(other, read)), None
            )
            advice = "no other checkpoint can be read"
            if whole is not None:
                advice = (
                    f"the newest whole checkpoint is of step {whole}: train --resume_from {whole} "
                    f"goes on from it, --checkpoint {whole} uses it"
                )
            raise ValueError(f"{error}; {advice}") from error

    def _others(self, step: int) -> Iterator[int]:
        return (s for s in sorted(self._manager.all_steps(), reverse=True) if s != step)

    def _is_whole(self, step: int, read: Callable[[int], Any]) -> bool:
        try:
            self._read(step, read)
        except ValueError:
            return False
        return True

    def _read(self, step: int, read: Callable[[int], Any]) -> Any:
        """Reads a checkpoint and compares its checksums.

        Raises:
            ValueError: it is damaged.
        """
        if step in self._damaged:
            raise ValueError(self._damaged[step])
        folder = self._folder / str(step)
        state, reason = _attempt(lambda: read(step))
        if reason is not None:
            raise ValueError(f"{folder}: cannot be read ({reason})")
        stored = self._checksums[step]
        for name, found in checksums(state).items():
            if stored.get(name, found) != found:
                raise ValueError(f"{folder}: {name} is damaged (its checksum does not match)")
        return state


def _attempt(read: Callable[[], Any]) -> tuple[Any, str | None]:
    """Returns what `read` returns, or else why it fails.

    When reading fails, orbax leaves coroutines behind, and Python prints their tracebacks when it
    discards them. So they are discarded here, without a word.
    """
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        try:
            return read(), None
        except Exception as error:  # orbax and tensorstore raise many types
            reason = _short_reason(error)
        time.sleep(0.1)  # threads of orbax end
        gc.collect()
    finally:
        sys.unraisablehook = hook
    return None, reason


def _short_reason(error: Exception) -> str:
    """The reason if it is short: tensorstore writes many lines with its settings and sources."""
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    return text if len(text) <= 100 else "damaged, or of another structure"


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    """The shape of an array and where to put it: without a sharding on one device of this process,
    since the devices that wrote it may not exist here."""
    where = getattr(x, "sharding", None)
    if where is None:
        where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
