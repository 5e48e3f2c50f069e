"""The server's state: nothing while the model loads, then the model and what requests are checked against."""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from bitnet.errors import BitNetError
from bitnet.serve.guard import read_body
from bitnet.serve.metrics import Metrics
from bitnet.serve.protocol import RequestError, parse_json
from bitnet.serve.scheduler import Scheduler
from bitnet.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """A model that is ready."""

    name: str
    tokenizer: Tokenizer
    limit: int  # most tokens of a text, its prompt included
    scheduler: Scheduler
    info: Callable[[], dict[str, Any]]  # the answer of /info


class Service:
    """What all routes share."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.started = int(time.time())
        self._model: ServedModel | None = None
        # Encoding a chat temporarily changes a setting of its tokenizer: one thread at a time.
        self._encoding = asyncio.Lock()
        self._longest_token = 1  # bytes

    def ready(self, model: ServedModel) -> None:
        """Take requests from now on. Called on the event loop."""
        self._longest_token = max(1, int(model.tokenizer.byte_lengths().max()))
        self._model = model
        self.metrics.ready.set(1)

    @property
    def loading(self) -> bool:
        """Whether the model is still being loaded."""
        return self._model is None

    @property
    def model(self) -> ServedModel:
        """The model. Raises RequestError (503) while it is loading."""
        if self._model is None:
            raise RequestError(503, "the model is loading; try again soon", code="loading", retry=1)
        return self._model

    async def encode(self, encoder: Callable[[], list[int]], text: str) -> list[int]:
        """The ids that `encoder` returns for `text`, computed in a thread.

        Raises RequestError (400) for a text that cannot be encoded or is too long.
        """
        limit = self.model.limit
        # No token has more bytes than the longest: a text that cannot fit is refused before it is tokenised.
        if len(text) > limit * self._longest_token:
            raise too_long(f"over {limit}", limit)
        try:
            async with self._encoding:
                return await asyncio.to_thread(encoder)
        except BitNetError as error:
            raise RequestError(400, str(error)) from None

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise RequestError (400) for no ids, for ids outside the vocabulary, and for more than fit."""
        model = self.model
        if not ids:
            raise RequestError(400, "prompt: got no tokens, expected at least one", param="prompt")
        if not in_vocabulary(ids, model.tokenizer.vocab_size):
            raise RequestError(
                400, f"prompt: got an unknown token id, expected 0 to {model.tokenizer.vocab_size - 1}", param="prompt"
            )
        if len(ids) > model.limit:
            raise too_long(f"{len(ids)}", model.limit)

    def check_model(self, name: str | None) -> None:
        """Raise RequestError (404) for the name of a model that is not served."""
        if name not in (None, self.model.name):
            message = f"model: got '{name[:100]!s}', expected '{self.model.name}'" if name else "model: got ''"
            raise RequestError(404, message, param="model", code="model_not_found")


def service_of(request: Request) -> Service:
    """The service of the application that a request came to."""
    service: Service = request.app.state.service
    return service


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object in the body of a request. Raises RequestError (400, 408, 413, 415) and ClientGoneError."""
    return parse_json(await read_body(request.receive, request.headers))


def too_long(got: str, limit: int) -> RequestError:
    """The error for a prompt that does not fit into the context."""
    message = f"prompt: got {got} tokens, expected at most the context's {limit}; shorten it"
    return RequestError(400, message, param="prompt", code="context_length_exceeded")


def in_vocabulary(ids: Iterable[int], vocab_size: int) -> bool:
    """Whether all ids are those of tokens."""
    return all(0 <= id < vocab_size for id in ids)
