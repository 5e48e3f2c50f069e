"""The application: which route answers what, the routes about the server itself, and how errors are answered.

Everything here runs on the event loop; what takes time (tokenising, reading the file) goes to a thread.
"""

import asyncio
from collections.abc import Awaitable, Callable
from importlib import resources

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bitnet.serve.completions import chat_completions, completions
from bitnet.serve.guard import App, ClientGoneError, Guard
from bitnet.serve.metrics import CONTENT_TYPE
from bitnet.serve.protocol import RequestError
from bitnet.serve.replies import error_reply, json_reply
from bitnet.serve.service import Service, service_of
from bitnet.serve.tokenizer_routes import detokenize, tokenize, tokenizer_info

_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


def build_app(
    service: Service,
    key: str | None = None,
    hosts: frozenset[str] | None = None,
    crowded: Callable[[], bool] = lambda: False,
) -> App:
    """The whole server as an ASGI application. key, hosts, crowded: see `Guard`."""
    routes: dict[str, tuple[str, Callable[[Request], Awaitable[Response]]]] = {
        "/health": ("GET", _health),
        "/metrics": ("GET", _metrics),
        "/info": ("GET", _info),
        "/v1/models": ("GET", _models),
        "/v1/completions": ("POST", completions),
        "/v1/chat/completions": ("POST", chat_completions),
        "/tokenize": ("POST", tokenize),
        "/detokenize": ("POST", detokenize),
        "/tokenizer_info": ("GET", tokenizer_info),
        **dict.fromkeys(_PAGE, ("GET", _page)),
    }
    app = Starlette(
        routes=[Route(path, endpoint, methods=[method]) for path, (method, endpoint) in routes.items()],
        exception_handlers={
            RequestError: _on_request_error,
            HTTPException: _on_http_error,
            ClientGoneError: _on_client_gone,
            500: _on_bug,
        },
    )
    app.router.redirect_slashes = False  # a redirect would be built from the Host header
    app.state.service = service
    return Guard(app, service.metrics, routes, key, hosts, crowded)


# ---- the server itself -------------------------------------------------------------------------------------


async def _health(request: Request) -> Response:
    if service_of(request).loading:
        return json_reply({"status": "loading"}, 503, {"Retry-After": "1"})
    return json_reply({"status": "ok"})


async def _metrics(request: Request) -> Response:
    return Response(service_of(request).metrics.render(), media_type=CONTENT_TYPE)


async def _info(request: Request) -> Response:
    return json_reply(await asyncio.to_thread(service_of(request).model.info))


async def _models(request: Request) -> Response:
    service = service_of(request)
    model = service.model
    entry = {"id": model.name, "object": "model", "created": service.started, "owned_by": "bitnet"}
    return json_reply({"object": "list", "data": [{**entry, "max_model_len": model.limit}]})


async def _page(request: Request) -> Response:
    name, kind = _PAGE[request.url.path]
    content = resources.files("bitnet.serve").joinpath("page", name).read_bytes()
    return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})


# ---- errors ------------------------------------------------------------------------------------------------


async def _on_request_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError), error
    return error_reply(error)


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), error
    known = {404: "no such path; see /v1/models", 405: "this path does not support that method"}
    reply = error_reply(RequestError(error.status_code, known.get(error.status_code, str(error.detail))))
    for name, value in (error.headers or {}).items():
        reply.headers[name] = value
    return reply


async def _on_client_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # sent to nobody: nginx's status for it, so that /metrics counts it as others do


async def _on_bug(_: Request, __: Exception) -> Response:
    return error_reply(RequestError(500, "internal server error; see the server's log"))
