"""From a file to a server that answers, and to its polite end.

The socket opens first, so that a port in use is told before a large model is read and /health says 503 meanwhile. The
main thread runs the event loop; a second one loads the model and then is the scheduler. SIGINT and SIGTERM stop new
work, give what runs GRACE seconds, and end; a second signal ends at once.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from bitnet.engine.base import Engine, SequenceBatch
from bitnet.errors import BitNetError
from bitnet.generation import load_for_text
from bitnet.inspection import inspect_packed
from bitnet.kernels import ops
from bitnet.serve.app import Loaded, Service, build_app, deliver
from bitnet.serve.guard import allowed_hosts, is_loopback
from bitnet.serve.metrics import Metrics
from bitnet.serve.protocol import RequestError
from bitnet.serve.replies import json_bytes
from bitnet.serve.scheduler import Scheduler
from bitnet.text.json_tokenizer import JsonTokenizer

_log = logging.getLogger("bitnet")

GRACE = 30.0  # seconds for running texts once the server is asked to stop
_MARGIN = 5.0  # on top, for their last bytes
_HEAD_SECONDS = 15.0  # for the first request of a connection to be announced in full
_IDLE_SECONDS = 30  # a connection may rest between requests
_UNREAD_MS = 60_000  # a peer that takes no bytes for so long loses its connection (TCP_USER_TIMEOUT, Linux)
_LOOK_SECONDS = 0.5  # a small model has been counted by then
_CONNECTIONS = 1000  # beyond it: 503. Below the usual limit of 1,024 files


@dataclass(frozen=True)
class ServerOptions:
    """Where and for whom to serve. queue: texts that may wait; context 0: the model's."""

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    slots: int = 4
    context: int = 0
    queue: int = 64
    grace: float = GRACE


def serve(
    model: Path,
    device: torch.device,
    options: ServerOptions,
    announce: Callable[[str], None] = lambda url: None,
    **engine: str,
) -> int:
    """Serve a packed model until a signal ends it. Returns the exit code: 130 for SIGINT, 143 for SIGTERM.

    announce: called with the page's URL once the model is ready. engine: engine, head and cache of `bitnet.load`.
    Raises BitNetError for an address that cannot be had and for what `load_for_text` refuses.
    """
    check_options(options)
    opened = open_socket(options.host, options.port)
    return _Run(model, device, options, engine, opened, announce).run()


def check_options(options: ServerOptions) -> None:
    """Raise BitNetError for options that make no server."""
    key = options.api_key
    if key is not None and not (key.strip() and key.isascii() and key.isprintable()):
        raise BitNetError("api-key: got no key or one that no header can carry, expected visible ASCII characters")
    if not 1 <= options.slots <= 256:  # each takes memory for a whole context
        raise BitNetError(f"slots: got {options.slots}, expected 1 to 256")
    if not 0 <= options.queue <= 100_000:
        raise BitNetError(f"queue: got {options.queue}, expected 0 to 100,000")


def open_socket(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises BitNetError where the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BitNetError(f"host: got '{host}' ({reason}), expected an address of this machine") from None
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections inherit it
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
    """Where a browser on this machine finds the page."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}/"


class _Protocol(H11Protocol):
    """uvicorn's HTTP, with a limit to how long the head of a request may take."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(_HEAD_SECONDS, self._give_up)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._head_timer.cancel()
        if not self.transport.is_closing():
            self._head_timer = self.loop.call_later(_IDLE_SECONDS + _HEAD_SECONDS, self._give_up)

    def send_400_response(self, msg: str) -> None:
        """For what is not HTTP: uvicorn's answer, with OpenAI's error object."""
        body = json_bytes(RequestError(400, f"HTTP: {msg}", code="invalid_http").body())
        head = f"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(f"{head}Connection: close\r\n\r\n".encode() + body)
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer.cancel()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()  # what is left of an answer still goes out


class _Server(uvicorn.Server):
    """uvicorn's server, whose signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Stopped(Exception):  # noqa: N818 - no error: the way out of loading
    """The server was asked to stop while the model was loading."""


class _Run:
    """One run of the server."""

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
                timeout_graceful_shutdown=int(options.grace + _MARGIN),
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
        # Pieces of text for a client that has just left are an everyday thing, and asyncio warns of each.
        logging.getLogger("asyncio").setLevel(logging.ERROR)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        worker = threading.Thread(target=self._work, args=(loop,), name="bitnet-scheduler", daemon=True)
        worker.start()
        await self._server.serve(sockets=[self._socket])
        # Not longer than a pass of the engine; a model that is still being read does not keep anybody.
        await asyncio.to_thread(worker.join, _MARGIN)

    def _on_signal(self, number: int) -> None:
        if self._signal is not None:  # a second one
            self._server.force_exit = True
            self._stop(0.0)
            return
        self._signal = int(number)
        busy = self._scheduler is not None and self._scheduler.busy
        if busy:
            _log.info("stopping: running texts have %.0f s to end; again to stop at once", self._options.grace)
        self._stop(self._options.grace)

    def _stop(self, seconds: float) -> None:
        self._stopping.set()
        self._server.should_exit = True
        if self._scheduler is not None:
            self._scheduler.close(seconds)

    # ---- the second thread ---------------------------------------------------------------------------------

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        def call(function: Callable[..., object], *args: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(function, *args)

        try:
            scheduler, loaded = self._load(call)
            call(self._service.ready, loaded)
            self._warn()
            self._announce(page_url(self._options.host, self._port))
            scheduler.run()  # also where a stop came meanwhile: requests that came before it get their answer
        except _Stopped:
            pass
        except (ValueError, OSError, MemoryError, RuntimeError) as error:  # told by the main thread, at the end
            self._failure = error
        finally:
            if not self._stopping.is_set():
                self._failure = self._failure or RuntimeError("the scheduler's thread has ended")
                call(self._stop, 0.0)

    def _load(self, call: Callable[..., None]) -> tuple[Scheduler, Loaded]:
        options, started = self._options, time.perf_counter()
        engine, tokenizer, limit = load_for_text(
            self._model, self._device, options.context, self._check_stop, **self._engine
        )
        self._check_stop(0)
        slots = engine.sequence_batch(options.slots, limit)
        metrics = self._service.metrics
        metrics.slots.set(slots.count)
        scheduler = Scheduler(slots, tokenizer, metrics, lambda events: call(deliver, events), queue=options.queue)
        self._scheduler = scheduler
        self._check_stop(0)  # a stop before this line has not closed it
        _log.info("%s ready in %.1f s: %s engine", self._model.name, time.perf_counter() - started, engine.name)
        facts = Facts(self._model, engine, slots, tokenizer, self._engine)
        return scheduler, Loaded(self._model.stem, tokenizer, limit, scheduler, facts)

    def _check_stop(self, layer: int) -> None:
        if self._stopping.is_set():
            raise _Stopped

    def _warn(self) -> None:
        if self._options.api_key is None and not is_loopback(self._host):
            _log.warning(
                "%s can be reached from other machines and no key is set: anybody there may use it (--api-key, or "
                "BITNET_API_KEY in the environment)", self._options.host,
            )  # fmt: skip


class Facts:
    """What /info tells. The inside of the file is counted once, in a thread that starts with the first question."""

    def __init__(
        self, model: Path, engine: Engine, slots: SequenceBatch, tokenizer: object, options: dict[str, str]
    ) -> None:
        self._model, self._lock = model, threading.Lock()
        self._inside: Future[dict[str, Any]] | None = None
        template = isinstance(tokenizer, JsonTokenizer) and tokenizer.settings.chat_template is not None
        self._facts = {
            "name": model.stem,
            "context": slots.limit,
            "slots": slots.count,
            "chat": template,
            "engine": describe_engine(engine, options),
        }

    def __call__(self) -> dict[str, Any]:
        """`inside` is null until it has been counted."""
        with self._lock:
            if self._inside is None:
                self._inside = Future()
                threading.Thread(target=self._look, args=(self._inside,), daemon=True).start()
        with contextlib.suppress(TimeoutError):
            return {**self._facts, "inside": self._inside.result(timeout=_LOOK_SECONDS)}
        return {**self._facts, "inside": None}

    def _look(self, future: Future[dict[str, Any]]) -> None:
        try:
            report = inspect_packed(self._model)
        except BitNetError as error:  # the file has changed since it was loaded
            future.set_result({"error": str(error)})
            return
        del report["file"]  # a path of this machine is nobody's business
        future.set_result(report)


def describe_engine(engine: Engine, options: dict[str, str]) -> dict[str, Any]:
    """Name, kernels and options of an engine, as JSON values."""
    device = torch.device(getattr(engine, "device", "cpu"))
    kernels = getattr(engine, "instruction_set", None)
    if kernels is None:
        kernels = "triton" if engine.name == "triton" else ops.select(device).name
    return {
        "name": engine.name,
        "kernels": kernels,
        "device": str(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "head": options.get("head", "file"),
        "cache": options.get("cache", "fp32"),
    }
