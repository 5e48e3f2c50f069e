"""The JSON of replies in OpenAI's format, in one piece and as server-sent events.

A reply consists of choices, and each choice is the text of one job. JSON is written in ASCII, since a reply may repeat
strings of its request, which need not have a UTF-8 form (a lone surrogate has none).
"""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from starlette.responses import Response

from bitnet.serve.jobs import Delta, Finished, Token
from bitnet.serve.protocol import RequestError
from bitnet.serve.text import Speller

_LOWEST = -9999.0  # what OpenAI writes for the logarithm of 0; JSON has no infinity


def json_bytes(value: Any) -> bytes:
    """A value as ASCII JSON."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response with a JSON body."""
    return Response(json_bytes(value), status, headers, media_type="application/json")


def error_reply(error: RequestError) -> Response:
    """A response with OpenAI's error object."""
    headers = {} if error.retry is None else {"Retry-After": str(error.retry)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_reply(error.body(), error.status, headers)


def sse(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json_bytes(value) + b"\n\n"


SSE_END = b"data: [DONE]\n\n"
SSE_WAITING = b": waiting\n\n"  # a comment, which keeps proxies from closing an idle connection


class Usage:
    """Token counts of a request. A prompt counts once, however many choices (n) are made of it."""

    def __init__(self, prompt_tokens: int, n: int) -> None:
        self.prompt, self.generated, self._n = prompt_tokens, 0, n
        self._cached: dict[int, int] = {}  # by prompt: the tokens that none of its choices had to read

    def add(self, index: int, end: Finished) -> None:
        """Count a job that has finished."""
        self.generated += end.tokens
        prompt = index // self._n
        self._cached[prompt] = min(end.cached, self._cached.get(prompt, end.cached))

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }


class Reply(Protocol):
    """The JSON of one kind of reply."""

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Chunks that begin a streamed choice."""

    def chunk(self, index: int, delta: Delta, reason: str | None) -> dict[str, Any]:
        """New text of a streamed choice."""

    def complete(self, choices: Sequence[tuple[str, Sequence[Token], str]], usage: Usage) -> dict[str, Any]:
        """The reply in one piece, from the text, tokens and finish reason of each choice."""

    def closing(self, usage: Usage) -> dict[str, Any]:
        """The last chunk of a stream, which holds the usage."""


class _Common:
    """What both kinds share: the fields that every object starts with."""

    prefix, complete_kind, chunk_kind = "", "", ""

    def __init__(self, model: str, speller: Speller, top: int | None, include_usage: bool) -> None:
        self._spell, self._top, self._usage = speller, top, include_usage
        self._head = {"id": self.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}

    def _object(self, kind: str, choices: list[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        result = {**self._head, "object": kind, "choices": choices}
        if usage is not None:
            result["usage"] = usage.to_dict()
        elif self._usage:
            result["usage"] = None
        return result

    def opening(self, index: int) -> list[dict[str, Any]]:
        return []

    def closing(self, usage: Usage) -> dict[str, Any]:
        return self._object(self.chunk_kind, [], usage)


class CompletionReply(_Common):
    """The reply of /v1/completions."""

    prefix, complete_kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def chunk(self, index: int, delta: Delta, reason: str | None) -> dict[str, Any]:
        return self._object(self.chunk_kind, [self._choice(index, delta.text, delta.tokens, reason)])

    def complete(self, choices: Sequence[tuple[str, Sequence[Token], str]], usage: Usage) -> dict[str, Any]:
        return self._object(self.complete_kind, [self._choice(i, *choice) for i, choice in enumerate(choices)], usage)

    def _choice(self, index: int, text: str, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        logprobs = None if self._top is None else self._logprobs(tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {
            "tokens": [self._spell.name(token.id) for token in tokens],
            "token_logprobs": [None if token.logprob is None else _finite(token.logprob) for token in tokens],
            "top_logprobs": [None if token.logprob is None else self._likeliest(token) for token in tokens],
            "text_offset": [token.start for token in tokens],
        }

    def _likeliest(self, token: Token) -> dict[str, float]:
        """Log-probabilities by spelling, the likeliest first, the token included; of equal spellings the likelier."""
        found: dict[str, float] = {}
        for id, logprob in [*token.top, (token.id, token.logprob or 0.0)]:
            found.setdefault(self._spell.name(id), _finite(logprob))
        return found


class ChatReply(_Common):
    """The reply of /v1/chat/completions."""

    prefix, complete_kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [self._object(self.chunk_kind, [self._choice(index, "delta", delta, (), None)])]

    def chunk(self, index: int, delta: Delta, reason: str | None) -> dict[str, Any]:
        message = {"content": delta.text} if delta.text or delta.tokens else {}
        return self._object(self.chunk_kind, [self._choice(index, "delta", message, delta.tokens, reason)])

    def complete(self, choices: Sequence[tuple[str, Sequence[Token], str]], usage: Usage) -> dict[str, Any]:
        made = [
            self._choice(i, "message", {"role": "assistant", "content": text}, tokens, reason)
            for i, (text, tokens, reason) in enumerate(choices)
        ]
        return self._object(self.complete_kind, made, usage)

    def _choice(
        self, index: int, name: str, message: dict[str, Any], tokens: Sequence[Token], reason: str | None
    ) -> dict[str, Any]:
        logprobs = None if self._top is None else {"content": [self._entry(token) for token in tokens]}
        return {"index": index, name: message, "logprobs": logprobs, "finish_reason": reason}

    def _entry(self, token: Token) -> dict[str, Any]:
        top = [self._one(id, logprob) for id, logprob in token.top]
        return {**self._one(token.id, token.logprob or 0.0), "top_logprobs": top}

    def _one(self, id: int, logprob: float) -> dict[str, Any]:
        data = self._spell.bytes(id)
        return {"token": self._spell.name(id), "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
