"""The web application: paths, errors and streams of the OpenAI API."""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from irqlora_jax.serve.answer import Answer, event, usage_counts
from irqlora_jax.serve.request import Ask, BadRequest, read_request
from irqlora_jax.serve.service import Failed, Service, Texts

_CLOSED_REQUEST = 499
"""Status for the log if the client has disconnected."""


def make_app(service: Service, key: str | None = None) -> Starlette:
    """Makes the application.

    Args:
        service: answers the requests.
        key: requests need it as `Authorization: Bearer KEY`; None: they need none.
    """
    model = {"id": service.name, "object": "model", "created": 0, "owned_by": "irqlora_jax"}

    async def list_models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != service.name:
            message = f"model = {name[:200]!r}: not served here; expected {service.name!r}"
            raise BadRequest(message, "model", "model_not_found", status=404)
        return JSONResponse(model)

    def completions(chat: bool) -> Callable[[Request], Awaitable[Response]]:
        async def complete(request: Request) -> Response:
            asked = read_request(await _body(request), chat=chat, model=service.name)
            answer, texts = Answer.new(chat, service.name), await service.start(asked)
            if asked.stream:
                return _Stream(answer, asked, texts)
            return await _whole(request, answer, texts)

        return complete

    def guarded(
        endpoint: Callable[[Request], Awaitable[Response]],
    ) -> Callable[[Request], Awaitable[Response]]:
        async def checked(request: Request) -> Response:
            _check_key(request, key)
            return await endpoint(request)

        return checked

    routes = [
        Route("/v1/models", guarded(list_models)),
        Route("/v1/models/{name:path}", guarded(one_model)),
        Route("/v1/chat/completions", guarded(completions(chat=True)), methods=["POST"]),
        Route("/v1/completions", guarded(completions(chat=False)), methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {
        BadRequest: lambda _, error: JSONResponse({"error": error.body}, error.status),
        HTTPException: _no_such_path,
        Failed: lambda _, error: JSONResponse(_failure(error), 503 if error.stopping else 500),
    }
    return Starlette(routes=routes, exception_handlers=handlers)


async def _no_such_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    body = BadRequest(message, status=error.status_code).body
    return JSONResponse({"error": body}, error.status_code, headers=error.headers)


def _failure(error: Failed) -> dict[str, Any]:
    return {"error": {"message": str(error), "type": "server_error", "param": None, "code": None}}


def _check_key(request: Request, key: str | None) -> None:
    given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
    if key is not None and not hmac.compare_digest(given, key.encode()):
        message = "the API key is missing or wrong; expected the header Authorization: Bearer KEY"
        raise BadRequest(message, None, "invalid_api_key", status=401)


async def _body(request: Request) -> Any:
    try:
        body = json.loads(await request.body())
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # JSON can write what no tokenizer and no answer can hold
        raise BadRequest("the body has half of a surrogate pair; expected whole pairs") from None
    except (ValueError, RecursionError):  # also for text that is not UTF-8
        raise BadRequest("the body is not valid JSON; expected a JSON object") from None
    return body


async def _whole(request: Request, answer: Answer, texts: Texts) -> Response:
    """The whole answer. If the client goes away, its texts end."""
    said = [""] * texts.count
    finishes = [""] * texts.count

    async def collect() -> None:
        async for index, piece in texts.pieces():
            said[index] += piece.text
            finishes[index] = piece.finish or ""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.create_task(collect()), asyncio.create_task(leave())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            return Response(status_code=_CLOSED_REQUEST)
        tasks[0].result()
    finally:
        texts.cancel()
        for task in tasks:
            task.cancel()
    usage = usage_counts(texts.prompt_tokens, texts.completion_tokens)
    return JSONResponse(answer.whole(said, finishes, usage))


class _Stream(StreamingResponse):
    """An answer in events. If the client goes away, its texts end."""

    def __init__(self, answer: Answer, asked: Ask, texts: Texts) -> None:
        headers = {"Cache-Control": "no-cache"}
        super().__init__(_events(answer, asked, texts), 200, headers, "text/event-stream")
        self._texts = texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._texts.cancel()


async def _events(answer: Answer, asked: Ask, texts: Texts) -> AsyncIterator[str]:
    # As in the API, all chunks have the field "usage" if the last one counts the tokens.
    more = {"usage": None} if asked.usage else {}
    if asked.chat:
        for index in range(texts.count):
            yield event(answer.opening(index) | more)
    try:
        async for index, piece in texts.pieces():
            if piece.text:
                yield event(answer.chunk(index, piece.text) | more)
            if piece.finish:
                yield event(answer.chunk(index, "", piece.finish) | more)
    except Failed as error:
        yield event(_failure(error))
        return
    if asked.usage:
        counts = usage_counts(texts.prompt_tokens, texts.completion_tokens)
        yield event(answer.usage(counts))
    yield event("[DONE]")
