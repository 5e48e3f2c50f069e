"""Answers in OpenAI's shape, whole and as a stream of server-sent events.

A reply is made of its choices; each choice takes the pieces of one job. JSON is written in ASCII: a model may be asked
about, and may be sent, strings that have no UTF-8 form.
"""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from starlette.responses import Response

from bitnet.serve.protocol import RequestError
from bitnet.serve.scheduler import End, Piece, Token
from bitnet.serve.text import Speller

_LOWEST = -9999.0  # OpenAI's way to write a probability of nothing; JSON has no infinity


def json_bytes(value: Any) -> bytes:
    """A value as JSON."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A whole answer."""
    return Response(json_bytes(value), status, headers, media_type="application/json")


def error_reply(error: RequestError) -> Response:
    """An error as OpenAI sends it."""
    headers = {} if error.retry is None else {"Retry-After": str(error.retry)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_reply(error.body(), error.status, headers)


def sse(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json_bytes(value) + b"\n\n"


SSE_END = b"data: [DONE]\n\n"
SSE_WAITING = b": waiting\n\n"  # a comment, so that proxies see life


class Usage:
    """Counts tokens over the jobs of a request. A prompt counts once, however many choices it has (n)."""

    def __init__(self, prompt_tokens: int, n: int) -> None:
        self.prompt, self.written, self._n = prompt_tokens, 0, n
        self._reused: dict[int, int] = {}  # by prompt: what none of its choices had to read

    def add(self, index: int, end: End) -> None:
        """Count a job that has ended."""
        self.written += end.tokens
        prompt = index // self._n
        self._reused[prompt] = min(end.reused, self._reused.get(prompt, end.reused))

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.written,
            "total_tokens": self.prompt + self.written,
            "prompt_tokens_details": {"cached_tokens": sum(self._reused.values())},
        }


class Reply(Protocol):
    """How one kind of request is answered."""

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Chunks that begin a streamed choice."""

    def chunk(self, index: int, piece: Piece, reason: str | None) -> dict[str, Any]:
        """A streamed part of a choice."""

    def whole(self, choices: Sequence[tuple[str, Sequence[Token], str]], usage: Usage) -> dict[str, Any]:
        """The answer in one: text, tokens and reason of each choice."""

    def closing(self, usage: Usage) -> dict[str, Any]:
        """The chunk with the usage."""


class _Common:
    """What both kinds share: the head of every object."""

    prefix, whole_kind, chunk_kind = "", "", ""

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
    """The answer of /v1/completions."""

    prefix, whole_kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def chunk(self, index: int, piece: Piece, reason: str | None) -> dict[str, Any]:
        return self._object(self.chunk_kind, [self._choice(index, piece.text, piece.tokens, reason)])

    def whole(self, choices: Sequence[tuple[str, Sequence[Token], str]], usage: Usage) -> dict[str, Any]:
        return self._object(self.whole_kind, [self._choice(i, *choice) for i, choice in enumerate(choices)], usage)

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
        """By spelling, the likeliest first; of two tokens that are spelt alike the likelier. The token itself too."""
        found: dict[str, float] = {}
        for id, logprob in [*token.top, (token.id, token.logprob or 0.0)]:
            found.setdefault(self._spell.name(id), _finite(logprob))
        return found


class ChatReply(_Common):
    """The answer of /v1/chat/completions."""

    prefix, whole_kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [self._object(self.chunk_kind, [self._choice(index, "delta", delta, (), None)])]

    def chunk(self, index: int, piece: Piece, reason: str | None) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text or piece.tokens else {}
        return self._object(self.chunk_kind, [self._choice(index, "delta", delta, piece.tokens, reason)])

    def whole(self, choices: Sequence[tuple[str, Sequence[Token], str]], usage: Usage) -> dict[str, Any]:
        made = [
            self._choice(i, "message", {"role": "assistant", "content": text}, tokens, reason)
            for i, (text, tokens, reason) in enumerate(choices)
        ]
        return self._object(self.whole_kind, made, usage)

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
