"""Checks before every request (host name, key, size and speed of the body), and headers on every response.

A web page from elsewhere, open in a browser on this machine, must not be able to use the server: no CORS header is ever
sent, JSON needs its content type (a form cannot set it), and a server on a loopback address answers only to names of
this machine (DNS rebinding points another name to 127.0.0.1).
"""

import asyncio
import hmac
import ipaddress
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from bitnet.serve.metrics import Metrics
from bitnet.serve.protocol import RequestError
from bitnet.serve.replies import error_reply

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

MAX_BODY = 1 << 20  # bytes
DRAIN = 16 << 20  # bytes of a body that is too large: read and dropped, so that the client gets to read the error
BODY_SECONDS = 30.0  # for the whole body to arrive
OPEN_PATHS = frozenset({"/", "/style.css", "/app.js", "/icon.svg", "/health"})  # need no key: nothing secret, no work

_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (
        b"content-security-policy",
        (
            b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
            b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
    ),
]


class Guard:
    """Refuses requests before they reach the application, and counts all of them.

    key: None: none is needed. hosts: names to answer to; None: any. crowded: whether there are too many connections.
    """

    def __init__(
        self,
        app: App,
        metrics: Metrics,
        routes: Collection[str],
        key: str | None,
        hosts: Collection[str] | None,
        crowded: Callable[[], bool],
    ) -> None:
        self._app, self._metrics, self._routes = app, metrics, frozenset(routes)
        self._key = None if key is None else b"Bearer " + key.encode()
        self._hosts, self._crowded = hosts, crowded

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle a request, as an ASGI application."""
        if scope["type"] != "http":
            return
        path = scope["path"] if scope["path"] in self._routes else "other"

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
                if path not in OPEN_PATHS:
                    message["headers"].append((b"cache-control", b"no-store"))
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        try:
            self._check(scope)
        except RequestError as error:
            reply = error_reply(error)
            if error.code == "crowded":
                reply.headers["Connection"] = "close"
            await reply(scope, receive, send_guarded)
            return
        await self._app(scope, receive, send_guarded)

    def _check(self, scope: Message) -> None:
        if self._crowded():
            raise RequestError(503, "the server has too many connections; try again soon", code="crowded", retry=1)
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if self._hosts is not None and host_name(host) not in self._hosts:
            raise RequestError(
                421,
                "Host: got a name that is not this machine's, expected localhost; a proxy has to set the Host header "
                "to localhost, and --host makes the server reachable from other machines",
                code="wrong_host",
            )
        if self._key is None or scope["path"] in OPEN_PATHS:
            return
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._key):
            raise RequestError(
                401, "Authorization: got no valid key, expected 'Bearer' and the server's key", code="invalid_api_key"
            )


def host_name(value: str) -> str:
    """The name in a Host header, without its port, in lower case."""
    name = value.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].rstrip(".")


def allowed_hosts(bound: str, asked: str) -> frozenset[str] | None:
    """The names a server answers to: on a loopback address those of this machine, elsewhere any (None).

    bound: the address of its socket. asked: the name or address given with --host.
    """
    if not is_loopback(bound):
        return None
    return frozenset({"localhost", "127.0.0.1", "::1", bound, asked.lower()})


def is_loopback(address: str) -> bool:
    """Whether an address is reachable from this machine only."""
    return ipaddress.ip_address(address).is_loopback


class ClientGoneError(Exception):
    """The client disconnected before its request was complete or its response sent."""


async def read_body(receive: Receive, headers: Any) -> bytes:
    """The body of a request. Raises RequestError (408, 413, 415) and ClientGoneError."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    body = bytearray()
    size = 0
    until = time.monotonic() + BODY_SECONDS
    while True:
        try:
            async with asyncio.timeout(until - time.monotonic()):
                message = await receive()
        except TimeoutError:
            raise RequestError(408, f"body: got only part of it in {BODY_SECONDS:.0f} s, expected all of it") from None
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        size += len(message.get("body", b""))
        if size <= MAX_BODY:
            body += message.get("body", b"")
        if not message.get("more_body") or size > DRAIN:
            break
    if size > MAX_BODY:
        raise RequestError(413, f"body: got more than {MAX_BODY:,} bytes, expected at most that", code="body_too_large")
    if kind != "application/json":
        raise RequestError(415, "Content-Type: expected application/json", code="wrong_content_type")
    return bytes(body)
