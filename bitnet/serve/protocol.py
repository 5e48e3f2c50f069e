"""Requests and errors in OpenAI's format; every field is checked.

Unknown fields are ignored, as OpenAI does. Known fields that this server does not support are refused by name, unless
their value asks for nothing. null means "not given". Beyond OpenAI's fields: top_k, min_p, ignore_eos.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from bitnet.engine.sampling import Sampling
from bitnet.errors import BitNetError

MAX_CHOICES = 16  # of one prompt (n)
MAX_STOPS = 16  # OpenAI takes 4
MAX_STOP_LENGTH = 1024  # characters: so much text may be held back
MAX_TOP = {"completion": 5, "chat": 20}  # alternatives per token, as OpenAI
_INT = 2**63
# Fields of OpenAI or its clients that are not supported, each with the values that ask for nothing.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "guided_json": (),
    "guided_regex": (),
    "grammar": ("",),
    "prompt_logprobs": (0,),
}


class RequestError(Exception):
    """The error that a request is answered with: HTTP status, one sentence, the field, and OpenAI's code."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry = retry  # seconds, for Retry-After

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refuse(param: str, got: Any, expected: str) -> RequestError:
    """The error for a field with a wrong value."""
    shown = json.dumps(_outline(got), default=str)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return RequestError(400, f"{param}: got {shown}, expected {expected}", param=param)


def _outline(value: Any, depth: int = 4) -> Any:
    """The start of a value, a few levels deep: json.dumps would fail on one that is nested too deeply."""
    if not isinstance(value, list | dict):
        return value
    if not depth:
        return "..."
    if isinstance(value, dict):
        return {name: _outline(part, depth - 1) for name, part in islice(value.items(), 40)}
    return [_outline(part, depth - 1) for part in value[:40]]


@dataclass(frozen=True)
class RequestParams:
    """What both kinds of request say about the text to generate. max_tokens None: up to the context."""

    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    n: int
    top: int | None  # alternatives to report for each token; None: no log-probabilities
    ignore_eos: bool
    stream: bool
    include_usage: bool
    model: str | None


@dataclass(frozen=True)
class CompletionRequest:
    """Texts or lists of token ids to continue."""

    params: RequestParams
    prompts: Sequence[str | list[int]]
    echo: bool


@dataclass(frozen=True)
class ChatRequest:
    """A conversation to answer: messages with "role" and "content", the content as one text."""

    params: RequestParams
    messages: Sequence[dict[str, str]]


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in the body of a request. Raises RequestError (400)."""

    def no_constant(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    try:
        values = json.loads(body, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"body: got {_short(error)}, expected JSON in UTF-8", code="invalid_json") from None
    if not isinstance(values, dict):
        raise RequestError(400, f"body: got {type(values).__name__}, expected a JSON object", code="invalid_json")
    return values


def parse_completion(values: Mapping[str, Any]) -> CompletionRequest:
    """The fields of a request to /v1/completions. Raises RequestError (400)."""
    top = integer(values, "logprobs", None, 0, MAX_TOP["completion"])
    params = _params(values, top, integer(values, "max_tokens", 16, 0, _INT))
    return CompletionRequest(params, _prompts(values.get("prompt")), flag(values, "echo"))


def parse_chat(values: Mapping[str, Any]) -> ChatRequest:
    """The fields of a request to /v1/chat/completions. Raises RequestError (400)."""
    top = integer(values, "top_logprobs", None, 0, MAX_TOP["chat"])
    if not flag(values, "logprobs"):
        if top:
            raise refuse("top_logprobs", top, "it together with logprobs: true")
        top = None
    else:
        top = top or 0
    newer = integer(values, "max_completion_tokens", None, 1, _INT)
    limit = newer if newer is not None else integer(values, "max_tokens", None, 1, _INT)
    return ChatRequest(_params(values, top, limit), _messages(values.get("messages")))


def _params(values: Mapping[str, Any], top: int | None, max_tokens: int | None) -> RequestParams:
    _refuse_unsupported(values)
    seed = integer(values, "seed", None, -_INT, _INT - 1)
    try:
        sampling = Sampling(
            temperature=number(values, "temperature", 1.0, 0.0, 2.0),
            top_p=max(number(values, "top_p", 1.0, 0.0, 1.0), 1e-6),
            top_k=max(integer(values, "top_k", 0, -1, _INT) or 0, 0),  # other servers use -1 for off
            min_p=number(values, "min_p", 0.0, 0.0, 1.0),
            seed=int.from_bytes(os.urandom(4)) if seed is None else seed % _INT,
        )
    except BitNetError as error:
        raise RequestError(400, str(error)) from None
    options = values.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise refuse("stream_options", options, "an object")
    model = values.get("model")
    if model is not None and not isinstance(model, str):
        raise refuse("model", model, "a string")
    return RequestParams(
        sampling=sampling,
        max_tokens=max_tokens,
        stop=_stops(values.get("stop")),
        n=integer(values, "n", 1, 1, MAX_CHOICES) or 1,
        top=top,
        ignore_eos=flag(values, "ignore_eos"),
        stream=flag(values, "stream"),
        include_usage=flag(options or {}, "include_usage"),
        model=model,
    )


def _refuse_unsupported(values: Mapping[str, Any]) -> None:
    for name, harmless in _UNSUPPORTED.items():
        value = values.get(name)
        if value is not None and not any(type(value) is type(h) and value == h for h in _as_numbers(harmless)):
            if name == "best_of" and value == values.get("n"):
                continue
            raise RequestError(400, f"{name}: not supported by this server; omit it", param=name)


def _as_numbers(values: Sequence[Any]) -> list[Any]:
    """The values, and every whole number as a float too."""
    return [*values, *(float(value) for value in values if type(value) is int)]


def number(values: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    """A number in low..high. Raises RequestError (400)."""
    value = values.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise refuse(name, value, f"a number from {low:g} to {high:g}")
    return float(value)


def integer(values: Mapping[str, Any], name: str, default: int | None, low: int, high: int) -> int | None:
    """A whole number in low..high, or the default. Raises RequestError (400)."""
    value = values.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        upper = f"to {high}" if high < 2**32 else "or more"
        raise refuse(name, value, f"a whole number from {low} {upper}".replace(f"from {low} or", f"{low} or"))
    return value


def flag(values: Mapping[str, Any], name: str) -> bool:
    """true or false; not given is false. Raises RequestError (400)."""
    value = values.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise refuse(name, value, "true or false")


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    good = isinstance(stops, list) and all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in stops)
    if not good or len(stops) > MAX_STOPS:
        raise refuse("stop", value, f"a text or up to {MAX_STOPS} of them, 1 to {MAX_STOP_LENGTH} characters each")
    return tuple(stops)


def _prompts(value: Any) -> Sequence[str | list[int]]:
    expected = "a text, a list of texts, a list of token ids, or a list of such lists"
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise refuse("prompt", value, expected)
    if all(type(part) is int for part in value):
        return [value]
    texts = all(isinstance(part, str) for part in value)
    ids = all(isinstance(part, list) and part and all(type(id) is int for id in part) for part in value)
    if not texts and not ids:
        raise refuse("prompt", value, expected)
    return value


def _messages(value: Any) -> Sequence[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise refuse("messages", value, "a list of messages, one or more")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise refuse(where, message, 'an object with "role" and "content"')
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise RequestError(400, f"{where}.{name}: not supported by this server", param=where)
    content = message.get("content")
    if isinstance(content, list):  # parts, of which text is the only kind supported
        texts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(text, str) for text in texts):
            raise refuse(f"{where}.content", content, "a text or parts of type text")
        content = "".join(texts)  # type: ignore[arg-type]
    if not isinstance(content, str):
        raise refuse(f"{where}.content", content, "a text")
    return {"role": message["role"], "content": content}


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
