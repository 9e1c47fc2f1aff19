"""Answers checked requests: prompts to tokens, tokens to texts, by way of the worker."""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator
from typing import Any

from irqlora_jax.data import encode_source
from irqlora_jax.generate.conversation import Style, TextStream, encode_messages
from irqlora_jax.generate.rows import Sampling
from irqlora_jax.serve.request import Ask, BadRequest
from irqlora_jax.serve.worker import STOPPING, Job, Piece, Worker

logger = logging.getLogger(__name__)


class Failed(Exception):  # noqa: N818
    """There is no answer because of the model or the server, not because of the request."""

    @property
    def stopping(self) -> bool:
        """Whether the server is about to end."""
        return str(self) == STOPPING


@dataclasses.dataclass(frozen=True)
class Service:
    """A model that answers requests.

    Attributes:
        name: of the model.
        tokenizer: a transformers tokenizer.
        style: format of the prompts of a chat.
        vocabulary: number of tokens.
        context: largest number of tokens of a prompt and its answer.
        worker: decodes.
        max_waiting: while so many texts wait for a row, requests are refused.
        ignored: ignored parameters that the log has already named.
    """

    name: str
    tokenizer: Any
    style: Style
    vocabulary: int
    context: int
    worker: Worker
    max_waiting: int
    ignored: set[str] = dataclasses.field(default_factory=set)

    async def start(self, asked: Ask) -> "Texts":
        """Encodes the prompts and hands them to the worker.

        Raises:
            BadRequest: a prompt is empty or too long, has unknown tokens, or the chat template
                refuses it; or too many texts wait.
        """
        self._check_room()
        for name in set(asked.ignored) - self.ignored:
            self.ignored.add(name)
            logger.info(f"requests: the parameter {name} is ignored, because it changes no result")
        # In a thread: a long text, or a slow template, must not hold up the other requests.
        prompts = await asyncio.to_thread(self._encode, asked)
        self._check_room()  # others may have come in the meantime
        return Texts(self, asked, prompts)

    def _check_room(self) -> None:
        if self.worker.waiting >= self.max_waiting:
            raise BadRequest(
                f"{self.worker.waiting} texts wait already, and this server holds max_waiting = "
                f"{self.max_waiting}; try again later",
                code="rate_limit_exceeded",
                status=429,
                kind="rate_limit_error",
            )

    def _encode(self, asked: Ask) -> list[list[int]]:
        if asked.chat:
            if self.style.continues:
                raise BadRequest(
                    f"{self.name} continues text and has no format for a chat; expected a request "
                    "to /v1/completions"
                )
            try:
                prompts = [encode_messages(self.style, self.tokenizer, asked.messages)]
            except ValueError as error:
                raise BadRequest(f"messages: {error}", "messages") from None
        else:
            prompts = [
                encode_source(self.tokenizer, [prompt])[0]
                if isinstance(prompt, str)
                else list(prompt)
                for prompt in asked.prompts
            ]
        for prompt in prompts:
            self._check(prompt, "messages" if asked.chat else "prompt")
        return prompts

    def _check(self, prompt: list[int], param: str) -> None:
        if not prompt:
            raise BadRequest(f"{param}: no tokens; expected some text", param)
        bad = next((token for token in prompt if not 0 <= token < self.vocabulary), None)
        if bad is not None:
            accepted = f"0 <= token < {self.vocabulary}"
            raise BadRequest(f"{param}: token {bad}: expected {accepted}", param)
        if len(prompt) >= self.context:
            raise BadRequest(
                f"{param}: {len(prompt)} tokens; expected fewer than the context of "
                f"{self.context} tokens, which also holds the answer",
                param,
                "context_length_exceeded",
            )


class Texts:
    """The texts of a request while they are decoded. `cancel` ends them at any time."""

    def __init__(self, service: Service, asked: Ask, prompts: list[list[int]]) -> None:
        """Hands all texts to the worker. Text i continues prompt i // n."""
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.prompt_tokens = sum(map(len, prompts))
        self._jobs: list[Job] = []
        stops = asked.stops + (service.style.stops if asked.chat else ())
        # As in `irqlora chat`, an answer has no space or line break in front.
        self._bare = [asked.chat] * len(prompts) * asked.n
        for index in range(len(prompts) * asked.n):
            prompt = prompts[index // asked.n]
            room = service.context - len(prompt)
            job = Job(
                prompt,
                room if asked.limit is None else min(asked.limit, room),
                # Each prompt of several is drawn as if it were the only one.
                Sampling(asked.temperature, asked.top_p, asked.seed, index % asked.n),
                TextStream(service.tokenizer, prompt, stops),
                lambda piece, index=index: self._tell(index, piece),
            )
            self._jobs.append(job)
            service.worker.submit(job)

    @property
    def count(self) -> int:
        """Number of texts."""
        return len(self._jobs)

    @property
    def completion_tokens(self) -> int:
        """Number of new tokens so far."""
        return sum(job.tokens for job in self._jobs)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yields the number of a text and its next piece, until all texts have ended.

        Raises:
            Failed: the model failed, or the server ends.
        """
        running = self.count
        while running:
            index, piece = await self._queue.get()
            if piece.error is not None:
                raise Failed(piece.error)
            text = piece.text.lstrip() if self._bare[index] else piece.text
            self._bare[index] &= not text
            running -= piece.finish is not None
            if text or piece.finish:
                yield index, dataclasses.replace(piece, text=text)

    def cancel(self) -> None:
        """Ends all texts."""
        for job in self._jobs:
            job.cancelled = True

    def _tell(self, index: int, piece: Piece) -> None:
        """Takes a piece from the worker's thread, also after the end of the loop."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))
