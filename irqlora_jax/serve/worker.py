"""Decodes the texts of all requests in one batch, in a thread of its own.

Only this thread uses the model. A text joins the batch at the next step with a free row, and leaves
it when it ends. Texts that find no row wait in the order of their arrival.
"""

import collections
import contextlib
import dataclasses
import logging
import queue
import threading
from collections.abc import Callable, Collection
from typing import Literal

from irqlora_jax.generate.conversation import TextStream
from irqlora_jax.generate.rows import Rows, Sampling

STOPPING = "the server is stopping"
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of a text.

    Attributes:
        text: the new characters; may be empty.
        finish: why the text has ended ("stop": by itself or before a stop string; "length": no
            more tokens are allowed); None if it goes on.
        error: why the text cannot go on; None if it can.
    """

    text: str
    finish: Literal["stop", "length"] | None = None
    error: str | None = None


@dataclasses.dataclass(eq=False)
class Job:
    """A text to decode.

    Attributes:
        prompt: its token ids.
        limit: largest number of new tokens, at least 1.
        sampling: how to choose the tokens.
        text: decodes them.
        tell: gets each piece, in the thread of the worker. The last piece has `finish` or `error`.
        cancelled: set this to end the text. Nobody is told then.
        tokens: number of new tokens so far.
    """

    prompt: list[int]
    limit: int
    sampling: Sampling
    text: TextStream
    tell: Callable[[Piece], None]
    cancelled: bool = False
    tokens: int = 0


class Worker:
    """The thread. `stop` ends it.

    Attributes:
        slots: largest number of tokens of a prompt and its text.
        cache_bytes: memory of the cache.
    """

    def __init__(self, make_rows: Callable[[], Rows], eos_token_ids: Collection[int]) -> None:
        """Starts the thread.

        Args:
            make_rows: makes empty rows; called again after an error.
            eos_token_ids: tokens that end a text.
        """
        self._make_rows, self._eos = make_rows, frozenset(eos_token_ids)
        self._rows = make_rows()
        self.slots, self.cache_bytes = self._rows.slots, self._rows.cache_bytes
        self._size = self._rows.size
        self._arrived: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._line: collections.deque[Job] = collections.deque()  # for this thread alone
        self._active: dict[int, Job] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of texts that find no free row at the next step. Any thread may ask."""
        free = self._size - len(self._active)
        return max(0, self._arrived.qsize() + len(self._line) - free)

    def submit(self, job: Job) -> None:
        """Takes a text. It may come from any thread."""
        if self._stopping:
            job.tell(Piece("", error=STOPPING))
        else:
            self._arrived.put(job)

    def stop(self) -> None:
        """Ends all texts at the next step. A signal handler may call this."""
        self._stopping = True
        self._arrived.put(None)

    def join(self, seconds: float) -> None:
        """Waits for the end of the thread, after `stop`."""
        self._thread.join(seconds)

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._queue_up(wait=not self._active and not self._line)
                while self._line and len(self._active) < self._size and not self._stopping:
                    self._start(self._line.popleft())
                if self._active and not self._stopping:
                    self._step()
            except Exception as error:
                self._recover(error)
        self._fail(STOPPING)

    def _queue_up(self, wait: bool) -> None:
        """Moves the texts that have arrived to the line. Cancelled ones leave it."""
        found = [self._arrived.get()] if wait else []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._arrived.get_nowait())
        jobs = (*self._line, *found)
        self._line = collections.deque(job for job in jobs if job is not None and not job.cancelled)

    def _start(self, job: Job) -> None:
        row = next(row for row in range(self._size) if row not in self._active)
        self._active[row] = job
        self._advance(row, self._rows.start(row, job.prompt, job.sampling))

    def _step(self) -> None:
        self._active = {row: job for row, job in self._active.items() if not job.cancelled}
        if self._active:
            tokens = self._rows.step()
            for row in list(self._active):
                self._advance(row, tokens[row])

    def _advance(self, row: int, token: int) -> None:
        job = self._active[row]
        job.tokens += 1
        text = job.text.push(token)
        ended = job.text.stopped or token in self._eos
        if not ended and job.tokens < job.limit:
            if text:
                job.tell(Piece(text))
            return
        del self._active[row]
        job.tell(Piece(text + job.text.end(), "stop" if ended else "length"))

    def _recover(self, error: Exception) -> None:
        """Fails all texts and makes new rows: the cache may be gone after an error."""
        self._fail(_failure(error))
        del self._rows  # its memory is needed
        try:
            self._rows = self._make_rows()
        except Exception as again:
            logger.warning(f"no more requests are answered: {_failure(again)}")
            self.stop()

    def _fail(self, reason: str) -> None:
        """Ends all texts with an error; when the worker stops, also those that wait."""
        if reason != STOPPING:
            logger.warning(reason)
        jobs, self._active = list(self._active.values()), {}
        if self._stopping:
            self._queue_up(wait=False)
            jobs += self._line
        for job in jobs:
            job.tell(Piece("", error=reason))


def _failure(error: Exception) -> str:
    return f"the model failed: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
