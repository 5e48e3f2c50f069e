"""The routes: OpenAI's, the tokenizer's, the page's, and what watches the server asks for.

Everything here runs on the event loop; what takes time (tokenising, looking into the file) goes to a thread.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bitnet.errors import BitNetError
from bitnet.generation import prompt_ids, stop_ids
from bitnet.serve import metrics as telemetry
from bitnet.serve.guard import App, ClientGoneError, Guard, Receive, Send, read_body
from bitnet.serve.protocol import (
    RequestError,
    RequestParams,
    flag,
    parse_chat,
    parse_completion,
    parse_json,
    refuse,
)
from bitnet.serve.replies import (
    SSE_END,
    SSE_WAITING,
    ChatReply,
    CompletionReply,
    Reply,
    Usage,
    error_reply,
    json_reply,
    sse,
)
from bitnet.serve.scheduler import (
    ClosedError,
    End,
    Event,
    Failure,
    Job,
    Piece,
    QueueFullError,
    Scheduler,
    Token,
    usable,
)
from bitnet.serve.text import Speller
from bitnet.text.tokenizer import Tokenizer

SEND_SECONDS = 60.0  # a client that takes nothing for so long is gone
WAITING_SECONDS = 10.0  # between signs of life while a request waits
MOST_EVENTS = 1024  # that wait for a client; one that reads more slowly than its text is written loses it
_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


@dataclass(frozen=True)
class Loaded:
    """A model that is ready."""

    name: str
    tokenizer: Tokenizer
    limit: int  # tokens a text may have, its prompt included
    scheduler: Scheduler
    facts: Callable[[], dict[str, Any]]  # what /info tells


class Service:
    """The server's state: nothing until the model is loaded."""

    def __init__(self, metrics: telemetry.Metrics) -> None:
        self.metrics = metrics
        self.started = int(time.time())
        self._loaded: Loaded | None = None
        # A tokenizer with a chat template changes a setting while it encodes one: one thread at a time.
        self._encoding = asyncio.Lock()
        self._longest = 1

    def ready(self, loaded: Loaded) -> None:
        """Take requests from now on. Called on the event loop."""
        self._longest = max(1, int(loaded.tokenizer.byte_lengths().max()))
        self._loaded = loaded
        self.metrics.ready.set(1)

    @property
    def loading(self) -> bool:
        """Whether the model is not there yet."""
        return self._loaded is None

    @property
    def loaded(self) -> Loaded:
        """The model. Raises RequestError (503) while it is loading."""
        if self._loaded is None:
            raise RequestError(503, "the model is loading; try again soon", code="loading", retry=1)
        return self._loaded

    async def encode(self, make: Callable[[], list[int]], text: str) -> list[int]:
        """Ids that `make` gives for `text`. Raises RequestError (400) for what cannot be encoded or is too long."""
        loaded = self.loaded
        # No token spells more bytes than the longest: what cannot fit is not even tokenised.
        if len(text) > loaded.limit * self._longest:
            raise too_long(f"over {loaded.limit}", loaded.limit)
        try:
            async with self._encoding:
                return await asyncio.to_thread(make)
        except BitNetError as error:
            raise RequestError(400, str(error)) from None

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises RequestError (400) for ids of another model, for none, and for too many."""
        loaded = self.loaded
        if not ids:
            raise RequestError(400, "prompt: got no tokens, expected at least one", param="prompt")
        if not usable(ids, loaded.tokenizer.vocab_size):
            raise RequestError(
                400, f"prompt: got an unknown token id, expected 0 to {loaded.tokenizer.vocab_size - 1}", param="prompt"
            )
        if len(ids) > loaded.limit:
            raise too_long(f"{len(ids)}", loaded.limit)

    def check_model(self, name: str | None) -> None:
        """Raises RequestError (404) for a model that is not the one served."""
        if name not in (None, self.loaded.name):
            message = f"model: got '{name[:100]!s}', expected '{self.loaded.name}'" if name else "model: got ''"
            raise RequestError(404, message, param="model", code="model_not_found")


def too_long(got: str, limit: int) -> RequestError:
    """The error for a prompt that does not fit."""
    message = f"prompt: got {got} tokens, expected at most the context's {limit}; shorten it"
    return RequestError(400, message, param="prompt", code="context_length_exceeded")


def build_app(
    service: Service,
    key: str | None = None,
    hosts: frozenset[str] | None = None,
    crowded: Callable[[], bool] = lambda: False,
) -> App:
    """The whole server as an ASGI application; key, hosts and crowded: of `Guard`."""
    routes: dict[str, tuple[str, Callable[[Request], Awaitable[Response]]]] = {
        "/health": ("GET", _health),
        "/metrics": ("GET", _metrics),
        "/info": ("GET", _info),
        "/v1/models": ("GET", _models),
        "/v1/completions": ("POST", _completions),
        "/v1/chat/completions": ("POST", _chat),
        "/tokenize": ("POST", _tokenize),
        "/detokenize": ("POST", _detokenize),
        "/tokenizer_info": ("GET", _tokenizer_info),
        **dict.fromkeys(_PAGE, ("GET", _page)),
    }
    app = Starlette(
        routes=[Route(path, endpoint, methods=[method]) for path, (method, endpoint) in routes.items()],
        exception_handlers={
            RequestError: _on_refusal,
            HTTPException: _on_http_error,
            ClientGoneError: _on_gone,
            500: _on_mistake,
        },
    )
    app.router.redirect_slashes = False  # a redirect would be built from the Host header
    app.state.service = service
    return Guard(app, service.metrics, routes, key, hosts, crowded)


def _service(request: Request) -> Service:
    return request.app.state.service


# ---- texts -------------------------------------------------------------------------------------------------


async def _completions(request: Request) -> Response:
    service = _service(request)
    values = parse_json(await read_body(request.receive, request.headers))
    asked = parse_completion(values)
    loaded, params = service.loaded, asked.params
    service.check_model(params.model)
    _check_count(len(asked.prompts) * params.n, loaded.scheduler.most)
    jobs, prompt_tokens = [], 0
    for prompt in asked.prompts:
        if isinstance(prompt, str):
            ids = await service.encode(lambda text=prompt: prompt_ids(loaded.tokenizer, text), prompt)  # type: ignore[misc]
        else:
            ids = prompt
        service.check_ids(ids)
        echo = None
        if asked.echo:
            echo = prompt if isinstance(prompt, str) else loaded.tokenizer.decode(ids)
        prompt_tokens += len(ids)
        jobs += [_job(loaded, ids, params, i, echo) for i in range(params.n)]
    reply = CompletionReply(loaded.name, Speller(loaded.tokenizer), params.top, params.include_usage)
    return await _run(request, jobs, reply, params, Usage(prompt_tokens, params.n))


async def _chat(request: Request) -> Response:
    service = _service(request)
    values = parse_json(await read_body(request.receive, request.headers))
    asked = parse_chat(values)
    loaded, params = service.loaded, asked.params
    service.check_model(params.model)
    tokenizer = loaded.tokenizer
    if tokenizer.chat_template is None:
        raise RequestError(
            400, "this model has no chat template; use /v1/completions", param="messages", code="no_chat_template"
        )
    said = "".join(message["content"] for message in asked.messages)
    ids = await service.encode(lambda: tokenizer.encode_chat(asked.messages), said)
    service.check_ids(ids)
    _check_count(params.n, loaded.scheduler.most)
    jobs = [_job(loaded, ids, params, i, None) for i in range(params.n)]
    reply = ChatReply(loaded.name, Speller(tokenizer), params.top, params.include_usage)
    return await _run(request, jobs, reply, params, Usage(len(ids), params.n))


def _check_count(count: int, most: int) -> None:
    if count > most:
        raise RequestError(
            400, f"prompt, n: got {count} texts in one request, expected at most {most}; send fewer at once or raise "
            "the server's --queue", param="prompt",
        )  # fmt: skip


def _job(loaded: Loaded, ids: Sequence[int], params: RequestParams, choice: int, echo: str | None) -> Job:
    room = loaded.limit - len(ids) + 1  # the last token is written, never read
    sampling = params.sampling
    return Job(
        ids=ids,
        max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
        sampling=type(sampling)(**{**vars(sampling), "seed": (sampling.seed + choice) % 2**63}),
        stop=params.stop,
        ends=frozenset() if params.ignore_eos else frozenset(stop_ids(loaded.tokenizer)),
        top=params.top,
        echo=echo,
    )


class _Box(asyncio.Queue[Any]):
    """The events of one request: (its job's index, event), or "gone" once the client has left."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        super().__init__()
        self._jobs = jobs

    def take(self, index: int, event: Event) -> None:
        """Put an event in; of too many the last is a failure, and the jobs end."""
        if self.qsize() < MOST_EVENTS:
            self.put_nowait((index, event))
        elif not self._jobs[index].cancelled:
            self.put_nowait((index, Failure(503, "the answer was read too slowly")))
            self.cancel()

    def cancel(self) -> None:
        """End the jobs; those that have ended do not mind."""
        for job in self._jobs:
            job.cancelled = True


async def _run(request: Request, jobs: list[Job], reply: Reply, params: RequestParams, usage: Usage) -> Response:
    """Queue the jobs of a request and answer with what comes of them."""
    box = _Box(jobs)
    for index, job in enumerate(jobs):
        job.key = (box, index)
    try:
        _service(request).loaded.scheduler.submit(jobs)
    except QueueFullError as error:
        raise RequestError(429, f"too many requests: {error}", code="queue_full", retry=error.retry) from None
    except ClosedError:
        raise RequestError(503, "the server is shutting down", code="shutting_down") from None
    if params.stream:
        return EventStream(jobs, box, reply, usage, params.include_usage)
    return await _whole(request, jobs, box, reply, usage)


def deliver(events: Sequence[tuple[Job, Event]]) -> None:
    """Put events into the boxes of their requests. Called on the event loop with what the scheduler posted."""
    for job, event in events:
        box, index = job.key
        box.take(index, event)


async def _whole(request: Request, jobs: list[Job], box: _Box, reply: Reply, usage: Usage) -> Response:
    texts: list[list[str]] = [[] for _ in jobs]
    tokens: list[list[Token]] = [[] for _ in jobs]
    reasons = [""] * len(jobs)
    async for found in _events(jobs, box, request.receive):
        if found is None:
            continue
        index, event = found
        if isinstance(event, Piece):
            texts[index].append(event.text)
            tokens[index].extend(event.tokens)
        elif isinstance(event, End):
            usage.add(index, event)
            reasons[index] = event.reason
        else:
            raise RequestError(event.status, event.message)
    return json_reply(reply.whole(list(zip(map("".join, texts), tokens, reasons, strict=True)), usage))


async def _events(jobs: list[Job], box: _Box, receive: Receive) -> AsyncIterator[tuple[int, Event] | None]:
    """What comes of the jobs, until each has ended; None after WAITING_SECONDS of nothing.

    Raises ClientGoneError. Whatever ends this also ends the jobs.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        box.put_nowait("gone")

    watcher = asyncio.create_task(watch())
    left = len(jobs)
    try:
        while left:
            try:
                async with asyncio.timeout(WAITING_SECONDS):
                    found = await box.get()
            except TimeoutError:
                yield None
                continue
            if found == "gone":
                raise ClientGoneError
            left -= not isinstance(found[1], Piece)
            yield found
    finally:
        box.cancel()
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher


class EventStream(Response):
    """A reply that is sent as it is written."""

    def __init__(self, jobs: list[Job], box: _Box, reply: Reply, usage: Usage, include_usage: bool) -> None:
        super().__init__(headers={"X-Accel-Buffering": "no"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._jobs, self._box, self._reply, self._usage, self._include = jobs, box, reply, usage, include_usage

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        events = _events(self._jobs, self._box, receive)
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            for index in range(len(self._jobs)):
                for chunk in self._reply.opening(index):
                    await _push(send, sse(chunk))
            await self._pump(events, send)
            if self._include:
                await _push(send, sse(self._reply.closing(self._usage)))
            await _push(send, SSE_END)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (ClientGoneError, TimeoutError):
            pass  # nobody is there to be told; the unfinished answer makes the server close the connection
        finally:
            self._box.cancel()  # the events may not have begun; then closing them runs nothing
            await events.aclose()  # type: ignore[attr-defined]

    async def _pump(self, events: AsyncIterator[tuple[int, Event] | None], send: Send) -> None:
        async for found in events:
            if found is None:
                await _push(send, SSE_WAITING)
                continue
            index, event = found
            if isinstance(event, Piece):
                await _push(send, sse(self._reply.chunk(index, event, None)))
            elif isinstance(event, End):
                self._usage.add(index, event)
                await _push(send, sse(self._reply.chunk(index, Piece("", ()), event.reason)))
            else:
                await _push(send, sse(RequestError(event.status, event.message).body()))
                return


async def _push(send: Send, data: bytes) -> None:
    async with asyncio.timeout(SEND_SECONDS):
        await send({"type": "http.response.body", "body": data, "more_body": True})


# ---- the tokenizer -----------------------------------------------------------------------------------------


async def _tokenize(request: Request) -> Response:
    """{"prompt" or "content": text, "add_special_tokens": BOS where texts start with one (default true)}."""
    service = _service(request)
    values = parse_json(await read_body(request.receive, request.headers))
    loaded = service.loaded
    text = values.get("prompt", values.get("content"))
    if not isinstance(text, str):
        raise refuse("prompt", text, "a text")
    special = values.get("add_special_tokens") is None or flag(values, "add_special_tokens")
    control = _control_ids(loaded.tokenizer)
    if not special and text in control:
        ids = [control[text]]  # the whole text is the name of a control token: somebody asks for its id
    else:
        make = (lambda: prompt_ids(loaded.tokenizer, text)) if special else (lambda: loaded.tokenizer.encode(text))
        ids = await service.encode(make, "")  # however long: nothing is kept of it
    return json_reply({"tokens": ids, "count": len(ids), "max_model_len": loaded.limit})


def _control_ids(tokenizer: Tokenizer) -> dict[str, int]:
    speller = Speller(tokenizer)
    return {speller.name(id): id for id in (tokenizer.bos_id, tokenizer.eos_id) if id is not None}


async def _detokenize(request: Request) -> Response:
    """{"tokens": ids} to {"prompt": text}."""
    service = _service(request)
    values = parse_json(await read_body(request.receive, request.headers))
    loaded, ids = service.loaded, values.get("tokens")
    if not isinstance(ids, list) or not all(type(id) is int for id in ids):
        raise refuse("tokens", ids, "a list of token ids")
    if not usable(ids, loaded.tokenizer.vocab_size):
        raise RequestError(400, f"tokens: expected ids from 0 to {loaded.tokenizer.vocab_size - 1}", param="tokens")
    text = loaded.tokenizer.decode(ids)
    return json_reply({"prompt": text, "content": text})


async def _tokenizer_info(request: Request) -> Response:
    """What lm-eval asks before it leaves tokenising to the server. /tokenize gives the id of a name."""
    tokenizer = _service(request).loaded.tokenizer
    speller = Speller(tokenizer)
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    names = {name: None if id is None else speller.name(id) for name, id in ids.items()}
    return json_reply({**names, "pad_token": None, "chat_template": tokenizer.chat_template})


# ---- the server itself -------------------------------------------------------------------------------------


async def _health(request: Request) -> Response:
    if _service(request).loading:
        return json_reply({"status": "loading"}, 503, {"Retry-After": "1"})
    return json_reply({"status": "ok"})


async def _metrics(request: Request) -> Response:
    return Response(_service(request).metrics.render(), media_type=telemetry.CONTENT_TYPE)


async def _info(request: Request) -> Response:
    return json_reply(await asyncio.to_thread(_service(request).loaded.facts))


async def _models(request: Request) -> Response:
    service = _service(request)
    loaded = service.loaded
    entry = {"id": loaded.name, "object": "model", "created": service.started, "owned_by": "bitnet"}
    return json_reply({"object": "list", "data": [{**entry, "max_model_len": loaded.limit}]})


async def _page(request: Request) -> Response:
    name, kind = _PAGE[request.url.path]
    content = resources.files("bitnet.serve").joinpath("page", name).read_bytes()
    return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})


# ---- errors ------------------------------------------------------------------------------------------------


async def _on_refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError), error
    return error_reply(error)


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), error
    known = {404: "no such path; see /v1/models", 405: "this path does not take that method"}
    reply = error_reply(RequestError(error.status_code, known.get(error.status_code, str(error.detail))))
    for name, value in (error.headers or {}).items():
        reply.headers[name] = value
    return reply


async def _on_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; what others write into their logs for this


async def _on_mistake(_: Request, __: Exception) -> Response:
    return error_reply(RequestError(500, "the server made a mistake; its log says more"))
