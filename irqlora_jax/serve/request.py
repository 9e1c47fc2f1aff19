"""Reads the requests of the OpenAI API: chat completions and completions.

A parameter that would change the result and is not supported is refused. So is an unknown one: it
may be a misspelled name. `null` stands for the default, as in the API.
"""

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from irqlora_jax.text import shorten

MOST_TEXTS = 128
"""Texts that one request may ask for: prompts times n."""

_COMMON = ("model", "stream", "stream_options", "stop", "max_tokens", "temperature", "top_p")
_COMMON += ("seed", "n")
_CHAT = (*_COMMON, "messages", "max_completion_tokens")
_COMPLETION = (*_COMMON, "prompt")
# They change neither the text nor the form of the answer.
_HARMLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
_HARMLESS += ("prompt_cache_retention", "prediction", "parallel_tool_calls")
# Parameters of the API and of other servers, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
}
_LOGPROBS = "this server returns no log probabilities; leave it out"
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class BadRequest(Exception):  # noqa: N818
    """A request that is refused.

    Attributes:
        body: the error object of the API: message, type, param and code.
        status: of HTTP.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
    ) -> None:
        """Makes the error."""
        super().__init__(message)
        self.status = status
        self.body = {"message": message, "type": kind, "param": param, "code": code}


@dataclasses.dataclass(frozen=True)
class Ask:
    """What a request asks for.

    Attributes:
        chat: whether it is a chat completion.
        messages: of a chat completion: role (system, user or assistant) and content.
        prompts: of a completion: texts or token ids.
        stream: whether the answer is sent in pieces.
        usage: whether a stream ends with the numbers of tokens.
        stops: strings that end a text.
        limit: largest number of new tokens; None: as many as the context allows.
        temperature: 0: greedy decoding.
        top_p: total probability of the tokens to sample from; None: all.
        seed: of the sampling, below 2**32.
        n: number of texts for each prompt.
        ignored: parameters that change no result here.
    """

    chat: bool
    messages: tuple[dict[str, str], ...]
    prompts: tuple[str | tuple[int, ...], ...]
    stream: bool
    usage: bool
    stops: tuple[str, ...]
    limit: int | None
    temperature: float
    top_p: float | None
    seed: int
    n: int
    ignored: tuple[str, ...] = ()


def read_request(body: Any, *, chat: bool, model: str) -> Ask:
    """Checks a request.

    Args:
        body: from JSON.
        chat: whether it is a chat completion.
        model: name of the model that is served.

    Raises:
        BadRequest: it is invalid, or asks for what is not supported.
    """
    if not isinstance(body, dict):
        raise BadRequest(f"the body is {type(body).__name__}: expected a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    _check_names(given, _CHAT if chat else _COMPLETION)
    named = given.get("model", model)
    if named != model:
        message = f"model = {shorten(named)}: not served here; expected {model!r}"
        raise BadRequest(message, "model", "model_not_found", status=404)
    stream = _boolean(given, "stream")
    limit = _whole(given, "max_tokens", None if chat else 16, 1)
    top_p = _number(given, "top_p", 1.0, 1.0, "0 < top_p <= 1")
    _refuse_unless(top_p > 0, "top_p", top_p, "0 < top_p <= 1")
    seed = _whole(given, "seed", secrets.randbits(32), None)
    asked = Ask(
        chat=chat,
        messages=_messages(given.get("messages")) if chat else (),
        prompts=() if chat else _prompts(given.get("prompt")),
        stream=stream,
        usage=_usage(given, stream),
        stops=_stops(given.get("stop", [])),
        limit=_whole(given, "max_completion_tokens", limit, 1),
        temperature=_number(given, "temperature", 1.0, 2.0, "0 <= temperature <= 2"),
        top_p=None if top_p == 1 else top_p,
        seed=(seed or 0) % 2**32,
        n=_whole(given, "n", 1, 1),
        ignored=tuple(name for name in given if name in _HARMLESS),
    )
    most = MOST_TEXTS // max(1, len(asked.prompts))
    _refuse_unless(asked.n <= most, "n", asked.n, f"at most {MOST_TEXTS} texts a request")
    return asked


def _check_names(given: Mapping[str, Any], known: Sequence[str]) -> None:
    for name, value in given.items():
        if name in known or name in _HARMLESS:
            continue
        neutral = _NEUTRAL.get(name)
        # 0 == False, but a number of log probabilities asks for them.
        if neutral is not None and any(
            value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral
        ):
            continue
        reason = "not supported" if neutral is not None else "an unknown parameter"
        if name in ("logprobs", "top_logprobs"):
            reason = _LOGPROBS
        raise BadRequest(
            f"{shorten(name, quoted=False)} = {shorten(value)}: {reason}",
            name[:200],
            "unsupported_parameter" if neutral is not None else "unknown_parameter",
        )


def _refuse_unless(ok: bool, field: str, value: Any, accepted: str) -> None:
    if not ok:
        raise BadRequest(f"{field} = {shorten(value)}: expected {accepted}", field)


def _boolean(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    _refuse_unless(isinstance(value, bool), name, value, "true or false")
    return value


def _whole(given: Mapping[str, Any], name: str, default: int | None, least: int | None) -> Any:
    value = given.get(name, default)
    ok = isinstance(value, int) and not isinstance(value, bool)
    accepted = "a whole number" + ("" if least is None else f" of at least {least}")
    ok = name not in given or (ok and (least is None or value >= least))
    _refuse_unless(ok, name, value, accepted)
    return value


def _number(
    given: Mapping[str, Any], name: str, default: float, most: float, accepted: str
) -> float:
    value = given.get(name, default)
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    _refuse_unless(ok and 0 <= value <= most, name, value, accepted)
    return float(value)


def _usage(given: Mapping[str, Any], stream: bool) -> bool:
    options = given.get("stream_options", {})
    ok = isinstance(options, dict) and (stream or "stream_options" not in given)
    _refuse_unless(ok, "stream_options", options, "an object, with stream = true")
    unknown = set(options) - {"include_usage", "include_obfuscation"}
    _refuse_unless(not unknown, "stream_options", options, "only include_usage")
    wanted = options.get("include_usage") or False
    _refuse_unless(
        isinstance(wanted, bool), "stream_options.include_usage", wanted, "true or false"
    )
    return wanted


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    ok = isinstance(stops, list) and all(isinstance(stop, str) and stop for stop in stops)
    _refuse_unless(ok and len(stops) <= 4, "stop", value, "a text or a list of up to 4 texts")
    return tuple(stops)


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    ok = isinstance(value, list) and bool(value)
    _refuse_unless(ok, "messages", value, "a list of messages with role and content")
    return tuple(_message(message, f"messages[{place}]") for place, message in enumerate(value))


def _message(message: Any, place: str) -> dict[str, str]:
    _refuse_unless(isinstance(message, dict), place, message, "an object with role and content")
    role = message.get("role")
    known = isinstance(role, str) and role in _ROLES
    _refuse_unless(known, f"{place}.role", role, "system, user or assistant")
    for name in ("tool_calls", "function_call", "audio"):
        _refuse_unless(not message.get(name), f"{place}.{name}", message.get(name), "none")
    content = message.get("content")
    if isinstance(content, list):
        content = _joined_parts(content, place)
    _refuse_unless(isinstance(content, str), f"{place}.content", content, "text")
    return {"role": _ROLES[role], "content": content}


def _joined_parts(parts: list[Any], place: str) -> str:
    for number, part in enumerate(parts):
        ok = isinstance(part, dict) and part.get("type") == "text"
        ok = ok and isinstance(part.get("text"), str)
        _refuse_unless(ok, f"{place}.content[{number}]", part, 'text, as {"type": "text", ...}')
    return "".join(part["text"] for part in parts)


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    accepted = "a text, a list of texts, token ids, or a list of lists of token ids"
    prompts = [value] if isinstance(value, str) or _is_tokens(value) else value
    ok = isinstance(prompts, list) and 0 < len(prompts) <= MOST_TEXTS
    ok = ok and all(isinstance(prompt, str) or _is_tokens(prompt) for prompt in prompts)
    _refuse_unless(ok, "prompt", value, f"{accepted}; at most {MOST_TEXTS}")
    return tuple(prompt if isinstance(prompt, str) else tuple(prompt) for prompt in prompts)


def _is_tokens(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(token, int) and not isinstance(token, bool) for token in value)
