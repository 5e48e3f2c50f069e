"""The HTTP server: OpenAI's API and a page, around an engine. An optional extra, used by `bitnet serve` alone.

    client --HTTP--> app (event loop: requests, responses) --Job--> scheduler (one thread: sequences of the engine)
                                                          <--Event--

server.py     opens the socket, loads the model, shuts down
guard.py      checks every request before the routes; protocol.py parses it
app.py        the routes; completions.py, tokenizer_routes.py and info.py answer them, service.py is what they share
delivery.py   events to responses; replies.py their JSON
jobs.py       what both sides exchange
scheduler.py  which sequences run; sequence.py one of them, text.py its stop strings
"""

import importlib.util

from bitnet.errors import BitNetError

_PACKAGES = ("starlette", "uvicorn", "prometheus_client")


def check_packages() -> None:
    """Raise BitNetError if packages of the extra are missing."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise BitNetError(
            f"serve: got no package {', '.join(missing)}, expected the server's packages; "
            "from a clone: pip install '.[serve]'"
        )
