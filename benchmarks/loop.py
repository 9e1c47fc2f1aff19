"""The cost of the training loop: its wall time compared with the step alone.

    python benchmarks/loop.py [--size cpu] [--turns 7]

`loop.train` runs on synthetic examples with everything that a run does between two checkpoints. It
makes batches and sends them to the device, and it fetches, checks and logs metrics at every step (a
run: at every tenth). The step alone, with its batch already on the device, runs in turns with the
loop: every few steps, the script times it while the loop waits in its log. The step must take at
least 98 % of the wall time; exit code 1 otherwise.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from timing import machine, table, verdict
from train_step import SHIFTED, Ours, add_size, fill_size, random_base, shape

from irqlora_jax.config import Config, LogConfig
from irqlora_jax.data import Example, make_batches
from irqlora_jax.data.order import Part
from irqlora_jax.generate.conversation import Style
from irqlora_jax.generate.samples import Samples
from irqlora_jax.runs.checkpoints import Checkpoints
from irqlora_jax.sharding import make_mesh
from irqlora_jax.train.job import Job
from irqlora_jax.train.loop import train
from irqlora_jax.train.metrics import MetricsLog, Values

LEAST = 0.98
LOOP, ALONE = 4, 3  # steps of a turn, in the loop and alone


class Clock(MetricsLog):
    """Times the loop's steps by the arrival of their metrics, and in between the step alone."""

    def __init__(self, folder: Path, config: Config, step: Callable[[], object]) -> None:
        super().__init__(folder, 0, config)
        self.loop: list[float] = []  # mean seconds of each turn
        self.alone: list[float] = []  # median seconds, before the first turn and after each turn
        self._step, self._start = step, 0.0

    def write(self, step: int, values: Values) -> None:
        """Called with the metrics of a step, after the start of the next step."""
        super().write(step, values)
        now = time.perf_counter()
        place = step % (LOOP + 2)
        if place == 2:  # earlier steps started or ended while the step alone was timed
            self._start = now
        if place == 0:
            self.loop.append((now - self._start) / LOOP)
        if place == 0 or step == 1:
            self.alone.append(self._time_alone())

    def _time_alone(self) -> float:
        self._step()  # waits for the loop's step that has already started
        times = []
        for _ in range(ALONE):
            start = time.perf_counter()
            self._step()
            times.append(time.perf_counter() - start)
        return statistics.median(times)


def make_job(args: argparse.Namespace, ours: Ours, folder: Path) -> Job:
    """A run on examples that all have the full length."""
    rng, targets = np.random.default_rng(2), np.ones(args.length, bool)
    rows = rng.integers(0, args.vocab, (16 * args.batch, args.length), np.int32)
    config = Config(
        model="random",
        output_dir=str(folder),
        quant=SHIFTED,
        train=ours.settings,
        log=LogConfig(every=1, progress=False),
    )
    examples = [Example(row, targets) for row in rows]
    return Job(
        config=config,
        mesh=make_mesh(config.mesh, args.batch),
        model=ours.model,
        optimizer=ours.optimizer,
        examples=examples,
        eval_examples=[],
        questions=[],
        samples=Samples((), [], Style("text"), None, 0),
        calibrate=None,
        batches=make_batches(examples, config.data, args.batch, config.seed),
        parts=(Part(len(examples)),),
    )


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_size(parser)
    parser.add_argument("--turns", type=int, default=7)
    args = fill_size(parser.parse_args())
    steps = args.turns * (LOOP + 2) + 1
    ours = Ours(args, random_base(args, SHIFTED), "iec", steps)
    print(f"{machine()}\n\n{shape(args)}; nf4, ICQ, IEC; {steps} steps of the loop\n")
    with tempfile.TemporaryDirectory() as name:
        job = make_job(args, ours, Path(name))
        with (
            jax.set_mesh(job.mesh),
            Checkpoints(Path(name)) as checkpoints,
            Clock(Path(name), job.config, ours.step) as clock,
        ):
            ours.step()  # compiles
            train(job, ours.base, ours.new_state(), checkpoints, clock)
    rows, shares = [], []
    for before, loop, after in zip(clock.alone, clock.loop, clock.alone[1:], strict=False):
        alone = (before + after) / 2
        shares.append(alone / loop)
        rows.append((f"{alone * 1e3:.1f}", f"{loop * 1e3:.1f}", f"{alone / loop:.1%}"))
    print(table(("step alone, ms", "step of the loop, ms", "share"), rows))
    share = statistics.median(shares)
    print(
        f"\nshare of the wall time: {share:.1%} ({min(shares):.1%}-{max(shares):.1%}), "
        f"must be at least {LEAST:.0%}: {verdict(share >= LEAST)}"
    )
    return 0 if share >= LEAST or args.size == "tiny" else 1


if __name__ == "__main__":
    sys.exit(main())
