"""The answers of the OpenAI API as JSON objects: whole, or chunks of a stream."""

import dataclasses
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Answer:
    """What all parts of an answer share. `Answer.new` makes one.

    Attributes:
        chat: whether it is a chat completion.
        model: name of the model.
        id: of the answer.
        created: seconds since 1970.
    """

    chat: bool
    model: str
    id: str
    created: int

    @classmethod
    def new(cls, chat: bool, model: str) -> "Answer":
        """Makes the answer to a request that comes now."""
        kind = "chatcmpl" if chat else "cmpl"
        return cls(chat, model, f"{kind}-{uuid.uuid4().hex}", int(time.time()))

    def whole(
        self, texts: Sequence[str], finishes: Sequence[str], usage: Mapping[str, int]
    ) -> dict[str, Any]:
        """The answer as one object. `finishes` has the finish_reason of each text."""
        choices = []
        for index, (text, finish) in enumerate(zip(texts, finishes, strict=True)):
            message = {"role": "assistant", "content": text, "refusal": None}
            content = {"message": message} if self.chat else {"text": text}
            choices.append({"index": index, **content, "logprobs": None, "finish_reason": finish})
        kind = "chat.completion" if self.chat else "text_completion"
        return self._head(kind) | {"choices": choices, "usage": usage}

    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk of a text of a chat."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None)

    def chunk(self, index: int, text: str, finish: str | None = None) -> dict[str, Any]:
        """The next characters of a text, or its end."""
        return self._chunk(index, {"content": text} if text or not finish else {}, finish, text)

    def usage(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """The last chunk, with the numbers of tokens."""
        return self._chunk_head() | {"choices": [], "usage": usage}

    def _chunk(
        self, index: int, delta: Mapping[str, str], finish: str | None, text: str = ""
    ) -> dict[str, Any]:
        content = {"delta": delta} if self.chat else {"text": text}
        choice = {"index": index, **content, "logprobs": None, "finish_reason": finish}
        return self._chunk_head() | {"choices": [choice]}

    def _chunk_head(self) -> dict[str, Any]:
        return self._head("chat.completion.chunk" if self.chat else "text_completion")

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage_counts(prompt: int, completion: int) -> dict[str, int]:
    """The numbers of tokens of an answer."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def event(value: Mapping[str, Any] | str) -> str:
    """An event of a stream: an object, or the text at the end."""
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n"
