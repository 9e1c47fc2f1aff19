"""The checkpoints of a run: its training states by step."""

import contextlib
import dataclasses
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax


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
        """
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._folder = (run / "checkpoints").absolute()
        self._losses: dict[int, float] = {}
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
            stored = self._manager.metadata(step).custom_metadata or {}
            if "eval_loss" in stored:
                self._losses[step] = stored["eval_loss"]

    def __enter__(self) -> "Checkpoints":
        logging.getLogger("absl").addFilter(_is_news)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            with self._explained(self._writing):
                self._manager.close()
        except OSError:
            if kind is None or not issubclass(kind, OSError):  # else the first error is raised
                raise
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

    def find(self, which: Literal["last", "best"] | int) -> int:
        """The step of a checkpoint.

        Raises:
            FileNotFoundError: there is none, none of this step, or none with an evaluation loss.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise FileNotFoundError(f"{self._folder}: no checkpoint yet; use --baseline")
        if which == "last":
            return steps[-1]
        there = ", ".join(map(str, steps))
        if which == "best":
            best = self.best()
            if best is None:
                raise FileNotFoundError(
                    f"checkpoint = best: none in {self._folder} has an evaluation loss (data.eval "
                    f"or data.eval_fraction); expected last or one of {there}"
                )
            return best
        if which not in steps:
            raise FileNotFoundError(
                f"checkpoint = {which}: not in {self._folder}; there are {there}"
            )
        return which

    def save(self, step: int, state: Any, loss: float | None = None) -> None:
        """Writes a pytree of arrays in the background, then deletes old checkpoints.

        Args:
            step: of the state.
            state: the arrays.
            loss: evaluation loss of the state.

        Raises:
            OSError: this checkpoint or the previous one could not be written.
        """
        self.wait()
        if loss is not None:
            self._losses[step] = loss
        metadata = None if loss is None else {"eval_loss": loss}
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
            raise OSError(
                f"{self._folder}: the checkpoint of step {step} could not be written ({reason}); "
                f"{kept}"
            ) from error

    def restore_adapters(self, step: int, like: Any) -> Any:
        """Reads only the adapters of a state, into the structure of `like`.

        Raises:
            ValueError: the stored adapters have another structure or other shapes.
        """
        wanted = {"adapters": jax.tree.map(_abstract, like)}
        handler = self._ocp.PyTreeCheckpointHandler()
        arguments = self._ocp.args.PyTreeRestore(
            wanted,
            restore_args=self._ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        folder: Any = self._folder / str(step) / "default"
        return handler.restore(folder, args=arguments)["adapters"]

    def restore(self, step: int, like: Any) -> Any:
        """Reads a state into the structure of `like` (arrays or their shapes).

        Raises:
            ValueError: the stored state has another structure or other shapes.
        """
        abstract = jax.tree.map(_abstract, like)
        return self._manager.restore(step, args=self._ocp.args.StandardRestore(abstract))


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
