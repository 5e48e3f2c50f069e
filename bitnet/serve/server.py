"""The life of the server: open the socket, load the model, serve, shut down.

The socket opens first, so that a port in use is reported before a large model is read; /health answers 503 until the
model is ready. The main thread runs the event loop; a second one loads the model and then becomes the scheduler. SIGINT
and SIGTERM refuse new work and give running requests GRACE seconds; a second signal ends the server at once.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from bitnet.errors import BitNetError
from bitnet.generation import load_for_text
from bitnet.serve.app import build_app
from bitnet.serve.delivery import deliver
from bitnet.serve.guard import allowed_hosts, is_loopback
from bitnet.serve.info import ModelInfo
from bitnet.serve.metrics import Metrics
from bitnet.serve.protocol import RequestError
from bitnet.serve.replies import json_bytes
from bitnet.serve.scheduler import Scheduler
from bitnet.serve.service import ServedModel, Service

_log = logging.getLogger("bitnet")

MOST_SEQUENCES = 256  # each takes memory for a whole context
MOST_QUEUED = 100_000  # jobs, each with its prompt in memory
GRACE = 30.0  # seconds that running requests have to finish after SIGINT or SIGTERM
_MARGIN = 5.0  # seconds more, for their last bytes
_HEAD_SECONDS = 15.0  # for the header of the first request of a connection to arrive
_IDLE_SECONDS = 30  # a connection may be idle between requests
_UNREAD_MS = 60_000  # a client that accepts no bytes for so long is disconnected (TCP_USER_TIMEOUT, Linux)
_CONNECTIONS = 1000  # further ones get status 503; below the usual limit of 1,024 open files


@dataclass(frozen=True)
class ServerOptions:
    """Where to listen, and how many requests to take. `bitnet serve` defines the defaults."""

    host: str
    port: int  # 0: any free one
    api_key: str | None  # None: no key is needed
    sequences: int  # decoded at once
    context: int  # tokens; 0: the model's
    queue: int  # jobs that may wait


def serve(
    model: Path,
    device: torch.device,
    options: ServerOptions,
    announce: Callable[[str], None],
    **engine: str,
) -> int:
    """Serve a packed model until a signal ends it. Returns the exit code: 130 for SIGINT, 143 for SIGTERM.

    announce: called with the page's URL once the model is ready. engine: engine, head and cache of `bitnet.load`, all
    three. Raises BitNetError for an address that cannot be used and for what `load_for_text` refuses.
    """
    check_options(options)
    opened = open_socket(options.host, options.port)
    return _Lifecycle(model, device, options, engine, opened, announce).run()


def check_options(options: ServerOptions) -> None:
    """Raise BitNetError for options out of range."""
    key = options.api_key
    if key is not None and not (key.strip() and key.isascii() and key.isprintable()):
        raise BitNetError(
            "api-key: got a key that is empty or cannot be sent in a header, expected visible ASCII characters"
        )
    if not 1 <= options.sequences <= MOST_SEQUENCES:
        raise BitNetError(f"sequences: got {options.sequences}, expected 1 to {MOST_SEQUENCES}")
    if not 0 <= options.queue <= MOST_QUEUED:
        raise BitNetError(f"queue: got {options.queue}, expected 0 to {MOST_QUEUED:,}")


def open_socket(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises BitNetError for an address that cannot be used."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BitNetError(f"host: got '{host}' ({reason}), expected an address of this machine") from None
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections inherit the option
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_MS)
        opened.bind(address)
        opened.listen(256)
    except OSError as error:
        opened.close()
        raise BitNetError(
            f"port: got {port} on {host} ({error.strerror}), expected a free one; choose another (--port, 0: any)"
        ) from None
    return opened


def page_url(host: str, port: int) -> str:
    """The URL of the page for a browser on this machine."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}/"


class _Protocol(H11Protocol):
    """uvicorn's HTTP protocol with a time limit for the header of a request."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(_HEAD_SECONDS, self._close_if_idle)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._head_timer.cancel()
        if not self.transport.is_closing():
            self._head_timer = self.loop.call_later(_IDLE_SECONDS + _HEAD_SECONDS, self._close_if_idle)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP as uvicorn does, but with OpenAI's error object."""
        body = json_bytes(RequestError(400, f"HTTP: {msg}", code="invalid_http").body())
        head = f"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(f"{head}Connection: close\r\n\r\n".encode() + body)
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer.cancel()
        super().connection_lost(exc)

    def _close_if_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()  # a response that is being sent is still completed


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Stopped(Exception):  # noqa: N818 - not an error: it ends loading
    """A signal came while the model was loading."""


class _Lifecycle:
    """The server from its open socket to its end: `run` returns the exit code."""

    def __init__(
        self,
        model: Path,
        device: torch.device,
        options: ServerOptions,
        engine: dict[str, str],
        opened: socket.socket,
        announce: Callable[[str], None],
    ) -> None:
        self._model, self._device, self._options, self._engine = model, device, options, engine
        self._socket, self._announce = opened, announce
        self._host, self._port = opened.getsockname()[:2]
        self._service = Service(Metrics())
        app = build_app(self._service, options.api_key, allowed_hosts(self._host, options.host), self._crowded)
        self._server = _Server(
            uvicorn.Config(
                app,
                http=_Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_IDLE_SECONDS,
                timeout_graceful_shutdown=int(GRACE + _MARGIN),
            )
        )
        self._scheduler: Scheduler | None = None
        self._signal: int | None = None
        self._stopping = threading.Event()
        self._failure: BaseException | None = None

    def _crowded(self) -> bool:
        return len(self._server.server_state.connections) > _CONNECTIONS

    def run(self) -> int:
        with self._socket:
            asyncio.run(self._main())
        if self._failure is not None:
            raise self._failure
        return 128 + self._signal if self._signal else 0

    async def _main(self) -> None:
        loop = asyncio.get_running_loop()
        # asyncio warns of each write to a client that has just disconnected, which is normal here.
        logging.getLogger("asyncio").setLevel(logging.ERROR)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        worker = threading.Thread(target=self._load_and_schedule, args=(loop,), name="bitnet-scheduler", daemon=True)
        worker.start()
        await self._server.serve(sockets=[self._socket])
        # Time for the last pass of the engine; a model that is still being read is not waited for.
        await asyncio.to_thread(worker.join, _MARGIN)

    def _on_signal(self, number: int) -> None:
        if self._signal is not None:  # the second signal
            self._server.force_exit = True
            self._stop(0.0)
            return
        self._signal = int(number)
        busy = self._scheduler is not None and self._scheduler.busy
        if busy:
            _log.info("stopping: running requests have %.0f s to finish; repeat to stop at once", GRACE)
        self._stop(GRACE)

    def _stop(self, seconds: float) -> None:
        self._stopping.set()
        self._server.should_exit = True
        if self._scheduler is not None:
            self._scheduler.close(seconds)

    # ---- the scheduler's thread ----------------------------------------------------------------------------

    def _load_and_schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        def call(function: Callable[..., object], *args: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(function, *args)

        try:
            scheduler, model = self._load(call)
            call(self._service.ready, model)
            self._warn_if_open()
            self._announce(page_url(self._options.host, self._port))
            scheduler.run()  # even after a signal: requests that came before it get an answer
        except _Stopped:
            pass
        except (ValueError, OSError, MemoryError, RuntimeError) as error:  # raised by the main thread, at the end
            self._failure = error
        finally:
            if not self._stopping.is_set():
                self._failure = self._failure or RuntimeError("the scheduler's thread has ended")
                call(self._stop, 0.0)

    def _load(self, call: Callable[..., None]) -> tuple[Scheduler, ServedModel]:
        options, started = self._options, time.perf_counter()
        engine, tokenizer, limit = load_for_text(
            self._model, self._device, options.context, self._check_stop, **self._engine
        )
        self._check_stop(0)
        batch = engine.sequence_batch(options.sequences, limit)
        metrics = self._service.metrics
        metrics.sequences.set(batch.count)
        scheduler = Scheduler(batch, tokenizer, metrics, lambda events: call(deliver, events), queue=options.queue)
        self._scheduler = scheduler
        self._check_stop(0)  # a signal before the previous line has not closed the scheduler
        _log.info("%s ready in %.1f s: %s engine", self._model.name, time.perf_counter() - started, engine.name)
        info = ModelInfo(self._model, engine, batch, tokenizer, self._engine)
        return scheduler, ServedModel(self._model.stem, tokenizer, limit, scheduler, info)

    def _check_stop(self, layer: int) -> None:
        if self._stopping.is_set():
            raise _Stopped

    def _warn_if_open(self) -> None:
        if self._options.api_key is None and not is_loopback(self._host):
            _log.warning(
                "%s is reachable from other machines and no key is set: anyone there may use the server; set one with "
                "BITNET_API_KEY or --api-key",
                self._options.host,
            )
